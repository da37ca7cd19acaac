//! Named tensors that outlive a step: parameters and the running statistics.

use crate::autograd::History;
use crate::tensor::{Shape, Tensor, TensorId};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

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

    /// Changes the values, in place unless a tensor taken earlier is still alive.
    pub fn update(&self, change: impl FnOnce(&mut [f32])) {
        let mut value = self.lock();
        let old = std::mem::replace(&mut *value, Tensor::zeros([0]));
        *value = old.map_in_place(change);
        self.version.fetch_add(1, Ordering::Release);
    }

    /// Replaces the values; `value` must have the same shape.
    pub fn set(&self, value: Tensor) {
        assert_eq!(value.shape(), &self.shape, "shape of {}", self.name);
        *self.lock() = value.detach();
        self.version.fetch_add(1, Ordering::Release);
    }
}
