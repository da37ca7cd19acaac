//! Convolutions as products of bf16 tiles ([`amx`]).
//!
//! Tiles multiply bf16 alone. An f32 is the sum of two bf16 and a rest of 2^-18 of it; of the products of two such sums three matter
//! (Henry, Tang and Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision computations", 2019). What
//! is packed is packed in so many parts; values that are bf16 have one.
//!
//! Nothing is packed for each tap: `planes` are one rearranged copy of the input, and every tap of every output is a tile of it
//! where it lies. The filter is packed in the order in which it is read (`filter`). [`multiply`] is the forward pass and the gradient to the input,
//! [`transposed`] the gradient to the filter.

pub mod amx;
mod blocks;
mod filter;
mod finish;
pub mod multiply;
mod planes;
pub mod transposed;

use super::float::Float;
use super::simd::Simd;
use crate::tensor::pool::Scratch;
use amx::{STEP, TILE};
pub use filter::TileFilter;
use half::bf16;

/// How many bf16 stand for a value at most.
const MOST: usize = 2;

/// How many bf16 stand for a value.
pub fn parts_of<T: Float>() -> usize {
    3 - T::PER_WORD
}

/// What is packed, from the most significant part on.
type Parts = Vec<Scratch<bf16>>;

fn parts(count: usize, len: usize) -> Parts {
    (0..count).map(|_| Scratch::take(len)).collect()
}

/// Their values, to write to.
fn slices(parts: &mut Parts) -> Vec<&mut [bf16]> {
    parts.iter_mut().map(|part| &mut part[..]).collect()
}

/// The sums of a block.
#[derive(Default)]
#[repr(align(64))]
struct Sums([[f32; TILE]; TILE]);

/// Columns, and rows, of one tile of two.
const HALF: usize = TILE / 2;
/// Values of the right side that a step takes, of each part.
const RIGHT: usize = STEP * TILE;

/// [`HALF`] rows of [`HALF`] words, `from_stride` apart, to the columns one after the other.
///
/// # Safety
/// `from` is valid for reading the rows, `to` for writing the columns.
#[inline(always)]
unsafe fn transpose<S: Simd>(simd: S, from: *const f32, from_stride: usize, to: *mut f32) {
    for i in (0..HALF).step_by(S::LANES) {
        for j in (0..HALF).step_by(S::LANES) {
            // SAFETY: the contract.
            unsafe { simd.transpose(from.add(i * from_stride + j), from_stride, to.add(j * HALF + i), HALF) };
        }
    }
}

/// Two vectors to the words of a vector, of each of so many parts.
///
/// # Safety
/// `out` of a part is valid for writing them.
#[inline(always)]
unsafe fn split_pairs<S: Simd>(simd: S, mut values: [S::V; 2], parts: usize, mut out: impl FnMut(usize) -> *mut bf16) {
    for part in 0..parts {
        let out = out(part);
        // SAFETY: the contract.
        unsafe {
            simd.store(out.cast(), simd.pairs(values[0], values[1]));
            if part + 1 < parts {
                let rounded = simd.load_pairs(out);
                values = [simd.sub(values[0], rounded[0]), simd.sub(values[1], rounded[1])];
            }
        }
    }
}
