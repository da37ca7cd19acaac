//! Named tensors that outlive a step: parameters and the running statistics.

use crate::autograd::History;
use crate::cpu::elementwise;
use crate::cuda;
use crate::error::Result;
use crate::tensor::{Device, Shape, Storage, Tensor, TensorId};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// A tensor under a name that is updated in place. Its identity stays the same through all updates, so that optimisers
/// and gradients find it.
pub struct Parameter {
    name: String,
    id: TensorId,
    shape: Shape,
    value: Mutex<Tensor>,
    trainable: AtomicBool,
    version: AtomicU64,
}

impl Parameter {
    /// A parameter that is not trained until [`Parameter::set_trainable`] says so. `name` is PyTorch's, "layer1.0.bn1.weight".
    pub fn new(name: impl Into<String>, value: Tensor) -> Self {
        Parameter {
            name: name.into(),
            id: TensorId::fresh(),
            shape: value.shape().clone(),
            value: Mutex::new(value.detach()),
            trainable: AtomicBool::new(false),
            version: AtomicU64::new(0),
        }
    }

    /// PyTorch's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The key of its gradient.
    pub fn id(&self) -> TensorId {
        self.id
    }

    /// Extents in hone's layout: filters are `[O, KH, KW, I]`.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Whether it gets gradients.
    pub fn is_trainable(&self) -> bool {
        self.trainable.load(Ordering::Relaxed)
    }

    /// Makes it get gradients, or not.
    pub fn set_trainable(&self, trainable: bool) {
        self.trainable.store(trainable, Ordering::Relaxed);
    }

    /// Grows with each update; whoever derives something from the value can tell that it is stale.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    fn lock(&self) -> MutexGuard<'_, Tensor> {
        self.value.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The value as of now, a leaf if it is trained. It shares memory with the parameter: an update while it is alive
    /// copies first.
    pub fn tensor(&self) -> Tensor {
        let history = if self.is_trainable() { History::Leaf } else { History::None };
        let value = self.lock();
        Tensor::from_parts(self.id, self.shape.clone(), value.storage().clone(), history)
    }

    /// Changes the values of a parameter on the CPU, in place unless a tensor taken earlier is still alive.
    pub fn update(&self, change: impl FnOnce(&mut [f32])) {
        let mut value = self.lock();
        let old = std::mem::replace(&mut *value, Tensor::zeros([0]));
        *value = old.map_in_place(change);
        self.version.fetch_add(1, Ordering::Release);
    }

    /// The value on the card for a kernel to change in place: of this parameter alone, copied if something else shares it.
    /// Whoever changes it calls [`Parameter::touch`].
    pub(crate) fn for_update_on_cuda(&self) -> Result<Tensor> {
        let mut value = self.lock();
        if Arc::strong_count(value.storage()) > 1 {
            let Storage::Cuda(buffer) = &**value.storage() else { unreachable!("a parameter on cuda") };
            *value = Tensor::from_cuda(&self.shape, buffer.duplicate()?);
        }
        Ok(Tensor::from_parts(self.id, self.shape.clone(), value.storage().clone(), History::None))
    }

    /// Where the value lies on the card.
    pub(crate) fn address_on_cuda(&self) -> u64 {
        match &**self.lock().storage() {
            Storage::Cuda(buffer) => buffer.address(),
            Storage::Cpu(_) => unreachable!("a parameter on cuda"),
        }
    }

    /// Says that the values have changed.
    pub(crate) fn touch(&self) {
        self.version.fetch_add(1, Ordering::Release);
    }

    /// `value = value * keep + other * factor`, on the device that both are on.
    pub fn blend(&self, other: &Tensor, keep: f32, factor: f32) -> Result<()> {
        match other.device() {
            Device::Cpu => self.update(|values| elementwise::blend(values, other.as_slice(), keep, factor)),
            Device::Cuda => {
                cuda::norm::blend(&self.for_update_on_cuda()?, other, keep, factor)?;
                self.touch();
            }
        }
        Ok(())
    }

    /// Moves the values to a device.
    pub fn to_device(&self, device: Device) -> Result<()> {
        let mut value = self.lock();
        *value = value.to_device(device)?;
        self.touch();
        Ok(())
    }

    /// Replaces the values; `value` must have the same shape.
    pub fn set(&self, value: Tensor) -> Result<()> {
        assert_eq!(value.shape(), &self.shape, "shape of {}", self.name);
        let mut old = self.lock();
        // A network stays on its device.
        *old = value.to_device(old.device())?;
        self.version.fetch_add(1, Ordering::Release);
        Ok(())
    }
}
