//! Where the elements of a tensor lie.

use super::dtype::{DType, Element};
use super::pool::Block;
use crate::cuda::CudaBuffer;
use std::ops::Range;
use std::sync::Arc;

/// A place where tensors live and operations run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Device {
    /// The processor, on rayon's current thread pool.
    #[default]
    Cpu,
    /// The first NVIDIA card, or the emulated grid in its place.
    Cuda,
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda => f.write_str("cuda"),
        }
    }
}

/// The elements of a tensor, on a device. An operation matches on it to choose its kernels.
pub enum Storage {
    /// In the machine's memory.
    Cpu(CpuBuffer),
    /// In the card's memory.
    Cuda(CudaBuffer),
}

impl Storage {
    /// The device it lies on.
    pub fn device(&self) -> Device {
        match self {
            Storage::Cpu(_) => Device::Cpu,
            Storage::Cuda(_) => Device::Cuda,
        }
    }

    /// The type of its elements.
    pub fn dtype(&self) -> DType {
        match self {
            Storage::Cpu(buffer) => buffer.dtype,
            Storage::Cuda(buffer) => buffer.dtype(),
        }
    }
}

/// A typed, contiguous buffer from the pool, or a part of one.
pub struct CpuBuffer {
    block: Arc<Block>,
    dtype: DType,
    /// Elements of the block.
    range: Range<usize>,
}

impl CpuBuffer {
    /// `len` elements of unspecified content, aligned to 64 bytes, for a kernel to fill.
    pub fn take<T: Element>(len: usize) -> Self {
        CpuBuffer { block: Arc::new(Block::take(len * size_of::<T>())), dtype: T::DTYPE, range: 0..len }
    }

    /// A copy of `values`.
    pub fn from_slice<T: Element>(values: &[T]) -> Self {
        let mut buffer = Self::take::<T>(values.len());
        buffer.as_mut_slice().copy_from_slice(values);
        buffer
    }

    /// Some of its elements, in the same memory.
    pub fn part(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.range.len(), "a part of a buffer");
        let range = self.range.start + range.start..self.range.start + range.end;
        CpuBuffer { block: self.block.clone(), dtype: self.dtype, range }
    }

    /// Whether no other buffer is in the same block of memory.
    pub fn is_unique(&self) -> bool {
        Arc::strong_count(&self.block) == 1
    }

    /// The elements. Panics if `T` is not its type: operations check types before they run kernels.
    pub fn as_slice<T: Element>(&self) -> &[T] {
        assert_eq!(T::DTYPE, self.dtype, "element type of a buffer");
        &self.block.as_slice(self.range.end)[self.range.start..]
    }

    /// The elements, to write to. Panics if `T` is not its type, or if another buffer is in the same block.
    pub fn as_mut_slice<T: Element>(&mut self) -> &mut [T] {
        assert_eq!(T::DTYPE, self.dtype, "element type of a buffer");
        let block = Arc::get_mut(&mut self.block).expect("a buffer that is not shared");
        &mut block.as_mut_slice(self.range.end)[self.range.start..]
    }
}
