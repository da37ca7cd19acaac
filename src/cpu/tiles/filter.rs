//! The right side of products on tiles, packed in the order in which it is read.

use super::super::float::split;
use super::super::simd::{Isa, Simd, Task, dispatch};
use super::amx::{STEP, TILE};
use super::{HALF, MOST, RIGHT, split_pairs, transpose};
use crate::tensor::pool::Scratch;
use half::bf16;
use rayon::prelude::*;
use std::ops::Range;

/// The right side of a product, `[panel of 32 columns][step of the depth][part][half of the columns][pair of rows][column][row of the
/// pair]`, zero-padded.
pub struct TileFilter {
    panels: Scratch<bf16>,
    pub(super) parts: usize,
    pub(super) steps: usize,
    pub(super) columns: usize,
}

impl TileFilter {
    /// From the columns one after the other, `[columns, depth]`; the depth of step `i` begins at `steps[i].0` and is `steps[i].1` long.
    pub(super) fn from_columns(isa: Isa, b: &[f32], columns: usize, parts: usize, steps: &[(usize, usize)]) -> Self {
        // As they follow one another in memory.
        let mut order: Vec<usize> = (0..steps.len()).collect();
        order.sort_unstable_by_key(|&step| steps[step].0);
        let (depth, order) = (b.len().checked_div(columns).unwrap_or(0), &order[..]);
        let pack =
            |first, out: &mut [bf16]| dispatch(isa, Columns { b, depth, columns, steps, order, parts, first, out });
        TileFilter { panels: by_panels(columns, steps.len() * parts, pack), parts, steps: steps.len(), columns }
    }

    /// From rows of `columns` contiguous values, which begin at `steps[i][row]` for the rows of step `i`.
    pub(super) fn from_rows(isa: Isa, b: &[f32], columns: usize, parts: usize, steps: &[Vec<usize>]) -> Self {
        let pack = |first, out: &mut [bf16]| dispatch(isa, Rows { b, columns, steps, parts, first, out });
        TileFilter { panels: by_panels(columns, steps.len() * parts, pack), parts, steps: steps.len(), columns }
    }

    /// The steps of some columns.
    pub(super) fn panel(&self, panel: usize) -> &[bf16] {
        let len = self.steps * self.parts * RIGHT;
        &self.panels[panel * len..][..len]
    }

    /// Bytes of it.
    pub(super) fn bytes(&self) -> usize {
        self.panels.len() * size_of::<bf16>()
    }
}

/// Panels of so many steps in all parts, which `pack` fills from the one of its first argument on: a task takes some, because rows of the
/// source go on from each to the next.
fn by_panels(columns: usize, steps: usize, pack: impl Fn(usize, &mut [bf16]) + Sync) -> Scratch<bf16> {
    let panels = columns.div_ceil(TILE);
    let mut out = Scratch::take(panels * steps * RIGHT);
    let together = panels.div_ceil(2 * rayon::current_num_threads()).max(1);
    let piece = together * steps * RIGHT;
    out.par_chunks_mut(piece.max(1)).enumerate().for_each(|(i, out)| pack(i * together, out));
    out
}

/// [`TileFilter::from_columns`] of the panels from `first` on.
struct Columns<'a> {
    b: &'a [f32],
    depth: usize,
    columns: usize,
    steps: &'a [(usize, usize)],
    /// The order in which steps are taken.
    order: &'a [usize],
    parts: usize,
    first: usize,
    out: &'a mut [bf16],
}

impl Task for Columns<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Columns { b, depth, columns, steps, order, parts, first, out } = self;
        let step_len = parts * RIGHT;
        // Of each part the values of a step, whose pairs are words that are turned.
        let mut values = [[[bf16::ZERO; STEP]; HALF]; MOST];
        for (range, at) in halves(out.len(), steps.len() * step_len, first, columns) {
            for (i, &step) in order.iter().enumerate() {
                let (start, count) = steps[step];
                let next = order.get(i + 1).map_or(start, |&next| steps[next].0);
                for column in 0..HALF {
                    let mut values = values.each_mut().map(|part| &mut part[column][..]);
                    let values = &mut values[..parts];
                    let there = if column < range.len() { count } else { 0 };
                    if there > 0 {
                        let from = (range.start + column) * depth;
                        simd.prefetch_near(b.as_ptr().wrapping_add(from + next));
                        simd.prefetch_near(b.as_ptr().wrapping_add(from + next + STEP / 2));
                        split(simd, &b[from + start..][..there], 0, values);
                    }
                    if there < STEP {
                        values.iter_mut().for_each(|part| part[there..].fill(bf16::ZERO));
                    }
                }
                for (part, values) in values[..parts].iter().enumerate() {
                    let out = &mut out[at + step * step_len + part * RIGHT..][..RIGHT / 2];
                    // SAFETY: 16 rows of 16 words on either side.
                    unsafe { transpose(simd, values.as_ptr().cast(), HALF, out.as_mut_ptr().cast()) };
                }
            }
        }
    }
}

/// [`TileFilter::from_rows`] of the panels from `first` on.
struct Rows<'a> {
    b: &'a [f32],
    columns: usize,
    steps: &'a [Vec<usize>],
    parts: usize,
    first: usize,
    out: &'a mut [bf16],
}

impl Task for Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Rows { b, columns, steps, parts, first, out } = self;
        let step_len = parts * RIGHT;
        // Rows of fewer than 16 columns, widened by zeros.
        let mut widened = [[0.0f32; HALF]; 2];
        for (step, starts) in steps.iter().enumerate() {
            let next = steps.get(step + 1).unwrap_or(starts);
            for (range, at) in halves(out.len(), steps.len() * step_len, first, columns) {
                let out = &mut out[at + step * step_len..][..step_len - RIGHT / 2];
                for pair in 0..STEP / 2 {
                    let mut rows = [std::ptr::null(); 2];
                    for (i, row) in rows.iter_mut().enumerate() {
                        if let Some(next) = next.get(2 * pair + i) {
                            simd.prefetch_near(b.as_ptr().wrapping_add(next + range.start));
                        }
                        let start = starts.get(2 * pair + i);
                        let from = start.map_or(&[][..], |start| &b[start + range.start..start + range.end]);
                        *row = from.as_ptr();
                        if from.len() < HALF {
                            widened[i][..from.len()].copy_from_slice(from);
                            widened[i][from.len()..].fill(0.0);
                            *row = widened[i].as_ptr();
                        }
                    }
                    for column in (0..HALF).step_by(S::LANES) {
                        // SAFETY: a vector from `column` on lies in either row, and its words in the pair's place of each part.
                        unsafe {
                            let values = rows.map(|row| simd.load(row.add(column)));
                            let out = out.as_mut_ptr().add((pair * HALF + column) * 2);
                            split_pairs(simd, values, parts, |part| out.add(part * RIGHT));
                        }
                    }
                }
            }
        }
    }
}

/// The columns of each half of panels of `len` values, from panel `first` on, and where they begin in `out_len` of them.
fn halves(out_len: usize, len: usize, first: usize, columns: usize) -> impl Iterator<Item = (Range<usize>, usize)> {
    (0..out_len / len * 2).map(move |i| {
        let start = first * TILE + i * HALF;
        (start.min(columns)..(start + HALF).min(columns), i / 2 * len + i % 2 * (RIGHT / 2))
    })
}
