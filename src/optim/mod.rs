//! Optimisers.

mod adam;

pub use adam::{Adam, AdamConfig};

use crate::nn::Parameter;
use std::sync::Arc;

/// Parameters that share a rate.
pub struct ParamGroup {
    /// What is trained.
    pub parameters: Vec<Arc<Parameter>>,
    /// Learning rate.
    pub lr: f64,
}
