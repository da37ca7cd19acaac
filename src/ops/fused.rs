//! Inference in one kernel: convolution, folded batch norm, residual and ReLU.
//!
//! With stored statistics, batch norm is an affine map of each channel, which folds into the filter before it:
//! `w' = w * gamma / sqrt(var + eps)` and `b' = beta - mean * gamma / sqrt(var + eps)`. Nothing here is recorded.

use super::{Conv2dParams, require_f32, require_float};
use crate::cpu::Isa;
use crate::cpu::conv::ConvShape;
use crate::cpu::gemm::{Epilogue, PackedB};
use crate::cpu::winograd::{self, WinogradFilter};
use crate::error::{Error, Result};
use crate::tensor::{Device, Tensor};
use crate::{cpu, cuda};
use std::sync::Mutex;

/// Filters, packed for the algorithm that suits their shape.
enum Filter {
    Direct(PackedB),
    Winograd(WinogradFilter),
    /// On the card: folded, `[O, KH, KW, C]` in f32; the bias; and what the kernels read for a type of activations.
    Cuda {
        folded: Tensor,
        bias: Tensor,
        packed: Mutex<Option<Tensor>>,
    },
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
        let mut folded = weight.to_f32_vec()?;
        for (filter, scale) in folded.chunks_exact_mut(kh * kw * c).zip(scale) {
            filter.iter_mut().for_each(|w| *w *= scale);
        }
        let (isa, dims) = (Isa::current(), [o, kh, kw, c]);
        if weight.device() == Device::Cuda {
            let folded = Tensor::from_slice(&folded, dims)?.to_device(Device::Cuda)?;
            let bias = Tensor::from_slice(shift, [o])?.to_device(Device::Cuda)?;
            let filter = Filter::Cuda { folded, bias, packed: Mutex::default() };
            return Ok(FusedConv2d { filter, bias: Vec::new(), dims, params });
        }
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
        require_float("fused_conv2d", &[x, residual])?;
        if residual.dims() != dims {
            return Err(Error::shape("fused_conv2d", format!("a residual of {dims:?}"), &[residual.dims()]));
        }
    }
    let on_cpu = || Epilogue { bias: Some(&conv.bias), residual: residual.map(|r| r.as_slice()), relu };
    match (&conv.filter, x.device()) {
        (Filter::Direct(filter), Device::Cpu) => {
            Ok(Tensor::build(dims, |y| cpu::conv::forward(x.as_slice(), filter, &shape, on_cpu(), y)))
        }
        (Filter::Winograd(filter), Device::Cpu) => {
            Ok(Tensor::build(dims, |y| winograd::forward(x.as_slice(), filter, &shape, on_cpu(), y)))
        }
        (Filter::Cuda { folded, bias, packed }, Device::Cuda) => {
            let mut packed = packed.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let filter = match &*packed {
                Some(filter) if filter.dtype() == x.dtype() => filter.clone(),
                _ => packed.insert(cuda::conv::pack_filter(folded, &shape, x.dtype())?).clone(),
            };
            let epilogue = cuda::conv::Epilogue { bias: Some(bias), residual, relu };
            Ok(cuda::conv::forward(x, &filter, &shape, epilogue, false)?.0)
        }
        _ => {
            let problem = format!("an input on {}, but filters elsewhere", x.device());
            Err(Error::Argument { op: "fused_conv2d", problem })
        }
    }
}
