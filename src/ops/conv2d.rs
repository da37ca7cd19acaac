//! Two-dimensional convolution (cross-correlation, as everybody's).
//!
//! `y[n, p, q, o] = bias[o] + sum over r, s, c of x[n, p*stride + r - padding, q*stride + s - padding, c] * w[o, r, s, c]`,
//! with zeros outside the input. All three gradients are convolutions too; `cpu::conv` says how.

use super::batch_norm::BatchStatistics;
use super::{require_f32, require_float, require_one_device, require_vector};
use crate::autograd::{Needs, record};
use crate::cpu::conv::{ConvShape, Purpose};
use crate::cpu::gemm::Epilogue;
use crate::cpu::{Float, Isa};
use crate::error::{Error, Result};
use crate::tensor::{DType, Device, Element, Tensor, with_float};
use crate::{cpu, cuda};

/// Stride and zero padding, for rows and for columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conv2dParams {
    /// Input pixels between outputs, at least 1.
    pub stride: [usize; 2],
    /// Zeros on each side of the input.
    pub padding: [usize; 2],
}

impl Conv2dParams {
    /// The same for rows and columns.
    pub fn new(stride: usize, padding: usize) -> Self {
        Conv2dParams { stride: [stride; 2], padding: [padding; 2] }
    }

    /// The extents of the convolution of `x` `[n, h, w, c]` with `weight` `[o, kh, kw, c]`, or why there is none.
    pub(super) fn shape(&self, op: &'static str, x: &Tensor, weight: &[usize]) -> Result<ConvShape> {
        require_float(op, &[x])?;
        let (&[n, h, w, c], &[o, kh, kw, wc]) = (x.dims(), weight) else {
            return Err(Error::shape(op, "input [N, H, W, C] and filters [O, KH, KW, C]", &[x.dims(), weight]));
        };
        let shape = ConvShape { n, h, w, c, o, kh, kw, stride: self.stride, padding: self.padding };
        if c != wc || [c, o, kh, kw].contains(&0) {
            return Err(Error::shape(op, "filters of as many channels as the input", &[x.dims(), weight]));
        }
        if self.stride.contains(&0) {
            return Err(Error::Argument { op, problem: format!("stride {:?}, expected at least 1", self.stride) });
        }
        if h + 2 * self.padding[0] < kh || w + 2 * self.padding[1] < kw {
            let expected = format!("a padded input no smaller than the filter (padding {:?})", self.padding);
            return Err(Error::shape(op, expected, &[x.dims(), weight]));
        }
        Ok(shape)
    }
}

/// Convolves `x` `[N, H, W, C]` with `weight` `[O, KH, KW, C]` and adds `bias` `[O]`; gives `[N, OH, OW, O]`. If `x` is
/// BF16, so is the result; filters and their gradients are F32 all the same.
pub fn conv2d(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, params: Conv2dParams) -> Result<Tensor> {
    Ok(convolve(x, weight, bias, params, false)?.0)
}

/// [`conv2d`] without bias, for a batch norm by the batch that comes next: where the device can take the statistics while it
/// stores the result, they come with it.
pub fn conv2d_with_statistics(
    x: &Tensor,
    weight: &Tensor,
    params: Conv2dParams,
) -> Result<(Tensor, Option<BatchStatistics>)> {
    convolve(x, weight, None, params, true)
}

fn convolve(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    params: Conv2dParams,
    with_statistics: bool,
) -> Result<(Tensor, Option<BatchStatistics>)> {
    require_one_device("conv2d", &[x, weight])?;
    require_f32("conv2d", &[weight])?;
    let shape = params.shape("conv2d", x, weight.dims())?;
    if let Some(bias) = bias {
        require_vector("conv2d", bias, shape.o)?;
    }
    let [oh, ow] = shape.output();
    let mut statistics = None;
    let y = match x.device() {
        Device::Cpu => with_float!(x.dtype(), T => Tensor::build([shape.n, oh, ow, shape.o], |y| {
            let packed = cpu::conv::pack_filter::<T>(Isa::current(), weight.as_slice(), &shape, Purpose::Training);
            let epilogue = Epilogue { bias: bias.map(|b| b.as_slice()), ..Default::default() };
            cpu::conv::forward(x.as_slice(), &packed, &shape, epilogue, y)
        })),
        Device::Cuda => {
            let packed = cuda::conv::pack_filter(weight, &shape, x.dtype())?;
            let epilogue = cuda::conv::Epilogue { bias, ..Default::default() };
            let (y, moments) = cuda::conv::forward(x, &packed, &shape, epilogue, with_statistics)?;
            let count = shape.n * oh * ow;
            statistics = moments.map(|m| BatchStatistics { mean: m.mean, variance: m.variance, count });
            y
        }
    };
    let inputs: Vec<&Tensor> = [x, weight].into_iter().chain(bias).collect();
    let y = record("conv2d", y, &inputs, |_| {
        // Each gradient needs the other operand alone: a frozen filter's input is not kept.
        let saved_x = weight.requires_grad().then(|| x.detach());
        let saved_weight = x.requires_grad().then(|| weight.detach());
        Box::new(move |dy, needs| {
            if dy.device() == Device::Cuda {
                let dx = saved_weight.map(|weight| cuda::conv::backward_input(&dy, &weight, &shape)).transpose()?;
                let dweight = saved_x.map(|x| cuda::conv::backward_filter(&x, &dy, &shape)).transpose()?;
                let sums = || cuda::norm::column_sums(&dy.to_dtype(DType::F32)?);
                let dbias = needs.get(2).map(|&needed| needed.then(sums).transpose());
                return Ok([dx, dweight].into_iter().chain(dbias.transpose()?).collect());
            }
            with_float!(dy.dtype(), T => {
                let mut gradients = gradients::<T>(&dy, saved_x, saved_weight, &shape, needs).to_vec();
                if let Some(&needed) = needs.get(2) {
                    let sums = || Tensor::build([shape.o], |db| cpu::norm::column_sums::<T>(dy.as_slice(), db));
                    gradients.push(needed.then(sums));
                }
                Ok(gradients)
            })
        })
    });
    Ok((y, statistics))
}

/// On the CPU the gradients to the input, for which the filter is given, and to the filter, for which the input is. The first is added to
/// the earlier ones of that input, the first one of the operation.
pub(super) fn gradients<T: Float>(
    dy: &Tensor,
    x: Option<Tensor>,
    weight: Option<Tensor>,
    shape: &ConvShape,
    needs: &mut Needs,
) -> [Option<Tensor>; 2] {
    let (isa, dy) = (Isa::current(), dy.as_slice::<T>());
    let dx = weight.map(|weight| {
        input_gradient(needs, shape, |dx, accumulate| {
            cpu::conv::backward_input::<T>(isa, dy, weight.as_slice(), shape, dx, accumulate)
        })
    });
    let dweight = x.map(|x| {
        Tensor::build([shape.o, shape.kh, shape.kw, shape.c], |dw| {
            cpu::conv::backward_filter::<T>(isa, x.as_slice(), dy, shape, dw)
        })
    });
    [dx, dweight]
}

/// The gradient to a convolution's input, the operation's first, by `compute(dx, accumulate)`: added to the earlier ones where there are any.
pub(super) fn input_gradient<T: Element>(
    needs: &mut Needs,
    shape: &ConvShape,
    compute: impl FnOnce(&mut [T], bool),
) -> Tensor {
    match needs.take_earlier(0) {
        Some(earlier) => earlier.map_in_place(|sum| compute(sum, true)),
        None => Tensor::build([shape.n, shape.h, shape.w, shape.c], |dx| compute(dx, false)),
    }
}
