//! Whether the user has asked to stop.

use crate::error::{Error, Result};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// Looked at wherever a run takes long.
#[derive(Clone)]
pub struct Stop<'a> {
    asked: Option<&'a AtomicBool>,
    run: PathBuf,
}

impl<'a> Stop<'a> {
    /// Of the run in a folder; `asked` turns true when it is to stop.
    pub fn new(asked: Option<&'a AtomicBool>, run: &Path) -> Self {
        Stop { asked, run: run.to_path_buf() }
    }

    /// [`Error::Interrupted`] from the moment on when the run is to stop.
    pub fn check(&self) -> Result<()> {
        match self.asked.is_some_and(|asked| asked.load(Ordering::Relaxed)) {
            true => Err(Error::Interrupted { run: self.run.clone() }),
            false => Ok(()),
        }
    }
}
