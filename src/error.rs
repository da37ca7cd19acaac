//! The one error type. Every variant names the operation, the shapes or the path, and says what to do about it,
//! in one line that is fit to be printed to a user as it stands.

use std::path::{Path, PathBuf};

/// `Result` with hone's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Operands whose shapes do not fit the operation.
    #[error("{op}: expected {expected}, got {got}")]
    Shape {
        /// Name of the operation, as in `ops::NAME`.
        op: &'static str,
        /// What would have been accepted.
        expected: String,
        /// The shapes that were given.
        got: String,
    },
    /// A parameter of an operation outside its domain.
    #[error("{op}: {problem}")]
    Argument {
        /// Name of the operation.
        op: &'static str,
        /// The value, and the values that are accepted.
        problem: String,
    },
    /// A use of the tape that has no meaning, such as a second backward pass over a freed graph.
    #[error("autograd: {0}")]
    Autograd(String),
    /// The operating system refused an operation on a path.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// A verb phrase: "open", "read", "write", "create the folder".
        action: &'static str,
        /// The reason as the system gives it.
        source: std::io::Error,
    },
    /// A file whose content cannot be used.
    #[error("{}: {problem}; {hint}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
        /// What the user can do.
        hint: String,
    },
    /// A folder of pictures that cannot be trained on or evaluated.
    #[error("{}: {problem}; {hint}", path.display())]
    Data {
        /// The folder.
        path: PathBuf,
        /// What was looked for and not found.
        problem: String,
        /// What the user can do.
        hint: String,
    },
    /// The device refused or failed.
    #[error("cuda: {problem}")]
    Device {
        /// What was tried, and what came of it.
        problem: String,
    },
    /// The device's memory is full.
    #[error(
        "cuda: out of memory: {} MiB more are needed, {} MiB are free, {} MiB are in use; {}",
        needed >> 20, free >> 20, in_use >> 20, fitting_batch(*batch, *needed, *free, *in_use)
    )]
    Memory {
        /// Bytes of the request that failed.
        needed: usize,
        /// Bytes the device has left.
        free: usize,
        /// Bytes that tensors hold.
        in_use: usize,
        /// Pictures a step, where that is known.
        batch: Option<usize>,
    },
    /// The system has no memory left for tensors: what a panic carries that ends in one line.
    #[error("out of memory: {} MiB more are needed; give a smaller batch, smaller pictures, or --accumulate", needed >> 20)]
    OutOfMemory {
        /// Bytes of the request that failed.
        needed: usize,
    },
    /// The user asked to stop, and everything is saved.
    #[error("interrupted; go on with: hone train --resume {}", run.display())]
    Interrupted {
        /// The folder of the run.
        run: PathBuf,
    },
    /// Settings that contradict each other or the data.
    #[error("{problem}; {hint}")]
    Config {
        /// What is wrong.
        problem: String,
        /// What the user can do.
        hint: String,
    },
}

/// Memory grows with the batch, all but a little: what is there, over what a picture takes, fits.
fn fitting_batch(batch: Option<usize>, needed: usize, free: usize, in_use: usize) -> String {
    match batch {
        Some(batch) if batch > 1 => {
            // A step was not through when it failed: leave a quarter for the rest.
            let fits = (batch as f64 * 0.75 * (free + in_use) as f64 / (in_use + needed).max(1) as f64) as usize;
            format!("a batch of {} should fit (it is {batch}), or give --accumulate", fits.clamp(1, batch - 1))
        }
        _ => "give --device cpu, or free the card".to_string(),
    }
}

impl Error {
    /// The same error, told how many pictures a step has, if that matters to it.
    pub fn with_batch(self, pictures: usize) -> Error {
        match self {
            Error::Memory { needed, free, in_use, .. } => Error::Memory { needed, free, in_use, batch: Some(pictures) },
            other => other,
        }
    }

    /// An [`Error::Io`] for `path`; made for `map_err(Error::io("open", path))`.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { path, action, source }
    }

    /// An [`Error::File`].
    pub fn file(path: impl AsRef<Path>, problem: impl Into<String>, hint: impl Into<String>) -> Error {
        Error::File { path: path.as_ref().to_path_buf(), problem: problem.into(), hint: hint.into() }
    }

    /// An [`Error::Data`].
    pub fn data(path: impl AsRef<Path>, problem: impl Into<String>, hint: impl Into<String>) -> Error {
        Error::Data { path: path.as_ref().to_path_buf(), problem: problem.into(), hint: hint.into() }
    }

    /// An [`Error::Config`].
    pub fn config(problem: impl Into<String>, hint: impl Into<String>) -> Error {
        Error::Config { problem: problem.into(), hint: hint.into() }
    }

    /// An [`Error::Shape`]; `got` are the shapes of the operands.
    pub fn shape(op: &'static str, expected: impl Into<String>, got: &[&[usize]]) -> Error {
        let got = got.iter().map(|s| format!("{s:?}")).collect::<Vec<_>>().join(" and ");
        Error::Shape { op, expected: expected.into(), got }
    }
}
