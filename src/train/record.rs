//! How far a run has come, and the writing of it.

use super::checkpoint::{self, Fingerprint, Progress};
use super::config::TrainConfig;
use super::run_folder::RunFolder;
use super::step::Trainer;
use super::{Epoch, Observer, Outcome};
use crate::error::{Error, Result};
use std::path::PathBuf;
use std::time::Instant;

/// The settings of a run, what it trains on, and its progress.
pub struct Record {
    pub config: TrainConfig,
    pub data: Fingerprint,
    pub progress: Progress,
}

/// More validation accuracy is better, then less validation loss; without validation pictures, later is better.
pub fn is_better(epoch: &Epoch, best: &Epoch) -> bool {
    match (epoch.val_accuracy, best.val_accuracy) {
        (Some(accuracy), Some(other)) => accuracy > other || (accuracy == other && epoch.val_loss < best.val_loss),
        _ => true,
    }
}

impl Progress {
    /// What a finished run amounts to.
    pub fn outcome(&self, classes: &[String], model: PathBuf, start: Instant) -> Result<Outcome> {
        let best = self.best.and_then(|i| self.history.get(i)).copied();
        Ok(Outcome {
            best: best.ok_or_else(|| Error::config("the run has no finished epoch", "start it anew"))?,
            epochs: self.history.clone(),
            confusion: self.confusion.clone(),
            classes: classes.to_vec(),
            model,
            seconds: start.elapsed().as_secs_f64(),
            skipped: self.skipped.clone(),
        })
    }
}

impl Record {
    /// Whether all epochs are done, or there is no patience left for more.
    pub fn is_over(&self, observer: &mut dyn Observer) -> bool {
        let done = self.progress.history.len();
        let waited = self.progress.best.map_or(0, |best| done - 1 - best);
        let impatient = self.config.patience.is_some_and(|patience| waited >= patience && done > 0);
        if impatient && done < self.config.epochs && self.progress.batch == 0 {
            observer.note(&format!("no better validation for {waited} epochs, stopped"));
        }
        done >= self.config.epochs || impatient
    }

    /// Writes models, figures and the checkpoint; of a finished run, its record in place of the checkpoint.
    pub fn write(&self, folder: &mut RunFolder, trainer: &Trainer) -> Result<()> {
        let state = (!self.progress.finished).then_some((&trainer.network, &trainer.optimizer, trainer.ema.as_ref()));
        folder.flush(&self.progress.history, |path| {
            checkpoint::save(path, &self.config, &self.data, &self.progress, state)
        })
    }

    /// The error for numbers that are none any more. What finished epochs have left is written first.
    pub fn diverged(&self, folder: &mut RunFolder, problem: String) -> Error {
        let saved = self.progress.best.is_some() && folder.flush(&self.progress.history, |_| Ok(())).is_ok();
        let last = folder.path().join("last.safetensors");
        let good = match saved {
            true => format!("the last good model is {}", last.display()),
            false => "no epoch was finished before".to_string(),
        };
        Error::config(problem, format!("lower --lr or give --clip-norm 1; {good}"))
    }
}
