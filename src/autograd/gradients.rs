//! What a backward pass returns.

use crate::error::Result;
use crate::tensor::{Device, Tensor, TensorId, with_float};
use crate::{cpu, cuda};
use std::collections::HashMap;

/// Gradients by leaf.
#[derive(Default)]
pub struct Gradients(HashMap<TensorId, Tensor>);

impl Gradients {
    /// The gradient of `leaf`, shaped as it; `None` if the result did not depend on it.
    pub fn get(&self, leaf: &Tensor) -> Option<&Tensor> {
        self.0.get(&leaf.id())
    }

    /// The gradient of the leaf with this identity.
    pub fn by_id(&self, id: TensorId) -> Option<&Tensor> {
        self.0.get(&id)
    }

    /// Adds `gradient` to that of `id`.
    pub(crate) fn add(&mut self, id: TensorId, gradient: Tensor) -> Result<()> {
        let total = match self.0.remove(&id) {
            Some(earlier) => sum(earlier, &gradient)?,
            None => gradient,
        };
        self.0.insert(id, total);
        Ok(())
    }

    /// Adds the gradients of another pass, as over the parts of a split batch.
    pub fn accumulate(&mut self, other: Gradients) -> Result<()> {
        // In the order of the leaves, though each is summed on its own: the device's memory is then asked for in the same
        // order in every step.
        for (id, gradient) in std::collections::BTreeMap::from_iter(other.0) {
            self.add(id, gradient)?;
        }
        Ok(())
    }

    /// Scales all gradients down so that their common norm is at most `max`; returns the norm they had, a
    /// scalar on their device. PyTorch's `clip_grad_norm_`.
    pub fn clip_norm(&mut self, max: f64) -> Result<Tensor> {
        // In the order of the leaves: a sum in the map's own order would differ from run to run.
        let mut ids: Vec<TensorId> = self.0.keys().copied().collect();
        ids.sort();
        if self.0.values().any(|gradient| gradient.device() == Device::Cuda) {
            return self.clip_norm_on_cuda(max, &ids);
        }
        let squares = |t: &Tensor| cpu::elementwise::sum_of_squares(t.as_slice());
        let norm = ids.iter().map(|id| squares(&self.0[id])).sum::<f64>().sqrt();
        let factor = max / (norm + 1e-6);
        if factor < 1.0 {
            for id in ids {
                if let Some(gradient) = self.0.remove(&id) {
                    let scaled = gradient.map_in_place(|g| cpu::elementwise::scale::<f32>(g, factor as f32));
                    self.0.insert(id, scaled);
                }
            }
        }
        Ok(Tensor::full([], norm as f32))
    }

    fn clip_norm_on_cuda(&mut self, max: f64, ids: &[TensorId]) -> Result<Tensor> {
        let mut squares = Tensor::full_on(Device::Cuda, [], 0.0)?;
        for id in ids {
            squares = cuda::elementwise::add(&squares, &cuda::elementwise::sum(&self.0[id], true, 1.0)?)?;
        }
        let (factor, norm) = cuda::optim::clip(&squares, max as f32)?;
        for id in ids {
            if let Some(gradient) = self.0.remove(id) {
                self.0.insert(*id, cuda::elementwise::scale(&gradient, 1.0, Some(&factor))?);
            }
        }
        Ok(norm)
    }

    /// How many leaves have a gradient.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether no leaf has one.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// `a + b`, in the memory of `a` if nothing else shares it.
pub(super) fn sum(a: Tensor, b: &Tensor) -> Result<Tensor> {
    match a.device() {
        Device::Cpu => Ok(with_float!(a.dtype(), T => {
            a.map_in_place(|a| cpu::elementwise::add_assign::<T>(a, b.as_slice()))
        })),
        Device::Cuda if a.is_unique() => cuda::elementwise::add_assign(&a, b).map(|()| a),
        Device::Cuda => cuda::elementwise::add(&a, b),
    }
}
