//! Adam, AdamW and SGD as PyTorch computes them.

use crate::autograd::Gradients;
use crate::cpu::optim::{AdamStep, SgdStep, adam, sgd};
use crate::error::{Error, Result};
use crate::nn::Parameter;
use crate::tensor::{CpuBuffer, TensorId};
use std::collections::HashMap;
use std::sync::Arc;

/// The rule of an update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Algorithm {
    /// Kingma and Ba, "Adam", 2015; with a weight decay that is decoupled from the gradient it is AdamW (Loshchilov and
    /// Hutter, "Decoupled weight decay regularization", 2019).
    Adam {
        /// Decay of the first moment.
        beta1: f64,
        /// Decay of the second moment.
        beta2: f64,
        /// Added to the root of the second moment, outside of it.
        eps: f64,
    },
    /// Stochastic gradient descent; its weight decay is added to the gradient.
    Sgd {
        /// Share of the last update that is kept.
        momentum: f64,
        /// Whether the gradient is taken as if the momentum had been applied (Sutskever et al., 2013).
        nesterov: bool,
    },
}

impl Algorithm {
    /// Adam with PyTorch's constants.
    pub const ADAM: Algorithm = Algorithm::Adam { beta1: 0.9, beta2: 0.999, eps: 1e-8 };
}

/// Parameters that share a rate.
pub struct ParamGroup {
    /// What is trained.
    pub parameters: Vec<Arc<Parameter>>,
    /// Learning rate at its peak; the schedule's factor is applied to it.
    pub lr: f64,
    /// Weight decay.
    pub weight_decay: f64,
}

impl ParamGroup {
    /// Without weight decay.
    pub fn new(parameters: Vec<Arc<Parameter>>, lr: f64) -> Self {
        ParamGroup { parameters, lr, weight_decay: 0.0 }
    }
}

/// What the optimiser remembers of a parameter.
struct State {
    step: u32,
    /// Adam: first moment; SGD: momentum.
    first: CpuBuffer,
    /// Adam: second moment; SGD: nothing.
    second: CpuBuffer,
}

/// The state of one parameter, to be kept in a file.
pub struct SavedState<'a> {
    /// The parameter's name.
    pub name: &'a str,
    /// Updates it has had.
    pub step: u32,
    /// First moment or momentum, as long as the parameter.
    pub first: &'a [f32],
    /// Second moment; empty for SGD.
    pub second: &'a [f32],
}

/// An optimiser, with the state of each parameter it has met.
pub struct Optimizer {
    /// What is trained, at which rates.
    pub groups: Vec<ParamGroup>,
    algorithm: Algorithm,
    states: HashMap<TensorId, State>,
}

impl Optimizer {
    /// For the parameters of `groups`.
    pub fn new(groups: Vec<ParamGroup>, algorithm: Algorithm) -> Self {
        Optimizer { groups, algorithm, states: HashMap::new() }
    }

    fn fresh_state(&self, len: usize) -> State {
        let zeros = |len: usize| CpuBuffer::from_slice(&vec![0.0f32; len]);
        let second = match self.algorithm {
            Algorithm::Adam { .. } => len,
            Algorithm::Sgd { .. } => 0,
        };
        State { step: 0, first: zeros(len), second: zeros(second) }
    }

    /// Updates every parameter that has a gradient, at `factor` times its group's rate.
    pub fn step(&mut self, gradients: &Gradients, factor: f64) {
        for group in 0..self.groups.len() {
            for i in 0..self.groups[group].parameters.len() {
                let parameter = self.groups[group].parameters[i].clone();
                let Some(gradient) = gradients.by_id(parameter.id()) else { continue };
                let mut state = match self.states.remove(&parameter.id()) {
                    Some(state) => state,
                    None => self.fresh_state(gradient.numel()),
                };
                state.step += 1;
                let (lr, decay) = (self.groups[group].lr * factor, self.groups[group].weight_decay);
                parameter.update(|values| self.algorithm.update(values, gradient.as_slice(), &mut state, lr, decay));
                self.states.insert(parameter.id(), state);
            }
        }
    }

    /// The state of every parameter that has been updated, in the order of the groups.
    pub fn state(&self) -> impl Iterator<Item = SavedState<'_>> {
        self.groups.iter().flat_map(|group| &group.parameters).filter_map(|parameter| {
            let state = self.states.get(&parameter.id())?;
            let (first, second) = (state.first.as_slice(), state.second.as_slice());
            Some(SavedState { name: parameter.name(), step: state.step, first, second })
        })
    }

    /// Puts back what [`Optimizer::state`] gave for a parameter of this name.
    pub fn restore(&mut self, saved: &SavedState) -> Result<()> {
        let found = self.groups.iter().flat_map(|group| &group.parameters).find(|p| p.name() == saved.name);
        let misfit = || Error::config(format!("optimiser state of {} does not fit", saved.name), "start the run anew");
        let parameter = found.ok_or_else(misfit)?;
        let mut state = self.fresh_state(parameter.shape().numel());
        let lengths = (state.first.as_slice::<f32>().len(), state.second.as_slice::<f32>().len());
        if lengths != (saved.first.len(), saved.second.len()) {
            return Err(misfit());
        }
        state.step = saved.step;
        state.first.as_mut_slice().copy_from_slice(saved.first);
        state.second.as_mut_slice().copy_from_slice(saved.second);
        self.states.insert(parameter.id(), state);
        Ok(())
    }
}

impl Algorithm {
    fn update(&self, values: &mut [f32], gradient: &[f32], state: &mut State, lr: f64, decay: f64) {
        match *self {
            Algorithm::Adam { beta1, beta2, eps } => {
                let t = state.step as i32;
                let step = AdamStep {
                    keep: (1.0 - lr * decay) as f32,
                    step_size: (lr / (1.0 - beta1.powi(t))) as f32,
                    correction: (1.0 - beta2.powi(t)).sqrt() as f32,
                    one_minus_beta1: (1.0 - beta1) as f32,
                    beta2: beta2 as f32,
                    one_minus_beta2: (1.0 - beta2) as f32,
                    eps: eps as f32,
                };
                adam(step, values, gradient, state.first.as_mut_slice(), state.second.as_mut_slice());
            }
            Algorithm::Sgd { momentum, nesterov } => {
                let step = SgdStep {
                    lr: lr as f32,
                    weight_decay: decay as f32,
                    // The first momentum is the gradient itself: the zeros it starts from make it so.
                    momentum: momentum as f32,
                    nesterov,
                };
                sgd(step, values, gradient, state.first.as_mut_slice());
            }
        }
    }
}
