//! Everything that a run needs to go on as if it had never stopped.
//!
//! One safetensors file: the network, the optimiser's state and the averages as tensors; settings and progress as JSON in
//! the metadata. The order of pictures and all that is random follow from (seed, epoch, index), so the place in the run is
//! all there is to a sampler's or a generator's state.

use super::config::TrainConfig;
use super::ema::Ema;
use super::metrics::{Confusion, Tally};
use super::{Epoch, Skipped};
use crate::error::{Error, Result};
use crate::nn::ResNet18;
use crate::optim::{Optimizer, SavedState};
use crate::weights::{self, Data, NamedTensor, WeightsFile};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

/// Name of the file in the run's folder.
pub const FILE: &str = "checkpoint.safetensors";

/// Sums of an unfinished epoch; the loss as its bits, since it must come back as it was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Partial {
    loss_bits: u64,
    correct: usize,
    count: usize,
    /// Seconds spent in it.
    pub seconds: f64,
}

impl Partial {
    pub fn new(tally: &Tally, seconds: f64) -> Self {
        Partial { loss_bits: tally.loss.to_bits(), correct: tally.correct, count: tally.count, seconds }
    }

    pub fn tally(&self) -> Tally {
        Tally { loss: f64::from_bits(self.loss_bits), correct: self.correct, count: self.count }
    }
}

/// How far a run has come.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Finished epochs.
    pub history: Vec<Epoch>,
    /// Index in `history` of the best.
    pub best: Option<usize>,
    /// Of the best.
    pub confusion: Confusion,
    /// Batches of the next epoch that are done.
    pub batch: usize,
    /// What came of those.
    pub partial: Partial,
    /// Pictures found unreadable so far.
    pub skipped: Vec<Skipped>,
    /// Whether nothing is left to do.
    pub finished: bool,
}

/// What the folder of pictures held when the run began: counts and names, to tell whether it is still the same.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Names of the classes.
    pub classes: Vec<String>,
    /// FNV-1a of the labels and file names of all pictures in their order.
    pub hash: String,
}

/// Writes the checkpoint, whole or not at all.
pub fn save(
    path: &Path,
    config: &TrainConfig,
    data: &Fingerprint,
    progress: &Progress,
    state: Option<(&ResNet18, &Optimizer, Option<&Ema>)>,
) -> Result<()> {
    let json = |what: &str, value: serde_json::Result<String>| {
        value.map_err(|e| Error::config(format!("cannot write the {what} ({e})"), "report this"))
    };
    let metadata = BTreeMap::from([
        ("hone_checkpoint".to_string(), "1".to_string()),
        ("config".to_string(), json("settings", serde_json::to_string(config))?),
        ("data".to_string(), json("data", serde_json::to_string(data))?),
        ("progress".to_string(), json("progress", serde_json::to_string(progress))?),
    ]);
    let Some((network, optimizer, ema)) = state else { return weights::save(path, &[], &metadata) };
    let vector = |name: String, values: Vec<f32>| NamedTensor {
        name,
        shape: vec![values.len()],
        data: Data::F32(Cow::Owned(values)),
    };
    let snapshot = network.snapshot();
    let mut tensors = snapshot.tensors()?;
    tensors.iter_mut().for_each(|tensor| tensor.name.insert_str(0, "network."));
    for saved in optimizer.state()? {
        let step = Data::I64(Cow::Owned(vec![i64::from(saved.step)]));
        tensors.push(NamedTensor { name: format!("optimizer.step.{}", saved.name), shape: vec![], data: step });
        tensors.push(vector(format!("optimizer.first.{}", saved.name), saved.first.into_owned()));
        tensors.push(vector(format!("optimizer.second.{}", saved.name), saved.second.into_owned()));
    }
    for (name, average) in ema.iter().flat_map(|ema| ema.values()) {
        tensors.push(vector(format!("ema.{name}"), average.to_f32_vec()?));
    }
    weights::save(path, &tensors, &metadata)
}

/// An open checkpoint.
pub struct Checkpoint {
    file: WeightsFile,
    pub config: TrainConfig,
    pub data: Fingerprint,
    pub progress: Progress,
}

impl Checkpoint {
    pub fn open(path: &Path) -> Result<Self> {
        let file = WeightsFile::open(path)?;
        let (config, data, progress) = (entry(&file, "config")?, entry(&file, "data")?, entry(&file, "progress")?);
        Ok(Checkpoint { file, config, data, progress })
    }

    /// Puts the saved values into a network, optimiser and averages made by the same settings.
    pub fn restore(&self, network: &ResNet18, optimizer: &mut Optimizer, ema: Option<&mut Ema>) -> Result<()> {
        network.restore(&self.file, "network.")?;
        let names =
            |prefix: &'static str| self.file.entries().iter().filter_map(move |entry| entry.name.strip_prefix(prefix));
        for name in names("optimizer.step.") {
            let step = self.file.i64(&format!("optimizer.step.{name}"))?.first().copied().unwrap_or(0);
            let first = self.file.f32(&format!("optimizer.first.{name}"))?;
            let second = self.file.f32(&format!("optimizer.second.{name}"))?;
            optimizer.restore(&SavedState { name, step: step as u32, first: first.into(), second: second.into() })?;
        }
        if let Some(ema) = ema {
            for name in names("ema.") {
                ema.restore(name, &self.file.f32(&format!("ema.{name}"))?)?;
            }
        }
        Ok(())
    }
}

fn entry<T: serde::de::DeserializeOwned>(file: &WeightsFile, key: &str) -> Result<T> {
    let text = file.metadata().get(key).map_or("", String::as_str);
    serde_json::from_str(text).map_err(|e| {
        let problem = format!("not a checkpoint of this version of hone (\"{key}\": {e})");
        Error::file(file.path(), problem, "start the run anew")
    })
}
