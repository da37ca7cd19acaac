//! What a run leaves behind: model.safetensors, last.safetensors, config.json, metrics.csv.

use super::model;
use super::{Epoch, TrainConfig};
use crate::data::Preprocess;
use crate::error::{Error, Result};
use crate::nn::Snapshot;
use crate::weights::write_atomically;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Models are written when this long has passed since the last time, and at the end: a head on cached features takes
/// milliseconds an epoch, and a model takes longer than that to write.
const WRITE_EVERY: Duration = Duration::from_secs(10);

/// A run's folder and what is yet to be written to it.
pub struct RunFolder {
    path: PathBuf,
    classes: Vec<String>,
    preprocess: Preprocess,
    best: Option<(Epoch, Snapshot)>,
    last: Option<(Epoch, Snapshot)>,
    written: Instant,
}

/// `runs/DATE-NAME`, or the first of `runs/DATE-NAME-2`, ... that does not exist.
pub fn default(data: &Path, today: &str) -> PathBuf {
    let absolute = std::fs::canonicalize(data).unwrap_or_else(|_| data.to_path_buf());
    let name = absolute.file_name().map_or("data".into(), |name| name.to_string_lossy().into_owned());
    let numbered = |i: usize| match i {
        1 => PathBuf::from(format!("runs/{today}-{name}")),
        i => PathBuf::from(format!("runs/{today}-{name}-{i}")),
    };
    (1..).map(numbered).find(|path| !path.exists()).expect("some number is free")
}

impl RunFolder {
    /// Makes the folder and writes config.json, so that a folder that cannot be written to is known before the work. A
    /// folder that holds a run is left alone.
    pub fn create(path: &Path, config: &TrainConfig, classes: &[String], preprocess: &Preprocess) -> Result<Self> {
        if path.join("model.safetensors").exists() || path.join("last.safetensors").exists() {
            let hint = "choose another --out, or move the old run away";
            return Err(Error::file(path, "the folder already holds a trained model", hint));
        }
        std::fs::create_dir_all(path).map_err(Error::io("create the folder", path))?;
        let folder = RunFolder {
            path: path.to_path_buf(),
            classes: classes.to_vec(),
            preprocess: preprocess.clone(),
            best: None,
            last: None,
            written: Instant::now(),
        };
        let config = json!({
            "hone_version": env!("CARGO_PKG_VERSION"),
            "settings": config,
            "classes": classes,
            "preprocess": preprocess,
        });
        let text = serde_json::to_string_pretty(&config).expect("plain values have a JSON form") + "\n";
        write_atomically(&folder.path.join("config.json"), |out| out.write_all(text.as_bytes()))?;
        Ok(folder)
    }

    /// Where the best model is, or will be.
    pub fn model(&self) -> PathBuf {
        self.path.join("model.safetensors")
    }

    /// Takes in an epoch. `snapshot` is the network after it, `best` whether it is the best so far.
    pub fn record(&mut self, epochs: &[Epoch], snapshot: impl Fn() -> Snapshot, best: bool) -> Result<()> {
        let Some(epoch) = epochs.last() else { return Ok(()) };
        if best {
            self.best = Some((*epoch, snapshot()));
        }
        self.last = Some((*epoch, snapshot()));
        self.write_metrics(epochs)?;
        if epoch.epoch == epoch.epochs || self.written.elapsed() >= WRITE_EVERY {
            self.flush()?;
        }
        Ok(())
    }

    /// Writes the models that have not been written yet.
    fn flush(&mut self) -> Result<()> {
        let pending = [("model.safetensors", self.best.take()), ("last.safetensors", self.last.take())];
        for (name, model) in pending {
            let Some((epoch, snapshot)) = model else { continue };
            let accuracy = epoch.val_accuracy.map(|a| ("val_accuracy", format!("{a:.6}")));
            let extra: Vec<_> = [("epoch", epoch.epoch.to_string())].into_iter().chain(accuracy).collect();
            model::save(&self.path.join(name), &snapshot, &self.classes, &self.preprocess, &extra)?;
        }
        self.written = Instant::now();
        Ok(())
    }

    fn write_metrics(&self, epochs: &[Epoch]) -> Result<()> {
        write_atomically(&self.path.join("metrics.csv"), |out| {
            let mut csv = csv::Writer::from_writer(out);
            for epoch in epochs {
                csv.serialize(epoch)?;
            }
            csv.flush()
        })
    }
}
