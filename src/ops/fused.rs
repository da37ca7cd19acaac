//! Inference in one kernel: convolution, folded batch norm, residual and ReLU.
//!
//! With stored statistics, batch norm is an affine map of each channel, which folds into the filter before it:
//! `w' = w * gamma / sqrt(var + eps)` and `b' = beta - mean * gamma / sqrt(var + eps)`. Nothing here is recorded.

use super::{Conv2dParams, require_f32};
use crate::cpu;
use crate::cpu::Isa;
use crate::cpu::conv::ConvShape;
use crate::cpu::gemm::{Epilogue, PackedB};
use crate::cpu::winograd::{self, WinogradFilter};
use crate::error::{Error, Result};
use crate::tensor::{Device, Tensor};

/// Filters, packed for the algorithm that suits their shape.
enum Filter {
    Direct(PackedB),
    Winograd(WinogradFilter),
}

/// A filter with the batch norm after it folded in, packed for the device.
pub struct FusedConv2d {
    filter: Filter,
    bias: Vec<f32>,
    /// `[O, KH, KW, C]`.
    dims: [usize; 4],
    params: Conv2dParams,
}

impl FusedConv2d {
    /// Folds `scale` and `shift`, one value for each output channel, into `weight` `[O, KH, KW, C]`.
    pub fn new(weight: &Tensor, scale: &[f32], shift: &[f32], params: Conv2dParams) -> Result<Self> {
        require_f32("fused_conv2d", &[weight])?;
        let &[o, kh, kw, c] = weight.dims() else {
            return Err(Error::shape("fused_conv2d", "filters [O, KH, KW, C]", &[weight.dims()]));
        };
        if scale.len() != o || shift.len() != o {
            return Err(Error::shape(
                "fused_conv2d",
                format!("{o} scales and shifts"),
                &[&[scale.len()], &[shift.len()]],
            ));
        }
        let mut folded = weight.to_vec::<f32>();
        for (filter, scale) in folded.chunks_exact_mut(kh * kw * c).zip(scale) {
            filter.iter_mut().for_each(|w| *w *= scale);
        }
        let (isa, dims) = (Isa::current(), [o, kh, kw, c]);
        let filter = match winograd::applies(isa, dims, params.stride, params.padding) {
            true => Filter::Winograd(WinogradFilter::new(isa, &folded, o, c)),
            false => Filter::Direct(PackedB::from_columns(isa, &folded, kh * kw * c, o)),
        };
        Ok(FusedConv2d { filter, bias: shift.to_vec(), dims, params })
    }
}

/// `relu(conv(x) + bias + residual)`, the last two if asked for. `residual` is shaped as the result.
pub fn fused_conv2d(x: &Tensor, conv: &FusedConv2d, residual: Option<&Tensor>, relu: bool) -> Result<Tensor> {
    let shape: ConvShape = conv.params.shape("fused_conv2d", x, &conv.dims)?;
    let [oh, ow] = shape.output();
    let dims = [shape.n, oh, ow, shape.o];
    if let Some(residual) = residual {
        require_f32("fused_conv2d", &[residual])?;
        if residual.dims() != dims {
            return Err(Error::shape("fused_conv2d", format!("a residual of {dims:?}"), &[residual.dims()]));
        }
    }
    Ok(match x.device() {
        Device::Cpu => Tensor::build(dims, |y| {
            let residual = residual.map(|r| r.as_slice());
            let epilogue = Epilogue { bias: Some(&conv.bias), residual, relu };
            match &conv.filter {
                Filter::Direct(filter) => cpu::conv::forward(x.as_slice(), filter, &shape, epilogue, y),
                Filter::Winograd(filter) => winograd::forward(x.as_slice(), filter, &shape, epilogue, y),
            }
        }),
    })
}
