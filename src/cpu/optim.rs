//! Optimiser updates, elementwise over one parameter.

use super::simd::vectorised;
use rayon::prelude::*;

/// Elements a task works on.
const CHUNK: usize = 1 << 14;

/// The scalars of one Adam step, bias corrections included.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct AdamStep {
    /// What decoupled weight decay leaves of a parameter, `1 - lr * weight_decay`.
    pub keep: f32,
    /// Rate over the first moment's bias correction, `lr / (1 - beta1^t)`.
    pub step_size: f32,
    /// Square root of the second moment's bias correction, `sqrt(1 - beta2^t)`.
    pub correction: f32,
    /// `1 - beta1`.
    pub one_minus_beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// `1 - beta2`.
    pub one_minus_beta2: f32,
    /// Added to the root, outside of it.
    pub eps: f32,
}

/// Adam with decoupled weight decay, in the order of operations PyTorch uses.
pub fn adam(step: AdamStep, parameter: &mut [f32], gradient: &[f32], first: &mut [f32], second: &mut [f32]) {
    let moments = first.par_chunks_mut(CHUNK).zip(second.par_chunks_mut(CHUNK));
    let values = parameter.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK));
    values.zip(moments).for_each(|((p, g), (m, v))| adam_chunk(step, p, g, m, v));
}

/// The scalars of one step of stochastic gradient descent.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct SgdStep {
    /// Learning rate.
    pub lr: f32,
    /// Times the parameter, added to the gradient.
    pub weight_decay: f32,
    /// Share of the last velocity that is kept; 0 for plain descent.
    pub momentum: f32,
    /// Whether to look ahead.
    pub nesterov: bool,
}

/// Stochastic gradient descent with momentum, in the order of operations PyTorch uses.
pub fn sgd(step: SgdStep, parameter: &mut [f32], gradient: &[f32], velocity: &mut [f32]) {
    let values = parameter.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK));
    values.zip(velocity.par_chunks_mut(CHUNK)).for_each(|((p, g), v)| sgd_chunk(step, p, g, v));
}

vectorised! {
    fn adam_chunk(step: AdamStep, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
        for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            *m += (g - *m) * step.one_minus_beta1;
            *v = *v * step.beta2 + step.one_minus_beta2 * g * g;
            let denominator = v.sqrt() / step.correction + step.eps;
            *p = *p * step.keep - step.step_size * (*m / denominator);
        }
    }

    fn sgd_chunk(step: SgdStep, p: &mut [f32], g: &[f32], velocity: &mut [f32]) {
        for ((p, &g), velocity) in p.iter_mut().zip(g).zip(velocity) {
            let g = g + step.weight_decay * *p;
            *velocity = *velocity * step.momentum + g;
            let update = if step.nesterov { g + step.momentum * *velocity } else { *velocity };
            *p -= step.lr * update;
        }
    }
}
