//! Winograd's algorithm along rows alone, for filters of few channels: the network's first, 7x7 with a stride of two.
//!
//! Where pixels have three channels the transforms are what limits the algorithm, and along both axes they would cost more than
//! they save. Along rows they take 10 + 9 products for seven outputs of each row of the filter, in bf16 7 + 6 for four, instead of
//! 49 or 28 (`points.rs`). Sums of products at a point go over the filter's rows, the two phases and the channels, so
//! that the transform back is done once for all of them.
//!
//! A vector of a transform holds the channels of a pixel, filled up to four, of several tiles. What it gives for a position is stored
//! as it is, and is what the products of that position read one after the other.

use super::check_operands;
use super::points::*;
use super::transforms::*;
use crate::cpu::conv::ConvShape;
use crate::cpu::float::{Float, copy_with};
use crate::cpu::gemm::{Epilogue, Far, Near, Output, Parts, Stream, TILE_ROWS, Tile};
use crate::cpu::isa::products_ask_for_others;
use crate::cpu::parallel::{for_each, piece};
use crate::cpu::pool::{PoolShape, max_pool_as_computed};
use crate::cpu::simd::{Isa, Simd, Task, dispatch};
use crate::tensor::pool::Scratch;
use std::marker::PhantomData;
use std::ops::Range;

/// Rows of outputs that a task computes: everything in between stays in L2.
const ROWS: usize = 8;
/// More channels fill runs that are long enough for the direct product.
const MAX_CHANNELS: usize = 4;
/// Tiles of a vector at most.
const TILES: usize = LANES / MAX_CHANNELS;

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

/// Planes that products are taken of before each position, and of all positions, if so many phases have a plane together.
pub(super) const fn planes_before<W: Float>(phases: usize) -> [usize; MAX + 1] {
    let (mut before, mut position) = ([0; MAX + 1], 0);
    while position < all_positions::<W>() {
        let (mut count, mut slot) = (0, 0);
        while slot < slots(row_axis::<W>()) {
            count += (position_of(row_axis::<W>(), slot) == position) as usize;
            slot += 1;
        }
        before[position + 1] = before[position] + count.div_ceil(phases);
        position += 1;
    }
    before
}

/// Planes of a position that products are taken of.
fn planes_at<W: Float>(position: usize) -> usize {
    let before = const { planes_before::<W>(W::PER_WORD) };
    before[position + 1] - before[position]
}

/// Rows of a panel before those of `position`, for filters of `rows` rows and `c` channels.
fn depth_before<W: Float>(position: usize, rows: usize, c: usize) -> usize {
    let before = const { planes_before::<W>(W::PER_WORD) };
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
    for_each(Seen::<T, W>::count(shape), |i| {
        dispatch(filter.isa, Rows { seen: Seen::new(x, shape, i, W::PER_WORD), filter, epilogue, y: &out, before: 0 });
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
    max_pool_as_computed(pooling, ROWS, y, |image, rows, out| {
        let before = (image * oh + rows.start) * ow * shape.o;
        let (seen, out) = (Seen::of_rows(x, shape, image, rows, W::PER_WORD), Output::new(out));
        dispatch(filter.isa, Rows { seen, filter, epilogue, y: &out, before });
    });
}

/// Some rows of outputs of an image.
struct Rows<'a, T, W> {
    seen: Seen<'a, T, W>,
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
                            let ahead = (near, Far(others.each_mut().map(|parts| parts.next(words))));
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

/// Some rows of outputs of an image, and what they see of it.
pub(super) struct Seen<'a, T, W> {
    x: &'a [T],
    pub shape: &'a ConvShape,
    image: usize,
    rows: Range<usize>,
    output: [usize; 2],
    /// Tiles of a row of outputs.
    pub across: usize,
    /// Planes of a position, whether there is a slot for all of them or not.
    planes: usize,
    products: PhantomData<W>,
}

impl<'a, T: Float, W: Float> Seen<'a, T, W> {
    /// How many parts a convolution has.
    pub fn count(shape: &ConvShape) -> usize {
        shape.n * shape.output()[0].div_ceil(ROWS)
    }

    /// One of its parts, if so many phases have a plane together.
    pub fn new(x: &'a [T], shape: &'a ConvShape, i: usize, phases: usize) -> Self {
        let oh = shape.output()[0];
        let blocks = oh.div_ceil(ROWS);
        let (image, block) = (i / blocks, i % blocks);
        Self::of_rows(x, shape, image, piece(block, blocks, oh), phases)
    }

    /// Some rows of an image.
    fn of_rows(x: &'a [T], shape: &'a ConvShape, image: usize, rows: Range<usize>, phases: usize) -> Self {
        assert!(shape.c <= MAX_CHANNELS, "room for the channels");
        let output @ [_, ow] = shape.output();
        let across = ow.div_ceil(row_axis::<W>().outputs);
        Seen { x, shape, image, rows, output, across, planes: PHASES / phases, products: PhantomData }
    }

    /// Its rows among those of all images' outputs.
    pub fn rows(&self) -> Range<usize> {
        let first = self.image * self.output[0];
        first + self.rows.start..first + self.rows.end
    }

    /// The pixels that the next part sees and this one does not, or what follows an image, for so many tiles to ask for.
    pub fn next_pixels(&self, tiles: usize) -> Parts {
        let ConvShape { h, w, c, kh, stride, padding, .. } = *self.shape;
        let seen = ((self.rows.end - 1) * stride[0] + kh).saturating_sub(padding[0]).min(h);
        let first = self.x.as_ptr().wrapping_add((self.image * h + seen) * w * c);
        Parts::new(first, self.rows.len() * stride[0] * w * c, tiles)
    }

    /// Tiles of all rows.
    pub fn tiles(&self) -> usize {
        self.rows.len() * self.across
    }

    /// The first output of a tile, of all images', and how many of the tile lie inside the image.
    #[inline]
    pub fn outputs(&self, tile: usize) -> (usize, usize) {
        let ([oh, ow], whole) = (self.output, row_axis::<W>().outputs);
        let (row, left) = (self.rows.start + tile / self.across, tile % self.across * whole);
        ((self.image * oh + row) * ow + left, whole.min(ow - left))
    }

    /// Values to a row of transformed inputs, a position of it and a plane of that.
    #[inline]
    pub fn offset(&self, [row, position, plane]: [usize; 3]) -> usize {
        let plane_len = self.across.next_multiple_of(TILES) * MAX_CHANNELS * W::PER_WORD;
        ((row * all_positions::<W>() + position) * self.planes + plane) * plane_len
    }

    /// What a tile sees: its words for the filter's first row at the first position and the first plane of it lie at the beginning, and for
    /// others as far from there as [`Seen::offset`] says.
    #[inline]
    pub fn tile<'b>(&self, inputs: &'b [W], tile: usize) -> &'b [W] {
        let (row, column) = (tile / self.across * self.shape.stride[0], tile % self.across);
        let last = [self.shape.kh - 1, all_positions::<W>() - 1, self.planes - 1];
        let words = MAX_CHANNELS * W::PER_WORD;
        &inputs[self.offset([row, 0, 0]) + column * words..][..self.offset(last) + words]
    }

    /// The rows of the image that the outputs see: `[row][position][plane][tile][channel]`, in words of phases.
    #[inline(always)]
    fn transform<S: Simd>(&self, simd: S) -> Scratch<W> {
        let rows = (self.rows.len() - 1) * self.shape.stride[0] + self.shape.kh;
        let (row_len, plane) = (self.offset([1, 0, 0]), self.offset([0, 0, 1]));
        let mut out = Scratch::<W>::take(rows * row_len);
        let mut padded = self.room_for_row();
        for (row, out) in out.chunks_exact_mut(row_len).enumerate() {
            let pixels = self.read_row(simd, row, &mut padded);
            for tile in (0..self.across).step_by(S::LANES / MAX_CHANNELS) {
                let [first, second] = [
                    self.transform_phase::<S, 0>(simd, pixels, tile),
                    self.transform_phase::<S, 1>(simd, pixels, tile),
                ];
                let out = &mut out[tile * MAX_CHANNELS * W::PER_WORD..];
                unrolled!(POSITION => {
                    if const { POSITION < all_positions::<W>() } {
                        let planes = const { PHASES / W::PER_WORD };
                        let out = out[POSITION * planes * plane..][..(planes - 1) * plane + S::LANES * W::PER_WORD].as_mut_ptr();
                        // SAFETY: a vector of words in each plane.
                        unsafe {
                            W::store_words(simd, out, first[POSITION], second[POSITION]);
                            if W::PER_WORD == 1 {
                                W::store(simd, out.add(plane), second[POSITION]);
                            }
                        }
                    }
                });
            }
        }
        out
    }

    /// The same in words of rows that are `apart` rows of outputs from each other, and of so many the first; a phase has a plane.
    #[inline(always)]
    pub fn transform_rows<S: Simd>(&self, simd: S, apart: usize) -> Scratch<W> {
        let stride = self.shape.stride[0];
        let rows = (apart - 1) * stride + self.shape.kh;
        let (row_len, plane) = (self.offset([1, 0, 0]), self.offset([0, 0, 1]));
        let mut out = Scratch::<W>::take(rows * row_len);
        let mut padded = [self.room_for_row(), self.room_for_row()];
        let [padded, others] = &mut padded;
        for (row, out) in out.chunks_exact_mut(row_len).enumerate() {
            let pixels = self.read_row(simd, row, padded);
            let others = if W::PER_WORD > 1 { self.read_row(simd, row + apart * stride, others) } else { pixels };
            for tile in (0..self.across).step_by(S::LANES / MAX_CHANNELS) {
                let out = &mut out[tile * MAX_CHANNELS * W::PER_WORD..];
                unrolled!(PHASE in 0 1 => {
                    let first = self.transform_phase::<S, PHASE>(simd, pixels, tile);
                    let last = if W::PER_WORD > 1 { self.transform_phase::<S, PHASE>(simd, others, tile) } else { first };
                    unrolled!(POSITION => {
                        if const { POSITION < all_positions::<W>() } {
                            let out = out[(POSITION * PHASES + PHASE) * plane..][..S::LANES * W::PER_WORD].as_mut_ptr();
                            // SAFETY: a vector of words.
                            unsafe { W::store_words(simd, out, first[POSITION], last[POSITION]) };
                        }
                    });
                });
            }
        }
        out
    }

    /// Room for a row of pixels between zeros. Inputs of a tile that follow its outputs are the next one's, and after a pixel's channels
    /// others' are read.
    fn room_for_row(&self) -> Scratch<f32> {
        let ConvShape { w, c, padding, .. } = *self.shape;
        let pixels = self.across.next_multiple_of(TILES) * row_axis::<W>().outputs * PHASES + ROW_TAPS;
        let mut padded = Scratch::<f32>::take(pixels.max(w + padding[1]) * c + MAX_CHANNELS);
        padded.fill(0.0);
        padded
    }

    /// A row of the image, counted from the first that the outputs see, which may be outside.
    #[inline(always)]
    fn read_row<'b, S: Simd>(&self, simd: S, row: usize, padded: &'b mut [f32]) -> &'b [f32] {
        let ConvShape { h, w, c, stride, padding, .. } = *self.shape;
        let pixels = &mut padded[padding[1] * c..][..w * c];
        match (self.rows.start * stride[0] + row).checked_sub(padding[0]) {
            Some(row) if row < h => copy_with(simd, &self.x[(self.image * h + row) * w * c..][..w * c], pixels),
            _ => pixels.fill(0.0),
        }
        padded
    }

    /// `B^T d` of a phase of as many tiles as a vector has, from `tile` on.
    #[inline(always)]
    fn transform_phase<S: Simd, const PHASE: usize>(&self, simd: S, padded: &[f32], tile: usize) -> [S::V; MAX] {
        let (c, apart) = (self.shape.c, row_axis::<W>().outputs * PHASES * self.shape.c);
        let tiles = S::LANES / MAX_CHANNELS;
        let last = (tiles - 1) * apart + ((RowInput::<W, PHASE>::VALUES - 1) * PHASES + PHASE) * c + MAX_CHANNELS;
        let from = padded[tile * apart..][..last].as_ptr();
        let values = vectors!(simd, RowInput::<W, PHASE>::VALUES, I => {
            // SAFETY: those of the last tile end where the slice does.
            unsafe { simd.load_fours(from.add((I * PHASES + PHASE) * c), apart) }
        });
        RowInput::<W, PHASE>::apply(simd, &values)
    }
}

impl<T: Float, W: Float> Rows<'_, T, W> {
    /// Where its results go, for so many tiles to ask for.
    fn results(&self, tiles: usize) -> Parts {
        let (rows, row_len) = (self.seen.rows(), self.seen.output[1] * self.seen.shape.o);
        Parts::new(self.y.pointer().wrapping_add(rows.start * row_len - self.before), rows.len() * row_len, tiles)
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
