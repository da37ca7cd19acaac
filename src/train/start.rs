//! What a run begins with: the network, how its pictures are prepared, and what the folder holds.

use super::Observer;
use super::checkpoint::Fingerprint;
use super::config::{TrainConfig, Weights};
use super::model::{classes, preprocess};
use crate::data::{Dataset, Preprocess};
use crate::error::Result;
use crate::nn::ResNet18;
use crate::tensor::Tensor;
use crate::weights::WeightsFile;
use fnv::FnvHasher;
use std::hash::Hasher;

/// The network with a head for `names`, and the preprocessing that its file and the settings ask for.
pub fn load(config: &TrainConfig, names: &[String], observer: &mut dyn Observer) -> Result<(ResNet18, Preprocess)> {
    let mut result = Preprocess { exif: config.exif, ..Preprocess::imagenet(config.image_size) };
    let path = match &config.weights {
        Weights::Random => {
            observer.note("random weights: the backbone is untrained");
            return Ok((ResNet18::new(names.len(), config.seed), result));
        }
        Weights::File(path) => path,
    };
    let file = WeightsFile::open(path)?;
    let stored = preprocess(&file)?;
    (result.mean, result.std) = (stored.mean, stored.std);
    // A head is kept only if it is for these very classes: a run goes on from an earlier one.
    let same = classes(&file)?.is_some_and(|stored| stored == names);
    if same && ResNet18::classes_in(&file) == Some(names.len()) {
        observer.note(&format!("{}: kept its head, which is for the same classes", path.display()));
        return Ok((ResNet18::load(&file)?, result));
    }
    let network = ResNet18::load_backbone(&file, names.len(), config.seed)?;
    let old = match ResNet18::classes_in(&file) {
        Some(found) => format!("fc for {found} classes replaced by a"),
        None => "no usable fc in it, a".to_string(),
    };
    observer.note(&format!("{}: {old} new head for {}", path.display(), names.len()));
    Ok((network, result))
}

/// Labels and names of the pictures, by FNV-1a.
pub fn fingerprint(dataset: &Dataset) -> Fingerprint {
    let mut hash = FnvHasher::default();
    for sample in dataset.train.iter().chain(&dataset.val) {
        hash.write(&sample.label.to_le_bytes());
        hash.write(sample.path.file_name().unwrap_or_default().as_encoded_bytes());
    }
    hash.write(&dataset.train.len().to_le_bytes());
    Fingerprint { classes: dataset.classes.clone(), hash: format!("{:016x}", hash.finish()) }
}

/// scikit-learn's "balanced": pictures over classes times the pictures of the class.
pub fn balanced_weights(labels: impl Iterator<Item = usize>, classes: usize) -> Result<Tensor> {
    let mut counts = vec![0usize; classes];
    labels.for_each(|label| counts[label] += 1);
    let total: usize = counts.iter().sum();
    let weights: Vec<f32> = counts.iter().map(|&n| total as f32 / (classes * n.max(1)) as f32).collect();
    Tensor::from_slice(&weights, [classes])
}
