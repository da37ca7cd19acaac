//! Winograd's algorithm for 3x3 filters of few channels and a stride of one.
//!
//! Filters are transformed beforehand. A block of tiles goes all the way, its inputs transformed, multiplied panel by panel at
//! all positions and transformed back, while everything in between stays in L2.

use super::axes::*;
use super::check_operands;
use super::parts::{Place, TileGrid};
use super::points::OUTPUTS;
use super::transforms::Room;
use crate::cpu::conv::ConvShape;
use crate::cpu::float::Float;
use crate::cpu::gemm::{Epilogue, Output, TILE_ROWS, Tile};
use crate::cpu::simd::{Isa, Simd, Task, dispatch};
use crate::tensor::pool::Scratch;
use rayon::prelude::*;
use std::ops::Range;

/// With more channels, of input or output, the transformed filters, four times the filters, do not stay in L2 beside the
/// tiles: [`super::strips`] then transforms them when they are used.
pub(super) const MAX_CHANNELS: usize = 128;
/// Tiles a task transforms together: their inputs and the outputs of a panel stay in L2.
const BLOCK_TILES: usize = 18;
/// Panels are divided among tasks until there are this many.
const TASKS: usize = 8;

/// Filters transformed and packed for the micro-kernel: `[position][panel of O][word of C][column of the panel]`, zero-padded. `W` is
/// the type whose products are taken.
pub struct BlockFilter<W> {
    isa: Isa,
    panels: Scratch<W>,
    c: usize,
    o: usize,
}

impl<W: Float> BlockFilter<W> {
    /// From filters `[o, 3, 3, c]`.
    pub fn new(isa: Isa, filter: &[f32], o: usize, c: usize) -> Self {
        let turned = transposed(filter, o, 9 * c);
        Self::pack(isa, &turned, c, o, |tap, c_in| (tap * c + c_in) * o)
    }

    /// From filters `[o, 3, 3, c]`, for the gradient to the input: the convolution of the output's gradient with the filters
    /// turned by half a turn and their channels exchanged.
    pub fn for_backward_input(isa: Isa, filter: &[f32], o: usize, c: usize) -> Self {
        Self::pack(isa, filter, o, c, |tap, o_in| (o_in * 9 + 8 - tap) * c)
    }

    /// From `c` to `o` channels; tap `t` from input channel `i` to all outputs begins at `start(t, i)` in `filter`.
    fn pack(isa: Isa, filter: &[f32], c: usize, o: usize, start: impl Fn(usize, usize) -> usize + Sync) -> Self {
        assert_eq!(filter.len(), o * 9 * c);
        let width = isa.tile_columns();
        let panels = o.div_ceil(width);
        let mut packed = Scratch::take(POSITIONS * panels * c * width);
        if !o.is_multiple_of(width) {
            packed.fill(W::default());
        }
        let out = Output::new(&mut packed);
        assert!(c.is_multiple_of(W::PER_WORD), "channels are whole words");
        (0..c / W::PER_WORD).into_par_iter().for_each(|word| {
            let taps = |channel: usize| std::array::from_fn(|tap| &filter[start(tap, channel)..][..o]);
            let taps = [taps(word * W::PER_WORD), taps((word + 1) * W::PER_WORD - 1)];
            dispatch(isa, FilterTransform { taps, out: &out, word, panel: c * width, stride: panels * c * width });
        });
        BlockFilter { isa, panels: packed, c, o }
    }

    fn panel(&self, position: usize, panel: usize) -> &[W] {
        let width = self.isa.tile_columns();
        &self.panels[(position * self.o.div_ceil(width) + panel) * self.c * width..][..self.c * width]
    }
}

/// The transpose of `[rows, columns]`.
fn transposed(matrix: &[f32], rows: usize, columns: usize) -> Scratch<f32> {
    assert_eq!(matrix.len(), rows * columns);
    // A cache line of each row is read at once.
    const LINE: usize = 16;
    let mut out = Scratch::<f32>::take(matrix.len());
    out.par_chunks_mut(LINE * rows).enumerate().for_each(|(i, out)| {
        for row in 0..rows {
            let values = &matrix[row * columns + i * LINE..][..out.len() / rows];
            out[row..].iter_mut().step_by(rows).zip(values).for_each(|(out, &x)| *out = x);
        }
    });
    out
}

/// `G g G^T` of the filters from the input channels of a word to all outputs.
struct FilterTransform<'a, W> {
    /// `[3 * 3][o]` of the word's first and last channel.
    taps: [[&'a [f32]; 9]; 2],
    out: &'a Output<W>,
    word: usize,
    /// Values of a panel.
    panel: usize,
    /// Values of a position.
    stride: usize,
}

impl<W: Float> Task for FilterTransform<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (o, width) = (self.taps[0][0].len(), S::LANES * S::VECTORS);
        assert!(o.is_multiple_of(S::LANES) && self.taps.as_flattened().iter().all(|tap| tap.len() == o));
        for column in (0..o).step_by(S::LANES) {
            let at = column / width * self.panel + (self.word * width + column % width) * W::PER_WORD;
            let mut room = Room::new();
            // SAFETY: each of the nine taps has `o` values, and a whole vector of them from `column` on; this word's row of every
            // panel is this task's alone.
            unsafe {
                let taps = self.taps.each_ref().map(|taps| Taps { taps, column });
                let out = self.out.pointer().add(at);
                transform_words::<FilterAxis<W>, S, W, 3, IN>(simd, taps, &mut room, out, self.stride);
            }
        }
    }
}

/// `y = epilogue(conv(x, filter))` for a 3x3 filter of stride and padding one.
pub fn forward<T: Float, W: Float>(
    x: &[T],
    filter: &BlockFilter<W>,
    shape: &ConvShape,
    epilogue: Epilogue<T>,
    y: &mut [T],
) {
    check_operands(shape, [filter.c, filter.o], x, &epilogue, y);
    let grid = TileGrid::new(shape);
    let tiles = grid.count();
    if tiles == 0 {
        return;
    }
    let panels = shape.o.div_ceil(filter.isa.tile_columns());
    // Blocks are whole rows of the micro-kernel's tiles, and an even number of them, so that two threads share one picture well.
    let rows = tiles.div_ceil(TILE_ROWS);
    let blocks = tiles.div_ceil(BLOCK_TILES).next_multiple_of(2).min(rows);
    // Each group of panels transforms the inputs again.
    let groups = TASKS.div_ceil(blocks).min(panels);
    let group = panels.div_ceil(groups);
    let out = Output::new(y);
    (0..groups * blocks).into_par_iter().for_each(|task| {
        let (first, block) = (task / blocks * group, task % blocks);
        let start = |block: usize| tiles.min(block * rows / blocks * TILE_ROWS);
        let tiles = start(block)..start(block + 1);
        let panels = first.min(panels)..(first + group).min(panels);
        dispatch(filter.isa, Block { x, filter, shape, grid, y: &out, epilogue, tiles, panels });
    });
}

/// Some tiles and some panels of filters.
struct Block<'a, T, W> {
    x: &'a [T],
    filter: &'a BlockFilter<W>,
    shape: &'a ConvShape,
    grid: TileGrid,
    y: &'a Output<T>,
    epilogue: Epilogue<'a, T>,
    tiles: Range<usize>,
    panels: Range<usize>,
}

impl<T: Float, W: Float> Task for Block<'_, T, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let count = self.tiles.len();
        if count == 0 || self.panels.is_empty() {
            return;
        }
        let (c, width) = (self.shape.c, S::LANES * S::VECTORS);
        // Transformed inputs [position][tile][channel], products [position][tile][column of the panel], the latter in whole
        // tiles of the micro-kernel.
        let padded = count.next_multiple_of(TILE_ROWS);
        let mut inputs = Scratch::<W>::take(POSITIONS * count * c);
        let mut products = Scratch::<f32>::take(POSITIONS * padded * width);
        for (i, tile) in self.tiles.clone().enumerate() {
            // SAFETY: there is room for `count` tiles of `c` channels at each position.
            unsafe {
                let out = inputs.as_mut_ptr().add(i * c);
                self.transform_input(simd, tile, out, count * c);
            }
        }
        for panel in self.panels.clone() {
            let columns = width.min(self.shape.o - panel * width);
            for position in 0..POSITIONS {
                let a = &inputs[position * count * c..][..count * c];
                let product = &mut products[position * padded * width..][..padded * width];
                multiply_panel(simd, a, c, self.filter.panel(position, panel), product, columns);
            }
            for (i, tile) in self.tiles.clone().enumerate() {
                self.transform_output(simd, tile, &products[i * width..], padded * width, panel * width, columns);
            }
        }
    }
}

/// `c = a [rows, depth] b [words of the depth, width]`; `c` holds whole tiles of `width` columns.
#[inline(always)]
fn multiply_panel<S: Simd, W: Float>(simd: S, a: &[W], depth: usize, b: &[W], c: &mut [f32], columns: usize) {
    let width = S::LANES * S::VECTORS;
    let rows = a.len() / depth;
    assert!(b.len() >= depth * width && c.len() >= rows.next_multiple_of(TILE_ROWS) * width);
    for start in (0..rows).step_by(TILE_ROWS) {
        let runs = [std::array::from_fn(|lane| a[(start + lane).min(rows - 1) * depth..][..depth].as_ptr().cast())];
        let sums = c[start * width..].as_mut_ptr();
        let tile = Tile::of_sums(&runs, depth / W::PER_WORD, b, [TILE_ROWS.min(rows - start), columns], sums);
        // SAFETY: runs are `depth` long, `b` has as many full rows, and `c` room for a full tile from there on.
        unsafe { tile.compute(simd) };
    }
}

impl<T: Float, W: Float> Block<'_, T, W> {
    /// `B^T d B` of one tile, all channels; position `p` goes to `out + p * stride`.
    ///
    /// # Safety
    /// `out` is valid for `c` values at each of the positions.
    #[inline(always)]
    unsafe fn transform_input<S: Simd>(&self, simd: S, tile: usize, out: *mut W, stride: usize) {
        let pixels = self.grid.inputs(self.x, self.shape, tile);
        for channel in (0..self.shape.c).step_by(S::LANES) {
            // SAFETY: every pixel has `c` values, and a whole vector of them from `channel` on; the contract.
            unsafe {
                let out = Plane::<W, IN> { first: out.add(channel), stride };
                along_both::<InputAxis<W>, S, IN, IN>(simd, Pixels { pixels: &pixels, channel }, out);
            }
        }
    }

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
        let Place { image, top, left } = self.grid.place(tile);
        let (rows, row_len) = (oh - top, ow - left);
        let first = ((image * oh + top) * ow + left) * o + column;
        assert!(products.len() >= (POSITIONS - 1) * stride + columns && columns.is_multiple_of(S::LANES));
        for at in (0..columns).step_by(S::LANES) {
            // SAFETY: a bias has as many values as there are columns.
            let bias = self.epilogue.bias.map(|bias| unsafe { simd.load(bias[column + at..].as_ptr()) });
            let out = Outputs {
                y: self.y.pointer(),
                epilogue: self.epilogue,
                bias,
                first: first + at,
                row: ow * o,
                pixel: o,
                rows,
                columns: row_len,
            };
            // SAFETY: as asserted, a vector from `at` on is there at every position; outputs that lie inside the image are this
            // task's alone, and the residual is as long.
            unsafe {
                let products = Plane::<f32, IN> { first: products.as_ptr().add(at).cast_mut(), stride };
                along_both::<OutputAxis<W>, S, IN, OUTPUTS>(simd, products, out);
            }
        }
    }
}

/// Where the outputs of a tile go, with the epilogue; those beyond the image nowhere.
struct Outputs<'a, T, V> {
    y: *mut T,
    epilogue: Epilogue<'a, T>,
    bias: Option<V>,
    first: usize,
    row: usize,
    pixel: usize,
    /// Rows and columns inside the image.
    rows: usize,
    columns: usize,
}

impl<T: Float, S: Simd> Sink<S> for Outputs<'_, T, S::V> {
    #[inline(always)]
    unsafe fn store(&self, simd: S, i: usize, j: usize, value: S::V) {
        if i < self.rows && j < self.columns {
            // SAFETY: the caller's.
            unsafe { self.epilogue.store(simd, value, self.bias, self.y, self.first + i * self.row + j * self.pixel) };
        }
    }
}
