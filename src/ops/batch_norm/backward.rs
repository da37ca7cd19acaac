//! The gradients of a batch norm, to its input, scale and shift, and what is added after it.

use super::{Pooled, product, reciprocal_deviation, scale_and_shift};
use crate::cpu::norm_backward::{self, Gate};
use crate::cpu::norm_pool::OfMaxima;
use crate::cpu::pool::PoolShape;
use crate::cpu::{Float, elementwise};
use crate::cuda;
use crate::error::Result;
use crate::tensor::{CpuBuffer, Tensor};
use std::ops::Range;

/// What the backward pass reads.
pub(in crate::ops) struct Saved {
    pub(super) x: Tensor,
    /// What the ReLU gave, if that is not a function of `x` alone.
    pub(super) y: Option<Tensor>,
    pub(super) relu: bool,
    pub(super) pooled: Option<Pooled>,
    pub(super) gamma: Tensor,
    pub(super) beta: Tensor,
    pub(super) mean: Tensor,
    pub(super) variance: Tensor,
    pub(super) eps: f32,
    pub(super) count: Option<usize>,
}

/// The gradient to a norm's input on the CPU, still to be computed: `a * g + b * x + c`, where `g` is what the gate lets pass of `dy`.
pub(in crate::ops) struct InputGradient {
    x: Tensor,
    dy: Tensor,
    /// `scale` and `shift`, if a ReLU's gate is still to be applied.
    gate: Option<[Vec<f32>; 2]>,
    coefficients: [Vec<f32>; 3],
    /// The places that maxima come from, if they were pooled.
    pooled: Option<(CpuBuffer, PoolShape)>,
}

impl InputGradient {
    fn gate<T: Float>(&self) -> Gate<'_, T> {
        self.gate.as_ref().map_or(Gate::Open, |[scale, shift]| Gate::Affine([scale, shift]))
    }

    /// The largest of what it is made of, a value for each of it.
    pub(in crate::ops) fn reads<T: Float>(&self) -> &[T] {
        self.x.as_slice()
    }

    /// That of some rows of all pictures', for an input `[N, H, ...]`.
    pub(in crate::ops) fn of_rows<T: Float>(&self, rows: Range<usize>, dx: &mut [T]) {
        let row_len = self.x.dims()[2..].iter().product::<usize>();
        let values = rows.start * row_len..rows.end * row_len;
        let (x, dy) = (&self.x.as_slice::<T>()[values.clone()], self.dy.as_slice::<T>());
        match &self.pooled {
            Some((places, shape)) => {
                let of = OfMaxima::new(dy, places.as_slice(), shape);
                of.backward_input_of_rows(x, self.gate(), self.coefficients(), rows, dx);
            }
            None => norm_backward::backward_input(x, self.gate(), self.coefficients(), Some(&dy[values]), dx),
        }
    }

    /// That of all of the input.
    pub(in crate::ops) fn whole<T: Float>(mut self) -> Tensor {
        let x = self.x.clone();
        let x = x.as_slice::<T>();
        if let Some((places, shape)) = &self.pooled {
            let of = OfMaxima::new(self.dy.as_slice(), places.as_slice(), shape);
            return Tensor::build(self.x.shape().clone(), |dx| {
                of.backward_input(x, self.gate(), self.coefficients(), dx);
            });
        }
        // In place, if nothing else has the gradient.
        let dy = std::mem::replace(&mut self.dy, self.x.clone());
        dy.replaced(|dy, dx| norm_backward::backward_input(x, self.gate(), self.coefficients(), dy, dx))
    }

    fn coefficients(&self) -> [&[f32]; 3] {
        self.coefficients.each_ref().map(|vector| &vector[..])
    }
}

/// The gradients of a norm.
pub(in crate::ops) struct Gradients {
    pub(in crate::ops) input: Option<InputGradient>,
    pub(in crate::ops) gamma: Option<Tensor>,
    pub(in crate::ops) beta: Option<Tensor>,
    /// As many as there are residuals.
    pub(in crate::ops) residual: Option<Option<Tensor>>,
}

impl Saved {
    /// The gradients that are needed, on the CPU.
    pub(super) fn backward<T: Float>(self, dy: Tensor, needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let Gradients { input, gamma, beta, residual } = self.gradients::<T>(dy, needs)?;
        let dx = input.map(|input| input.whole::<T>());
        Ok([dx, gamma, beta].into_iter().chain(residual).collect())
    }

    /// Of the input, the scale, the shift, and the residual if there is one, those that are needed; on the CPU.
    pub(in crate::ops) fn gradients<T: Float>(self, dy: Tensor, needs: &[bool]) -> Result<Gradients> {
        let (mean, gamma) = (self.mean.as_slice::<f32>(), self.gamma.as_slice::<f32>());
        let (channels, rstd) = (mean.len(), reciprocal_deviation(self.variance.as_slice(), self.eps));
        let (mut dgamma, mut dbeta) = (vec![0.0; channels], vec![0.0; channels]);
        let (scale, shift) = scale_and_shift(gamma, self.beta.as_slice(), mean, &rstd);
        let affine = || if self.relu { Gate::Affine([&scale, &shift]) } else { Gate::Open };
        // Batch statistics need both sums for the input's gradient as well.
        let sums_are_needed = self.count.is_some() || needs[1] || needs[2];
        let mut dy = dy;
        if let Some(Pooled { maxima, signs, .. }) = &self.pooled {
            if sums_are_needed {
                let (scale, mean) = (product(&scale, signs), product(mean, signs));
                let gate = if self.relu { Gate::Affine([&scale, &shift]) } else { Gate::Open };
                dy = dy.map_in_place(|dy| {
                    let x = maxima.as_slice::<T>();
                    norm_backward::parameter_gradients(x, gate, dy, [&mean, &rstd], &mut dgamma, &mut dbeta);
                });
                dgamma = product(&dgamma, signs);
            }
        } else {
            let gate = self.y.as_ref().map_or_else(affine, |y| Gate::Outputs(y.as_slice()));
            if sums_are_needed {
                let x = self.x.as_slice::<T>();
                dy = dy.map_in_place(|dy| {
                    norm_backward::parameter_gradients(x, gate, dy, [mean, &rstd], &mut dgamma, &mut dbeta);
                });
            } else if let Gate::Outputs(y) = gate {
                dy = dy.map_in_place(|dy| elementwise::relu_backward::<T>(y, dy));
            }
        }
        let residual = needs.get(3).map(|&needed| needed.then(|| dy.clone()));
        let coefficients = input_coefficients(&scale, mean, &rstd, &dgamma, &dbeta, self.count);
        let vector = |values: Vec<f32>| Tensor::from_slice(&values, [channels]);
        Ok(Gradients {
            gamma: needs[1].then(|| vector(dgamma)).transpose()?,
            beta: needs[2].then(|| vector(dbeta)).transpose()?,
            residual,
            // Outputs have let pass what they do.
            input: needs[0].then(|| InputGradient {
                x: self.x.clone(),
                dy,
                gate: (self.relu && self.y.is_none()).then_some([scale, shift]),
                coefficients,
                pooled: self.pooled.map(|Pooled { places, shape, .. }| (places, shape)),
            }),
        })
    }

    /// The same on a card.
    pub(super) fn backward_on_cuda(self, dy: Tensor, needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let affine = cuda::norm::Affine {
            gamma: &self.gamma,
            beta: &self.beta,
            mean: &self.mean,
            variance: &self.variance,
            eps: self.eps,
        };
        let wants_residual = needs.get(3) == Some(&true);
        let gradients = cuda::norm::backward(
            &self.x,
            self.y.as_ref(),
            &dy,
            affine,
            self.count.is_some(),
            needs[0],
            wants_residual,
        )?;
        let parameters = [(needs[1], gradients.dgamma), (needs[2], gradients.dbeta)];
        let parameters = parameters.into_iter().map(|(needed, gradient)| needed.then_some(gradient));
        let residual = needs.get(3).map(|_| gradients.dresidual);
        Ok([gradients.dx].into_iter().chain(parameters).chain(residual).collect())
    }
}

/// `a`, `b`, `c` of `dx = a * g + b * x + c`, the gradient above with its terms collected; `a` is the norm's scale.
fn input_coefficients(
    a: &[f32],
    mean: &[f32],
    rstd: &[f32],
    dgamma: &[f32],
    dbeta: &[f32],
    count: Option<usize>,
) -> [Vec<f32>; 3] {
    let Some(count) = count else {
        return [a.to_vec(), vec![0.0; mean.len()], vec![0.0; mean.len()]];
    };
    let count = count as f32;
    let b: Vec<f32> = (0..a.len()).map(|i| -a[i] * rstd[i] * dgamma[i] / count).collect();
    let c = (0..a.len()).map(|i| -a[i] * dbeta[i] / count - b[i] * mean[i]).collect();
    [a.to_vec(), b, c]
}
