//! Winograd's algorithm along rows for the gradient to the filter of the network's first layer.
//!
//! The transpose of [`super::rows`]: gradients of a tile's outputs are transformed to the positions (`A`), the inputs to the slots as there,
//! and products at a slot, summed over all tiles, are transformed to the gradient of the taps (`G^T`). Products are f32: those of
//! bf16 would be of tiles of four, and of as many tiles as words, for which they would have to be laid out again.

use super::points::*;
use super::rows::{Seen, depth_before, planes_at};
use super::transforms::*;
use crate::cpu::conv::{ConvShape, Making, OutputGradient};
use crate::cpu::float::Float;
use crate::cpu::gemm::{Far, Parts};
use crate::cpu::gemm_transposed::{Order, SLICE, multiply_runs, reduce};
use crate::cpu::simd::{Isa, Simd, Task, dispatch};
use crate::tensor::pool::Scratch;
use rayon::prelude::*;
use std::ops::Range;

/// Tasks at most; each has sums of its own, which are added in their order.
const TASKS: usize = 32;

/// Gradient to the filter, `[o, kh, 7, c]`, of a convolution that [`super::rows::suits`].
pub fn backward_filter<T: Float>(isa: Isa, x: &[T], dy: OutputGradient<T>, shape: &ConvShape, dfilter: &mut [f32]) {
    let ConvShape { c, o, kh, .. } = *shape;
    shape.check(x.len(), dy.len(shape));
    assert_eq!(dfilter.len(), o * kh * ROW_TAPS * c);
    let (parts, width) = (Seen::<T, f32>::count(shape), isa.tile_columns());
    let parts_each = parts.div_ceil(TASKS).max(1);
    let (tasks, depth) = (parts.div_ceil(parts_each).max(1), depth_before::<f32>(all_positions::<f32>(), kh, c));
    // [task][panel][position][filter row][plane][channel][column]
    let len = o.div_ceil(width) * depth * width;
    let mut sums = Scratch::<f32>::take(tasks * len);
    if parts == 0 {
        sums.fill(0.0);
    }
    sums.par_chunks_exact_mut(len).enumerate().for_each(|(task, sums)| {
        for i in (task * parts_each)..parts.min((task + 1) * parts_each) {
            let first = i == task * parts_each;
            dispatch(isa, Products { seen: Seen::new(x, shape, i), dy, first, sums });
        }
    });
    let mut total = Scratch::<f32>::take(depth * o);
    reduce(&sums, tasks, depth, o, width, &mut total, Order::RowMajor);
    transform_sums(&total, shape, dfilter);
}

/// `G^T` of the sums at all slots, `[position][filter row][plane][channel][o]`.
fn transform_sums(sums: &[f32], shape: &ConvShape, dfilter: &mut [f32]) {
    let ConvShape { c, o, kh, .. } = *shape;
    let matrix = const { filter_matrix::<ROW_SLOTS>(row_axis::<f32>()) };
    let mut sums = sums.chunks_exact(c * o);
    dfilter.fill(0.0);
    for position in 0..all_positions::<f32>() {
        let slots = slots_at(row_axis::<f32>(), position);
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
struct Products<'a, T> {
    seen: Seen<'a, T, f32>,
    dy: OutputGradient<'a, T>,
    /// Whether they are the first of their sums.
    first: bool,
    sums: &'a mut [f32],
}

impl<T: Float> Task for Products<'_, T> {
    type Output = ();
    const BF16: bool = T::PER_WORD > 1;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let ConvShape { c, o, kh, .. } = *self.seen.shape;
        let (tiles, width) = (self.seen.tiles(), S::LANES * S::VECTORS);
        let inputs = self.seen.transform(simd);
        let (rows, row_len) = (self.seen.rows(), self.seen.shape.output()[1] * o);
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
        let runs: Vec<*const f32> = (0..tiles).map(|tile| self.seen.tile(&inputs, tile).as_ptr()).collect();
        // [position][tile][column]
        let mut gradients = Scratch::<f32>::take(all_positions::<f32>() * tiles * width);
        let panel_len = depth_before::<f32>(all_positions::<f32>(), kh, c) * width;
        let products = o.div_ceil(width) * depth_before::<f32>(all_positions::<f32>(), kh, 1) * tiles.div_ceil(SLICE);
        let mut next_dy = Parts::new(follows.as_ptr(), rows.len() * row_len, products);
        let mut next_x = self.seen.next_pixels(products);
        for panel in 0..o.div_ceil(width) {
            let columns = panel * width..o.min((panel + 1) * width);
            if columns.len() < width {
                gradients.fill(0.0);
            }
            for tile in 0..tiles {
                let (first, count) = self.seen.outputs(tile);
                let dy = &dy[first * o - rows.start * row_len..][..count * o];
                let to = &mut gradients[tile * width..];
                transform_gradients(simd, dy, o, columns.clone(), to, tiles * width);
            }
            let mut sums = self.sums[panel * panel_len..][..panel_len].chunks_exact_mut(c * width);
            for (position, gradients) in gradients.chunks_exact(tiles * width).enumerate() {
                let planes = planes_at::<f32>(position);
                for (row, plane) in (0..kh).flat_map(|row| (0..planes).map(move |plane| (row, plane))) {
                    let sums = sums.next().expect("as many as the filter has");
                    let first = self.seen.offset([row, position, plane]);
                    for (i, (runs, gradients)) in runs.chunks(SLICE).zip(gradients.chunks(SLICE * width)).enumerate() {
                        let (channels, begins) = (first..first + c, self.first && i == 0);
                        let ahead = Far([next_dy.next(runs.len()), next_x.next(runs.len())]);
                        multiply_runs(simd, runs, channels, 0, gradients, begins, sums, width, ahead);
                    }
                }
            }
        }
    }
}

/// `A d` of some channels of a tile, whose outputs' gradients are `dy`, `o` channels each; those beyond the image have none. Positions are
/// `stride` values apart.
#[inline(always)]
fn transform_gradients<T: Float, S: Simd>(
    simd: S,
    dy: &[T],
    o: usize,
    channels: Range<usize>,
    to: &mut [f32],
    stride: usize,
) {
    let count = dy.len() / o;
    assert!(to.len() >= (all_positions::<f32>() - 1) * stride + channels.len());
    assert!(channels.len().is_multiple_of(S::LANES) && channels.end <= o);
    for (i, channel) in channels.step_by(S::LANES).enumerate() {
        let values = vectors!(simd, RowGradient::<f32>::VALUES, J => {
            if J < count {
                // SAFETY: an output has a vector of these channels, as asserted.
                unsafe { T::load(simd, dy.as_ptr().add(J * o + channel)) }
            } else {
                simd.splat(0.0)
            }
        });
        let vectors = RowGradient::<f32>::apply(simd, &values);
        unrolled!(POSITION => {
            if const { POSITION < all_positions::<f32>() } {
                // SAFETY: as asserted.
                unsafe { simd.store(to.as_mut_ptr().add(POSITION * stride + i * S::LANES), vectors[POSITION]) };
            }
        });
    }
}
