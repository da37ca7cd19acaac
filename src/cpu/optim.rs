//! Optimiser updates, elementwise over one parameter.

use super::simd::vectorised;
use rayon::prelude::*;

/// Elements a task works on.
const CHUNK: usize = 1 << 14;

/// The scalars of one Adam step, bias corrections included.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct AdamStep {
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

/// Kingma and Ba, "Adam", 2015, in the order of operations PyTorch uses.
pub fn adam(step: AdamStep, parameter: &mut [f32], gradient: &[f32], first: &mut [f32], second: &mut [f32]) {
    let moments = first.par_chunks_mut(CHUNK).zip(second.par_chunks_mut(CHUNK));
    let values = parameter.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK));
    values.zip(moments).for_each(|((p, g), (m, v))| adam_chunk(step, p, g, m, v));
}

vectorised! {
    fn adam_chunk(step: AdamStep, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
        for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            *m += (g - *m) * step.one_minus_beta1;
            *v = *v * step.beta2 + step.one_minus_beta2 * g * g;
            let denominator = v.sqrt() / step.correction + step.eps;
            *p -= step.step_size * (*m / denominator);
        }
    }
}
