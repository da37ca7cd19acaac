//! A run: data, network, optimiser, epochs, files.

use super::inputs::Split;
use super::metrics::Tally;
use super::model::{classes, preprocess};
use super::run_folder::RunFolder;
use super::{BnMode, Epoch, Observer, Outcome, TrainConfig, Weights};
use crate::autograd::no_grad;
use crate::data::{Dataset, Preprocess};
use crate::error::{Error, Result};
use crate::nn::{HeadSource, ResNet18, Stage};
use crate::ops::{CrossEntropy, cross_entropy};
use crate::optim::{Adam, AdamConfig, ParamGroup};
use crate::weights::WeightsFile;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use std::path::Path;
use std::time::Instant;

/// Trains as `config` says and leaves everything in `out`.
pub fn fit(config: &TrainConfig, out: &Path, observer: &mut dyn Observer) -> Result<Outcome> {
    let start = Instant::now();
    check(config)?;
    let dataset = Dataset::open(&config.data, config.val_split, config.seed)?;
    dataset.warnings.iter().for_each(|line| observer.note(line));
    observer.note(&format!(
        "{} classes, {} training and {} validation pictures",
        dataset.classes.len(),
        dataset.train.len(),
        dataset.val.len()
    ));
    let (network, preprocess) = load(config, &dataset.classes, observer)?;
    let mut folder = RunFolder::create(out, config, &dataset.classes, &preprocess)?;
    network.set_trainable(|stage| stage == Stage::Head);
    network.use_batch_statistics(|_| config.bn == BnMode::Batch);
    let group = ParamGroup { parameters: network.parameters(Stage::Head), lr: config.lr };
    let mut run = Run {
        config,
        train: Split::new("training pictures", dataset.train, &preprocess),
        val: Split::new("validation pictures", dataset.val, &preprocess),
        optimiser: Adam::new(vec![group], AdamConfig::default()),
        network,
    };
    for split in [&mut run.train, &mut run.val] {
        split.prepare(&run.network, config.bn, config.cache, config.batch_size, observer)?;
    }
    let mut epochs: Vec<Epoch> = Vec::new();
    let mut best: Option<Epoch> = None;
    for number in 1..=config.epochs {
        let epoch = run.epoch(number, observer)?;
        let improved = best.is_none_or(|best| is_better(&epoch, &best));
        if improved {
            best = Some(epoch);
        }
        epochs.push(epoch);
        folder.record(&epochs, || run.network.snapshot(), improved)?;
        observer.epoch(&epoch);
    }
    let best = best.expect("at least one epoch was run");
    let skipped = run.train.skipped.into_iter().chain(run.val.skipped).collect();
    Ok(Outcome { epochs, best, model: folder.model(), seconds: start.elapsed().as_secs_f64(), skipped })
}

fn check(config: &TrainConfig) -> Result<()> {
    let smallest = crate::nn::MIN_IMAGE_SIZE as u32;
    if config.epochs == 0 || config.batch_size == 0 {
        return Err(Error::config("there is nothing to train", "give at least 1 epoch and a batch of at least 1"));
    }
    if !(config.lr.is_finite() && config.lr > 0.0) {
        return Err(Error::config(format!("a learning rate of {}", config.lr), "give a positive --lr, such as 1e-3"));
    }
    if config.image_size < smallest {
        let problem = format!("an image size of {} pixels", config.image_size);
        return Err(Error::config(problem, format!("the network needs {smallest} pixels at least")));
    }
    Ok(())
}

/// The network with a head for `names`, and the preprocessing that its file and the settings ask for.
fn load(config: &TrainConfig, names: &[String], observer: &mut dyn Observer) -> Result<(ResNet18, Preprocess)> {
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
    let (network, head) = ResNet18::load_backbone(&file, names.len(), config.seed)?;
    let old = match head {
        HeadSource::New { found: Some(found) } => format!("fc for {found} classes replaced by a"),
        HeadSource::New { found: None } | HeadSource::File => "no usable fc in it, a".to_string(),
    };
    observer.note(&format!("{}: {old} new head for {}", path.display(), names.len()));
    Ok((network, result))
}

/// More validation accuracy is better, then less validation loss; without validation pictures, later is better.
fn is_better(epoch: &Epoch, best: &Epoch) -> bool {
    match (epoch.val_accuracy, best.val_accuracy) {
        (Some(accuracy), Some(other)) => accuracy > other || (accuracy == other && epoch.val_loss < best.val_loss),
        _ => true,
    }
}

struct Run<'a> {
    config: &'a TrainConfig,
    network: ResNet18,
    optimiser: Adam,
    train: Split,
    val: Split,
}

impl Run<'_> {
    /// One pass over the training pictures, and one over the validation pictures.
    fn epoch(&mut self, number: usize, observer: &mut dyn Observer) -> Result<Epoch> {
        let start = Instant::now();
        let train = self.train_epoch(number, observer)?;
        let trained = start.elapsed().as_secs_f64();
        let val = self.validate(observer)?;
        Ok(Epoch {
            epoch: number,
            epochs: self.config.epochs,
            train_loss: train.mean_loss().unwrap_or(f64::NAN),
            train_accuracy: train.accuracy().unwrap_or(f64::NAN),
            val_loss: val.mean_loss(),
            val_accuracy: val.accuracy(),
            images_per_second: train.count as f64 / trained,
            seconds: start.elapsed().as_secs_f64(),
        })
    }

    fn train_epoch(&mut self, number: usize, observer: &mut dyn Observer) -> Result<Tally> {
        let Run { config, network, optimiser, train, .. } = self;
        let mut order: Vec<usize> = (0..train.len()).collect();
        let mut rng = ChaCha8Rng::seed_from_u64(config.seed);
        rng.set_stream(number as u64);
        order.shuffle(&mut rng);
        let mut tally = Tally::default();
        let mut step = 0;
        train.for_each_batch(order, config.batch_size, observer, "training", |input, labels| {
            step += 1;
            let logits = network.head().forward(&input.features(network, true)?)?;
            let loss = cross_entropy(&logits, &labels, &CrossEntropy::default())?;
            let value = loss.item()?;
            if !value.is_finite() {
                let problem =
                    format!("the loss is {value} at step {step} of epoch {number}, with a rate of {}", config.lr);
                return Err(Error::config(problem, "lower --lr"));
            }
            optimiser.step(&loss.backward()?);
            tally.add(value, logits.as_slice(), labels.as_slice());
            Ok(())
        })?;
        Ok(tally)
    }

    fn validate(&mut self, observer: &mut dyn Observer) -> Result<Tally> {
        let Run { config, network, val, .. } = self;
        let mut tally = Tally::default();
        let order = (0..val.len()).collect();
        val.for_each_batch(order, config.batch_size, observer, "validation", |input, labels| {
            let (loss, logits) = no_grad(|| {
                let logits = network.head().forward(&input.features(network, false)?)?;
                Ok::<_, Error>((cross_entropy(&logits, &labels, &CrossEntropy::default())?.item()?, logits))
            })?;
            tally.add(loss, logits.as_slice(), labels.as_slice());
            Ok(())
        })?;
        Ok(tally)
    }
}
