//! Layers and the network.

mod init;
mod layers;
mod parameter;
mod resnet;
mod state;

pub use layers::{BatchNorm2d, ConvBn, Linear};
pub use parameter::Parameter;
pub use resnet::{FEATURES, MAX_IMAGE_SIZE, MIN_IMAGE_SIZE, ResNet18, Stage};
pub use state::Snapshot;
