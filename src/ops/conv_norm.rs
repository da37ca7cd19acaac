//! A convolution and the batch norm after it, with what follows that, as one operation: what is between the two is large, and is used
//! while it is in cache.
//!
//! The mathematics is that of [`super::conv2d`] and [`super::norm_act`] one after the other.

use super::batch_norm::{
    BatchStatistics, Norm, Pooled, Statistics, check, check_count, check_stored, norm_act, normalise,
};
use super::conv2d::{self, Conv2dParams, conv2d, conv2d_with_statistics};
use super::pool::pool_shape;
use super::{require_f32, require_one_device};
use crate::autograd::record;
use crate::cpu::Isa;
use crate::cpu::conv::{Making, Purpose, backward_as_made, pack_filter, takes_gradients_as_made};
use crate::cpu::conv_norm::{Maxima, forward_and_take};
use crate::error::Result;
use crate::tensor::{Device, Tensor, with_float};
use std::ops::Range;

/// What to normalise a convolution's results by.
#[derive(Clone, Copy)]
pub enum NormBy<'a> {
    /// Their own statistics.
    Batch,
    /// Mean and variance that stay as they are, `[O]`.
    Stored(&'a Tensor, &'a Tensor),
}

/// [`norm_act`] of [`conv2d`] of `x` `[N, H, W, C]` with `weight` `[O, KH, KW, C]`, and the batch's statistics if it used them.
pub fn conv2d_norm_act(
    x: &Tensor,
    weight: &Tensor,
    params: Conv2dParams,
    by: NormBy,
    how: Norm,
) -> Result<(Tensor, Option<BatchStatistics>)> {
    // A residual is added before pooling, and so everything is normalised.
    if x.device() == Device::Cuda || (how.pooling.is_some() && how.residual.is_some()) {
        return match by {
            NormBy::Batch => {
                let (z, taken) = conv2d_with_statistics(x, weight, params)?;
                norm_act(&z, Statistics::Batch(taken), how)
            }
            NormBy::Stored(mean, variance) => {
                norm_act(&conv2d(x, weight, None, params)?, Statistics::Stored(mean, variance), how)
            }
        };
    }
    require_one_device("conv2d", &[x, weight])?;
    require_f32("conv2d", &[weight])?;
    let shape = params.shape("conv2d", x, weight.dims())?;
    let [oh, ow] = shape.output();
    let (dims, count) = ([shape.n, oh, ow, shape.o], shape.n * oh * ow);
    check(x, &dims, &how)?;
    match by {
        NormBy::Batch => check_count(count, &dims)?,
        NormBy::Stored(mean, variance) => check_stored(x, [mean, variance], shape.o)?,
    }
    let pooling =
        how.pooling.map(|[kernel, stride, padding]| pool_shape(&dims, kernel, stride, padding)).transpose()?;
    with_float!(x.dtype(), T => {
        let packed = pack_filter::<T>(Isa::current(), weight.as_slice(), &shape, Purpose::Training);
        let (mut mean, mut variance) = (vec![0.0; shape.o], vec![0.0; shape.o]);
        let mut z = None;
        let statistics = matches!(by, NormBy::Batch).then_some([&mut mean[..], &mut variance[..]]);
        let convolve = |maxima: Option<Maxima<T>>| {
            z = Some(Tensor::build(dims, |z| forward_and_take(x.as_slice(), &packed, &shape, z, statistics, maxima)));
        };
        let pooled = match pooling {
            None => {
                convolve(None);
                None
            }
            Some(shape) => Some(Pooled::new(how.gamma, shape, |signs, maxima, places| {
                convolve(Some(Maxima { signs, shape: &shape, maxima, places }));
            })),
        };
        let z = z.expect("just built");
        let (mean, variance) = match by {
            NormBy::Batch => (Tensor::from_slice(&mean, [shape.o])?, Tensor::from_slice(&variance, [shape.o])?),
            NormBy::Stored(mean, variance) => (mean.clone(), variance.clone()),
        };
        let of_batch = matches!(by, NormBy::Batch).then_some(count);
        let (y, saved) = normalise(&z, &mean, &variance, how, of_batch, pooled)?;
        let inputs: Vec<&Tensor> = [x, weight, how.gamma, how.beta].into_iter().chain(how.residual).collect();
        let y = record("conv2d_norm_act", y, &inputs, |_| {
            // Each gradient needs the other operand alone: a frozen filter's input is not kept.
            let saved_x = weight.requires_grad().then(|| x.detach());
            let saved_weight = x.requires_grad().then(|| weight.detach());
            Box::new(move |dy, needs| {
                let of_norm = [&[needs[0] || needs[1]], &needs[2..]].concat();
                let gradients = saved.gradients::<T>(dy, &of_norm)?;
                let isa = Isa::current();
                let of_conv = match (gradients.input, saved_x) {
                    (Some(dz), Some(x)) if takes_gradients_as_made::<T>(isa, &shape, saved_weight.is_some()) => {
                        let (x, make) = (x.as_slice(), |rows: Range<usize>, out: &mut [T]| dz.of_rows(rows, out));
                        let making = Making { make: &make, of: dz.reads() };
                        let mut dx = None;
                        let dweight = Tensor::build([shape.o, shape.kh, shape.kw, shape.c], |dw| match saved_weight {
                            None => backward_as_made(isa, x, &shape, making, dw, None),
                            Some(weight) => {
                                dx = Some(conv2d::input_gradient(needs, &shape, |dx, accumulate| {
                                    let with_input = (weight.as_slice(), dx, accumulate);
                                    backward_as_made(isa, x, &shape, making, dw, Some(with_input));
                                }));
                            }
                        });
                        [dx, Some(dweight)]
                    }
                    (Some(dz), x) => conv2d::gradients::<T>(&dz.whole::<T>(), x, saved_weight, &shape, needs),
                    (None, _) => [None, None],
                };
                Ok(of_conv.into_iter().chain([gradients.gamma, gradients.beta]).chain(gradients.residual).collect())
            })
        });
        Ok((y, of_batch.map(|count| BatchStatistics { mean, variance, count })))
    })
}
