//! Batch normalisation (Ioffe and Szegedy, 2015) of `x` `[..., C]`, channel by channel, with what follows it in a residual
//! network: `y = pool(act(gamma * (x - mean) / sqrt(var + eps) + beta + residual))`, where `act` may be a ReLU, and `pool` max pooling.
//!
//! With batch statistics, mean and (biased) variance are functions of `x`. With M rows, `xhat` the normalised input, and `g`
//! the part of `dy` that the ReLU lets pass, `dx = gamma / sqrt(var + eps) * (g - mean(g) - xhat * mean(g * xhat))`. With
//! stored statistics they are constants, and `dx = gamma / sqrt(var + eps) * g`. Either way `dgamma = sum(g * xhat)`,
//! `dbeta = sum(g)` and `dresidual = g`.

mod backward;

use super::pool::{max_pool2d, pool_shape};
use super::{require_float, require_one_device, require_vector};
use crate::autograd::record;
use crate::cpu::pool::{PoolShape, signed_max_pool};
use crate::cpu::{Float, norm, norm_pool};
use crate::cuda;
use crate::error::{Error, Result};
use crate::tensor::{CpuBuffer, Device, Tensor, with_float};
pub(super) use backward::Saved;

/// Statistics of a batch, for the running averages.
#[derive(Clone)]
pub struct BatchStatistics {
    /// Mean of every channel, `[C]`.
    pub mean: Tensor,
    /// Biased variance of every channel, `[C]`.
    pub variance: Tensor,
    /// Rows they were taken over.
    pub count: usize,
}

/// What to normalise by.
pub enum Statistics<'a> {
    /// The statistics of the input itself, which needs two rows at least: the variance of one value says nothing. They are
    /// given if the convolution before has taken them.
    Batch(Option<BatchStatistics>),
    /// Mean and variance that stay as they are, `[C]`.
    Stored(&'a Tensor, &'a Tensor),
}

/// The map after normalisation.
#[derive(Clone, Copy)]
pub struct Norm<'a> {
    /// Scale, `[C]`.
    pub gamma: &'a Tensor,
    /// Shift, `[C]`.
    pub beta: &'a Tensor,
    /// Added to the variance.
    pub eps: f32,
    /// Added to the result, shaped as it.
    pub residual: Option<&'a Tensor>,
    /// Whether a ReLU comes after that.
    pub relu: bool,
    /// The max pooling of `[N, H, W, C]` that comes last: extent of the windows, stride and padding.
    pub pooling: Option<[usize; 3]>,
}

/// Normalises by the statistics of `x` itself, and returns them. `gamma` and `beta` are `[C]`.
pub fn batch_norm(x: &Tensor, gamma: &Tensor, beta: &Tensor, eps: f32) -> Result<(Tensor, BatchStatistics)> {
    let (y, statistics) =
        norm_act(x, Statistics::Batch(None), Norm { gamma, beta, eps, residual: None, relu: false, pooling: None })?;
    Ok((y, statistics.expect("batch statistics were asked for")))
}

/// Normalises by given statistics, which stay as they are. All vectors are `[C]`.
pub fn batch_norm_stored(
    x: &Tensor,
    gamma: &Tensor,
    beta: &Tensor,
    mean: &Tensor,
    variance: &Tensor,
    eps: f32,
) -> Result<Tensor> {
    let how = Norm { gamma, beta, eps, residual: None, relu: false, pooling: None };
    Ok(norm_act(x, Statistics::Stored(mean, variance), how)?.0)
}

/// Normalises, adds the residual, applies the ReLU, in one pass, and pools, on the CPU before the other two if there is no residual;
/// returns the batch's statistics if it used them.
pub fn norm_act(x: &Tensor, by: Statistics, how: Norm) -> Result<(Tensor, Option<BatchStatistics>)> {
    let channels = check(x, x.dims(), &how)?;
    let statistics = match by {
        Statistics::Stored(mean, variance) => {
            check_stored(x, [mean, variance], channels)?;
            return Ok((apply(x, mean, variance, how, None)?, None));
        }
        Statistics::Batch(Some(given)) => given,
        Statistics::Batch(None) => take(x, channels)?,
    };
    let y = apply(x, &statistics.mean, &statistics.variance, how, Some(statistics.count))?;
    Ok((y, Some(statistics)))
}

/// The number of channels, if the operands fit what is to be normalised: of extents `dims`, on the device of `x` and of its type.
pub(super) fn check(x: &Tensor, dims: &[usize], how: &Norm) -> Result<usize> {
    require_float("batch_norm", &[x])?;
    let channels = match dims.last() {
        Some(&channels) if channels > 0 => channels,
        _ => return Err(Error::shape("batch_norm", "[..., C]", &[dims])),
    };
    for vector in [how.gamma, how.beta] {
        require_vector("batch_norm", vector, channels)?;
    }
    require_one_device("batch_norm", &[x, how.gamma, how.beta])?;
    if let Some(residual) = how.residual {
        require_one_device("batch_norm", &[x, residual])?;
        require_float("batch_norm", &[x, residual])?;
        if residual.dims() != dims {
            return Err(Error::shape("batch_norm", "a residual shaped as the input", &[dims, residual.dims()]));
        }
    }
    Ok(channels)
}

/// An error unless stored statistics fit what is normalised by them.
pub(super) fn check_stored(x: &Tensor, [mean, variance]: [&Tensor; 2], channels: usize) -> Result<()> {
    for vector in [mean, variance] {
        require_vector("batch_norm", vector, channels)?;
    }
    require_one_device("batch_norm", &[x, mean, variance])
}

/// An error unless a channel has values enough for statistics: the variance of one says nothing.
pub(super) fn check_count(count: usize, dims: &[usize]) -> Result<()> {
    if count < 2 {
        return Err(Error::shape(
            "batch_norm",
            "two values a channel at least for batch statistics (more pictures, or larger ones)",
            &[dims],
        ));
    }
    Ok(())
}

fn take(x: &Tensor, channels: usize) -> Result<BatchStatistics> {
    let count = x.numel() / channels;
    check_count(count, x.dims())?;
    match x.device() {
        Device::Cpu => {
            let mut variance = None;
            let mean = Tensor::build([channels], |mean| {
                variance = Some(Tensor::build([channels], |variance| {
                    with_float!(x.dtype(), T => norm::statistics::<T>(x.as_slice(), mean, variance));
                }));
            });
            Ok(BatchStatistics { mean, variance: variance.expect("just built"), count })
        }
        Device::Cuda => {
            let moments = cuda::norm::statistics(x)?;
            Ok(BatchStatistics { mean: moments.mean, variance: moments.variance, count })
        }
    }
}

/// `1 / sqrt(variance + eps)`.
pub(crate) fn reciprocal_deviation(variance: &[f32], eps: f32) -> Vec<f32> {
    variance.iter().map(|&v| (1.0 / (f64::from(v) + f64::from(eps)).sqrt()) as f32).collect()
}

/// Normalises and records. `count` is the number of rows if the statistics are those of `x`.
fn apply(x: &Tensor, mean: &Tensor, variance: &Tensor, how: Norm, count: Option<usize>) -> Result<Tensor> {
    let Norm { gamma, beta, residual, pooling, .. } = how;
    if let Some([kernel, stride, padding]) = pooling
        && (x.device() == Device::Cuda || residual.is_some())
    {
        let y = apply(x, mean, variance, Norm { pooling: None, ..how }, count)?;
        return max_pool2d(&y, kernel, stride, padding);
    }
    let pooled = match pooling {
        None => None,
        Some([kernel, stride, padding]) => {
            let shape = pool_shape(x.dims(), kernel, stride, padding)?;
            with_float!(x.dtype(), T => Some(Pooled::new::<T>(gamma, shape, |signs, maxima, places| {
                signed_max_pool(x.as_slice::<T>(), signs, &shape, maxima, places)
            })))
        }
    };
    let (y, saved) = normalise(x, mean, variance, how, count, pooled)?;
    let inputs: Vec<&Tensor> = [x, gamma, beta].into_iter().chain(residual).collect();
    Ok(record("batch_norm", y, &inputs, |_| {
        Box::new(move |dy, needs| match dy.device() {
            Device::Cpu => with_float!(dy.dtype(), T => saved.backward::<T>(dy, needs)),
            Device::Cuda => saved.backward_on_cuda(dy, needs),
        })
    }))
}

/// Normalises, and gives what the backward pass reads as well; on the CPU what is to be pooled is so already.
pub(super) fn normalise(
    x: &Tensor,
    mean: &Tensor,
    variance: &Tensor,
    how: Norm,
    count: Option<usize>,
    pooled: Option<Pooled>,
) -> Result<(Tensor, Saved)> {
    let Norm { gamma, beta, eps, residual, relu, .. } = how;
    let y = match x.device() {
        Device::Cpu => with_float!(x.dtype(), T => {
            let rstd = reciprocal_deviation(variance.as_slice(), eps);
            let (scale, shift) = scale_and_shift(gamma.as_slice(), beta.as_slice(), mean.as_slice(), &rstd);
            match &pooled {
                None => Tensor::build(x.shape().clone(), |y| {
                    norm::affine::<T>(x.as_slice(), &scale, &shift, residual.map(|r| r.as_slice()), relu, y)
                }),
                Some(Pooled { maxima, signs, .. }) => Tensor::build(maxima.shape().clone(), |y| {
                    norm::affine::<T>(maxima.as_slice(), &product(&scale, signs), &shift, None, relu, y);
                }),
            }
        }),
        Device::Cuda => {
            let affine = cuda::norm::Affine { gamma, beta, mean, variance, eps };
            cuda::norm::normalise(x, affine, residual, relu)?
        }
    };
    let saved = Saved {
        x: x.detach(),
        // The next layer keeps it as well; where it is positive the ReLU lets pass.
        y: (relu && (residual.is_some() || x.device() == Device::Cuda)).then(|| y.clone()),
        relu,
        pooled,
        gamma: gamma.detach(),
        beta: beta.detach(),
        mean: mean.detach(),
        variance: variance.detach(),
        eps,
        count,
    };
    Ok((y, saved))
}

/// What was pooled: [`signed_max_pool`] of the input.
pub(super) struct Pooled {
    maxima: Tensor,
    places: CpuBuffer,
    shape: PoolShape,
    signs: Vec<f32>,
}

impl Pooled {
    /// Of a norm's scale: its sign is that of what values are multiplied with. `pool` is given a channel's signs and fills maxima and
    /// places.
    pub(super) fn new<T: Float>(
        gamma: &Tensor,
        shape: PoolShape,
        pool: impl FnOnce(&[f32], &mut [T], &mut [u8]),
    ) -> Pooled {
        let ([oh, ow], signs) = (shape.output(), norm_pool::signs(gamma.as_slice()));
        let dims = [shape.n, oh, ow, shape.c];
        let mut places = CpuBuffer::take::<u8>(dims.iter().product());
        let maxima = Tensor::build(dims, |maxima| pool(&signs, maxima, places.as_mut_slice()));
        Pooled { maxima, places, shape, signs }
    }
}

/// Element by element.
fn product(a: &[f32], b: &[f32]) -> Vec<f32> {
    a.iter().zip(b).map(|(a, b)| a * b).collect()
}

/// The affine map that normalisation amounts to once the statistics are known.
pub(crate) fn scale_and_shift(gamma: &[f32], beta: &[f32], mean: &[f32], rstd: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let scale = product(gamma, rstd);
    let shift = beta.iter().zip(mean).zip(&scale).map(|((b, m), s)| b - m * s).collect();
    (scale, shift)
}
