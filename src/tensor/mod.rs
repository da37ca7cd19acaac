//! Tensors: a shape, shared storage on a device, and the history that autograd needs.
//!
//! A tensor is contiguous and immutable; cloning shares it. Activations are `[N, H, W, C]`, filters `[O, KH, KW, I]`,
//! matrices row-major. PyTorch's `NCHW` and `OIHW` exist at the file boundary alone ([`layout`]).

mod dtype;
pub mod layout;
pub mod pool;
mod shape;
mod storage;

pub(crate) use dtype::with_float;
pub use dtype::{DType, Element};
pub use shape::Shape;
pub use storage::{CpuBuffer, Device, Storage};

use crate::autograd::{Edge, History};
use crate::cuda::CudaBuffer;
use crate::error::{Error, Result};
use rayon::prelude::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Identifies a tensor, or a parameter through all its updates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TensorId(u64);

impl TensorId {
    /// An identity that no other tensor has.
    pub fn fresh() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        TensorId(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// A contiguous, immutable n-dimensional array. Cloning is cheap and shares the elements.
#[derive(Clone)]
pub struct Tensor(Arc<Inner>);

struct Inner {
    id: TensorId,
    shape: Shape,
    storage: Arc<Storage>,
    history: History,
}

impl Tensor {
    /// The one constructor: everything else ends here.
    pub(crate) fn from_parts(id: TensorId, shape: Shape, storage: Arc<Storage>, history: History) -> Self {
        Tensor(Arc::new(Inner { id, shape, storage, history }))
    }

    /// A tensor without history around a buffer that a kernel has filled.
    pub(crate) fn from_buffer(shape: impl Into<Shape>, buffer: CpuBuffer) -> Self {
        Self::from_parts(TensorId::fresh(), shape.into(), Arc::new(Storage::Cpu(buffer)), History::None)
    }

    /// A tensor without history around a buffer on the card.
    pub(crate) fn from_cuda(dims: &[usize], buffer: CudaBuffer) -> Self {
        Self::from_parts(TensorId::fresh(), dims.into(), Arc::new(Storage::Cuda(buffer)), History::None)
    }

    /// A tensor on the CPU whose elements `fill` writes, every one of them.
    pub(crate) fn build<T: Element>(shape: impl Into<Shape>, fill: impl FnOnce(&mut [T])) -> Self {
        let shape = shape.into();
        let mut buffer = CpuBuffer::take::<T>(shape.numel());
        fill(buffer.as_mut_slice());
        Self::from_buffer(shape, buffer)
    }

    /// A copy of `values` with the given shape; an error if the counts differ.
    pub fn from_slice<T: Element>(values: &[T], shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        if shape.numel() != values.len() {
            return Err(Error::shape(
                "from_slice",
                format!("{} elements for {shape:?}", shape.numel()),
                &[&[values.len()]],
            ));
        }
        Ok(Self::from_buffer(shape, CpuBuffer::from_slice(values)))
    }

    /// All elements `value`.
    pub fn full<T: Element>(shape: impl Into<Shape>, value: T) -> Self {
        Self::build(shape, |out: &mut [T]| out.fill(value))
    }

    /// All elements zero.
    pub fn zeros(shape: impl Into<Shape>) -> Self {
        Self::full(shape, 0.0f32)
    }

    /// This tensor as a leaf: the backward pass collects its gradient.
    pub fn leaf(self) -> Self {
        Self::from_parts(self.0.id, self.0.shape.clone(), self.0.storage.clone(), History::Leaf)
    }

    /// The same elements, without history: gradients stop here.
    pub fn detach(&self) -> Self {
        match self.0.history {
            History::None => self.clone(),
            _ => Self::from_parts(TensorId::fresh(), self.0.shape.clone(), self.0.storage.clone(), History::None),
        }
    }

    /// The same elements under another shape of the same count, without history; `ops::reshape` is the recorded one.
    pub(crate) fn with_shape(&self, shape: impl Into<Shape>) -> Self {
        let shape = shape.into();
        debug_assert_eq!(shape.numel(), self.numel());
        Self::from_parts(TensorId::fresh(), shape, self.0.storage.clone(), History::None)
    }

    /// The same tensor with a history; what `autograd::record` returns.
    pub(crate) fn with_history(self, history: History) -> Self {
        Self::from_parts(self.0.id, self.0.shape.clone(), self.0.storage.clone(), history)
    }

    /// Identity, the key of its gradient if it is a leaf.
    pub fn id(&self) -> TensorId {
        self.0.id
    }

    /// Extents, outermost first.
    pub fn shape(&self) -> &Shape {
        &self.0.shape
    }

    /// Extents, outermost first.
    pub fn dims(&self) -> &[usize] {
        self.0.shape.dims()
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.0.shape.numel()
    }

    /// Type of the elements.
    pub fn dtype(&self) -> DType {
        self.0.storage.dtype()
    }

    /// The device it lies on.
    pub fn device(&self) -> Device {
        self.0.storage.device()
    }

    /// Whether an operation on it would be recorded.
    pub fn requires_grad(&self) -> bool {
        !matches!(self.0.history, History::None) && crate::autograd::is_enabled()
    }

    /// Where its gradient goes; `None` if nowhere.
    pub(crate) fn edge(&self) -> Option<Edge> {
        match &self.0.history {
            History::None => None,
            History::Leaf => Some(Edge::Leaf(self.0.id)),
            History::Node(node) => Some(Edge::Node(node.clone())),
        }
    }

    /// The elements of a tensor on the CPU. Panics if it lies elsewhere or `T` is not its type; operations check that first.
    pub fn as_slice<T: Element>(&self) -> &[T] {
        match &*self.0.storage {
            Storage::Cpu(buffer) => buffer.as_slice(),
            Storage::Cuda(_) => panic!("the elements of a tensor on cuda; call to_device(Device::Cpu) first"),
        }
    }

    /// The same elements on another device, without history; the tensor itself if it is there.
    pub fn to_device(&self, device: Device) -> Result<Self> {
        match (&*self.0.storage, device) {
            (Storage::Cpu(_), Device::Cpu) | (Storage::Cuda(_), Device::Cuda) => Ok(self.detach()),
            (Storage::Cpu(_), Device::Cuda) => {
                let buffer = match self.dtype() {
                    DType::F32 => CudaBuffer::from_slice(self.as_slice::<f32>())?,
                    DType::BF16 => CudaBuffer::from_slice(self.as_slice::<half::bf16>())?,
                    DType::I64 => CudaBuffer::from_slice(self.as_slice::<i64>())?,
                    DType::U8 => CudaBuffer::from_slice(self.as_slice::<u8>())?,
                };
                Ok(Self::from_cuda(self.dims(), buffer))
            }
            (Storage::Cuda(buffer), Device::Cpu) => match self.dtype() {
                DType::F32 => Self::from_slice(&buffer.to_vec::<f32>()?, self.shape().clone()),
                DType::BF16 => Self::from_slice(&buffer.to_vec::<half::bf16>()?, self.shape().clone()),
                DType::I64 => Self::from_slice(&buffer.to_vec::<i64>()?, self.shape().clone()),
                DType::U8 => Self::from_slice(&buffer.to_vec::<u8>()?, self.shape().clone()),
            },
        }
    }

    /// The same values as F32 or BF16, without history; the tensor itself if it is of that type.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        use crate::cpu::float::convert;
        use half::bf16;
        match (self.device(), self.dtype(), dtype) {
            (_, from, to) if from == to => Ok(self.detach()),
            (Device::Cuda, DType::F32 | DType::BF16, DType::F32 | DType::BF16) => {
                crate::cuda::elementwise::convert(self, dtype)
            }
            (Device::Cpu, DType::F32, DType::BF16) => {
                Ok(Self::build(self.shape().clone(), |y: &mut [bf16]| convert(self.as_slice::<f32>(), y)))
            }
            (Device::Cpu, DType::BF16, DType::F32) => {
                Ok(Self::build(self.shape().clone(), |y: &mut [f32]| convert(self.as_slice::<bf16>(), y)))
            }
            (_, from, _) => {
                let problem = format!("{from:?} to {dtype:?}, expected F32 and BF16");
                Err(Error::Argument { op: "to_dtype", problem })
            }
        }
    }

    /// The values as F32 on the CPU.
    pub fn to_f32_vec(&self) -> Result<Vec<f32>> {
        Ok(self.to_device(Device::Cpu)?.to_dtype(DType::F32)?.to_vec())
    }

    /// Rows of it along the first extent, without history, in the same memory; the tensor itself if they are all of them.
    pub(crate) fn rows(&self, rows: std::ops::Range<usize>) -> Result<Self> {
        let [count, extents @ ..] = self.dims() else { unreachable!("a tensor with rows") };
        if rows == (0..*count) {
            return Ok(self.detach());
        }
        let row: usize = extents.iter().product();
        let dims = [&[rows.len()], extents].concat();
        let range = rows.start * row..rows.end * row;
        match &**self.storage() {
            Storage::Cuda(buffer) => Ok(Self::from_cuda(&dims, buffer.part(range.start, range.len())?)),
            Storage::Cpu(buffer) => Ok(Self::from_buffer(dims, buffer.part(range))),
        }
    }

    /// Tensors on the CPU one after the other along the first extent, in which alone they may differ, without history.
    pub(crate) fn concatenate(parts: &[Tensor]) -> Self {
        let first = &parts[0];
        if parts.len() == 1 {
            return first.detach();
        }
        let rows = parts.iter().map(|part| part.dims()[0]).sum();
        let dims = [&[rows], &first.dims()[1..]].concat();
        with_float!(first.dtype(), T => Self::build(dims, |mut out: &mut [T]| {
            let place = |part: &Tensor| out.split_off_mut(..part.numel()).expect("as many elements as all parts have");
            let places: Vec<&mut [T]> = parts.iter().map(place).collect();
            places.into_par_iter().zip(parts).for_each(|(place, part)| place.copy_from_slice(part.as_slice()));
        }))
    }

    /// All elements `value`, on a device.
    pub fn full_on(device: Device, shape: impl Into<Shape>, value: f32) -> Result<Self> {
        match device {
            Device::Cpu => Ok(Self::full(shape, value)),
            Device::Cuda => crate::cuda::elementwise::fill(&shape.into(), DType::F32, value, None),
        }
    }

    /// Overwrites the elements of a tensor on the card by those of another.
    pub(crate) fn copy_on_cuda(&self, source: &Tensor) -> Result<()> {
        match (&*self.0.storage, &*source.0.storage) {
            (Storage::Cuda(target), Storage::Cuda(source)) => target.copy_from(source),
            _ => unreachable!("tensors on cuda"),
        }
    }

    /// A copy of a tensor on the card.
    pub(crate) fn duplicate_on_cuda(&self) -> Result<Self> {
        let Storage::Cuda(buffer) = &*self.0.storage else { unreachable!("a tensor on cuda") };
        Ok(Self::from_cuda(self.dims(), buffer.duplicate()?))
    }

    /// Whether no other tensor has this storage. On the CPU, storages may be parts of one buffer: see [`Tensor::rows`].
    pub(crate) fn is_unique(&self) -> bool {
        Arc::strong_count(&self.0) == 1 && Arc::strong_count(&self.0.storage) == 1
    }

    /// A copy of the elements.
    pub fn to_vec<T: Element>(&self) -> Vec<T> {
        self.as_slice().to_vec()
    }

    /// The value of a tensor of one f32.
    pub fn item(&self) -> Result<f32> {
        match (self.dtype(), self.numel()) {
            (DType::F32, 1) => Ok(self.to_device(Device::Cpu)?.as_slice::<f32>()[0]),
            _ => Err(Error::shape("item", "one f32", &[self.dims()])),
        }
    }

    /// Whether both have the same storage. A part of a tensor has one of its own, though it lies in the same memory.
    pub fn shares_memory(&self, other: &Tensor) -> bool {
        Arc::ptr_eq(&self.0.storage, &other.0.storage)
    }

    /// The shared storage.
    pub(crate) fn storage(&self) -> &Arc<Storage> {
        &self.0.storage
    }

    /// The buffer itself if nothing else shares it, for a kernel to overwrite; else the tensor again.
    pub(crate) fn into_unique_buffer(self) -> std::result::Result<CpuBuffer, Tensor> {
        let inner = Arc::try_unwrap(self.0).map_err(Tensor)?;
        match Arc::try_unwrap(inner.storage) {
            Ok(Storage::Cpu(buffer)) if buffer.is_unique() => Ok(buffer),
            Ok(shared) => Err(Self::from_parts(inner.id, inner.shape, Arc::new(shared), inner.history)),
            Err(storage) => Err(Self::from_parts(inner.id, inner.shape, storage, inner.history)),
        }
    }

    /// A tensor like this one whose elements `change` has altered in place: in this very buffer if nothing else shares
    /// it, in a copy otherwise. The history is dropped.
    pub(crate) fn map_in_place<T: Element>(self, change: impl FnOnce(&mut [T])) -> Tensor {
        self.replaced(|shared, elements| {
            if let Some(shared) = shared {
                elements.copy_from_slice(shared);
            }
            change(elements);
        })
    }

    /// A tensor like this one whose elements `replace` computes from its own: `replace(None, elements)` finds them where the new ones are to
    /// go, if nothing else shares the buffer; `replace(Some(old), elements)` finds anything there. The history is dropped.
    pub(crate) fn replaced<T: Element>(self, replace: impl FnOnce(Option<&[T]>, &mut [T])) -> Tensor {
        let shape = self.shape().clone();
        match self.into_unique_buffer() {
            Ok(mut buffer) => {
                replace(None, buffer.as_mut_slice());
                Tensor::from_buffer(shape, buffer)
            }
            Err(shared) => Tensor::build(shape, |elements| replace(Some(shared.as_slice()), elements)),
        }
    }
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tensor({:?}, {:?}, {})", self.shape(), self.dtype(), self.device())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parts share memory until one of them changes.
    #[test]
    fn parts_change_on_their_own() {
        let values: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let whole = Tensor::from_slice(&values, [4, 3]).unwrap();
        let (first, last) = (whole.rows(0..2).unwrap(), whole.rows(2..4).unwrap());
        assert_eq!(last.rows(1..2).unwrap().to_vec::<f32>(), [9.0, 10.0, 11.0]);
        let double = |x: Tensor| x.map_in_place(|x: &mut [f32]| x.iter_mut().for_each(|x| *x *= 2.0));
        assert_eq!(double(first).to_vec::<f32>(), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(whole.to_vec::<f32>(), values);
        // The last that has the memory may change it in place.
        drop(whole);
        let place = last.as_slice::<f32>().as_ptr();
        let doubled = double(last);
        assert_eq!(doubled.to_vec::<f32>(), [12.0, 14.0, 16.0, 18.0, 20.0, 22.0]);
        assert_eq!(doubled.as_slice::<f32>().as_ptr(), place);
        let shared = doubled.clone();
        let sums = shared.replaced(|old, new: &mut [f32]| match old {
            Some(old) => new.iter_mut().zip(old).for_each(|(new, old)| *new = old + 1.0),
            None => panic!("`doubled` shares it"),
        });
        assert_eq!((doubled.as_slice::<f32>()[0], sums.as_slice::<f32>()[0]), (12.0, 13.0));
        let labels = Tensor::from_slice(&[1i64, 2, 3], [3]).unwrap();
        assert_eq!(labels.rows(1..3).unwrap().to_vec::<i64>(), [2, 3]);
    }
}
