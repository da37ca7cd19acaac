//! Launching kernels: looked up once, called with one parameter struct.

use super::backend::{Address, Extents, Function};
use super::source::Unit;
use super::{Context, CudaBuffer, context};
use crate::error::Result;
use crate::tensor::{DType, Storage, Tensor};
use bytemuck::{Pod, Zeroable};
use std::collections::HashMap;
use std::sync::Mutex;

/// Threads of most kernels' blocks.
pub const THREADS: u32 = 256;
/// Blocks of a kernel that strides over an array; enough to fill any card.
const MAX_BLOCKS: u64 = 1 << 14;

/// A kernel by its file and name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kernel(pub Unit, pub &'static str);

/// What has been looked up.
#[derive(Default)]
pub(super) struct Kernels(Mutex<HashMap<Kernel, Function>>);

impl Context {
    /// Launches `kernel` over a grid of blocks of `threads` with `shared` bytes of dynamic shared memory.
    pub(super) fn launch_with<P: Pod>(&self, kernel: Kernel, extents: Extents, params: &P) -> Result<()> {
        if extents.grid.contains(&0) {
            return Ok(());
        }
        let mut known = self.kernels.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let function = match known.get(&kernel) {
            Some(&function) => function,
            None => {
                let function = self.backend.function(kernel.0, kernel.1)?;
                known.insert(kernel, function);
                function
            }
        };
        drop(known);
        self.backend.launch(function, extents, bytemuck::bytes_of(params))
    }

    /// Launches `kernel` over `grid` blocks of 256 threads.
    pub(super) fn launch<P: Pod>(&self, kernel: Kernel, grid: [u32; 3], params: &P) -> Result<()> {
        self.launch_with(kernel, Extents { grid, threads: THREADS, shared: 0 }, params)
    }

    /// Launches a kernel that strides over `items` by the grid's size.
    pub(super) fn launch_over<P: Pod>(&self, kernel: Kernel, items: usize, params: &P) -> Result<()> {
        let blocks = (items as u64).div_ceil(u64::from(THREADS)).min(MAX_BLOCKS);
        self.launch(kernel, [blocks as u32, 1, 1], params)
    }
}

/// The kernel for the type of the activations.
pub(super) fn typed(dtype: DType, f32: &'static str, bf16: &'static str) -> &'static str {
    if dtype == DType::BF16 { bf16 } else { f32 }
}

/// Elements in 16 bytes, which a thread loads at once.
pub(super) fn pack(dtype: DType) -> usize {
    16 / dtype.size()
}

/// Division by a constant as a multiplication; `common.cuh` has the other half.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Divider {
    divisor: u32,
    magic: u32,
    shift: u32,
}

impl Divider {
    /// For dividends below 2^31 and a divisor of 1 to 2^31.
    pub fn new(divisor: usize) -> Self {
        let divisor = divisor as u32;
        let shift = divisor.next_power_of_two().trailing_zeros();
        let magic = ((1u64 << 32) * ((1u64 << shift) - u64::from(divisor)) / u64::from(divisor) + 1) as u32;
        Divider { divisor, magic, shift }
    }

    /// `x / divisor`, as the kernels compute it.
    pub fn divide(&self, x: u32) -> u32 {
        (((u64::from(x) * u64::from(self.magic)) >> 32) as u32 + x) >> self.shift
    }
}

impl Default for Divider {
    fn default() -> Self {
        Divider::new(1)
    }
}

/// The buffer of a tensor on the device.
pub(super) fn buffer(tensor: &Tensor) -> &CudaBuffer {
    match &**tensor.storage() {
        Storage::Cuda(buffer) => buffer,
        Storage::Cpu(_) => panic!("a tensor on the CPU given to a CUDA kernel"),
    }
}

pub(super) fn address(tensor: &Tensor) -> Address {
    buffer(tensor).address()
}

/// 0, null, for none.
pub(super) fn address_or_null(tensor: Option<&Tensor>) -> Address {
    tensor.map_or(0, address)
}

/// A tensor on the device whose elements a kernel is about to write.
pub(super) fn empty(dims: &[usize], dtype: DType) -> Result<Tensor> {
    let buffer = CudaBuffer::take(dtype, dims.iter().product())?;
    Ok(Tensor::from_cuda(dims, buffer))
}

/// The context; tensors on the device exist, so it does.
pub(super) fn device() -> &'static Context {
    context().expect("there are tensors on the device")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn division_is_exact() {
        for divisor in (1..200).chain([255, 256, 257, 3136, 12544, 65535, 65536, 1 << 20, (1 << 30) - 1, 1 << 30]) {
            let d = Divider::new(divisor);
            let near = [0u32, 1, 7, divisor as u32 - 1, divisor as u32, (1 << 31) - 1, (1 << 31) - 2];
            let multiples = (1..40u64).map(|i| (i * divisor as u64 * 7919 % (1 << 31)) as u32);
            for x in near.into_iter().chain(multiples.clone()).chain(multiples.map(|x| x.saturating_sub(1))) {
                assert_eq!(d.divide(x), x / divisor as u32, "{x} / {divisor}");
            }
        }
    }
}
