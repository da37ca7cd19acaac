//! Memory-mapped safetensors in and out.
//!
//! This room knows files: names, types, shapes and bytes. It knows neither tensors nor networks.

mod atomic;
mod check;
mod file;
mod locate;
mod save;

pub use atomic::{remove_partial, write_atomically};
pub use check::{Expected, Kind, Report, check};
pub use file::{Entry, WeightsFile};
pub use locate::locate_default;
pub use safetensors::Dtype;
pub use save::{Data, NamedTensor, save};
