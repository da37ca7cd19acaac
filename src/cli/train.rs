//! `hone train`.

use super::args::Train;
use super::report::{self, Report};
use super::using::class_table;
use crate::error::{Error, Result};
use crate::train::{Control, Outcome, default_run_folder, fit, resume};
use serde_json::json;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Today in the local time zone, as `2026-01-31`.
pub fn today() -> String {
    jiff::ZonedDateTime::now().date().to_string()
}

/// Set by Ctrl-C; the run then saves itself.
static STOP: AtomicBool = AtomicBool::new(false);
/// What shells expect of a program that Ctrl-C has ended.
pub const INTERRUPTED: u8 = 130;

pub fn run(args: Train) -> Result<()> {
    // The first Ctrl-C asks, the second insists.
    let handler = || {
        if STOP.swap(true, Ordering::Relaxed) {
            std::process::exit(i32::from(INTERRUPTED));
        }
    };
    ctrlc::set_handler(handler).map_err(|e| Error::config(format!("cannot watch for Ctrl-C ({e})"), "try again"))?;
    let write_every = Duration::try_from_secs_f64(args.checkpoint_seconds).unwrap_or(Duration::MAX);
    let control = Control { stop: Some(&STOP), write_every, device: args.common.device()? };
    let mut report = Report::new(args.common.json);
    let outcome = match &args.resume {
        Some(folder) => resume(folder, control, &mut report)?,
        None => {
            let config = args.config()?;
            let out = args.out.unwrap_or_else(|| default_run_folder(&config.data, &today()));
            fit(&config, &out, control, &mut report)?
        }
    };
    if args.common.json {
        report::json_line(&done(&outcome));
    } else {
        class_table(&outcome.classes, &outcome.confusion).iter().for_each(|line| report::line(line));
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
        "classes": outcome.classes,
        "confusion": outcome.confusion.counts,
        "top5_accuracy": outcome.confusion.top5_accuracy(),
        "per_class": outcome.confusion.class_metrics(),
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
