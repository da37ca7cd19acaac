//! Pictures: finding, decoding, preprocessing, and having them ready in time.

mod augment;
mod decode;
pub mod demo;
mod folder;
mod loader;
mod transforms;

pub use augment::{Augment, generator};
pub use decode::{Pixels, decode, decode_bytes};
pub use folder::{Dataset, Sample, expand_inputs, open_evaluation};
pub use loader::{OrderedParallel, ordered_parallel};
pub use transforms::Preprocess;
