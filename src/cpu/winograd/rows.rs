//! Winograd's algorithm along rows alone, for filters of few channels: the network's first, 7x7 with a stride of two.
//!
//! Where pixels have three channels the transforms are what limits the algorithm, and along both axes they would cost more than
//! they save. Along rows they halve the products: four outputs take 7 + 6 for each row of the filter instead of 28
//! (`points.rs`). Sums of products at a point go over the filter's rows, the two phases and the channels, so
//! that the transform back is done once for all of them.

use super::check_operands;
use super::points::*;
use crate::cpu::conv::ConvShape;
use crate::cpu::float::Float;
use crate::cpu::gemm::{Epilogue, Output, TILE_ROWS, Tile};
use crate::cpu::simd::{Isa, Simd, Task, dispatch};
use crate::tensor::pool::Scratch;
use rayon::prelude::*;
use std::ops::Range;

const TAPS: usize = 7;
const OUTPUTS: usize = 4;
const POINTS: [Point; 7] = [Some(0.0), None, Some(1.0), Some(-1.0), Some(2.0), Some(-2.0), Some(0.5)];
pub(super) const AXIS: Axis = Axis { taps: TAPS, stride: 2, outputs: OUTPUTS, points: &POINTS };
const SLOTS: usize = slots(AXIS);
const POSITIONS: usize = positions(AXIS, OUTPUTS);
/// Inputs of a tile; where the image ends earlier it is continued with zeros, and outputs beyond it are dropped.
const INPUTS: usize = inputs(AXIS, OUTPUTS);
/// Values of a phase of a transformed channel: its positions, and padding.
const ROOM: usize = 8;
const PHASES: usize = AXIS.stride;
/// Rows of outputs that a task computes: everything in between stays in L2.
const ROWS: usize = 8;
/// More channels fill runs that are long enough for the direct product.
const MAX_CHANNELS: usize = 4;

/// Transformed filters `[panel][position][filter row][channel][phase][column]`, zero-padded. `W` is the type whose products are
/// taken; where a word is a pair, its values are the phases, of which the second may be zero.
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
    few && shape.kw == TAPS && shape.stride[1] == AXIS.stride && !isa.has_tiles()
}

/// Words of a channel at a position.
fn words_at<W: Float>(position: usize) -> usize {
    slots_at(AXIS, position).count().div_ceil(W::PER_WORD)
}

/// Rows of a panel before those of `position`, for filters of `rows` rows and `c` channels.
fn depth_before<W: Float>(position: usize, rows: usize, c: usize) -> usize {
    (0..position).map(|position| rows * words_at::<W>(position) * c).sum()
}

/// Where a transformed channel has a slot: phase after phase, or in words of both.
const fn place<W: Float>(slot: usize) -> usize {
    let (phase, position) = (if slot < POSITIONS { 0 } else { 1 }, position_of(AXIS, slot));
    if W::PER_WORD == 1 { phase * ROOM + position } else { position * PHASES + phase }
}

impl<W: Float> RowFilter<W> {
    /// From filters `[o, kh, 7, c]`.
    pub fn new(isa: Isa, filter: &[f32], shape: &ConvShape) -> Self {
        let ConvShape { c, o, kh, .. } = *shape;
        assert_eq!(filter.len(), o * kh * TAPS * c);
        let matrix = const { filter_matrix::<SLOTS>(AXIS) };
        let (width, depth) = (isa.tile_columns(), depth_before::<W>(POSITIONS, kh, c));
        let mut panels = Scratch::<W>::take(o.div_ceil(width) * depth * width * W::PER_WORD);
        panels.fill(W::default());
        for (panel, out) in panels.chunks_exact_mut(depth * width * W::PER_WORD).enumerate() {
            let mut rows = out.chunks_exact_mut(width * W::PER_WORD);
            for position in 0..POSITIONS {
                for (row, channel) in (0..kh).flat_map(|row| (0..c).map(move |channel| (row, channel))) {
                    let mut slots = slots_at(AXIS, position);
                    for out in rows.by_ref().take(words_at::<W>(position)) {
                        for (lane, slot) in slots.by_ref().take(W::PER_WORD).enumerate() {
                            let values = out[lane..].iter_mut().step_by(W::PER_WORD);
                            for (value, column) in values.zip(panel * width..o) {
                                let taps = filter[(column * kh + row) * TAPS * c + channel..].iter().step_by(c);
                                let sum = matrix[slot].iter().zip(taps).map(|(factor, tap)| factor * tap).sum();
                                *value = W::from_f32(sum);
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
    let oh = shape.output()[0];
    check_operands(shape, [filter.c, filter.o], x, &epilogue, y);
    assert_eq!((shape.kw, shape.stride[1]), (TAPS, AXIS.stride));
    let blocks = oh.div_ceil(ROWS);
    let out = Output::new(y);
    (0..shape.n * blocks).into_par_iter().for_each(|task| {
        let (image, block) = (task / blocks, task % blocks);
        let rows = block * oh / blocks..(block + 1) * oh / blocks;
        dispatch(filter.isa, Rows { x, filter, shape, epilogue, y: &out, image, rows });
    });
}

/// What the positions of both phases take of each input.
const fn places<W: Float>() -> [[f32; PHASES * ROOM]; INPUTS] {
    let matrix = input_matrix::<INPUTS>(AXIS, OUTPUTS);
    let mut out = [[0.0; PHASES * ROOM]; INPUTS];
    let mut slot = 0;
    while slot < SLOTS {
        let mut input = 0;
        while input < INPUTS {
            out[input][place::<W>(slot)] = matrix[slot][input];
            input += 1;
        }
        slot += 1;
    }
    out
}

/// `B^T d` of the tiles of a row of the input, `[column][channel]`, to `[tile][channel][phase][ROOM]`.
#[inline(always)]
fn transform_row<S: Simd, W: Float>(simd: S, row: &[f32], channels: usize, out: &mut [W]) {
    let matrix = const { &places::<W>() };
    for (tile, out) in out.chunks_exact_mut(channels * PHASES * ROOM).enumerate() {
        let inputs = &row[tile * OUTPUTS * AXIS.stride * channels..][..INPUTS * channels];
        for (channel, out) in out.chunks_exact_mut(PHASES * ROOM).enumerate() {
            for at in (0..PHASES * ROOM).step_by(S::LANES) {
                let mut sum = simd.splat(0.0);
                for (i, factors) in matrix.iter().enumerate() {
                    // SAFETY: two phases are a whole number of vectors.
                    let factors = unsafe { simd.load(factors.as_ptr().add(at)) };
                    sum = simd.mul_add(factors, simd.splat(inputs[i * channels + channel]), sum);
                }
                // SAFETY: as above.
                unsafe { W::store(simd, out.as_mut_ptr().add(at), sum) };
            }
        }
    }
}

/// Some rows of outputs of an image.
struct Rows<'a, T, W> {
    x: &'a [T],
    filter: &'a RowFilter<W>,
    shape: &'a ConvShape,
    epilogue: Epilogue<'a, T>,
    y: &'a Output<T>,
    image: usize,
    rows: Range<usize>,
}

impl<T: Float, W: Float> Task for Rows<'_, T, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let ConvShape { c, o, kh, stride, .. } = *self.shape;
        let tiles = self.shape.output()[1].div_ceil(OUTPUTS);
        let (width, pixel) = (S::LANES * S::VECTORS, c * PHASES * ROOM);
        let inputs = self.transform_inputs(simd, tiles);
        let count = self.rows.len() * tiles;
        let room = count.next_multiple_of(TILE_ROWS);
        // [position][tile][column]
        let mut sums = Scratch::<f32>::take(POSITIONS * room * width);
        // Where each row of the filter meets each tile: [tile of the micro-kernel][filter row][tile].
        let mut runs = vec![[std::ptr::null(); TILE_ROWS]; room / TILE_ROWS * kh];
        for (i, run) in runs.iter_mut().enumerate() {
            let (start, row) = (i / kh * TILE_ROWS, i % kh);
            *run = std::array::from_fn(|lane| {
                let tile = (start + lane).min(count - 1);
                let at = ((tile / tiles * stride[0] + row) * tiles + tile % tiles) * pixel;
                inputs[at..][..pixel].as_ptr().cast()
            });
        }
        let row = width * W::PER_WORD;
        let depth = depth_before::<W>(POSITIONS, kh, c);
        for (panel, filters) in self.filter.panels.chunks_exact(depth * row).enumerate() {
            let columns = width.min(o - panel * width);
            for (position, sums) in sums.chunks_exact_mut(room * width).enumerate() {
                let b = &filters[depth_before::<W>(position, kh, c) * row..];
                let words_of_channel = words_at::<W>(position);
                let (words, step) = (words_of_channel * c, PHASES / W::PER_WORD / words_of_channel * ROOM);
                assert!(b.len() >= kh * words * row && position + (words - 1) * step < pixel / W::PER_WORD);
                let groups = runs.chunks_exact(kh).zip(sums.chunks_exact_mut(TILE_ROWS * width));
                for (start, (runs, sums)) in (0..count).step_by(TILE_ROWS).zip(groups) {
                    let extents = [TILE_ROWS.min(count - start), columns];
                    let tile =
                        Tile { first: position, step, ..Tile::of_sums(runs, words, b, extents, sums.as_mut_ptr()) };
                    // SAFETY: runs lie within a transformed pixel and `b` has as many rows as they have words, as asserted; there
                    // is a full tile of sums.
                    unsafe { tile.compute(simd) };
                }
            }
            for tile in 0..count {
                self.transform_outputs(simd, tile, tiles, panel * width, columns, &sums[tile * width..], room * width);
            }
        }
    }
}

impl<T: Float, W: Float> Rows<'_, T, W> {
    /// The rows of the image that the outputs see: `[row][tile][channel][phase][ROOM]`.
    #[inline(always)]
    fn transform_inputs<S: Simd>(&self, simd: S, tiles: usize) -> Scratch<W> {
        let ConvShape { h, w, c, kh, stride, padding, .. } = *self.shape;
        let rows = (self.rows.len() - 1) * stride[0] + kh;
        let row_len = tiles * c * PHASES * ROOM;
        let mut out = Scratch::<W>::take(rows * row_len);
        // A row of the image between zeros.
        let mut padded = vec![0.0; ((tiles - 1) * OUTPUTS * AXIS.stride + INPUTS).max(w + padding[1]) * c];
        for (row, out) in (self.rows.start * stride[0]..).zip(out.chunks_exact_mut(row_len)) {
            match row.checked_sub(padding[0]) {
                Some(y) if y < h => {
                    let x = &self.x[(self.image * h + y) * w * c..][..w * c];
                    T::read(x, |x| padded[padding[1] * c..][..w * c].copy_from_slice(x));
                    transform_row(simd, &padded, c, out);
                }
                _ => out.fill(W::default()),
            }
        }
        out
    }

    /// `A^T m` of a tile and a panel with the epilogue, to the outputs that lie inside the image.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn transform_outputs<S: Simd>(
        &self,
        simd: S,
        tile: usize,
        tiles: usize,
        column: usize,
        columns: usize,
        sums: &[f32],
        stride: usize,
    ) {
        let ([oh, ow], o) = (self.shape.output(), self.shape.o);
        let (row, left) = (self.rows.start + tile / tiles, tile % tiles * OUTPUTS);
        let first = ((self.image * oh + row) * ow + left) * o + column;
        assert!(sums.len() >= (POSITIONS - 1) * stride + columns && columns.is_multiple_of(S::LANES));
        let factor = |x: f32| simd.splat(x);
        for at in (0..columns).step_by(S::LANES) {
            // SAFETY: as asserted, a vector from `at` on is there at every position.
            let load = |position: usize| unsafe { simd.load(sums.as_ptr().add(position * stride + at)) };
            // SAFETY: a bias has as many values as there are columns.
            let bias = self.epilogue.bias.map(|bias| unsafe { simd.load(bias[column + at..][..S::LANES].as_ptr()) });
            let (zero, infinity, half) = (load(0), load(1), load(6));
            let (near, near_odd) = (simd.add(load(2), load(3)), simd.sub(load(2), load(3)));
            let (far, far_odd) = (simd.add(load(4), load(5)), simd.sub(load(4), load(5)));
            let outputs = [
                simd.add(simd.add(simd.add(zero, half), near), far),
                simd.mul_add(factor(0.5), half, simd.mul_add(factor(2.0), far_odd, near_odd)),
                simd.mul_add(factor(0.25), half, simd.mul_add(factor(4.0), far, near)),
                simd.add(simd.mul_add(factor(0.125), half, simd.mul_add(factor(8.0), far_odd, near_odd)), infinity),
            ];
            for (j, sum) in outputs.iter().enumerate() {
                if left + j < ow {
                    // SAFETY: the output lies inside the image and is this task's alone; the residual is as long.
                    unsafe { self.epilogue.store(simd, *sum, bias, self.y.pointer(), first + j * o + at) };
                }
            }
        }
    }
}
