//! An exponential moving average of the network's values (Polyak and Juditsky, 1992), which often generalises better than
//! the values themselves.

use crate::cpu::elementwise::blend;
use crate::cuda;
use crate::error::Result;
use crate::nn::{Parameter, ResNet18, Stage};
use crate::tensor::{Device, Tensor};
use std::sync::Arc;

/// Averages of everything that training changes: parameters and running statistics.
pub struct Ema {
    decay: f64,
    averages: Vec<(Arc<Parameter>, Tensor)>,
}

impl Ema {
    /// Starts from the network's values.
    pub fn new(network: &ResNet18, decay: f64) -> Self {
        let mut averages = Vec::new();
        for stage in Stage::ALL {
            let statistics =
                network.batch_norms(stage).flat_map(|bn| [bn.running_mean.clone(), bn.running_var.clone()]);
            let all = network.parameters(stage).into_iter().chain(statistics);
            averages.extend(all.map(|p| {
                let value = p.tensor().detach();
                (p, value)
            }));
        }
        Ema { decay, averages }
    }

    /// Moves the averages towards the network's values, after step number `step` (from 1). Early steps weigh more, so that
    /// the start is forgotten soon.
    pub fn update(&mut self, step: usize) -> Result<()> {
        let decay = self.decay.min((1.0 + step as f64) / (10.0 + step as f64)) as f32;
        for (parameter, average) in &mut self.averages {
            let value = parameter.tensor();
            // What has never been changed still shares its memory with the average.
            if !value.shares_memory(average) {
                let old = std::mem::replace(average, Tensor::zeros([0]));
                *average = match old.device() {
                    Device::Cpu => old.map_in_place(|a| blend(a, value.as_slice(), decay, 1.0 - decay)),
                    Device::Cuda => {
                        // An average that a snapshot shares stays as it is.
                        let own = if old.is_unique() { old } else { old.duplicate_on_cuda()? };
                        cuda::norm::blend(&own, &value, decay, 1.0 - decay)?;
                        own
                    }
                };
            }
        }
        Ok(())
    }

    /// Exchanges the averages and the network's values; a second call puts them back.
    pub fn swap(&mut self) -> Result<()> {
        for (parameter, average) in &mut self.averages {
            let value = parameter.tensor().detach();
            if !value.shares_memory(average) {
                parameter.set(std::mem::replace(average, value))?;
            }
        }
        Ok(())
    }

    /// Every average, under its parameter's name.
    pub fn values(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.averages.iter().map(|(parameter, average)| (parameter.name(), average))
    }

    /// Replaces the average of that name; values of another length are left out.
    pub fn restore(&mut self, name: &str, values: &[f32]) -> Result<()> {
        let entry = self.averages.iter_mut().find(|(p, _)| p.name() == name && p.shape().numel() == values.len());
        if let Some((parameter, average)) = entry {
            // Equal values go on sharing, as in a run that was not interrupted.
            let current = parameter.tensor().detach();
            *average = match current.to_f32_vec()? == values {
                true => current,
                false => Tensor::from_slice(values, parameter.shape().clone())?.to_device(current.device())?,
            };
        }
        Ok(())
    }
}
