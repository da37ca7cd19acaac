//! The training loop and what surrounds it: settings, inputs and their caches, metrics, the run folder, evaluation.
//!
//! It reports through an [`Observer`] and prints nothing.

mod evaluate;
mod fit;
mod inputs;
mod metrics;
pub mod model;
mod run_folder;

pub use evaluate::{Evaluation, Features, Prediction, evaluate, features_of, predict};
pub use fit::fit;
pub use inputs::Skipped;
pub use metrics::Confusion;
pub use model::Model;

use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// How batch norms of frozen layers normalise during training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BnMode {
    /// By the stored statistics, which stay as they are.
    Frozen,
    /// By those of the batch, updating the stored ones: PyTorch's `model.train()`.
    Batch,
}

/// Whether work that comes out the same in every epoch is done once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheMode {
    /// Keep the frozen backbone's features, else the decoded pictures.
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

/// Everything that decides the outcome of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainConfig {
    /// Folder of pictures.
    pub data: PathBuf,
    /// The backbone.
    pub weights: Weights,
    /// Passes over the training pictures.
    pub epochs: usize,
    /// Pictures a step.
    pub batch_size: usize,
    /// Learning rate of Adam.
    pub lr: f64,
    /// Batch norms of frozen layers.
    pub bn: BnMode,
    /// What is kept from epoch to epoch.
    pub cache: CacheMode,
    /// Share of each class held out where the folder has no split of its own.
    pub val_split: f64,
    /// Side of the crop, in pixels.
    pub image_size: u32,
    /// Whether pictures are turned as their EXIF data says.
    pub exif: bool,
    /// Decides the new head, the split and the order of pictures.
    pub seed: u64,
}

/// The outcome of one epoch.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Epoch {
    /// From 1.
    pub epoch: usize,
    /// How many there will be.
    pub epochs: usize,
    /// Mean loss over the training pictures, each as of its step.
    pub train_loss: f64,
    /// Share of training pictures classified rightly, each as of its step.
    pub train_accuracy: f64,
    /// Mean loss over the validation pictures; none without such pictures.
    pub val_loss: Option<f64>,
    /// Share of validation pictures classified rightly.
    pub val_accuracy: Option<f64>,
    /// Training pictures a second, validation not counted.
    pub images_per_second: f64,
    /// The whole epoch.
    pub seconds: f64,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Every epoch.
    pub epochs: Vec<Epoch>,
    /// The one whose model was kept.
    pub best: Epoch,
    /// That model.
    pub model: PathBuf,
    /// From the start of the run to its last file, in seconds.
    pub seconds: f64,
    /// Pictures that could not be read.
    pub skipped: Vec<Skipped>,
}

/// Told of what happens, as it happens.
pub trait Observer {
    /// One line that the user should know.
    fn note(&mut self, _line: &str) {}
    /// A picture that could not be read, once.
    fn skipped(&mut self, _picture: &Skipped) {}
    /// `done` of `total` pictures of a phase are through.
    fn progress(&mut self, _phase: &'static str, _done: usize, _total: usize) {}
    /// An epoch is over.
    fn epoch(&mut self, _epoch: &Epoch) {}
}

/// An observer that does not care.
impl Observer for () {}

/// The folder of a run that was not told where to write: `runs/DATE-NAME`, with a number if that exists.
pub fn default_run_folder(data: &Path, today: &str) -> PathBuf {
    run_folder::default(data, today)
}
