//! Everything that decides the outcome of a run.

use super::placement::Precision;
use crate::data::Augment;
use crate::error::{Error, Result};
use crate::nn::{MAX_IMAGE_SIZE, MIN_IMAGE_SIZE, ResNet18, Stage};
use crate::optim::{Algorithm, ParamGroup, ScheduleKind};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Rate of the lower layers, in shares of the head's, unless something else is asked for.
const BACKBONE_SHARE: f64 = 0.1;

/// How batch norms of frozen layers normalise during training; those of trained layers use the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum BnMode {
    /// By the stored statistics, which stay as they are.
    Frozen,
    /// By those of the batch, updating the stored ones: PyTorch's `model.train()`.
    Batch,
}

/// Whether work that comes out the same in every epoch is done once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum CacheMode {
    /// Keep what the frozen layers give, else the decoded pictures, as far as the budget allows.
    Auto,
    /// Decode and compute everything in every epoch.
    Off,
}

/// Where the backbone comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Weights {
    /// A safetensors file with torchvision's names.
    File(PathBuf),
    /// Random values: the untrained baseline.
    Random,
}

/// The lowest stage that is trained, with all above it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Depth {
    /// The new head alone.
    Head,
    /// From layer4 up.
    Layer4,
    /// From layer3 up.
    Layer3,
    /// From layer2 up.
    Layer2,
    /// From layer1 up.
    Layer1,
    /// The whole network.
    All,
}

impl Depth {
    /// The lowest trained stage.
    pub fn stage(self) -> Stage {
        match self {
            Depth::Head => Stage::Head,
            Depth::Layer4 => Stage::Layer4,
            Depth::Layer3 => Stage::Layer3,
            Depth::Layer2 => Stage::Layer2,
            Depth::Layer1 => Stage::Layer1,
            Depth::All => Stage::Stem,
        }
    }
}

/// The optimisers, by the names people know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// Adam without weight decay.
    Adam,
    /// Adam with decoupled weight decay, on filters and weights but not on biases and norms.
    #[value(name = "adamw")]
    AdamW,
    /// Gradient descent with momentum.
    Sgd,
}

/// What counts how much.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Balance {
    /// Every picture as much as any other.
    None,
    /// Every class as much as any other.
    Balanced,
}

/// Settings of a run; [`TrainConfig::new`] is the classic recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainConfig {
    /// Folder of pictures.
    pub data: PathBuf,
    /// Where the backbone comes from.
    pub weights: Weights,
    /// The lowest stage that is trained.
    pub train: Depth,
    /// Passes over the training pictures.
    pub epochs: usize,
    /// Epochs at the start in which the head alone is trained.
    pub unfreeze_after: usize,
    /// Pictures a step.
    pub batch_size: usize,
    /// Parts that a step is computed in, for less memory.
    pub accumulate: usize,
    /// Peak rate of the head.
    pub lr: f64,
    /// Peak rate of the stages below the head; a tenth of `lr` if neither this nor `lr_decay` is given.
    pub lr_backbone: Option<f64>,
    /// Peak rate of each stage as a share of the one above it.
    pub lr_decay: Option<f64>,
    /// How gradients become updates.
    pub optimizer: OptimizerKind,
    /// Momentum of SGD.
    pub momentum: f64,
    /// Whether it is Nesterov's.
    pub nesterov: bool,
    /// Weight decay of filters and weights; biases and norms have none.
    pub weight_decay: f64,
    /// Largest norm of all gradients together.
    pub clip_norm: Option<f64>,
    /// Course of the rates.
    pub schedule: ScheduleName,
    /// Epochs of linear warm-up; of one-cycle, its rise.
    pub warmup_epochs: f64,
    /// Epochs between the reductions of the step schedule.
    pub step_epochs: usize,
    /// Factor of each.
    pub step_gamma: f64,
    /// Batch norms of frozen layers.
    pub bn: BnMode,
    /// Random changes to training pictures.
    pub augment: Augment,
    /// Share of each target that is spread over all classes.
    pub label_smoothing: f32,
    /// Whether the loss counts every class as much.
    pub class_weights: Balance,
    /// Whether every class is drawn as often.
    pub sampling: Balance,
    /// Decay of the average of the network that is evaluated and kept.
    pub ema: Option<f64>,
    /// Epochs without improvement after which the run stops.
    pub patience: Option<usize>,
    /// Whether work is kept from epoch to epoch.
    pub cache: CacheMode,
    /// Memory for that, in MiB.
    pub cache_mb: usize,
    /// Share of each class held out where the folder has no split of its own.
    pub val_split: f64,
    /// Side of the crop, in pixels.
    pub image_size: u32,
    /// Whether pictures are turned as their EXIF data says.
    pub exif: bool,
    /// What activations are kept in and multiplied as.
    #[serde(default)]
    pub precision: Precision,
    /// Decides the new head, the split, the order of pictures and all that is random about them.
    pub seed: u64,
}

/// The courses of the learning rate, by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ScheduleName {
    /// The peak rate throughout.
    Constant,
    /// Reduced every so many epochs.
    Step,
    /// Half a cosine down to zero.
    Cosine,
    /// Up along a cosine and down along another.
    OneCycle,
}

impl TrainConfig {
    /// The classic recipe: a new head on a frozen backbone, Adam at 1e-3, batches of 32, 10 epochs, 224 pixels.
    pub fn new(data: PathBuf, weights: Weights) -> Self {
        TrainConfig {
            data,
            weights,
            train: Depth::Head,
            epochs: 10,
            unfreeze_after: 0,
            batch_size: 32,
            accumulate: 1,
            lr: 1e-3,
            lr_backbone: None,
            lr_decay: None,
            optimizer: OptimizerKind::Adam,
            momentum: 0.9,
            nesterov: false,
            weight_decay: 0.0,
            clip_norm: None,
            schedule: ScheduleName::Constant,
            warmup_epochs: 0.0,
            step_epochs: 30,
            step_gamma: 0.1,
            bn: BnMode::Frozen,
            augment: Augment::None,
            label_smoothing: 0.0,
            class_weights: Balance::None,
            sampling: Balance::None,
            ema: None,
            patience: None,
            cache: CacheMode::Auto,
            cache_mb: 2048,
            val_split: 0.2,
            image_size: 224,
            exif: false,
            precision: Precision::F32,
            seed: 0,
        }
    }

    /// An error if no run can be made of these settings.
    pub fn check(&self) -> Result<()> {
        if self.epochs == 0 || self.batch_size == 0 || self.accumulate == 0 {
            return Err(Error::config("there is nothing to train", "give at least 1 epoch and a batch of at least 1"));
        }
        let rates = [Some(self.lr), self.lr_backbone, self.lr_decay].into_iter().flatten();
        if let Some(rate) = rates.into_iter().find(|rate| !(rate.is_finite() && *rate > 0.0)) {
            return Err(Error::config(format!("a learning rate of {rate}"), "give a positive rate, such as 1e-3"));
        }
        if !(MIN_IMAGE_SIZE..=MAX_IMAGE_SIZE).contains(&(self.image_size as usize)) {
            let problem = format!("an image size of {} pixels", self.image_size);
            return Err(Error::config(problem, format!("give {MIN_IMAGE_SIZE} to {MAX_IMAGE_SIZE} pixels")));
        }
        if self.unfreeze_after > 0 && self.train == Depth::Head {
            let hint = "give --train layer4 or lower as well";
            return Err(Error::config("--unfreeze-after has nothing to unfreeze", hint));
        }
        Ok(())
    }

    /// An error if a part of a step over so many pictures has one value a channel, of which there are no statistics: the last layer has a
    /// pixel for each 32 of the picture's.
    pub(super) fn check_parts(&self, pictures: usize) -> Result<()> {
        let takes_statistics = self.train != Depth::Head || self.bn == BnMode::Batch;
        if !takes_statistics || self.image_size as usize > MIN_IMAGE_SIZE {
            return Ok(());
        }
        let steps = [self.batch_size.min(pictures), pictures % self.batch_size];
        match steps.into_iter().flat_map(|pictures| self.parts(pictures)).any(|part| part.len() == 1) {
            true => {
                let problem = format!("batch norms would see a single picture of {} pixels", self.image_size);
                let hint = "give --image-size 64, or another --batch-size or --accumulate, for two at least";
                Err(Error::config(problem, hint))
            }
            false => Ok(()),
        }
    }

    /// The parts that a step over so many pictures is computed in.
    pub(super) fn parts(&self, pictures: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let part = pictures.div_ceil(self.accumulate);
        (0..pictures).step_by(part.max(1)).map(move |start| start..pictures.min(start + part))
    }

    /// The same from whatever folder it is read.
    pub(super) fn with_absolute_paths(&self) -> Self {
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
        let weights = match &self.weights {
            Weights::File(path) => Weights::File(absolute(path)),
            Weights::Random => Weights::Random,
        };
        TrainConfig { data: absolute(&self.data), weights, ..self.clone() }
    }

    /// The lowest stage that is trained in an epoch, counted from 1.
    pub fn cut(&self, epoch: usize) -> Stage {
        if epoch <= self.unfreeze_after { Stage::Head } else { self.train.stage() }
    }

    /// Peak rate of a stage: the head's, the backbone's, or one that falls from stage to stage.
    fn rate(&self, stage: Stage) -> f64 {
        match (stage, self.lr_backbone, self.lr_decay) {
            (Stage::Head, ..) => self.lr,
            (_, Some(lr), _) => lr,
            (_, None, Some(decay)) => self.lr * decay.powi(Stage::Head as i32 - stage as i32),
            (_, None, None) => self.lr * BACKBONE_SHARE,
        }
    }

    /// Groups of every stage that is ever trained, biases and norms apart from what decays.
    pub fn groups(&self, network: &ResNet18) -> Vec<ParamGroup> {
        let stages = Stage::ALL.into_iter().filter(|stage| *stage >= self.train.stage());
        stages
            .flat_map(|stage| {
                let lr = self.rate(stage);
                let (decayed, plain): (Vec<_>, Vec<_>) =
                    network.parameters(stage).into_iter().partition(|p| p.shape().len() > 1);
                let groups = [(decayed, self.weight_decay), (plain, 0.0)];
                groups.map(|(parameters, weight_decay)| ParamGroup { parameters, lr, weight_decay })
            })
            .collect()
    }

    pub fn algorithm(&self) -> Algorithm {
        match self.optimizer {
            OptimizerKind::Adam | OptimizerKind::AdamW => Algorithm::ADAM,
            OptimizerKind::Sgd => Algorithm::Sgd { momentum: self.momentum, nesterov: self.nesterov },
        }
    }

    pub(super) fn schedule_kind(&self, steps_per_epoch: usize) -> ScheduleKind {
        match self.schedule {
            ScheduleName::Constant => ScheduleKind::Constant,
            ScheduleName::Step => {
                ScheduleKind::Step { every: self.step_epochs * steps_per_epoch, gamma: self.step_gamma }
            }
            ScheduleName::Cosine => ScheduleKind::Cosine,
            ScheduleName::OneCycle => ScheduleKind::OneCycle,
        }
    }
}
