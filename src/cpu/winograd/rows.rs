//! Winograd's algorithm along rows alone, for filters of few channels: the network's first, 7x7 with a stride of two.
//!
//! Where pixels have three channels the transforms are what limits the algorithm, and along both axes they would cost more than
//! they save. Along rows they take 10 + 9 products for seven outputs of each row of the filter, in bf16 7 + 6 for four, instead of
//! 49 or 28 (`points.rs`). Sums of products at a point go over the filter's rows, the two phases and the channels, so
//! that the transform back is done once for all of them.
//!
//! A vector of a transform holds the channels of a pixel, filled up to four, of several tiles. What it gives for a position is stored
//! as it is, and is what the products of that position read one after the other.

mod seen;
pub mod wgrad;

use super::check_operands;
use super::points::*;
use super::transforms::*;
use crate::cpu::conv::ConvShape;
use crate::cpu::float::Float;
use crate::cpu::gemm::{Epilogue, Far, Near, Output, Shares, Stream, TILE_ROWS, Tile};
use crate::cpu::isa::products_ask_for_others;
use crate::cpu::parallel::for_each;
use crate::cpu::pool::{PoolShape, max_pool_as_computed};
use crate::cpu::simd::{Isa, Simd, Task, dispatch};
use crate::tensor::pool::Scratch;
use seen::{MAX_CHANNELS, ROWS_OF_TASK, Seen, phases_of_plane};
use std::ops::Range;

/// Transformed filters `[panel][position][filter row][plane][channel][column]`, in words. `W` is the type whose products are taken; a
/// position has a plane for each phase, or one where a word is a pair, whose values are the phases, of which the second may be zero.
pub struct RowFilter<W> {
    isa: Isa,
    panels: Scratch<W>,
    c: usize,
    o: usize,
}

/// Whether a convolution of this geometry is one for this algorithm: rows of seven taps, a stride of two, few channels, and whole
/// vectors of outputs.
pub fn suits(isa: Isa, shape: &ConvShape) -> bool {
    let few = shape.c <= MAX_CHANNELS && shape.o.is_multiple_of(isa.lanes());
    few && shape.kw == ROW_TAPS && shape.stride[1] == PHASES
}

/// Planes that products are taken of before each position, and of all positions, in words of `rows` or of phases.
const fn planes_before<W: Float>(rows: bool) -> [usize; MAX + 1] {
    let (mut before, mut position) = ([0; MAX + 1], 0);
    while position < all_positions::<W>() {
        let (mut count, mut slot) = (0, 0);
        while slot < slots(row_axis::<W>()) {
            count += (position_of(row_axis::<W>(), slot) == position) as usize;
            slot += 1;
        }
        before[position + 1] = before[position] + count.div_ceil(phases_of_plane::<W>(rows));
        position += 1;
    }
    before
}

/// Planes of a position that products are taken of.
fn planes_at<W: Float>(position: usize) -> usize {
    let before = const { planes_before::<W>(false) };
    before[position + 1] - before[position]
}

/// Rows of a panel before those of `position`, for filters of `rows` rows and `c` channels.
fn depth_before<W: Float>(position: usize, rows: usize, c: usize) -> usize {
    let before = const { planes_before::<W>(false) };
    before[position] * rows * c
}

impl<W: Float> RowFilter<W> {
    /// From filters `[o, kh, 7, c]`.
    pub fn new(isa: Isa, filter: &[f32], shape: &ConvShape) -> Self {
        let ConvShape { c, o, kh, .. } = *shape;
        assert_eq!(filter.len(), o * kh * ROW_TAPS * c);
        let matrix = const { filter_matrix::<ROW_SLOTS>(row_axis::<W>()) };
        let (width, depth) = (isa.tile_columns(), depth_before::<W>(all_positions::<W>(), kh, c));
        let mut panels = Scratch::<W>::take(o.div_ceil(width) * depth * width * W::PER_WORD);
        panels.fill(W::default());
        for (panel, out) in panels.chunks_exact_mut(depth * width * W::PER_WORD).enumerate() {
            let mut rows = out.chunks_exact_mut(width * W::PER_WORD);
            for position in 0..all_positions::<W>() {
                let slots: Vec<usize> = slots_at(row_axis::<W>(), position).collect();
                for (row, slots) in (0..kh).flat_map(|row| slots.chunks(W::PER_WORD).map(move |slots| (row, slots))) {
                    for (channel, out) in (0..c).zip(rows.by_ref()) {
                        for (lane, slot) in slots.iter().enumerate() {
                            let values = out[lane..].iter_mut().step_by(W::PER_WORD);
                            for (value, column) in values.zip(panel * width..o) {
                                let taps = filter[(column * kh + row) * ROW_TAPS * c + channel..].iter().step_by(c);
                                let sum =
                                    matrix[*slot].iter().zip(taps).take(ROW_TAPS).map(|(factor, tap)| factor * tap);
                                *value = W::from_f32(sum.sum());
                            }
                        }
                    }
                }
            }
        }
        RowFilter { isa, panels, c, o }
    }
}

/// `y = epilogue(conv(x, filter))` for what [`suits`] accepts.
pub fn forward<T: Float, W: Float>(
    x: &[T],
    filter: &RowFilter<W>,
    shape: &ConvShape,
    epilogue: Epilogue<T>,
    y: &mut [T],
) {
    check_operands(shape, [filter.c, filter.o], x, &epilogue, y);
    assert_eq!((shape.kw, shape.stride[1]), (ROW_TAPS, PHASES));
    let out = Output::new(y);
    for_each(Seen::<T, W, false>::count(shape), |i| {
        dispatch(filter.isa, Rows { seen: Seen::new(x, shape, i), filter, epilogue, y: &out, before: 0 });
    });
}

/// The max pooling of what [`forward`] gives, `pooling` of its extents; no residual.
pub fn forward_max_pool<T: Float, W: Float>(
    x: &[T],
    filter: &RowFilter<W>,
    shape: &ConvShape,
    epilogue: Epilogue<T>,
    pooling: &PoolShape,
    y: &mut [T],
) {
    let [oh, ow] = shape.output();
    assert_eq!([shape.c, shape.o], [filter.c, filter.o], "the filter's channels");
    assert_eq!((shape.kw, shape.stride[1]), (ROW_TAPS, PHASES));
    assert_eq!([pooling.n, pooling.h, pooling.w, pooling.c], [shape.n, oh, ow, shape.o], "what is pooled");
    shape.check(x.len(), shape.n * oh * ow * shape.o);
    epilogue.check(shape.o, shape.n * oh * ow * shape.o);
    assert!(epilogue.residual.is_none());
    max_pool_as_computed(pooling, ROWS_OF_TASK, y, |image, rows, out| {
        let before = (image * oh + rows.start) * ow * shape.o;
        let (seen, out) = (Seen::of_rows(x, shape, image, rows), Output::new(out));
        dispatch(filter.isa, Rows { seen, filter, epilogue, y: &out, before });
    });
}

/// Some rows of outputs of an image.
struct Rows<'a, T, W> {
    seen: Seen<'a, T, W, false>,
    filter: &'a RowFilter<W>,
    epilogue: Epilogue<'a, T>,
    y: &'a Output<T>,
    /// Values of all outputs before those that `y` begins with.
    before: usize,
}

impl<T: Float, W: Float> Task for Rows<'_, T, W> {
    type Output = ();
    const BF16: bool = T::PER_WORD * W::PER_WORD > 1;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let seen = &self.seen;
        let ConvShape { c, o, kh, .. } = *seen.shape;
        let inputs = seen.transform(simd);
        let inputs = &*inputs;
        let (count, width) = (seen.tiles(), S::LANES * S::VECTORS);
        let room = count.next_multiple_of(TILE_ROWS);
        // [position][tile][column]
        let mut sums = Scratch::<f32>::take(all_positions::<W>() * room * width);
        // Where the rows of the filter meet the tiles at the first position: [tile of the micro-kernel][filter row][plane][tile].
        let last = all_positions::<W>() - 1;
        let runs = [planes_at::<W>(0), planes_at::<W>(last)].map(|planes| {
            let mut runs = Vec::with_capacity(room / TILE_ROWS * kh * planes);
            for start in (0..count).step_by(TILE_ROWS) {
                let first: [_; TILE_ROWS] =
                    std::array::from_fn(|lane| seen.tile(inputs, (start + lane).min(count - 1)).as_ptr());
                for at in (0..kh).flat_map(|row| (0..planes).map(move |plane| seen.offset([row, 0, plane]))) {
                    runs.push(first.map(|first| first.wrapping_add(at).cast::<f32>()));
                }
            }
            runs
        });
        let row = width * W::PER_WORD;
        let depth = depth_before::<W>(all_positions::<W>(), kh, c);
        // Products leave memory idle, and transforms wait for nothing else.
        let products = o.div_ceil(width) * all_positions::<W>() * (room / TILE_ROWS);
        let mut others = products_ask_for_others().then(|| [self.results(products), seen.next_pixels(products)]);
        for (panel, filters) in self.filter.panels.chunks_exact(depth * row).enumerate() {
            let columns = width.min(o - panel * width);
            for (position, sums) in sums.chunks_exact_mut(room * width).enumerate() {
                let b = &filters[depth_before::<W>(position, kh, c) * row..];
                let planes = planes_at::<W>(position);
                let runs = &runs[usize::from(planes != planes_at::<W>(0))];
                assert!(b.len() >= kh * planes * c * row && runs.len() == room / TILE_ROWS * kh * planes);
                let groups = runs.chunks_exact(kh * planes).zip(sums.chunks_exact_mut(TILE_ROWS * width));
                for (start, (runs, sums)) in (0..count).step_by(TILE_ROWS).zip(groups) {
                    let extents = [TILE_ROWS.min(count - start), columns];
                    let first = seen.offset([0, position, 0]) / W::PER_WORD;
                    // The next tile's sums, which follow.
                    let next = sums.as_ptr_range().end;
                    let words = runs.len() * c;
                    let near = Near([Stream::new(next, TILE_ROWS * width, words)]);
                    let sums = sums.as_mut_ptr();
                    // SAFETY: a tile has its words at every place of every row, and `b` has as many rows as runs have words, as
                    // asserted; there is a full tile of sums.
                    unsafe {
                        if let Some(others) = &mut others {
                            let ahead = (near, Far(others.each_mut().map(|shares| shares.next(words))));
                            Tile { first, ..Tile::of_sums(runs, c, b, extents, sums, ahead) }.compute(simd);
                        } else {
                            Tile { first, ..Tile::of_sums(runs, c, b, extents, sums, near) }.compute(simd);
                        }
                    }
                }
            }
            let channels = panel * width..panel * width + columns;
            for tile in 0..count {
                let sums = &sums[tile * width..];
                let whole = const { row_axis::<W>().outputs };
                match self.seen.outputs(tile) {
                    // Then there is nothing to decide for each output.
                    (first, count) if count == whole => {
                        self.transform_outputs(simd, first, whole, channels.clone(), sums, room * width)
                    }
                    (first, count) => self.transform_outputs(simd, first, count, channels.clone(), sums, room * width),
                }
            }
        }
    }
}

impl<T: Float, W: Float> Rows<'_, T, W> {
    /// Where its results go, for so many tiles to ask for.
    fn results(&self, tiles: usize) -> Shares {
        let (rows, row_len) = (self.seen.rows(), self.seen.shape.output()[1] * self.seen.shape.o);
        Shares::new(self.y.pointer().wrapping_add(rows.start * row_len - self.before), rows.len() * row_len, tiles)
    }

    /// `A^T m` of a tile and some channels with the epilogue, to `count` outputs from the `first` on.
    #[inline(always)]
    fn transform_outputs<S: Simd>(
        &self,
        simd: S,
        first: usize,
        count: usize,
        channels: Range<usize>,
        sums: &[f32],
        stride: usize,
    ) {
        // A copy, which stays in registers.
        let (epilogue, o) = (self.epilogue, self.seen.shape.o);
        let from = first * o - self.before;
        assert!(
            sums.len() >= (all_positions::<W>() - 1) * stride + channels.len()
                && channels.len().is_multiple_of(S::LANES)
        );
        for (i, channel) in channels.step_by(S::LANES).enumerate() {
            let values = vectors!(simd, all_positions::<W>(), POSITION => {
                // SAFETY: as asserted, a vector of the channels is there at every position.
                unsafe { simd.load(sums.as_ptr().add(POSITION * stride + i * S::LANES)) }
            });
            let outputs = RowSums::<W>::apply(simd, &values);
            // SAFETY: a bias has as many values as there are columns.
            let bias = epilogue.bias.map(|bias| unsafe { simd.load(bias[channel..][..S::LANES].as_ptr()) });
            unrolled!(J => {
                if const { J < row_axis::<W>().outputs } && J < count {
                    // SAFETY: the output lies inside the image and is this task's alone; the residual is as long.
                    unsafe { epilogue.store(simd, outputs[J], bias, self.y.pointer(), from + J * o + channel) };
                }
            });
        }
    }
}
