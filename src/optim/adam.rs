//! Adam (Kingma and Ba, 2015) as PyTorch computes it.

use super::ParamGroup;
use crate::autograd::Gradients;
use crate::cpu::optim::{AdamStep, adam};
use crate::tensor::{CpuBuffer, TensorId};
use std::collections::HashMap;

/// Constants of [`Adam`]; the defaults are PyTorch's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
}

impl Default for AdamConfig {
    fn default() -> Self {
        AdamConfig { beta1: 0.9, beta2: 0.999, eps: 1e-8 }
    }
}

/// What Adam remembers of a parameter.
struct State {
    step: i32,
    first: CpuBuffer,
    second: CpuBuffer,
}

/// The optimiser, with the state of each parameter it has met.
pub struct Adam {
    /// What is trained, at which rates; rates may be changed between steps.
    pub groups: Vec<ParamGroup>,
    config: AdamConfig,
    states: HashMap<TensorId, State>,
}

impl Adam {
    /// For the parameters of `groups`.
    pub fn new(groups: Vec<ParamGroup>, config: AdamConfig) -> Self {
        Adam { groups, config, states: HashMap::new() }
    }

    /// Updates every parameter that has a gradient.
    pub fn step(&mut self, gradients: &Gradients) {
        let AdamConfig { beta1, beta2, eps } = self.config;
        for group in &self.groups {
            for parameter in &group.parameters {
                let Some(gradient) = gradients.by_id(parameter.id()) else { continue };
                let zeros = || CpuBuffer::from_slice(&vec![0.0f32; gradient.numel()]);
                let state = self.states.entry(parameter.id());
                let state = state.or_insert_with(|| State { step: 0, first: zeros(), second: zeros() });
                state.step += 1;
                let step = AdamStep {
                    step_size: (group.lr / (1.0 - beta1.powi(state.step))) as f32,
                    correction: (1.0 - beta2.powi(state.step)).sqrt() as f32,
                    one_minus_beta1: (1.0 - beta1) as f32,
                    beta2: beta2 as f32,
                    one_minus_beta2: (1.0 - beta2) as f32,
                    eps: eps as f32,
                };
                let (first, second) = (state.first.as_mut_slice(), state.second.as_mut_slice());
                parameter.update(|values| adam(step, values, gradient.as_slice(), first, second));
            }
        }
    }
}
