//! What the card can do at most, measured on it.

use super::CudaBuffer;
use super::launch::{Kernel, device};
use super::source::PEAK;
use crate::error::Result;
use crate::tensor::DType;
use bytemuck::{Pod, Zeroable};

const THREADS: usize = 256;
/// `CHAINS` in peak.cu.
const CHAINS: usize = 8;
const REPEATS: usize = 5;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct PeakParams {
    y: u64,
    rounds: i32,
    unused: i32,
}

/// What is multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// f32 on the CUDA cores.
    F32,
    /// TF32 on the tensor cores.
    Tf32,
    /// bf16 on the tensor cores.
    Bf16,
}

/// Operations a second of chains of products in registers; the best of a few runs. `blocks` of 256 threads, `rounds` products
/// long: some thousands of each on a card.
pub fn operations_per_second(unit: Unit, blocks: usize, rounds: usize) -> Result<f64> {
    let y = CudaBuffer::take(DType::F32, blocks * THREADS)?;
    let params = PeakParams { y: y.address(), rounds: rounds as i32, unused: 0 };
    // A warp's product is 16 x 8 x K multiply-adds.
    let (name, per_thread) = match unit {
        Unit::F32 => ("peak_f32", 2),
        Unit::Tf32 => ("peak_tf32", 2 * 16 * 8 * 8 / 32),
        Unit::Bf16 => ("peak_bf16", 2 * 16 * 8 * 16 / 32),
    };
    let seconds = best(|| device().launch(Kernel(PEAK, name), [blocks as u32, 1, 1], &params))?;
    Ok((blocks * THREADS * CHAINS * rounds * per_thread) as f64 / seconds)
}

/// Bytes a second of a copy of `bytes` within the card, read and written ones counted; the best of a few.
pub fn bytes_per_second(bytes: usize) -> Result<f64> {
    let (a, b) = (CudaBuffer::take(DType::U8, bytes)?, CudaBuffer::from_slice(&vec![0u8; bytes])?);
    Ok(2.0 * bytes as f64 / best(|| a.copy_from(&b))?)
}

fn best(run: impl Fn() -> Result<()>) -> Result<f64> {
    run()?;
    let backend = device().backend();
    let mut best = f64::INFINITY;
    for _ in 0..REPEATS {
        let start = backend.mark()?;
        run()?;
        best = best.min(backend.seconds_between(&start, &backend.mark()?)?);
    }
    Ok(best)
}
