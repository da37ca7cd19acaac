//! The training loop and what surrounds it: settings, inputs and their caches, metrics, checkpoints, evaluation.
//!
//! It reports through an [`Observer`] and prints nothing.

mod checkpoint;
mod config;
mod ema;
mod evaluate;
mod fit;
mod inputs;
mod metrics;
mod mix;
pub mod model;
mod pictures;
mod placement;
mod record;
mod run_folder;
mod start;
mod step;
mod stop;

pub use config::{Balance, BnMode, CacheMode, Depth, OptimizerKind, ScheduleName, TrainConfig, Weights};
pub use evaluate::{Evaluation, Features, Prediction, evaluate, features_of, predict};
pub use fit::{Control, fit, resume};
pub use inputs::Input;
pub use metrics::{ClassMetrics, Confusion, Tally};
pub use model::Model;
pub use pictures::Skipped;
pub use placement::{Placement, Precision};
pub use run_folder::default as default_run_folder;
pub use step::{Diverged, Place, Trainer};

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

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
    /// What that model took each validation picture for.
    pub confusion: Confusion,
    /// Names of the classes.
    pub classes: Vec<String>,
    /// The model.
    pub model: PathBuf,
    /// From the start of the run, or of its continuation, to its last file, in seconds.
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
