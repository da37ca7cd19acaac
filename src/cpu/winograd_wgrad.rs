//! Winograd's algorithm for the gradient to a 3x3 filter: a quarter of the multiplications, as in [`super::winograd`].
//!
//! Forward, a tile's outputs are `A^T [(G g G^T) * (B^T d B)] A`. That is linear in the filter `g`, so its gradient is the
//! transposed map of the outputs' gradient: `dg = G^T [sum over tiles of (A dy A^T) * (B^T d B)] G`. The sum, for every
//! pair of channels at each position, is a matrix product over the tiles.

use super::conv::ConvShape;
use super::elementwise::add_assign;
use super::float::Float;
use super::gather::Gather;
use super::gemm::Output;
use super::gemm_transposed::{Order, multiply_transposed};
use super::simd::{Isa, Simd, Task, dispatch};
use super::winograd::{self, Algorithm, IN, OUT, POSITIONS, TileGrid, zeros};
use super::winograd_axes::{FilterGradientAxis, GradientAxis, along_both};
use crate::tensor::pool::Scratch;
use rayon::prelude::*;
use std::ops::Range;

/// Bytes of transformed tiles that are multiplied together; they are read once, from the last cache. But where the sums are
/// large, adding to them takes longer than reading tiles from memory: then so many times the sums.
const TRANSFORMED: usize = 12 << 20;
const TIMES_THE_SUMS: usize = 4;
/// Tiles a task transforms.
const BLOCK_TILES: usize = 16;

/// With more channels than these, of input or output, sums take longer to transform than few tiles take to multiply; and where
/// few pixels are summed, what is exactly zero should stay so: an optimiser that divides by the size of a gradient would make steps
/// of rounding errors.
const MAX_CHANNELS_OF_FEW: usize = 256;
/// Tiles that are enough for more channels.
const MANY_TILES: usize = 32;

/// Whether the gradient to the filter of this convolution is taken by this algorithm.
pub fn suits<T: Float>(isa: Isa, shape: &ConvShape) -> bool {
    let enough = shape.c.max(shape.o) <= MAX_CHANNELS_OF_FEW || TileGrid::new(shape).count() >= MANY_TILES;
    shape.stride == [1, 1] && enough && winograd::algorithm::<T>(isa, shape, shape.c, shape.o) != Algorithm::Direct
}

/// Gradient to filters `[o, 3, 3, c]`, for what [`suits`] accepts.
pub fn backward_filter<T: Float>(isa: Isa, x: &[T], dy: &[T], shape: &ConvShape, dfilter: &mut [f32]) {
    let (c, o) = (shape.c, shape.o);
    let [oh, ow] = shape.output();
    assert!(x.len() == shape.n * shape.h * shape.w * c && dy.len() == shape.n * oh * ow * o);
    assert_eq!(dfilter.len(), o * 9 * c);
    let grid = TileGrid::new(shape);
    let together = TRANSFORMED.max(TIMES_THE_SUMS * POSITIONS * c * o * size_of::<f32>());
    let part = (together / (POSITIONS * (c + o) * size_of::<f32>())).clamp(1, grid.count().max(1));
    let mut sums = Scratch::<f32>::take(POSITIONS * o * c);
    if grid.count() == 0 {
        sums.fill(0.0);
    }
    let mut inputs = Scratch::<f32>::take(POSITIONS * part * c);
    let mut gradients = Scratch::<f32>::take(POSITIONS * part * o);
    for start in (0..grid.count()).step_by(part) {
        let tiles = start..grid.count().min(start + part);
        let count = tiles.len();
        {
            let (inputs, gradients) = (Output::new(&mut inputs), Output::new(&mut gradients));
            (0..count.div_ceil(BLOCK_TILES)).into_par_iter().for_each(|block| {
                let first = tiles.start + block * BLOCK_TILES;
                let block = first..tiles.end.min(first + BLOCK_TILES);
                let (inputs, gradients) = (&inputs, &gradients);
                dispatch(isa, Transform { x, dy, shape, grid, tiles: block, start, count, inputs, gradients });
            });
        }
        sums.par_chunks_exact_mut(o * c).enumerate().for_each(|(position, sums)| {
            let inputs = &inputs[position * count * c..][..count * c];
            let gradients = &gradients[position * count * o..][..count * o];
            let multiply = |sums: &mut [f32]| {
                multiply_transposed(isa, gradients, &Gather::matrix(count, o), inputs, c, sums, Order::RowMajor);
            };
            if start == 0 {
                return multiply(sums);
            }
            let mut product = Scratch::<f32>::take(o * c);
            multiply(&mut product);
            add_assign::<f32>(sums, &product);
        });
    }
    dfilter.par_chunks_exact_mut(9 * c).enumerate().for_each(|(i, filter)| {
        dispatch(isa, FilterGradient { sums: &sums[i * c..], stride: o * c, c, filter });
    });
}

/// Some tiles of input and output's gradient to `[position][tile][channel]`, of which tile `start` is the first of `count`.
struct Transform<'a, T> {
    x: &'a [T],
    dy: &'a [T],
    shape: &'a ConvShape,
    grid: TileGrid,
    tiles: Range<usize>,
    start: usize,
    count: usize,
    inputs: &'a Output<f32>,
    gradients: &'a Output<f32>,
}

impl<T: Float> Task for Transform<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let ConvShape { c, o, .. } = *self.shape;
        for tile in self.tiles.clone() {
            let at = tile - self.start;
            // SAFETY: `at` is one of the `count` tiles there is room for, and this task's alone.
            unsafe {
                let out = self.inputs.pointer().add(at * c);
                self.grid.transform_input::<S, T, f32>(simd, self.x, self.shape, tile, out, self.count * c);
                self.transform_gradient(simd, tile, self.gradients.pointer().add(at * o), self.count * o);
            }
        }
    }
}

impl<T: Float> Transform<'_, T> {
    /// `A dy A^T` of one tile; outputs beyond the image have no gradient.
    ///
    /// # Safety
    /// `out` is valid for `o` values at each of the positions, `stride` apart.
    #[inline(always)]
    unsafe fn transform_gradient<S: Simd>(&self, simd: S, tile: usize, out: *mut f32, stride: usize) {
        let ([oh, ow], o) = (self.shape.output(), self.shape.o);
        let [n, top, left] = self.grid.place(tile);
        let mut pixels: [[&[T]; OUT]; OUT] = [[zeros(o); OUT]; OUT];
        for (i, row) in pixels.iter_mut().enumerate().take(oh - top) {
            for (j, pixel) in row.iter_mut().enumerate().take(ow - left) {
                *pixel = &self.dy[((n * oh + top + i) * ow + left + j) * o..][..o];
            }
        }
        for channel in (0..o).step_by(S::LANES) {
            // SAFETY: every pixel has `o` values, and a whole vector of them from `channel` on.
            let load = |i: usize, j: usize| unsafe { T::load(simd, pixels[i][j].as_ptr().add(channel)) };
            // SAFETY: the contract.
            let store = |position: usize, value| unsafe { simd.store(out.add(position * stride + channel), value) };
            along_both::<GradientAxis<f32>, S, OUT, IN>(simd, load, store);
        }
    }
}

/// `G^T m G` of one filter; position `p` of channel `i` is at `sums[p * stride + i]`.
struct FilterGradient<'a> {
    sums: &'a [f32],
    stride: usize,
    c: usize,
    /// `[3, 3, c]`.
    filter: &'a mut [f32],
}

impl Task for FilterGradient<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let FilterGradient { sums, stride, c, filter } = self;
        assert!(sums.len() >= (POSITIONS - 1) * stride + c && filter.len() == 9 * c && c.is_multiple_of(S::LANES));
        for channel in (0..c).step_by(S::LANES) {
            // SAFETY: as asserted, a vector from `channel` on is there at every position, and in every tap.
            unsafe {
                let load = |i: usize, j: usize| simd.load(sums.as_ptr().add((i * IN + j) * stride + channel));
                let out = filter.as_mut_ptr().add(channel);
                along_both::<FilterGradientAxis<f32>, S, IN, 3>(simd, load, |tap, value| {
                    simd.store(out.add(tap * c), value)
                });
            }
        }
    }
}
