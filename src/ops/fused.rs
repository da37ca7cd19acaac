//! Inference in one kernel: convolution, folded batch norm, residual and ReLU.
//!
//! With stored statistics, batch norm is an affine map of each channel, which folds into the filter before it:
//! `w' = w * gamma / sqrt(var + eps)` and `b' = beta - mean * gamma / sqrt(var + eps)`. Nothing here is recorded.

use super::pool::{max_pool2d, pool_shape};
use super::{Conv2dParams, require_f32, require_float};
use crate::cpu::Isa;
use crate::cpu::conv::{ConvShape, PackedFilter, Purpose};
use crate::cpu::gemm::Epilogue;
use crate::error::{Error, Result};
use crate::tensor::pool::Scratch;
use crate::tensor::{CpuBuffer, DType, Device, Tensor, with_float};
use crate::{cpu, cuda};
use half::bf16;
use rayon::prelude::*;

/// Filters and bias, packed for a device, a type of activations, and the algorithm that suits their shape.
enum Filter {
    F32(PackedFilter<f32>, Vec<f32>),
    Bf16(PackedFilter<bf16>, Vec<f32>),
    Cuda { filter: Tensor, bias: Tensor },
}

/// A filter with the batch norm after it folded in, packed for a device and a type of activations.
pub struct FusedConv2d {
    filter: Filter,
    dtype: DType,
    /// `[O, KH, KW, C]`.
    dims: [usize; 4],
    params: Conv2dParams,
}

impl FusedConv2d {
    /// Folds `scale` and `shift`, one value for each output channel, into `weight` `[O, KH, KW, C]`, for activations of type
    /// `dtype` on the weight's device.
    pub fn new(weight: &Tensor, scale: &[f32], shift: &[f32], params: Conv2dParams, dtype: DType) -> Result<Self> {
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
        let weight_on_cpu = weight.to_device(Device::Cpu)?;
        let mut folded = Scratch::<f32>::take(weight.numel());
        let filters = weight_on_cpu.as_slice::<f32>().par_chunks_exact(kh * kw * c);
        folded.par_chunks_exact_mut(kh * kw * c).zip(filters).zip(scale).for_each(|((folded, filter), scale)| {
            folded.iter_mut().zip(filter).for_each(|(folded, w)| *folded = w * scale);
        });
        let (isa, dims, bias) = (Isa::current(), [o, kh, kw, c], shift.to_vec());
        // Packing asks for the filter's extents alone.
        let shape = ConvShape { n: 0, h: kh, w: kw, c, o, kh, kw, stride: params.stride, padding: params.padding };
        let filter = match (weight.device(), dtype) {
            (Device::Cuda, _) => {
                let folded = Tensor::from_slice(&folded, dims)?.to_device(Device::Cuda)?;
                let bias = Tensor::from_slice(shift, [o])?.to_device(Device::Cuda)?;
                Filter::Cuda { filter: cuda::conv::pack_filter(&folded, &shape, dtype)?, bias }
            }
            (Device::Cpu, DType::BF16) => {
                Filter::Bf16(cpu::conv::pack_filter(isa, &folded, &shape, Purpose::Inference), bias)
            }
            (Device::Cpu, _) => Filter::F32(cpu::conv::pack_filter(isa, &folded, &shape, Purpose::Inference), bias),
        };
        Ok(FusedConv2d { filter, dtype, dims, params })
    }

    /// The type of activations that it is packed for.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
}

/// `relu(conv(x) + bias + residual)`, the last two if asked for. `residual` is shaped as the result.
pub fn fused_conv2d(x: &Tensor, conv: &FusedConv2d, residual: Option<&Tensor>, relu: bool) -> Result<Tensor> {
    let (shape, dims) = shape_of_result(x, conv, residual)?;
    match &conv.filter {
        Filter::Cuda { filter, bias } if x.device() == Device::Cuda && x.dtype() == conv.dtype => {
            let epilogue = cuda::conv::Epilogue { bias: Some(bias), residual, relu };
            Ok(cuda::conv::forward(x, filter, &shape, epilogue, false)?.0)
        }
        _ => {
            let mut y = with_float!(conv.dtype, T => CpuBuffer::take::<T>(dims.iter().product()));
            fused_conv2d_into(x, conv, residual, relu, &mut y, 0)?;
            Ok(Tensor::from_buffer(dims, y))
        }
    }
}

/// [`fused_conv2d`] on the CPU, to the elements of `y` from `first` on.
pub(crate) fn fused_conv2d_into(
    x: &Tensor,
    conv: &FusedConv2d,
    residual: Option<&Tensor>,
    relu: bool,
    y: &mut CpuBuffer,
    first: usize,
) -> Result<()> {
    let (shape, dims) = shape_of_result(x, conv, residual)?;
    let elements = first..first + dims.iter().product::<usize>();
    // Types and devices that match.
    macro_rules! on_cpu {
        ($T:ty, $filter:expr, $bias:expr) => {{
            let epilogue =
                Epilogue { bias: Some($bias), residual: residual.map(|r| r.as_slice()), relu, ..Default::default() };
            cpu::conv::forward(x.as_slice(), $filter, &shape, epilogue, &mut y.as_mut_slice::<$T>()[elements]);
            Ok(())
        }};
    }
    match (&conv.filter, x.device(), x.dtype()) {
        (Filter::F32(filter, bias), Device::Cpu, DType::F32) => on_cpu!(f32, filter, bias),
        (Filter::Bf16(filter, bias), Device::Cpu, DType::BF16) => on_cpu!(bf16, filter, bias),
        (_, device, dtype) => {
            let problem = format!("an input of {dtype:?} on {device}, but filters for {:?}, or elsewhere", conv.dtype);
            Err(Error::Argument { op: "fused_conv2d", problem })
        }
    }
}

/// The extents of the convolution and of its result, if the operands fit each other.
fn shape_of_result(x: &Tensor, conv: &FusedConv2d, residual: Option<&Tensor>) -> Result<(ConvShape, [usize; 4])> {
    let shape = conv.params.shape("fused_conv2d", x, &conv.dims)?;
    let [oh, ow] = shape.output();
    let dims = [shape.n, oh, ow, shape.o];
    if let Some(residual) = residual {
        require_float("fused_conv2d", &[x, residual])?;
        if residual.dims() != dims {
            return Err(Error::shape("fused_conv2d", format!("a residual of {dims:?}"), &[residual.dims()]));
        }
    }
    Ok((shape, dims))
}

/// `max_pool2d(relu(conv(x) + bias))`, ReLU if asked for: the first layer and the pooling after it, in one pass on the CPU.
pub fn fused_conv2d_max_pool(
    x: &Tensor,
    conv: &FusedConv2d,
    relu: bool,
    [kernel, stride, padding]: [usize; 3],
) -> Result<Tensor> {
    let shape: ConvShape = conv.params.shape("fused_conv2d", x, &conv.dims)?;
    let [oh, ow] = shape.output();
    let pooling = pool_shape(&[shape.n, oh, ow, shape.o], kernel, stride, padding)?;
    let [windows, windows_across] = pooling.output();
    let dims = [shape.n, windows, windows_across, shape.o];
    // Types and devices that match.
    macro_rules! on_cpu {
        ($filter:expr, $bias:expr) => {{
            let epilogue = Epilogue { bias: Some($bias), relu, ..Default::default() };
            Ok(Tensor::build(dims, |y| {
                cpu::conv::forward_max_pool(x.as_slice(), $filter, &shape, epilogue, &pooling, y)
            }))
        }};
    }
    match (&conv.filter, x.device(), x.dtype()) {
        (Filter::F32(filter, bias), Device::Cpu, DType::F32) => on_cpu!(filter, bias),
        (Filter::Bf16(filter, bias), Device::Cpu, DType::BF16) => on_cpu!(filter, bias),
        _ => max_pool2d(&fused_conv2d(x, conv, None, relu)?, kernel, stride, padding),
    }
}
