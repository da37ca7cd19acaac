//! Batch normalisation (Ioffe and Szegedy, 2015) of `x` `[..., C]`, channel by channel:
//! `y = gamma * (x - mean) / sqrt(var + eps) + beta`.
//!
//! With batch statistics, mean and (biased) variance are functions of `x`, and with M rows and `xhat` the normalised input
//! `dx = gamma / sqrt(var + eps) * (dy - mean(dy) - xhat * mean(dy * xhat))`. With stored statistics they are constants,
//! and `dx = gamma / sqrt(var + eps) * dy`. Either way `dgamma = sum(dy * xhat)` and `dbeta = sum(dy)`.

use super::{require_f32, require_vector};
use crate::autograd::record;
use crate::cpu::norm;
use crate::error::{Error, Result};
use crate::tensor::{Device, Tensor};

/// Statistics of a batch, for the running averages.
pub struct BatchStatistics {
    /// Mean of every channel, `[C]`.
    pub mean: Tensor,
    /// Biased variance of every channel, `[C]`.
    pub variance: Tensor,
    /// Rows they were taken over.
    pub count: usize,
}

/// Normalises by the statistics of `x` itself, and returns them. `gamma` and `beta` are `[C]`. Needs two rows at least:
/// the variance of one value says nothing.
pub fn batch_norm(x: &Tensor, gamma: &Tensor, beta: &Tensor, eps: f32) -> Result<(Tensor, BatchStatistics)> {
    let channels = check(x, &[gamma, beta])?;
    let count = x.numel() / channels;
    if count < 2 {
        return Err(Error::shape("batch_norm", "two values a channel at least, for batch statistics", &[x.dims()]));
    }
    let mut variance = None;
    let mean = match x.device() {
        Device::Cpu => Tensor::build([channels], |mean| {
            variance = Some(Tensor::build([channels], |variance| norm::statistics(x.as_slice(), mean, variance)));
        }),
    };
    let variance = variance.expect("just built");
    let y = apply(x, gamma, beta, &mean, &variance, eps, Some(count));
    Ok((y, BatchStatistics { mean, variance, count }))
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
    check(x, &[gamma, beta, mean, variance])?;
    Ok(apply(x, gamma, beta, mean, variance, eps, None))
}

fn check(x: &Tensor, vectors: &[&Tensor]) -> Result<usize> {
    require_f32("batch_norm", &[x])?;
    match x.dims().last() {
        Some(&channels) if channels > 0 => {
            vectors.iter().try_for_each(|vector| require_vector("batch_norm", vector, channels))?;
            Ok(channels)
        }
        _ => Err(Error::shape("batch_norm", "[..., C]", &[x.dims()])),
    }
}

/// `1 / sqrt(variance + eps)`.
pub(crate) fn reciprocal_deviation(variance: &[f32], eps: f32) -> Vec<f32> {
    variance.iter().map(|&v| (1.0 / (f64::from(v) + f64::from(eps)).sqrt()) as f32).collect()
}

/// Normalises and records. `count` is the number of rows if the statistics are those of `x`.
fn apply(
    x: &Tensor,
    gamma: &Tensor,
    beta: &Tensor,
    mean: &Tensor,
    variance: &Tensor,
    eps: f32,
    count: Option<usize>,
) -> Tensor {
    let rstd = reciprocal_deviation(variance.as_slice(), eps);
    let y = match x.device() {
        Device::Cpu => Tensor::build(x.shape().clone(), |y| {
            let (scale, shift) = scale_and_shift(gamma.as_slice(), beta.as_slice(), mean.as_slice(), &rstd);
            norm::affine(x.as_slice(), &scale, &shift, y)
        }),
    };
    record("batch_norm", y, &[x, gamma, beta], |_| {
        let (x, gamma, mean) = (x.detach(), gamma.detach(), mean.detach());
        Box::new(move |dy, needs| {
            let channels = rstd.len();
            let mut dbeta = vec![0.0; channels];
            let mut dgamma = vec![0.0; channels];
            // Batch statistics need both sums for the input's gradient as well.
            if count.is_some() || needs[1] || needs[2] {
                let (x, dy, mean) = (x.as_slice(), dy.as_slice(), mean.as_slice());
                norm::parameter_gradients(x, dy, mean, &rstd, &mut dgamma, &mut dbeta);
            }
            let dx = needs[0].then(|| {
                let [a, b, c] = input_coefficients(gamma.as_slice(), mean.as_slice(), &rstd, &dgamma, &dbeta, count);
                dy.map_in_place(|dy| norm::backward_input(x.as_slice(), &a, &b, &c, dy))
            });
            let vector = |values: Vec<f32>| Tensor::from_slice(&values, [channels]);
            let dgamma = needs[1].then(|| vector(dgamma)).transpose()?;
            let dbeta = needs[2].then(|| vector(dbeta)).transpose()?;
            Ok(vec![dx, dgamma, dbeta])
        })
    })
}

/// The affine map that normalisation amounts to once the statistics are known.
pub(crate) fn scale_and_shift(gamma: &[f32], beta: &[f32], mean: &[f32], rstd: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let scale: Vec<f32> = gamma.iter().zip(rstd).map(|(g, r)| g * r).collect();
    let shift = beta.iter().zip(mean).zip(&scale).map(|((b, m), s)| b - m * s).collect();
    (scale, shift)
}

/// `a`, `b`, `c` of `dx = a * dy + b * x + c`, the gradient above with its terms collected.
fn input_coefficients(
    gamma: &[f32],
    mean: &[f32],
    rstd: &[f32],
    dgamma: &[f32],
    dbeta: &[f32],
    count: Option<usize>,
) -> [Vec<f32>; 3] {
    let a: Vec<f32> = gamma.iter().zip(rstd).map(|(g, r)| g * r).collect();
    let Some(count) = count else {
        return [a, vec![0.0; mean.len()], vec![0.0; mean.len()]];
    };
    let count = count as f32;
    let b: Vec<f32> = (0..a.len()).map(|i| -a[i] * rstd[i] * dgamma[i] / count).collect();
    let c = (0..a.len()).map(|i| -a[i] * dbeta[i] / count - b[i] * mean[i]).collect();
    [a, b, c]
}
