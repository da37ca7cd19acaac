//! Where the elements of a tensor lie.

use super::dtype::{DType, Element};
use super::pool::Block;
use crate::cuda::CudaBuffer;

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

/// A typed, contiguous, 64-byte-aligned buffer from the pool.
pub struct CpuBuffer {
    block: Block,
    dtype: DType,
    len: usize,
}

impl CpuBuffer {
    /// `len` elements of unspecified content, for a kernel to fill.
    pub fn take<T: Element>(len: usize) -> Self {
        CpuBuffer { block: Block::take(len * size_of::<T>()), dtype: T::DTYPE, len }
    }

    /// A copy of `values`.
    pub fn from_slice<T: Element>(values: &[T]) -> Self {
        let mut buffer = Self::take::<T>(values.len());
        buffer.as_mut_slice().copy_from_slice(values);
        buffer
    }

    /// The elements. Panics if `T` is not its type: operations check types before they run kernels.
    pub fn as_slice<T: Element>(&self) -> &[T] {
        assert_eq!(T::DTYPE, self.dtype, "element type of a buffer");
        self.block.as_slice(self.len)
    }

    /// The elements, to write to. Panics if `T` is not its type.
    pub fn as_mut_slice<T: Element>(&mut self) -> &mut [T] {
        assert_eq!(T::DTYPE, self.dtype, "element type of a buffer");
        self.block.as_mut_slice(self.len)
    }
}
