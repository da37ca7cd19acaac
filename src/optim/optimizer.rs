//! Adam, AdamW and SGD as PyTorch computes them.

use crate::autograd::Gradients;
use crate::cpu::optim::{AdamStep, SgdStep, adam, sgd};
use crate::cuda::CudaBuffer;
use crate::cuda::optim::{Entry, Tables, Update};
use crate::error::{Error, Result};
use crate::nn::Parameter;
use crate::tensor::{CpuBuffer, Device, Tensor, TensorId};
use std::borrow::Cow;
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

/// What the optimiser remembers of a parameter, where the parameter is.
struct State {
    step: u32,
    moments: Moments,
}

/// Adam: first and second moment; SGD: momentum, and nothing.
enum Moments {
    Cpu { first: CpuBuffer, second: CpuBuffer },
    Cuda { first: CudaBuffer, second: Option<CudaBuffer> },
}

/// The state of one parameter, to be kept in a file.
pub struct SavedState<'a> {
    /// The parameter's name.
    pub name: &'a str,
    /// Updates it has had.
    pub step: u32,
    /// First moment or momentum, as long as the parameter.
    pub first: Cow<'a, [f32]>,
    /// Second moment; empty for SGD.
    pub second: Cow<'a, [f32]>,
}

/// An optimiser, with the state of each parameter it has met.
pub struct Optimizer {
    /// What is trained, at which rates.
    pub groups: Vec<ParamGroup>,
    algorithm: Algorithm,
    states: HashMap<TensorId, State>,
    /// On CUDA: the tables of the last step, which fit the next if everything is where it was.
    update: Option<Update>,
}

impl Optimizer {
    /// For the parameters of `groups`.
    pub fn new(groups: Vec<ParamGroup>, algorithm: Algorithm) -> Self {
        Optimizer { groups, algorithm, states: HashMap::new(), update: None }
    }

    /// State that begins with `first` and `second`, zeros where they are empty.
    fn state_of(&self, parameter: &Parameter, step: u32, first: &[f32], second: &[f32]) -> Result<State> {
        let len = parameter.shape().numel();
        let has_second = matches!(self.algorithm, Algorithm::Adam { .. });
        let filled = |values: &[f32], len: usize| if values.is_empty() { vec![0.0; len] } else { values.to_vec() };
        let (first, second) = (filled(first, len), filled(second, if has_second { len } else { 0 }));
        let moments = match parameter.tensor().device() {
            Device::Cpu => {
                Moments::Cpu { first: CpuBuffer::from_slice(&first), second: CpuBuffer::from_slice(&second) }
            }
            Device::Cuda => Moments::Cuda {
                first: CudaBuffer::from_slice(&first)?,
                second: has_second.then(|| CudaBuffer::from_slice(&second)).transpose()?,
            },
        };
        Ok(State { step, moments })
    }

    /// Updates every parameter that has a gradient, at `factor` times its group's rate.
    pub fn step(&mut self, gradients: &Gradients, factor: f64) -> Result<()> {
        self.prepare(|parameter| gradients.by_id(parameter.id()).is_some())?;
        let Optimizer { groups, states, algorithm, .. } = self;
        let mut on_cuda = false;
        for group in groups.iter() {
            for parameter in &group.parameters {
                let Some(gradient) = gradients.by_id(parameter.id()) else { continue };
                let state = states.get_mut(&parameter.id()).expect("prepared above");
                state.step += 1;
                match &mut state.moments {
                    Moments::Cuda { .. } => on_cuda = true,
                    Moments::Cpu { first, second } => {
                        let (lr, decay, step) = (group.lr * factor, group.weight_decay, state.step);
                        let (first, second) = (first.as_mut_slice(), second.as_mut_slice());
                        parameter.update(|values| {
                            algorithm.update(values, gradient.as_slice(), first, second, step, lr, decay)
                        });
                    }
                }
            }
        }
        if on_cuda {
            self.set_rates(factor)?;
            self.update_on_cuda(gradients, None)?;
        }
        Ok(())
    }

    /// Makes state for the parameters that `trained` accepts and that have none yet.
    pub(crate) fn prepare(&mut self, trained: impl Fn(&Parameter) -> bool) -> Result<()> {
        for parameter in self.groups.iter().flat_map(|group| &group.parameters) {
            if trained(parameter) && !self.states.contains_key(&parameter.id()) {
                let state = self.state_of(parameter, 0, &[], &[])?;
                self.states.insert(parameter.id(), state);
            }
        }
        Ok(())
    }

    /// The state of every parameter that has been updated, in the order of the groups.
    pub fn state(&self) -> Result<Vec<SavedState<'_>>> {
        let parameters = self.groups.iter().flat_map(|group| &group.parameters);
        let known = parameters.filter_map(|parameter| Some((parameter, self.states.get(&parameter.id())?)));
        known
            .map(|(parameter, state)| {
                let (first, second) = match &state.moments {
                    Moments::Cpu { first, second } => (first.as_slice().into(), second.as_slice().into()),
                    Moments::Cuda { first, second } => {
                        let second = second.as_ref().map(|second| second.to_vec::<f32>()).transpose()?;
                        (first.to_vec::<f32>()?.into(), second.unwrap_or_default().into())
                    }
                };
                Ok(SavedState { name: parameter.name(), step: state.step, first, second })
            })
            .collect()
    }

    /// Puts back what [`Optimizer::state`] gave for a parameter of this name.
    pub fn restore(&mut self, saved: &SavedState) -> Result<()> {
        let found = self.groups.iter().flat_map(|group| &group.parameters).find(|p| p.name() == saved.name);
        let misfit = || Error::config(format!("optimiser state of {} does not fit", saved.name), "start the run anew");
        let parameter = found.ok_or_else(misfit)?;
        let (len, adam) = (parameter.shape().numel(), matches!(self.algorithm, Algorithm::Adam { .. }));
        if (saved.first.len(), saved.second.len()) != (len, if adam { len } else { 0 }) {
            return Err(misfit());
        }
        let state = self.state_of(parameter, saved.step, &saved.first, &saved.second)?;
        self.states.insert(parameter.id(), state);
        Ok(())
    }
}

/// On CUDA an update is split in two: what changes from step to step is written to the card by [`Optimizer::set_rates`], and one
/// launch, [`Optimizer::update_on_cuda`], does the rest. A captured step holds the launch.
impl Optimizer {
    /// Counts a step for the parameters that have state and are trained.
    pub(crate) fn count_step(&mut self) {
        for parameter in self.groups.iter().flat_map(|group| &group.parameters).filter(|p| p.is_trainable()) {
            if let Some(state) = self.states.get_mut(&parameter.id()) {
                state.step += 1;
            }
        }
    }

    /// Rates of the step that has just been counted. Parameters of a group have been trained for as many steps.
    pub(crate) fn set_rates(&mut self, factor: f64) -> Result<()> {
        let mut scalars = Vec::new();
        for group in &self.groups {
            let steps = group.parameters.iter().filter_map(|p| self.states.get(&p.id())).map(|state| state.step);
            let step = steps.max().unwrap_or(1).max(1);
            scalars.extend(self.algorithm.scalars(step, group.lr * factor, group.weight_decay));
        }
        match &self.update {
            Some(update) => update.set_scalars(&scalars),
            None => {
                self.update = Some(Update::new(&[], matches!(self.algorithm, Algorithm::Adam { .. }), &scalars)?);
                Ok(())
            }
        }
    }

    /// What a captured step reads, to be kept as long as it.
    pub(crate) fn tables(&self) -> Option<Arc<Tables>> {
        self.update.as_ref().and_then(Update::tables)
    }

    /// Updates every parameter that has a gradient, if `guard` `[]` is finite.
    pub(crate) fn update_on_cuda(&mut self, gradients: &Gradients, guard: Option<&Tensor>) -> Result<()> {
        let mut values = Vec::new();
        for (group, parameters) in self.groups.iter().map(|group| &group.parameters).enumerate() {
            for parameter in parameters {
                if let Some(gradient) = gradients.by_id(parameter.id()) {
                    values.push((group, parameter, parameter.for_update_on_cuda()?, gradient));
                }
            }
        }
        let entries: Vec<Entry> = values
            .iter()
            .map(|(group, parameter, value, gradient)| match &self.states[&parameter.id()].moments {
                Moments::Cuda { first, second } => {
                    Entry { value, gradient, first, second: second.as_ref(), group: *group }
                }
                Moments::Cpu { .. } => unreachable!("a parameter on cuda has its state there"),
            })
            .collect();
        let update = self.update.as_mut().expect("rates were set");
        update.fit(&entries)?;
        update.run(guard)?;
        values.iter().for_each(|(_, parameter, ..)| parameter.touch());
        Ok(())
    }
}

impl Algorithm {
    fn adam_step(&self, step: u32, lr: f64, decay: f64) -> AdamStep {
        let &Algorithm::Adam { beta1, beta2, eps } = self else { unreachable!("asked of Adam") };
        let t = step as i32;
        AdamStep {
            keep: (1.0 - lr * decay) as f32,
            step_size: (lr / (1.0 - beta1.powi(t))) as f32,
            correction: (1.0 - beta2.powi(t)).sqrt() as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            eps: eps as f32,
        }
    }

    fn sgd_step(&self, lr: f64, decay: f64) -> SgdStep {
        let &Algorithm::Sgd { momentum, nesterov } = self else { unreachable!("asked of SGD") };
        // The first momentum is the gradient itself: the zeros it starts from make it so.
        SgdStep { lr: lr as f32, weight_decay: decay as f32, momentum: momentum as f32, nesterov }
    }

    /// What a group's parameters are updated with, as the structs of optim.cu have it.
    fn scalars(&self, step: u32, lr: f64, decay: f64) -> Vec<f32> {
        match self {
            Algorithm::Adam { .. } => {
                let s = self.adam_step(step, lr, decay);
                let first = [s.keep, s.step_size, s.correction, s.one_minus_beta1];
                [first, [s.beta2, s.one_minus_beta2, s.eps, 0.0]].concat()
            }
            Algorithm::Sgd { .. } => {
                let s = self.sgd_step(lr, decay);
                vec![s.lr, s.weight_decay, s.momentum, f32::from(u8::from(s.nesterov))]
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "a parameter with all that belongs to its update")]
    fn update(
        &self,
        values: &mut [f32],
        gradient: &[f32],
        first: &mut [f32],
        second: &mut [f32],
        step: u32,
        lr: f64,
        decay: f64,
    ) {
        match self {
            Algorithm::Adam { .. } => adam(self.adam_step(step, lr, decay), values, gradient, first, second),
            Algorithm::Sgd { .. } => sgd(self.sgd_step(lr, decay), values, gradient, first),
        }
    }
}
