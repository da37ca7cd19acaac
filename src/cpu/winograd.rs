//! Winograd's convolution F(4x4, 3x3): a 3x3 filter of stride one at a quarter of the multiplications.
//!
//! Lavin and Gray, "Fast algorithms for convolutional neural networks", 2016. A tile of 4x4 outputs needs 6x6 inputs `d` and
//! is `A^T [(G g G^T) * (B^T d B)] A`, where `*` is elementwise: 36 products instead of 144. Summed over channels, each of the
//! 36 positions is a matrix product of tiles and channels with channels and filters. The transforms add and subtract; they
//! cost the more the fewer filters share a transformed input.
//!
//! Whether it is used depends on the filter alone, never on the batch: a picture's features must not depend on its company.
//! Transforms and products are f32 whatever the type of activations: products of bf16 would lose two digits here, and a
//! quarter of the products in f32 takes less time than all of them in bf16.

use super::conv::ConvShape;
use super::float::Float;
use super::gemm::{Epilogue, Output, PackedB, TILE_ROWS, Tile};
use super::simd::{Isa, Simd, Task, dispatch};
use crate::tensor::pool::Scratch;
use rayon::prelude::*;
use std::ops::Range;

/// Outputs of a tile along one axis, and the inputs they see.
pub(super) const OUT: usize = 4;
pub(super) const IN: usize = 6;
pub(super) const POSITIONS: usize = IN * IN;
/// More input channels, and the transformed filters (four times the filters) take longer to read than they save.
pub(super) const MAX_CHANNELS: usize = 256;
/// Tiles a task transforms together: their inputs and the outputs of a panel stay in L2.
const BLOCK_TILES: usize = 18;
/// Fewer blocks than this, and the panels become tasks of their own.
const FEW_BLOCKS: usize = 8;

/// Filters transformed and packed: a matrix `[C, O]` for each of the 36 positions.
pub struct WinogradFilter {
    isa: Isa,
    positions: Vec<PackedB>,
    c: usize,
    o: usize,
}

/// Whether a convolution of this geometry from `c` to `o` channels is worth it: 3x3, stride one, padding one, whole vectors
/// of channels.
pub fn applies(isa: Isa, shape: &ConvShape, c: usize, o: usize) -> bool {
    let lanes = isa.lanes();
    [shape.kh, shape.kw] == [3, 3]
        && shape.stride == [1, 1]
        && shape.padding == [1, 1]
        && c.is_multiple_of(lanes)
        && o.is_multiple_of(lanes)
        && (lanes..=MAX_CHANNELS).contains(&c)
        && o <= MAX_CHANNELS
}

impl WinogradFilter {
    /// From filters `[o, 3, 3, c]`.
    pub fn new(isa: Isa, filter: &[f32], o: usize, c: usize) -> Self {
        let transformed = transform_filters(isa, filter, o, c, false);
        let pack = |matrix: &[f32]| PackedB::from_columns(isa, matrix, c, o, c);
        WinogradFilter { isa, positions: transformed.chunks_exact(c * o).map(pack).collect(), c, o }
    }

    /// From filters `[o, 3, 3, c]`, for the gradient to the input: the convolution of the output's gradient with the filters
    /// turned by half a turn and their channels exchanged.
    pub fn for_backward_input(isa: Isa, filter: &[f32], o: usize, c: usize) -> Self {
        let transformed = transform_filters(isa, filter, o, c, true);
        let pack = |matrix: &[f32]| PackedB::from_rows(isa, matrix, o, c, o, |row| row * c);
        WinogradFilter { isa, positions: transformed.chunks_exact(c * o).map(pack).collect(), c: o, o: c }
    }
}

/// `G g G^T` of every filter, `[position][o][c]`; of the filters turned by half a turn if `turned`.
fn transform_filters(isa: Isa, filter: &[f32], o: usize, c: usize, turned: bool) -> Scratch<f32> {
    assert_eq!(filter.len(), o * 9 * c);
    let mut transformed = Scratch::take(POSITIONS * o * c);
    let out = Output::new(&mut transformed);
    filter.par_chunks_exact(9 * c).enumerate().for_each(|(i, filter)| {
        dispatch(isa, FilterTransform { filter, c, turned, out: &out, at: i * c, stride: o * c });
    });
    transformed
}

/// One filter `[3, 3, c]`; position `p` goes to `out[at + p * stride..]`.
struct FilterTransform<'a> {
    filter: &'a [f32],
    c: usize,
    turned: bool,
    out: &'a Output<f32>,
    at: usize,
    stride: usize,
}

impl Task for FilterTransform<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        assert!(self.filter.len() == 9 * self.c && self.c.is_multiple_of(S::LANES));
        for channel in (0..self.c).step_by(S::LANES) {
            let load = |y: usize, x: usize| {
                let tap = if self.turned { 8 - (y * 3 + x) } else { y * 3 + x };
                // SAFETY: each of the nine taps has `c` values, and a whole vector of them from `channel` on.
                unsafe { simd.load(self.filter.as_ptr().add(tap * self.c + channel)) }
            };
            along_both::<FilterAxis, S, 3, IN>(simd, load, |position, value| {
                // SAFETY: `[position][o][c]` is this filter's alone at its `o`.
                unsafe { simd.store(self.out.pointer().add(self.at + position * self.stride + channel), value) };
            });
        }
    }
}

/// `G g` along one axis.
struct FilterAxis;

impl Axis<3, IN> for FilterAxis {
    #[inline(always)]
    fn apply<S: Simd>(s: S, [a, b, c]: [S::V; 3]) -> [S::V; IN] {
        let zero = s.splat(0.0);
        let times = |factor: f32, v: S::V| s.mul_add(s.splat(factor), v, zero);
        let (even, odd) = (times(-1.0 / 6.0, s.add(a, c)), times(1.0 / 6.0, b));
        let wide_even = s.mul_add(s.splat(1.0 / 6.0), c, times(1.0 / 24.0, a));
        let wide_odd = times(1.0 / 12.0, b);
        [times(0.25, a), s.sub(even, odd), s.add(even, odd), s.add(wide_even, wide_odd), s.sub(wide_even, wide_odd), c]
    }
}

/// The tiles of a convolution's output.
#[derive(Clone, Copy)]
pub(super) struct TileGrid {
    images: usize,
    /// Tiles of an image, down and across.
    across: [usize; 2],
}

impl TileGrid {
    pub(super) fn new(shape: &ConvShape) -> Self {
        TileGrid { images: shape.n, across: shape.output().map(|extent| extent.div_ceil(OUT)) }
    }

    pub(super) fn count(&self) -> usize {
        self.images * self.across[0] * self.across[1]
    }

    /// Image, and first output row and column of a tile.
    pub(super) fn place(&self, tile: usize) -> [usize; 3] {
        let [down, across] = self.across;
        [tile / (down * across), tile / across % down * OUT, tile % across * OUT]
    }

    /// `B^T d B` of one tile, all channels; position `p` goes to `out + p * stride`.
    ///
    /// # Safety
    /// `x` is the input of the convolution, and `out` valid for `c` values at each of the positions.
    #[inline(always)]
    pub(super) unsafe fn transform_input<S: Simd, T: Float>(
        &self,
        simd: S,
        x: &[T],
        shape: &ConvShape,
        tile: usize,
        out: *mut f32,
        stride: usize,
    ) {
        let ConvShape { h, w, c, .. } = *shape;
        let [n, top, left] = self.place(tile);
        // Where each of the 36 pixels begins; those on the padding read zeros.
        let zeros = [T::default(); MAX_CHANNELS];
        let pixels: [[&[T]; IN]; IN] = std::array::from_fn(|i| {
            std::array::from_fn(|j| match ((top + i).checked_sub(1), (left + j).checked_sub(1)) {
                (Some(y), Some(x_at)) if y < h && x_at < w => &x[((n * h + y) * w + x_at) * c..][..c],
                _ => &zeros[..c],
            })
        });
        for channel in (0..c).step_by(S::LANES) {
            // SAFETY: every pixel has `c` values, and a whole vector of them from `channel` on.
            let load = |i: usize, j: usize| unsafe { T::load(simd, pixels[i][j].as_ptr().add(channel)) };
            // SAFETY: the contract.
            let store = |position: usize, value| unsafe { simd.store(out.add(position * stride + channel), value) };
            along_both::<InputAxis, S, IN, IN>(simd, load, store);
        }
    }
}

/// `y = epilogue(conv(x, filter))` for a 3x3 filter of stride and padding one.
pub fn forward<T: Float>(x: &[T], filter: &WinogradFilter, shape: &ConvShape, epilogue: Epilogue<T>, y: &mut [T]) {
    let [oh, ow] = shape.output();
    assert_eq!((shape.c, shape.o), (filter.c, filter.o), "the filter's channels");
    assert!(x.len() == shape.n * shape.h * shape.w * shape.c && y.len() == shape.n * oh * ow * shape.o);
    assert!(epilogue.bias.is_none_or(|bias| bias.len() == shape.o), "one bias a channel");
    assert!(epilogue.residual.is_none_or(|residual| residual.len() == y.len()), "a residual for each output");
    let grid = TileGrid::new(shape);
    let tiles = grid.count();
    if tiles == 0 {
        return;
    }
    let panels = shape.o.div_ceil(filter.isa.tile_columns());
    let blocks = tiles.div_ceil(BLOCK_TILES);
    let block = tiles.div_ceil(blocks).next_multiple_of(TILE_ROWS);
    let group = if blocks < FEW_BLOCKS { 1 } else { panels };
    let groups = panels.div_ceil(group);
    let out = Output::new(y);
    (0..blocks * groups).into_par_iter().for_each(|task| {
        let (i, first) = (task / groups, task % groups * group);
        let tiles = (i * block).min(tiles)..((i + 1) * block).min(tiles);
        let panels = first..(first + group).min(panels);
        dispatch(filter.isa, Block { x, filter, shape, grid, y: &out, epilogue, tiles, panels });
    });
}

/// Some tiles and some panels of filters.
struct Block<'a, T> {
    x: &'a [T],
    filter: &'a WinogradFilter,
    shape: &'a ConvShape,
    grid: TileGrid,
    y: &'a Output<T>,
    epilogue: Epilogue<'a, T>,
    tiles: Range<usize>,
    panels: Range<usize>,
}

impl<T: Float> Task for Block<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let count = self.tiles.len();
        if count == 0 {
            return;
        }
        let (c, width) = (self.shape.c, S::LANES * S::VECTORS);
        // Transformed inputs [position][tile][channel], products [position][tile][column of the panel].
        let mut inputs = Scratch::<f32>::take(POSITIONS * count * c);
        // Whole tiles of the micro-kernel.
        let padded = count.next_multiple_of(TILE_ROWS);
        let mut products = Scratch::<f32>::take(POSITIONS * padded * width);
        for (i, tile) in self.tiles.clone().enumerate() {
            // SAFETY: there is room for `count` tiles of `c` channels at each position.
            unsafe {
                let out = inputs.as_mut_ptr().add(i * c);
                self.grid.transform_input(simd, self.x, self.shape, tile, out, count * c);
            }
        }
        for panel in self.panels.clone() {
            let columns = width.min(self.shape.o - panel * width);
            for (position, b) in self.filter.positions.iter().enumerate() {
                let a = &inputs[position * count * c..][..count * c];
                let product = &mut products[position * padded * width..][..padded * width];
                multiply_panel(simd, a, c, b.panel(panel), product, columns);
            }
            for (i, tile) in self.tiles.clone().enumerate() {
                self.transform_output(simd, tile, &products[i * width..], padded * width, panel * width, columns);
            }
        }
    }
}

/// `c = a [rows, depth] b [depth, width]`; `c` holds whole tiles of `width` columns.
#[inline(always)]
fn multiply_panel<S: Simd>(simd: S, a: &[f32], depth: usize, b: &[f32], c: &mut [f32], columns: usize) {
    let width = S::LANES * S::VECTORS;
    let rows = a.len() / depth;
    assert!(b.len() >= depth * width && c.len() >= rows.next_multiple_of(TILE_ROWS) * width);
    for start in (0..rows).step_by(TILE_ROWS) {
        let runs = [std::array::from_fn(|lane| a[(start + lane).min(rows - 1) * depth..][..depth].as_ptr())];
        let tile = Tile::<f32> {
            runs: &runs,
            words: depth,
            b: b.as_ptr(),
            c: std::ptr::null_mut(),
            targets: &[0; TILE_ROWS],
            rows: 0,
            column: 0,
            columns,
            before: None,
            after: Some(c[start * width..].as_mut_ptr()),
            epilogue: Epilogue::default(),
        };
        // SAFETY: runs are `depth` long, `b` has as many full rows, and `c` room for a full tile from there on.
        unsafe { tile.compute(simd) };
    }
}

/// A transform along one axis, from `A` values to `B`. A trait and not a closure: a closure may be compiled on its own, and
/// then without the instruction set.
pub(super) trait Axis<const A: usize, const B: usize> {
    /// Mark it `#[inline(always)]`.
    fn apply<S: Simd>(s: S, values: [S::V; A]) -> [S::V; B];
}

/// The transform along the columns, then along the rows. A column is loaded when it is needed, and a row stored when it is
/// done: all of them would not fit the registers.
#[inline(always)]
pub(super) fn along_both<X: Axis<A, B>, S: Simd, const A: usize, const B: usize>(
    simd: S,
    load: impl Fn(usize, usize) -> S::V,
    store: impl Fn(usize, S::V),
) {
    let mut halves = [[simd.splat(0.0); A]; B];
    for j in 0..A {
        let column = std::array::from_fn(|i| load(i, j));
        for (half, value) in halves.iter_mut().zip(X::apply(simd, column)) {
            half[j] = value;
        }
    }
    for (i, half) in halves.iter().enumerate() {
        for (j, value) in X::apply(simd, *half).into_iter().enumerate() {
            store(i * B + j, value);
        }
    }
}

/// `B^T d` along one axis.
struct InputAxis;

impl Axis<IN, IN> for InputAxis {
    #[inline(always)]
    fn apply<S: Simd>(s: S, d: [S::V; IN]) -> [S::V; IN] {
        let [plus_two, minus_two, plus_four, minus_four, minus_five] = [2.0, -2.0, 4.0, -4.0, -5.0].map(|x| s.splat(x));
        let [d0, d1, d2, d3, d4, d5] = d;
        let even = s.mul_add(minus_four, d2, d4);
        let odd = s.mul_add(minus_four, d1, d3);
        let step = s.sub(d4, d2);
        let slope = s.sub(d3, d1);
        [
            s.mul_add(plus_four, d0, s.mul_add(minus_five, d2, d4)),
            s.add(even, odd),
            s.sub(even, odd),
            s.mul_add(plus_two, slope, step),
            s.mul_add(minus_two, slope, step),
            s.mul_add(plus_four, d1, s.mul_add(minus_five, d3, d5)),
        ]
    }
}

/// `A^T m` along one axis.
struct OutputAxis;

impl Axis<IN, OUT> for OutputAxis {
    #[inline(always)]
    fn apply<S: Simd>(s: S, m: [S::V; IN]) -> [S::V; OUT] {
        let [m0, m1, m2, m3, m4, m5] = m;
        let (near, near_odd) = (s.add(m1, m2), s.sub(m1, m2));
        let (far, far_odd) = (s.add(m3, m4), s.sub(m3, m4));
        let [two, four, eight] = [2.0, 4.0, 8.0].map(|x| s.splat(x));
        [
            s.add(s.add(m0, near), far),
            s.mul_add(two, far_odd, near_odd),
            s.mul_add(four, far, near),
            s.add(s.mul_add(eight, far_odd, near_odd), m5),
        ]
    }
}

impl<T: Float> Block<'_, T> {
    /// `A^T m A` of one tile and panel with the epilogue, to the outputs that lie inside the image.
    #[inline(always)]
    fn transform_output<S: Simd>(
        &self,
        simd: S,
        tile: usize,
        products: &[f32],
        stride: usize,
        column: usize,
        columns: usize,
    ) {
        let ([oh, ow], o) = (self.shape.output(), self.shape.o);
        let [n, top, left] = self.grid.place(tile);
        let (rows, row_len) = (oh - top, ow - left);
        let first = ((n * oh + top) * ow + left) * o + column;
        assert!(products.len() >= (POSITIONS - 1) * stride + columns && columns.is_multiple_of(S::LANES));
        for at in (0..columns).step_by(S::LANES) {
            // SAFETY: as asserted, a vector from `at` on is there at every position.
            let load = |i: usize, j: usize| unsafe { simd.load(products.as_ptr().add((i * IN + j) * stride + at)) };
            // SAFETY: a bias has as many values as there are columns.
            let bias = self.epilogue.bias.map(|bias| unsafe { simd.load(bias[column + at..].as_ptr()) });
            along_both::<OutputAxis, S, IN, OUT>(simd, load, |position, mut value| {
                let (i, j) = (position / OUT, position % OUT);
                if i >= rows || j >= row_len {
                    return;
                }
                let target = first + (i * ow + j) * o + at;
                if let Some(bias) = bias {
                    value = simd.add(value, bias);
                }
                // SAFETY: the output lies inside the image and is this task's alone; the residual is as long.
                unsafe {
                    if let Some(residual) = self.epilogue.residual {
                        value = simd.add(value, T::load(simd, residual[target..].as_ptr()));
                    }
                    if self.epilogue.relu {
                        value = simd.relu(value);
                    }
                    T::store(simd, self.y.pointer().add(target), value);
                }
            });
        }
    }
}
