//! A network together with what is needed to use it: class names and preprocessing, kept in the file's metadata.

use super::placement::Placement;
use crate::data::Preprocess;
use crate::error::{Error, Result};
use crate::nn::{MAX_IMAGE_SIZE, MIN_IMAGE_SIZE, ResNet18, Snapshot};
use crate::weights::{self, WeightsFile};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;

/// The crop of files that do not say, torchvision's.
pub const DEFAULT_IMAGE_SIZE: u32 = 224;

/// A trained network, its classes, and the preprocessing it was trained with.
pub struct Model {
    /// The network.
    pub network: ResNet18,
    /// Names in the order of the logits.
    pub classes: Vec<String>,
    /// How a picture becomes its input.
    pub preprocess: Preprocess,
    /// Where it runs.
    pub placement: Placement,
}

impl Model {
    /// Reads a file that hone or torchvision has written. Without names in the metadata, classes are called by their number.
    pub fn load(path: &Path) -> Result<Model> {
        Self::load_on(path, Placement::default())
    }

    /// [`Model::load`], to be run elsewhere than on the CPU in f32.
    pub fn load_on(path: &Path, placement: Placement) -> Result<Model> {
        let file = WeightsFile::open(path)?;
        let network = ResNet18::load(&file)?;
        let classes = classes(&file)?.unwrap_or_else(|| (0..network.classes()).map(|i| i.to_string()).collect());
        if classes.len() != network.classes() {
            let problem =
                format!("the metadata names {} classes but fc.weight has {} rows", classes.len(), network.classes());
            return Err(Error::file(path, problem, "correct or remove \"classes\" in its metadata"));
        }
        placement.move_network(&network)?;
        Ok(Model { preprocess: preprocess(&file)?, network, classes, placement })
    }
}

/// Class names in the metadata of `file`, if it has any.
pub fn classes(file: &WeightsFile) -> Result<Option<Vec<String>>> {
    parse(file, "classes")
}

/// The preprocessing that the metadata of `file` asks for; torchvision's where it says nothing.
pub fn preprocess(file: &WeightsFile) -> Result<Preprocess> {
    let size = parse::<u32>(file, "image_size")?.unwrap_or(DEFAULT_IMAGE_SIZE);
    let mut preprocess = Preprocess::imagenet(size);
    preprocess.resize = parse(file, "resize")?.unwrap_or(preprocess.resize);
    preprocess.mean = parse(file, "mean")?.unwrap_or(preprocess.mean);
    preprocess.std = parse(file, "std")?.unwrap_or(preprocess.std);
    preprocess.exif = parse(file, "exif")?.unwrap_or(false);
    let usable = (MIN_IMAGE_SIZE..=MAX_IMAGE_SIZE).contains(&(preprocess.crop as usize))
        && (1..=2 * MAX_IMAGE_SIZE).contains(&(preprocess.resize as usize))
        && preprocess.mean.iter().all(|m| m.is_finite())
        && preprocess.std.iter().all(|s| s.is_finite() && *s > 0.0);
    if !usable {
        let problem = format!(
            "the metadata asks for unusable preprocessing (crop {}, resize {}, mean {:?}, std {:?})",
            preprocess.crop, preprocess.resize, preprocess.mean, preprocess.std
        );
        return Err(Error::file(file.path(), problem, "correct image_size, resize, mean and std in its metadata"));
    }
    Ok(preprocess)
}

fn parse<T: serde::de::DeserializeOwned>(file: &WeightsFile, key: &str) -> Result<Option<T>> {
    let Some(text) = file.metadata().get(key) else { return Ok(None) };
    serde_json::from_str(text).map(Some).map_err(|e| {
        let problem = format!("\"{key}\" in the metadata is not the JSON that was expected ({e})");
        Error::file(file.path(), problem, "correct or remove that entry")
    })
}

/// Writes what [`Model::load`] reads, with `extra` entries in the metadata. PyTorch's `load_state_dict` takes the tensors.
pub fn save(
    path: &Path,
    snapshot: &Snapshot,
    classes: &[String],
    preprocess: &Preprocess,
    extra: &[(&str, String)],
) -> Result<()> {
    let mut metadata = BTreeMap::from(
        [
            ("format", "pt".to_string()),
            ("architecture", "resnet18".to_string()),
            ("hone_version", env!("CARGO_PKG_VERSION").to_string()),
            ("classes", json!(classes).to_string()),
            ("image_size", json!(preprocess.crop).to_string()),
            ("resize", json!(preprocess.resize).to_string()),
            ("interpolation", "bilinear".to_string()),
            ("mean", json!(preprocess.mean).to_string()),
            ("std", json!(preprocess.std).to_string()),
            ("exif", json!(preprocess.exif).to_string()),
        ]
        .map(|(key, value)| (key.to_string(), value)),
    );
    metadata.extend(extra.iter().map(|(key, value)| (key.to_string(), value.clone())));
    weights::save(path, &snapshot.tensors()?, &metadata)
}
