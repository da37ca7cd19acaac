//! The right side of a product, in the order in which the micro-kernel reads it.

use crate::cpu::float::{Float, convert};
use crate::cpu::simd::Isa;
use crate::tensor::pool::Scratch;
use rayon::prelude::*;
use std::ops::Range;

/// Rows of B that are packed together, so that what they write stays in L1.
const PACK_ROWS: usize = 64;

/// The right side of a product, `[depth, columns]`, packed in panels: `[panel][word][tile columns][value of the word]`,
/// zero-padded.
pub struct PackedB<T = f32> {
    pub(super) isa: Isa,
    /// In values, a multiple of a word's.
    pub(super) depth: usize,
    pub(super) columns: usize,
    panels: Scratch<T>,
}

/// Calls `f` with filters as the type of activations.
fn narrowed<T: Float, R>(x: &[f32], f: impl FnOnce(&[T]) -> R) -> R {
    if T::PER_WORD == 1 {
        return f(bytemuck::cast_slice(x));
    }
    let mut rounded = Scratch::take(x.len());
    convert(x, &mut rounded);
    f(&rounded)
}

/// A run of `run` values of the depth, in whole words.
fn padded_run<T: Float>(run: usize) -> usize {
    run.next_multiple_of(T::PER_WORD)
}

impl<T: Float> PackedB<T> {
    /// `copy(columns, width, out)` fills the panel of some columns.
    fn pack(isa: Isa, depth: usize, columns: usize, copy: impl Fn(Range<usize>, usize, &mut [T]) + Sync) -> Self {
        let width = isa.tile_columns();
        let mut panels = Scratch::take(columns.div_ceil(width) * depth * width);
        if depth > 0 {
            panels.par_chunks_mut(depth * width).enumerate().for_each(|(panel, out)| {
                copy(panel * width..columns.min((panel + 1) * width), width, out);
            });
        }
        PackedB { isa, depth, columns, panels }
    }

    /// From the columns one after the other, `[columns, depth]`: filters `[O, KH*KW*I]`, a linear layer's `[out, in]`. The
    /// depth consists of runs of `run` values, each of which begins with a new word.
    pub fn from_columns(isa: Isa, b: &[f32], depth: usize, columns: usize, run: usize) -> Self {
        assert!(b.len() == depth * columns && depth.is_multiple_of(run.max(1)));
        let padded = padded_run::<T>(run);
        narrowed(b, |b: &[T]| {
            Self::pack(isa, depth / run.max(1) * padded, columns, |range, width, out| {
                if padded != run || range.len() < width {
                    out.fill(T::default());
                }
                for start in (0..depth).step_by(PACK_ROWS) {
                    for (i, column) in range.clone().enumerate() {
                        let values = &b[column * depth..][start..depth.min(start + PACK_ROWS)];
                        for (k, &value) in (start..).zip(values) {
                            let k = if padded == run { k } else { k / run * padded + k % run };
                            out[(k / T::PER_WORD * width + i) * T::PER_WORD + k % T::PER_WORD] = value;
                        }
                    }
                }
            })
        })
    }

    /// From rows of `columns` contiguous values, in runs of `run`; row `k` begins at `start(k)` in `b`.
    pub fn from_rows(
        isa: Isa,
        b: &[f32],
        depth: usize,
        columns: usize,
        run: usize,
        start: impl Fn(usize) -> usize + Sync,
    ) -> Self {
        assert!(depth.is_multiple_of(run.max(1)));
        let padded = padded_run::<T>(run);
        let nothing = vec![T::default(); columns];
        narrowed(b, |b: &[T]| {
            Self::pack(isa, depth / run.max(1) * padded, columns, |range, width, out| {
                // Row `k` counts the padding, of which there is at most one row at the end of a run.
                let row = |k: usize| match k % padded < run {
                    true => &b[start(k / padded * run + k % padded)..][..columns][range.clone()],
                    false => &nothing[range.clone()],
                };
                for (word, out) in out.chunks_exact_mut(width * T::PER_WORD).enumerate() {
                    let (values, rest) = out.split_at_mut(range.len() * T::PER_WORD);
                    let first = word * T::PER_WORD;
                    T::interleave(&[row(first), row(first + T::PER_WORD - 1)], values);
                    rest.fill(T::default());
                }
            })
        })
    }

    /// The rows of a panel, `[depth in words][tile columns]`.
    pub(in crate::cpu) fn panel(&self, panel: usize) -> &[T] {
        let len = self.depth * self.isa.tile_columns();
        &self.panels[panel * len..][..len]
    }

    /// Number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }
}
