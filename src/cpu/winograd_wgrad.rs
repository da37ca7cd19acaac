//! Winograd's algorithm for the gradient to a 3x3 filter: a quarter of the multiplications, as in [`super::winograd`].
//!
//! Forward, a tile's outputs are `A^T [(G g G^T) * (B^T d B)] A`. That is linear in the filter `g`, so its gradient is the
//! transposed map of the outputs' gradient: `dg = G^T [sum over tiles of (A dy A^T) * (B^T d B)] G`. The sum, for every
//! pair of channels at each of 36 positions, is a matrix product over the tiles.

use super::conv::ConvShape;
use super::elementwise::add_assign;
use super::float::Float;
use super::gather::Gather;
use super::gemm::Output;
use super::gemm_transposed::{Order, multiply_transposed};
use super::simd::{Isa, Simd, Task, dispatch};
use super::winograd::{Axis, IN, MAX_CHANNELS, OUT, POSITIONS, TileGrid, along_both};
use crate::tensor::pool::Scratch;
use rayon::prelude::*;
use std::ops::Range;

/// Bytes of transformed tiles that are multiplied together; they are read once, from the last cache.
const TRANSFORMED: usize = 12 << 20;
/// Tiles a task transforms.
const BLOCK_TILES: usize = 16;

/// Gradient to filters `[o, 3, 3, c]`, for what [`super::winograd::applies`] to.
pub fn backward_filter<T: Float>(isa: Isa, x: &[T], dy: &[T], shape: &ConvShape, dfilter: &mut [f32]) {
    let (c, o) = (shape.c, shape.o);
    let [oh, ow] = shape.output();
    assert!(x.len() == shape.n * shape.h * shape.w * c && dy.len() == shape.n * oh * ow * o);
    assert_eq!(dfilter.len(), o * 9 * c);
    let grid = TileGrid::new(shape);
    let part = (TRANSFORMED / (POSITIONS * (c + o) * size_of::<f32>())).clamp(1, grid.count().max(1));
    let mut sums = Scratch::<f32>::take(POSITIONS * o * c);
    sums.fill(0.0);
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
            let mut product = Scratch::<f32>::take(o * c);
            multiply_transposed(isa, gradients, &Gather::matrix(count, o), inputs, c, &mut product, Order::RowMajor);
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
                self.grid.transform_input(simd, self.x, self.shape, tile, out, self.count * c);
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
        let zeros = [T::default(); MAX_CHANNELS];
        let mut pixels: [[&[T]; OUT]; OUT] = [[&zeros[..o]; OUT]; OUT];
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
            along_both::<GradientAxis, S, OUT, IN>(simd, load, store);
        }
    }
}

/// `A g` along one axis.
struct GradientAxis;

impl Axis<OUT, IN> for GradientAxis {
    #[inline(always)]
    fn apply<S: Simd>(s: S, [g0, g1, g2, g3]: [S::V; OUT]) -> [S::V; IN] {
        let [two, four] = [2.0, 4.0].map(|x| s.splat(x));
        let (even, odd) = (s.add(g0, g2), s.add(g1, g3));
        let far_even = s.mul_add(four, g2, g0);
        let half_odd = s.mul_add(four, g3, g1);
        let far_odd = s.mul_add(two, half_odd, s.splat(0.0));
        [g0, s.add(even, odd), s.sub(even, odd), s.add(far_even, far_odd), s.sub(far_even, far_odd), g3]
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
                along_both::<FilterGradientAxis, S, IN, 3>(simd, load, |tap, value| {
                    simd.store(out.add(tap * c), value)
                });
            }
        }
    }
}

/// `G^T m` along one axis.
struct FilterGradientAxis;

impl Axis<IN, 3> for FilterGradientAxis {
    #[inline(always)]
    fn apply<S: Simd>(s: S, [m0, m1, m2, m3, m4, m5]: [S::V; IN]) -> [S::V; 3] {
        let [quarter, sixth, minus_sixth, twelfth, twenty_fourth] =
            [1.0 / 4.0, 1.0 / 6.0, -1.0 / 6.0, 1.0 / 12.0, 1.0 / 24.0].map(|x| s.splat(x));
        let (near, near_odd) = (s.add(m1, m2), s.sub(m2, m1));
        let (far, far_odd) = (s.add(m3, m4), s.sub(m3, m4));
        let shared = s.mul_add(minus_sixth, near, s.splat(0.0));
        [
            s.mul_add(quarter, m0, s.mul_add(twenty_fourth, far, shared)),
            s.mul_add(twelfth, far_odd, s.mul_add(sixth, near_odd, s.splat(0.0))),
            s.add(m5, s.mul_add(sixth, far, shared)),
        ]
    }
}
