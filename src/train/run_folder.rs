//! What a run leaves behind: model.safetensors, last.safetensors, config.json, metrics.csv; a checkpoint while it runs.

use super::checkpoint;
use super::model;
use super::{Epoch, TrainConfig};
use crate::data::Preprocess;
use crate::error::{Error, Result};
use crate::nn::Snapshot;
use crate::weights::{remove_partial, write_atomically};
use serde::Deserialize;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A run's folder and what is yet to be written to it.
pub struct RunFolder {
    path: PathBuf,
    classes: Vec<String>,
    preprocess: Preprocess,
    best: Option<(Epoch, Snapshot)>,
    last: Option<(Epoch, Snapshot)>,
    written: Instant,
}

/// The folder of a run that was not told where to write: `runs/DATE-NAME`, or the first of `runs/DATE-NAME-2`, ... that
/// does not exist.
pub fn default(data: &Path, today: &str) -> PathBuf {
    let absolute = std::fs::canonicalize(data).unwrap_or_else(|_| data.to_path_buf());
    let name = absolute.file_name().map_or("data".into(), |name| name.to_string_lossy().into_owned());
    let numbered = |i: usize| match i {
        1 => PathBuf::from(format!("runs/{today}-{name}")),
        i => PathBuf::from(format!("runs/{today}-{name}-{i}")),
    };
    (1..).map(numbered).find(|path| !path.exists()).expect("some number is free")
}

/// What config.json says of a run.
#[derive(Deserialize)]
struct Config {
    settings: TrainConfig,
    preprocess: Preprocess,
}

/// Settings and preprocessing of the run in `path`, as its config.json has them.
pub fn read_config(path: &Path) -> Result<(TrainConfig, Preprocess)> {
    let file = path.join("config.json");
    let text = std::fs::read_to_string(&file).map_err(Error::io("read", &file))?;
    let Config { settings, preprocess } = serde_json::from_str(&text).map_err(|e| {
        Error::file(&file, format!("not the settings of a run of this version of hone ({e})"), "start the run anew")
    })?;
    Ok((settings, preprocess))
}

impl RunFolder {
    /// Makes the folder and writes config.json, so that a folder that cannot be written to is known before the work. A
    /// folder that holds a run is left alone.
    pub fn create(path: &Path, config: &TrainConfig, classes: &[String], preprocess: &Preprocess) -> Result<Self> {
        for file in ["model.safetensors", "last.safetensors", checkpoint::FILE] {
            if path.join(file).exists() {
                let hint = "choose another --out, or go on with --resume";
                return Err(Error::file(path, format!("the folder already holds a run ({file})"), hint));
            }
        }
        std::fs::create_dir_all(path).map_err(Error::io("create the folder", path))?;
        let config = json!({
            "hone_version": env!("CARGO_PKG_VERSION"),
            "settings": config,
            "classes": classes,
            "preprocess": preprocess,
        });
        let text = format!("{config:#}\n");
        write_atomically(&path.join("config.json"), |out| out.write_all(text.as_bytes()))?;
        Ok(Self::reopen(path, classes, preprocess))
    }

    /// The folder of a run that goes on. What a killed program was writing is removed.
    pub fn reopen(path: &Path, classes: &[String], preprocess: &Preprocess) -> Self {
        remove_partial(path);
        RunFolder {
            path: path.to_path_buf(),
            classes: classes.to_vec(),
            preprocess: preprocess.clone(),
            best: None,
            last: None,
            written: Instant::now(),
        }
    }

    /// Where the best model is, or will be.
    pub fn model(&self) -> PathBuf {
        self.path.join("model.safetensors")
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes in an epoch. `snapshot` is the network to keep of it, `best` whether it is the best so far.
    pub fn record(&mut self, epoch: Epoch, snapshot: impl Fn() -> Snapshot, best: bool) {
        if best {
            self.best = Some((epoch, snapshot()));
        }
        self.last = Some((epoch, snapshot()));
    }

    /// Whether nothing has been written for this long.
    pub fn is_due(&self, every: Duration) -> bool {
        self.written.elapsed() >= every
    }

    /// Writes the models that have not been written yet, then the figures, then the checkpoint by `checkpoint`. Should the
    /// program end in between, the older checkpoint leads to the same models again.
    pub fn flush(&mut self, history: &[Epoch], checkpoint: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let pending = [("model.safetensors", self.best.take()), ("last.safetensors", self.last.take())];
        for (name, model) in pending {
            let Some((epoch, snapshot)) = model else { continue };
            let accuracy = epoch.val_accuracy.map(|a| ("val_accuracy", format!("{a:.6}")));
            let extra: Vec<_> = [("epoch", epoch.epoch.to_string())].into_iter().chain(accuracy).collect();
            model::save(&self.path.join(name), &snapshot, &self.classes, &self.preprocess, &extra)?;
        }
        self.write_metrics(history)?;
        checkpoint(&self.path.join(checkpoint::FILE))?;
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
