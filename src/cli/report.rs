//! Lines on stdout, notes and progress bars on stderr.

use crate::error::Error;
use crate::train::{Epoch, Observer, Skipped};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Progress is shown of what takes longer than this.
const PATIENCE: Duration = Duration::from_secs(1);

/// A line on stdout. A reader that has gone away ends the printing, not the work.
pub fn line(text: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

/// A JSON object as a line on stdout.
pub fn json_line(value: &Value) {
    line(&value.to_string());
}

/// A line on stderr that the user should know.
pub fn note(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// The line that ends a failed command.
pub fn error(error: &Error) {
    let _ = writeln!(std::io::stderr().lock(), "hone: {error}");
}

/// Prints a run as it goes: to people, or as JSON.
pub struct Report {
    json: bool,
    bar: Option<ProgressBar>,
    phase: Option<(&'static str, Instant)>,
}

impl Report {
    pub fn new(json: bool) -> Self {
        Report { json, bar: None, phase: None }
    }

    fn print(&self, to_stderr: bool, text: &str) {
        let write = || {
            if to_stderr {
                let _ = writeln!(std::io::stderr().lock(), "{text}");
            } else {
                line(text);
            }
        };
        match &self.bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        self.phase = None;
    }
}

impl Observer for Report {
    fn note(&mut self, text: &str) {
        self.print(self.json, text);
    }

    fn skipped(&mut self, picture: &Skipped) {
        self.print(true, &format!("skipped: {}", picture.reason));
    }

    fn progress(&mut self, phase: &'static str, done: usize, total: usize) {
        if done >= total {
            return self.clear();
        }
        let start = match self.phase {
            Some((current, start)) if current == phase => start,
            _ => {
                self.clear();
                self.phase.insert((phase, Instant::now())).1
            }
        };
        if self.bar.is_none() && start.elapsed() > PATIENCE && std::io::stderr().is_terminal() {
            let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {per_sec} {eta}");
            let bar = ProgressBar::with_draw_target(Some(total as u64), ProgressDrawTarget::stderr())
                .with_style(style.expect("a valid template"))
                .with_message(phase)
                .with_elapsed(start.elapsed());
            self.bar = Some(bar);
        }
        if let Some(bar) = &self.bar {
            bar.set_position(done as u64);
        }
    }

    fn epoch(&mut self, epoch: &Epoch) {
        self.clear();
        if self.json {
            let mut value = json!({ "event": "epoch" });
            if let (Value::Object(object), Ok(Value::Object(fields))) = (&mut value, serde_json::to_value(epoch)) {
                object.extend(fields);
            }
            json_line(&value);
        } else {
            line(&epoch_line(epoch));
        }
    }
}

fn epoch_line(epoch: &Epoch) -> String {
    let width = epoch.epochs.to_string().len();
    let val = match (epoch.val_loss, epoch.val_accuracy) {
        (Some(loss), Some(accuracy)) => format!("  val loss {loss:.4}  val accuracy {accuracy:.4}"),
        _ => String::new(),
    };
    format!(
        "epoch {:>width$}/{}  loss {:.4}  accuracy {:.4}{val}  {:.0} images/s  {:.2} s",
        epoch.epoch, epoch.epochs, epoch.train_loss, epoch.train_accuracy, epoch.images_per_second, epoch.seconds
    )
}
