//! Convolutions as products of bf16 tiles ([`amx`]).
//!
//! Tiles multiply bf16 alone. An f32 is the sum of two bf16 and a rest of 2^-18 of it; of the products of two such sums three matter
//! (Henry, Tang and Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision computations", 2019). What
//! is packed is packed in so many parts; values that are bf16 have one.
//!
//! Nothing is packed for each tap: `planes` are one rearranged copy of the input, and every tap of every output is a tile of it
//! where it lies. The filter is packed in the order in which it is read. [`multiply`] is the forward pass and the gradient to the input,
//! [`transposed`] the gradient to the filter.

pub mod amx;
pub mod multiply;
mod planes;
pub mod transposed;

use super::float::Float;
use super::simd::{Isa, Simd, Task, dispatch};
use crate::tensor::pool::Scratch;
use amx::{STEP, TILE, Tiles};
use half::bf16;
use rayon::prelude::*;

/// How many bf16 stand for a value.
fn parts_of<T: Float>() -> usize {
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

/// [`Tiles::multiply`] of values in one part or in two.
///
/// # Safety
/// As there, for each part.
#[inline(always)]
unsafe fn multiply_parts<U: Tiles, const PARTS: usize>(
    tiles: &mut U,
    a: [[*const bf16; 2]; PARTS],
    a_stride: usize,
    b: [[*const bf16; 2]; PARTS],
) {
    const { assert!(PARTS == 1 || PARTS == 2) };
    // SAFETY: the contract.
    unsafe {
        if PARTS == 1 {
            tiles.multiply(a[0], a_stride, b[0]);
        } else {
            tiles.multiply_parts([a[0], a[PARTS - 1]], a_stride, [b[0], b[PARTS - 1]]);
        }
    }
}

/// Columns, and rows, of one tile of two.
const HALF: usize = TILE / 2;
/// Values of the right side that a step takes, of each part.
const RIGHT: usize = STEP * TILE;

/// The right side of a product, `[panel of 32 columns][step of the depth][part][half of the columns][pair of rows][column][row of the
/// pair]`, zero-padded.
pub struct TileFilter {
    panels: Scratch<bf16>,
    parts: usize,
    steps: usize,
    columns: usize,
}

impl TileFilter {
    /// From `value(row of a step, column)`; `fill(step, columns, values)` writes the values `[row][column]` of a step.
    fn pack(
        isa: Isa,
        parts: usize,
        steps: usize,
        columns: usize,
        fill: impl Fn(usize, std::ops::Range<usize>, &mut [[f32; HALF]; STEP]) + Sync,
    ) -> Self {
        let mut panels = Scratch::take(columns.div_ceil(TILE) * steps * parts * RIGHT);
        panels.par_chunks_mut((steps * parts * RIGHT).max(1)).enumerate().for_each(|(panel, out)| {
            let mut values = [[0.0; HALF]; STEP];
            for (step, out) in out.chunks_exact_mut(parts * RIGHT).enumerate() {
                for half in 0..2 {
                    let first = panel * TILE + half * HALF;
                    fill(step, first.min(columns)..(first + HALF).min(columns), &mut values);
                    dispatch(
                        isa,
                        SplitPairs { rows: &values, out: &mut out[half * RIGHT / 2..], stride: RIGHT, parts },
                    );
                }
            }
        });
        TileFilter { panels, parts, steps, columns }
    }

    /// From the columns one after the other, `[columns, depth]`; the depth of step `i` begins at `steps[i].0` and is `steps[i].1` long.
    fn from_columns(isa: Isa, b: &[f32], columns: usize, parts: usize, steps: &[(usize, usize)]) -> Self {
        let depth = b.len().checked_div(columns).unwrap_or(0);
        Self::pack(isa, parts, steps.len(), columns, |step, range, values| {
            let (start, count) = steps[step];
            if range.len() == HALF && count == STEP {
                let from = &b[range.start * depth + start..];
                assert!(from.len() >= (HALF - 1) * depth + STEP);
                for (i, to) in values.chunks_exact_mut(HALF).enumerate() {
                    dispatch(isa, Transpose { from: &from[i * HALF..], from_stride: depth, to: to.as_flattened_mut() });
                }
                return;
            }
            *values = [[0.0; HALF]; STEP];
            for (i, column) in range.enumerate() {
                for (row, value) in values.iter_mut().zip(&b[column * depth + start..][..count]) {
                    row[i] = *value;
                }
            }
        })
    }

    /// From rows of `columns` contiguous values, which begin at `steps[i](row)` for the rows of step `i`.
    fn from_rows(isa: Isa, b: &[f32], columns: usize, parts: usize, steps: &[Vec<usize>]) -> Self {
        Self::pack(isa, parts, steps.len(), columns, |step, range, values| {
            let none = [0.0; HALF];
            for (row, start) in values.iter_mut().zip(steps[step].iter().map(Some).chain(std::iter::repeat(None))) {
                let from = start.map_or(&none[..range.len()], |start| &b[start + range.start..][..range.len()]);
                row[..range.len()].copy_from_slice(from);
                row[range.len()..].fill(0.0);
            }
        })
    }

    fn panel(&self, panel: usize) -> &[bf16] {
        let len = self.steps * self.parts * RIGHT;
        &self.panels[panel * len..][..len]
    }
}

/// Rows of f32 two by two to pairs of bf16, split; parts are `stride` values apart.
struct SplitPairs<'a> {
    rows: &'a [[f32; HALF]; STEP],
    out: &'a mut [bf16],
    stride: usize,
    parts: usize,
}

impl Task for SplitPairs<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        assert!(self.out.len() >= (self.parts - 1) * self.stride + STEP * HALF);
        for (i, rows) in self.rows.chunks_exact(2).enumerate() {
            for column in (0..HALF).step_by(S::LANES) {
                // SAFETY: a vector from `column` on lies in either row, and its words in the pair's place of each part.
                unsafe {
                    let values = [simd.load(rows[0].as_ptr().add(column)), simd.load(rows[1].as_ptr().add(column))];
                    let out = self.out.as_mut_ptr().add((i * HALF + column) * 2);
                    split_pairs(simd, values, out, self.stride, self.parts);
                }
            }
        }
    }
}

/// Two vectors to the words of a vector, `parts` times, `stride` values apart.
///
/// # Safety
/// `out` is valid for writing them.
#[inline(always)]
unsafe fn split_pairs<S: Simd>(simd: S, mut values: [S::V; 2], out: *mut bf16, stride: usize, parts: usize) {
    for part in 0..parts {
        // SAFETY: the contract.
        unsafe {
            let out = out.add(part * stride);
            simd.store(out.cast(), simd.pairs(values[0], values[1]));
            if part + 1 < parts {
                let rounded = simd.load_pairs(out);
                values = [simd.sub(values[0], rounded[0]), simd.sub(values[1], rounded[1])];
            }
        }
    }
}

/// [`HALF`] rows of [`HALF`] words, `from_stride` apart, to the columns one after the other.
struct Transpose<'a> {
    from: &'a [f32],
    from_stride: usize,
    to: &'a mut [f32],
}

impl Task for Transpose<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        assert!(self.from.len() >= (HALF - 1) * self.from_stride + HALF && self.to.len() == HALF * HALF);
        // SAFETY: as asserted.
        unsafe { transpose(simd, self.from.as_ptr(), self.from_stride, self.to.as_mut_ptr()) };
    }
}

/// The same, of pointers.
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
