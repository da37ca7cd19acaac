//! hone fine-tunes a pretrained ResNet-18 on a folder of photographs, without a framework beneath.
//!
//! To read it from the bottom up:
//!
//! - [`error`]: the one error type.
//! - [`tensor`]: shapes, recycled memory, tensors.
//! - [`autograd`]: the tape and the backward pass.
//! - [`cpu`]: kernels over slices. Start with `gather` and `gemm`: convolution forward and backward are built on them.
//! - [`ops`]: one operation a file, from tensors to tensors.
//! - [`nn`]: layers and the network.
//! - [`optim`]: the optimiser.

pub mod autograd;
pub mod cpu;
pub mod error;
pub mod nn;
pub mod ops;
pub mod optim;
pub mod tensor;

pub use error::{Error, Result};
pub use tensor::{DType, Device, Tensor};
