//! The arguments of `hone train`.

use super::{Common, path, positive, side};
use crate::data::Augment;
use crate::error::{Error, Result};
use crate::train::{Balance, BnMode, CacheMode, Depth, OptimizerKind, Precision, ScheduleName, TrainConfig, Weights};
use crate::weights::locate_default;
use clap::{ArgGroup, Args, Command, Id, value_parser};
use std::path::PathBuf;

/// PyTorch's default for AdamW.
const ADAMW_DECAY: f64 = 0.01;

#[derive(clap::Args)]
pub struct Train {
    /// Folder with train/CLASS/* and val/CLASS/*, or CLASS/* alone
    #[arg(required_unless_present = "resume")]
    data: Option<PathBuf>,
    /// Go on with the run in this folder, with the settings it began with
    #[arg(long, value_name = "RUN", conflicts_with_all = ["data", "out", "precision"], value_parser = path())]
    pub resume: Option<PathBuf>,
    /// Folder for the model and the record of the run [default: runs/DATE-NAME]
    #[arg(long, value_name = "DIR", value_parser = path())]
    pub out: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
    /// Seconds between checkpoints
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = not_negative)]
    pub checkpoint_seconds: f64,
    #[command(flatten)]
    pub common: Common,
}

/// What decides the outcome of a run.
#[derive(clap::Args)]
struct Settings {
    /// Pretrained weights, a safetensors file with torchvision's names; "none" for random ones [default: the bundled file]
    #[arg(long, value_name = "FILE", value_parser = path())]
    weights: Option<PathBuf>,
    /// The lowest layers to train, with all above them
    #[arg(long, value_enum, value_name = "LAYERS", default_value = "head")]
    train: Depth,
    /// Passes over the training pictures
    #[arg(long, value_name = "N", default_value = "10", value_parser = value_parser!(u32).range(1..))]
    epochs: u32,
    /// Train the head alone for so many epochs first
    #[arg(long, value_name = "N", default_value = "0")]
    unfreeze_after: u32,
    /// Pictures a step
    #[arg(long, value_name = "N", default_value = "32", value_parser = value_parser!(u32).range(1..=65536))]
    batch_size: u32,
    /// Compute each step in so many parts, for less memory
    #[arg(long, value_name = "N", default_value = "1", value_parser = value_parser!(u32).range(1..))]
    accumulate: u32,
    /// Learning rate
    #[arg(long, value_name = "RATE", default_value = "1e-3", value_parser = positive)]
    lr: f64,
    /// Rate of the layers below the head [default: a tenth of --lr]
    #[arg(long, value_name = "RATE", value_parser = positive)]
    lr_backbone: Option<f64>,
    /// Rate of each stage as a share of the one above it
    #[arg(long, value_name = "SHARE", value_parser = positive, conflicts_with = "lr_backbone")]
    lr_decay: Option<f64>,
    /// How gradients become updates
    #[arg(long, value_enum, default_value = "adam")]
    optimizer: OptimizerKind,
    /// Momentum of sgd
    #[arg(long, value_name = "SHARE", default_value = "0.9", value_parser = fraction)]
    momentum: f64,
    /// Nesterov's momentum, for sgd
    #[arg(long)]
    nesterov: bool,
    /// Weight decay of filters and weights, for adamw and sgd [default: 0.01 for adamw, 0 for sgd]
    #[arg(long, value_name = "X", value_parser = not_negative)]
    weight_decay: Option<f64>,
    /// Scale gradients down to this norm
    #[arg(long, value_name = "NORM", value_parser = positive)]
    clip_norm: Option<f64>,
    /// Course of the rates over the run
    #[arg(long, value_enum, default_value = "constant")]
    schedule: ScheduleName,
    /// Epochs of linear warm-up; of one-cycle, its rise
    #[arg(long, value_name = "N", default_value = "0", value_parser = not_negative)]
    warmup_epochs: f64,
    /// Epochs between the reductions of the step schedule
    #[arg(long, value_name = "N", default_value = "30", value_parser = value_parser!(u32).range(1..))]
    step_epochs: u32,
    /// What the step schedule multiplies the rates with
    #[arg(long, value_name = "X", default_value = "0.1", value_parser = positive)]
    step_gamma: f64,
    /// Batch norm of frozen layers: stored statistics, or the batch's (as PyTorch's model.train())
    #[arg(long, value_enum, default_value = "frozen")]
    bn: BnMode,
    /// Random changes to training pictures
    #[arg(long, value_enum, default_value = "none")]
    augment: Augment,
    /// Share of each target that is spread over all classes
    #[arg(long, value_name = "SHARE", default_value = "0", value_parser = fraction)]
    label_smoothing: f64,
    /// Weigh the loss so that every class counts as much
    #[arg(long, value_enum, default_value = "none")]
    class_weights: Balance,
    /// Draw pictures so that every class comes as often
    #[arg(long, value_enum, default_value = "none")]
    sampling: Balance,
    /// Average the network over the steps with this decay, such as 0.999, and evaluate and keep the average
    #[arg(long, value_name = "DECAY", value_parser = fraction)]
    ema: Option<f64>,
    /// Stop when so many epochs have brought no better validation accuracy
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..))]
    patience: Option<u32>,
    /// Decides the new head, the split, the order of pictures and all that is random about them
    #[arg(long, value_name = "N", default_value = "0")]
    seed: u64,
    /// Compute once what is the same in every epoch, or do not
    #[arg(long, value_enum, default_value = "auto")]
    cache: CacheMode,
    /// Memory for that, in MiB
    #[arg(long, value_name = "MIB", default_value = "2048")]
    cache_mb: u32,
    /// Share of each class held out if DATA has no val folder
    #[arg(long, value_name = "SHARE", default_value = "0.2", value_parser = share)]
    val_split: f64,
    /// Side of the centre crop; the short side is resized to 256/224 of it
    #[arg(long, value_name = "PX", default_value = "224", value_parser = side())]
    image_size: u32,
    /// Turn pictures as their EXIF data says (torchvision does not)
    #[arg(long)]
    exif: bool,
}

impl Train {
    /// Makes `train` refuse every setting with --resume: the run keeps its own. (To say so of the group would list all of it.)
    pub fn refuse_settings_on_resume(train: Command) -> Command {
        let is_settings = |group: &&ArgGroup| Some(group.get_id()) == Settings::group_id().as_ref();
        let settings: Vec<Id> = train.get_groups().filter(is_settings).flat_map(ArgGroup::get_args).cloned().collect();
        train.mut_arg("resume", |resume| resume.conflicts_with_all(settings))
    }

    /// The settings of a new run.
    pub fn config(&self) -> Result<TrainConfig> {
        self.settings.config(self.data.clone().unwrap_or_default(), self.common.precision)
    }
}

impl Settings {
    fn config(&self, data: PathBuf, precision: Precision) -> Result<TrainConfig> {
        let weights = match &self.weights {
            Some(none) if none.as_os_str() == "none" => Weights::Random,
            Some(path) => Weights::File(path.clone()),
            None => Weights::File(locate_default(std::env::var_os("HONE_WEIGHTS"))?),
        };
        let default_decay = if self.optimizer == OptimizerKind::AdamW { ADAMW_DECAY } else { 0.0 };
        let weight_decay = self.weight_decay.unwrap_or(default_decay);
        if self.optimizer == OptimizerKind::Adam && weight_decay > 0.0 {
            return Err(Error::config("adam has no weight decay", "give --optimizer adamw"));
        }
        Ok(TrainConfig {
            data,
            weights,
            train: self.train,
            epochs: self.epochs as usize,
            unfreeze_after: self.unfreeze_after as usize,
            batch_size: self.batch_size as usize,
            accumulate: self.accumulate as usize,
            lr: self.lr,
            lr_backbone: self.lr_backbone,
            lr_decay: self.lr_decay,
            optimizer: self.optimizer,
            momentum: self.momentum,
            nesterov: self.nesterov,
            weight_decay,
            clip_norm: self.clip_norm,
            schedule: self.schedule,
            warmup_epochs: self.warmup_epochs,
            step_epochs: self.step_epochs as usize,
            step_gamma: self.step_gamma,
            bn: self.bn,
            augment: self.augment,
            label_smoothing: self.label_smoothing as f32,
            class_weights: self.class_weights,
            sampling: self.sampling,
            ema: self.ema,
            patience: self.patience.map(|n| n as usize),
            cache: self.cache,
            cache_mb: self.cache_mb as usize,
            val_split: self.val_split,
            image_size: self.image_size,
            exif: self.exif,
            precision,
            seed: self.seed,
        })
    }
}

fn not_negative(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x.is_finite() && x >= 0.0 => Ok(x),
        _ => Err("expected a number that is not negative".into()),
    }
}

fn fraction(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if (0.0..1.0).contains(&x) => Ok(x),
        _ => Err("expected 0 or more, and less than 1".into()),
    }
}

fn share(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x > 0.0 && x < 1.0 => Ok(x),
        _ => Err("expected a share between 0 and 1".into()),
    }
}
