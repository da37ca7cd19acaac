//! hone fine-tunes a pretrained ResNet-18 on a folder of photographs, without a framework beneath.
//!
//! To read it from the bottom up:
//!
//! - [`error`]: the one error type.
//! - [`tensor`]: shapes, recycled memory, tensors.
//! - [`autograd`]: the tape and the backward pass.
//! - [`cpu`]: kernels over slices. Start with `gather` and `gemm`: convolution forward and backward are built on them.
//! - [`cuda`]: the same on a card; `kernels/*.cu` has the kernels.
//! - [`ops`]: one operation a file, from tensors to tensors.
//! - [`weights`]: safetensors files in and out.
//! - [`nn`]: layers and the network, with torchvision's names.
//! - [`optim`]: the optimiser.
//! - [`data`]: pictures from files to pixels.
//! - [`train`]: the run itself, and the use of its result.
//! - [`doctor`]: whether all of it computes rightly on the machine at hand.
//! - [`cli`]: arguments and printing.

pub mod autograd;
pub mod cli;
pub mod cpu;
pub mod cuda;
pub mod data;
pub mod doctor;
pub mod error;
pub mod nn;
pub mod ops;
pub mod optim;
pub mod tensor;
pub mod train;
pub mod weights;

pub use error::{Error, Result};
pub use tensor::{DType, Device, Tensor};
