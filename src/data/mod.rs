//! Pictures: finding, decoding, preprocessing, and having them ready in time.

mod augment;
mod decode;
pub mod demo;
mod folder;
mod loader;
mod split;
mod transforms;
mod walk;

pub use augment::{Augment, generator};
pub use decode::{MAX_PIXELS, Pixels, decode, decode_bytes};
pub use folder::{Dataset, Sample, open_evaluation};
pub use loader::{OrderedParallel, ordered_parallel};
pub use split::Split;
pub use transforms::Preprocess;
pub use walk::{EXTENSIONS, expand_inputs};
