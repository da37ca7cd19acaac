//! Operations on tensors, one file each: the mathematics, the shape check, the forward pass, the backward rule, and the
//! dispatch to a device.
//!
//! Every operation is a function from tensors to a tensor. It is recorded if one of its inputs needs a gradient, and then
//! keeps alive just what its backward rule reads.

mod add;
mod batch_norm;
mod conv2d;
mod conv_norm;
mod cross_entropy;
mod fused;
mod linear;
mod matmul;
mod pool;
mod reduce;
mod relu;
mod reshape;

pub use add::add;
pub use batch_norm::{BatchStatistics, Norm, Statistics, batch_norm, batch_norm_stored, norm_act};
pub(crate) use batch_norm::{reciprocal_deviation, scale_and_shift};
pub use conv_norm::{NormBy, conv2d_norm_act};
pub use conv2d::{Conv2dParams, conv2d, conv2d_with_statistics};
pub use cross_entropy::{CrossEntropy, Reduction, cross_entropy};
pub(crate) use fused::fused_conv2d_into;
pub use fused::{FusedConv2d, fused_conv2d, fused_conv2d_max_pool};
pub use linear::{PackedLinear, linear, packed_linear};
pub use matmul::matmul;
pub use pool::{global_avg_pool, max_pool2d};
pub use reduce::{mean, scale, sum};
pub use relu::relu;
pub use reshape::reshape;

use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// An error unless every tensor holds f32.
fn require_f32(op: &'static str, tensors: &[&Tensor]) -> Result<()> {
    match tensors.iter().find(|tensor| tensor.dtype() != DType::F32) {
        Some(other) => Err(Error::Argument { op, problem: format!("expected F32 elements, got {:?}", other.dtype()) }),
        None => Ok(()),
    }
}

/// An error unless every tensor holds f32, or every one bf16.
fn require_float(op: &'static str, tensors: &[&Tensor]) -> Result<()> {
    match tensors {
        [first, rest @ ..] if first.dtype() == DType::BF16 => {
            match rest.iter().find(|other| other.dtype() != DType::BF16) {
                Some(other) => {
                    Err(Error::Argument { op, problem: format!("expected BF16 elements, got {:?}", other.dtype()) })
                }
                None => Ok(()),
            }
        }
        all => require_f32(op, all),
    }
}

/// An error unless all tensors lie on one device.
fn require_one_device(op: &'static str, tensors: &[&Tensor]) -> Result<()> {
    match tensors.iter().find(|tensor| tensor.device() != tensors[0].device()) {
        Some(other) => {
            let problem = format!("operands on {} and {}, expected one device", tensors[0].device(), other.device());
            Err(Error::Argument { op, problem })
        }
        None => Ok(()),
    }
}

/// An error unless `vector` is `[channels]` of f32.
fn require_vector(op: &'static str, vector: &Tensor, channels: usize) -> Result<()> {
    require_f32(op, &[vector])?;
    if vector.dims() != [channels] {
        return Err(Error::shape(op, format!("one value a channel, [{channels}]"), &[vector.dims()]));
    }
    Ok(())
}
