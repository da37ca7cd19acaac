//! Winograd's algorithm along rows for the gradient to the filter of the network's first layer.
//!
//! The transpose of [`super`]: gradients of a tile's outputs are transformed to the positions (`A`), the inputs to the slots as there,
//! and products at a slot, summed over all tiles, are transformed to the gradient of the taps (`G^T`). The sum goes over tiles, so that a
//! pair of bf16 has to be of two of them: one in the first half of some rows, and the one at the same place in the second half.

use super::super::points::*;
use super::super::transforms::*;
use super::super::{multiplies, wgrad};
use super::planes_before;
use super::seen::Seen;
use crate::cpu::conv::{ConvShape, Making, OutputGradient};
use crate::cpu::float::Float;
use crate::cpu::gemm::{Far, Shares};
use crate::cpu::gemm_transposed::{Order, SLICE, multiply_runs, reduce};
use crate::cpu::isa::products_ask_for_others;
use crate::cpu::simd::{Isa, Simd, Task, dispatch};
use crate::tensor::pool::Scratch;
use rayon::prelude::*;
use std::ops::Range;

/// Tasks at most; each has sums of its own, which are added in their order.
const TASKS: usize = 32;

/// Gradient to the filter, `[o, kh, 7, c]`, of a convolution that [`super::suits`].
pub fn backward_filter<T: Float>(isa: Isa, x: &[T], dy: OutputGradient<T>, shape: &ConvShape, dfilter: &mut [f32]) {
    match multiplies::<T>(isa) && wgrad::has_many_pixels(shape) {
        true => backward_filter_by::<T, T>(isa, x, dy, shape, dfilter),
        false => backward_filter_by::<T, f32>(isa, x, dy, shape, dfilter),
    }
}

/// [`backward_filter`] with products of type `W`.
fn backward_filter_by<T: Float, W: Float>(
    isa: Isa,
    x: &[T],
    dy: OutputGradient<T>,
    shape: &ConvShape,
    dfilter: &mut [f32],
) {
    let ConvShape { c, o, kh, .. } = *shape;
    shape.check(x.len(), dy.len(shape));
    assert_eq!(dfilter.len(), o * kh * ROW_TAPS * c);
    let (parts, width) = (Seen::<T, W, true>::count(shape), isa.tile_columns());
    let parts_each = parts.div_ceil(TASKS).max(1);
    let (tasks, depth) = (parts.div_ceil(parts_each).max(1), all_slots::<W>() * kh * c);
    // [task][panel][position][filter row][phase][channel][column]
    let len = o.div_ceil(width) * depth * width;
    let mut sums = Scratch::<f32>::take(tasks * len);
    if parts == 0 {
        sums.fill(0.0);
    }
    sums.par_chunks_exact_mut(len).enumerate().for_each(|(task, sums)| {
        for i in (task * parts_each)..parts.min((task + 1) * parts_each) {
            let first = i == task * parts_each;
            dispatch(isa, Products::<T, W> { seen: Seen::new(x, shape, i), dy, first, sums });
        }
    });
    let mut total = Scratch::<f32>::take(depth * o);
    reduce(&sums, tasks, depth, o, width, &mut total, Order::RowMajor);
    transform_sums::<W>(&total, shape, dfilter);
}

/// Slots before each position, one for each phase that has it, and all slots.
const fn slots_before<W: Float>() -> [usize; MAX + 1] {
    planes_before::<W>(true)
}

/// All of them.
const fn all_slots<W: Float>() -> usize {
    slots_before::<W>()[all_positions::<W>()]
}

/// `G^T` of the sums at all slots, `[position][filter row][phase][channel][o]`.
fn transform_sums<W: Float>(sums: &[f32], shape: &ConvShape, dfilter: &mut [f32]) {
    let ConvShape { c, o, kh, .. } = *shape;
    let matrix = const { filter_matrix::<ROW_SLOTS>(row_axis::<W>()) };
    let mut sums = sums.chunks_exact(c * o);
    dfilter.fill(0.0);
    for position in 0..all_positions::<W>() {
        let slots = slots_at(row_axis::<W>(), position);
        for (row, slot) in (0..kh).flat_map(|row| slots.clone().map(move |slot| (row, slot))) {
            let sums = sums.next().expect("as many as the filter has");
            for (channel, sums) in sums.chunks_exact(o).enumerate() {
                for (sum, taps) in sums.iter().zip(dfilter.chunks_exact_mut(kh * ROW_TAPS * c)) {
                    let taps = taps[row * ROW_TAPS * c + channel..].iter_mut().step_by(c);
                    taps.zip(&matrix[slot]).take(ROW_TAPS).for_each(|(tap, factor)| *tap += factor * sum);
                }
            }
        }
    }
}

/// The products of some rows of outputs of an image.
struct Products<'a, T, W> {
    seen: Seen<'a, T, W, true>,
    dy: OutputGradient<'a, T>,
    /// Whether they are the first of their sums.
    first: bool,
    sums: &'a mut [f32],
}

impl<T: Float, W: Float> Task for Products<'_, T, W> {
    type Output = ();
    const BF16: bool = T::PER_WORD > 1;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let ConvShape { c, o, kh, .. } = *self.seen.shape;
        let width = S::LANES * S::VECTORS;
        let (rows, row_len) = (self.seen.rows(), self.seen.shape.output()[1] * o);
        let inputs = self.seen.transform(simd);
        let (inputs, words) = (&*inputs, self.seen.words());
        let mut made;
        // From the first gradient of these rows on, and what the next ones are or are made of.
        let (dy, follows) = match self.dy {
            OutputGradient::There(dy) => (&dy[rows.start * row_len..rows.end * row_len], &dy[rows.end * row_len..]),
            OutputGradient::Made(Making { make, of }) => {
                made = Scratch::take(rows.len() * row_len);
                make(rows.clone(), &mut made);
                (&*made, &of[rows.end * row_len..])
            }
        };
        let runs: Vec<*const f32> = (0..words).map(|word| self.seen.tile(inputs, word).as_ptr().cast()).collect();
        // [position][word][column]
        let mut gradients = Scratch::<W>::take(all_positions::<W>() * words * width * W::PER_WORD);
        let slots = const { all_slots::<W>() };
        let panel_len = slots * kh * c * width;
        let products = o.div_ceil(width) * slots * kh * words.div_ceil(SLICE);
        let next_dy = Shares::new(follows.as_ptr(), rows.len() * row_len, products);
        let mut others = products_ask_for_others().then(|| [next_dy, self.seen.next_pixels(products)]);
        for panel in 0..o.div_ceil(width) {
            let columns = panel * width..o.min((panel + 1) * width);
            if columns.len() < width {
                gradients.fill(W::default());
            }
            for word in 0..words {
                let tiles = [word, word + words].map(|tile| match tile < self.seen.tiles() {
                    true => {
                        let (first, count) = self.seen.outputs(tile);
                        &dy[first * o - rows.start * row_len..][..count * o]
                    }
                    // There is an odd number of rows.
                    false => &[],
                });
                let to = &mut gradients[word * width * W::PER_WORD..];
                transform_gradients::<T, W, S>(simd, tiles, o, columns.clone(), to, words * width * W::PER_WORD);
            }
            let mut sums = self.sums[panel * panel_len..][..panel_len].chunks_exact_mut(c * width);
            for (position, gradients) in gradients.chunks_exact(words * width * W::PER_WORD).enumerate() {
                let before = const { slots_before::<W>() };
                let phases = before[position + 1] - before[position];
                for (row, phase) in (0..kh).flat_map(|row| (0..phases).map(move |phase| (row, phase))) {
                    let sums = sums.next().expect("as many as the filter has");
                    let first = self.seen.offset([row, position, phase]) / W::PER_WORD;
                    let gradients = gradients.chunks(SLICE * width * W::PER_WORD);
                    for (i, (runs, gradients)) in runs.chunks(SLICE).zip(gradients).enumerate() {
                        let (channels, begins) = (first..first + c, self.first && i == 0);
                        if let Some(others) = &mut others {
                            let ahead = Far(others.each_mut().map(|shares| shares.next(runs.len())));
                            multiply_runs(simd, runs, channels, 0, gradients, begins, sums, width, ahead);
                        } else {
                            multiply_runs(simd, runs, channels, 0, gradients, begins, sums, width, ());
                        }
                    }
                }
            }
        }
    }
}

/// `A d` of some channels of the tiles of a word, whose outputs' gradients are `dy`, `o` channels each; those beyond the image have none.
/// Positions are `stride` values apart.
#[inline(always)]
fn transform_gradients<T: Float, W: Float, S: Simd>(
    simd: S,
    dy: [&[T]; 2],
    o: usize,
    channels: Range<usize>,
    to: &mut [W],
    stride: usize,
) {
    assert!(to.len() >= (all_positions::<W>() - 1) * stride + channels.len() * W::PER_WORD);
    assert!(channels.len().is_multiple_of(S::LANES) && channels.end <= o);
    for (i, channel) in channels.step_by(S::LANES).enumerate() {
        let first = transform_tile::<T, W, S>(simd, dy[0], o, channel);
        let last = if W::PER_WORD > 1 { transform_tile::<T, W, S>(simd, dy[1], o, channel) } else { first };
        unrolled!(POSITION => {
            if const { POSITION < all_positions::<W>() } {
                let to = to[POSITION * stride + i * S::LANES * W::PER_WORD..].as_mut_ptr();
                // SAFETY: as asserted.
                unsafe { W::store_words(simd, to, first[POSITION], last[POSITION]) };
            }
        });
    }
}

/// [`transform_gradients`] of a tile and a vector of channels.
#[inline(always)]
fn transform_tile<T: Float, W: Float, S: Simd>(simd: S, dy: &[T], o: usize, channel: usize) -> [S::V; MAX] {
    let count = dy.len() / o;
    assert!(channel + S::LANES <= o);
    let values = vectors!(simd, RowGradient::<W>::VALUES, J => {
        if J < count {
            // SAFETY: an output has a vector of these channels, as asserted.
            unsafe { T::load(simd, dy.as_ptr().add(J * o + channel)) }
        } else {
            simd.splat(0.0)
        }
    });
    RowGradient::<W>::apply(simd, &values)
}
