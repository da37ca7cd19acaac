//! `hone train`.

use super::args::Train;
use super::report::{self, Report};
use crate::error::Result;
use crate::train::{Outcome, TrainConfig, default_run_folder, fit};
use serde_json::json;
use std::path::PathBuf;

/// Today in the local time zone, as `2026-01-31`.
pub fn today() -> String {
    jiff::ZonedDateTime::now().date().to_string()
}

pub fn run(args: Train) -> Result<()> {
    let config = TrainConfig {
        weights: args.weights()?,
        epochs: args.epochs as usize,
        batch_size: args.batch_size as usize,
        lr: args.lr,
        bn: args.bn.into(),
        cache: args.cache.into(),
        val_split: args.val_split,
        image_size: args.image_size,
        exif: args.exif,
        seed: args.seed,
        data: args.data,
    };
    let out: PathBuf = args.out.unwrap_or_else(|| default_run_folder(&config.data, &today()));
    let outcome = fit(&config, &out, &mut Report::new(args.common.json))?;
    if args.common.json {
        report::json_line(&done(&outcome));
    } else {
        report::line(&summary(&outcome));
    }
    Ok(())
}

pub fn done(outcome: &Outcome) -> serde_json::Value {
    json!({
        "event": "done",
        "best_val_accuracy": outcome.best.val_accuracy,
        "best_epoch": outcome.best.epoch,
        "model": outcome.model.to_string_lossy(),
        "seconds": outcome.seconds,
        "skipped": outcome.skipped.iter().map(|s| s.file.to_string_lossy()).collect::<Vec<_>>(),
    })
}

pub fn summary(outcome: &Outcome) -> String {
    let accuracy = match outcome.best.val_accuracy {
        Some(accuracy) => format!("validation accuracy {accuracy:.4}"),
        None => "no validation pictures".to_string(),
    };
    let skipped = match outcome.skipped.len() {
        0 => String::new(),
        n => format!(", {n} pictures skipped"),
    };
    format!(
        "best epoch {}: {accuracy}; {} in {:.1} s{skipped}",
        outcome.best.epoch,
        outcome.model.display(),
        outcome.seconds
    )
}
