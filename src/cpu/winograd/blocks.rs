//! Winograd's algorithm for 3x3 filters of few channels and a stride of one.
//!
//! Filters are transformed beforehand. A block of tiles goes all the way, its inputs transformed, multiplied panel by panel at
//! all positions and transformed back, while everything in between stays in L2.

use super::ahead::PixelRows;
use super::axes::*;
use super::check_operands;
use super::parts::{Extents, Part, TileGrid};
use super::tiles::{Inputs, Layout, Outputs, finish};
use super::transforms::*;
use crate::cpu::conv::ConvShape;
use crate::cpu::float::Float;
use crate::cpu::gemm::{Ahead, Epilogue, Far, Output, Shares, TILE_ROWS, Tile};
use crate::cpu::isa::products_ask_for_others;
use crate::cpu::parallel::for_each;
use crate::cpu::simd::{Isa, Simd, Task, dispatch};
use crate::tensor::pool::Scratch;
use rayon::prelude::*;
use std::marker::PhantomData;
use std::ops::Range;

/// With more channels, of input or output, the transformed filters, four or nine times the filters, take too long to read for a block
/// of tiles: [`super::strips`] then transforms them when they are used.
pub(super) const MAX_CHANNELS: usize = 128;
/// Tiles a task transforms together: their inputs and the outputs of a panel stay in L2.
const BLOCK_TILES: usize = 18;
/// So many tiles are blocks enough that panels are not divided.
pub(super) const ENOUGH_TILES: usize = (TASKS - 1) * BLOCK_TILES + 1;
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
        let mut packed = Scratch::take(values::<W>(1).pow(2) * panels * c * width);
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
    const BF16: bool = W::PER_WORD > 1;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (o, width) = (self.taps[0][0].len(), S::LANES * S::VECTORS);
        assert!(o.is_multiple_of(S::LANES) && self.taps.as_flattened().iter().all(|tap| tap.len() == o));
        let mut rooms = [Room::new(), Room::new()];
        for column in (0..o).step_by(S::LANES) {
            let at = |column: usize| column / width * self.panel + (self.word * width + column % width) * W::PER_WORD;
            let next = at((column + S::LANES).min(o - S::LANES));
            let taps = self.taps.each_ref().map(|taps| Taps { taps, column });
            // SAFETY: each of the nine taps has `o` values, and a whole vector of them from `column` on; this word's row of every
            // panel is this task's alone.
            unsafe {
                let (out, steps) = (self.out.pointer(), [values::<W>(1) * self.stride, self.stride]);
                let words = Plane { first: out.add(at(column)), steps };
                transform_words(
                    simd,
                    &Along::<Filter<W, 1>, Filter<W, 1>>::new(),
                    taps,
                    &mut rooms,
                    words,
                    out.add(next),
                );
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
    let extents = Extents::of(shape);
    let grid = TileGrid::new(extents, axis::<W>(1).outputs);
    let tiles = grid.count();
    if tiles == 0 {
        return;
    }
    let panels = shape.o.div_ceil(filter.isa.tile_columns());
    // The micro-kernel takes pairs of tiles, and two threads share one picture well.
    let pairs = tiles.div_ceil(2);
    let blocks = tiles.div_ceil(BLOCK_TILES).next_multiple_of(2).min(pairs);
    // Each group of panels transforms the inputs again.
    let groups = TASKS.div_ceil(blocks).min(panels);
    let group = panels.div_ceil(groups);
    let out = Output::new(y);
    for_each(groups * blocks, |task| {
        let (first, block) = (task / blocks * group, task % blocks);
        let start = |block: usize| tiles.min(block * pairs / blocks * 2);
        let part = &Part::new(extents, axis::<W>(1), start(block)..start(block + 1), 1);
        let panels = first.min(panels)..(first + group).min(panels);
        let outputs = Outputs { part, extents, epilogue, y: &out, transform: PhantomData };
        // What will be written, and what the next block reads.
        let pixels = products_ask_for_others().then(|| {
            let (now, next) = (start(block)..start(block + 1), start(block + 1)..start(block + 2));
            let written = PixelRows::new(out.pointer().cast_const(), extents.output, grid, now);
            [written, PixelRows::new(x.as_ptr(), extents.input, grid, next)]
        });
        forward_block(x, filter, &outputs, panels, pixels);
    });
}

/// The outputs of some panels of filters in all tiles of a part. If `pixels` are to be asked for, what is written afterwards is with the first panel's
/// products, and what the next part reads with the last's.
fn forward_block<T: Float, W: Float>(
    x: &[T],
    filter: &BlockFilter<W>,
    outputs: &Outputs<T, W>,
    panels: Range<usize>,
    pixels: Option<[PixelRows; 2]>,
) {
    let (part, extents, isa) = (outputs.part, outputs.extents, filter.isa);
    let ([_, _, c], [_, _, o]) = (extents.input, extents.output);
    let (count, across, width) = (part.places.len(), values::<W>(1), isa.tile_columns());
    if count == 0 || panels.is_empty() {
        return;
    }
    // [tile][position down][position across][channel]
    let tile = across * across * c;
    let mut inputs = Scratch::<W>::take(count * tile);
    let layout = Layout { row: across * c, slot: c, tile, block: 0, words: c / W::PER_WORD };
    let to = &Output::new(&mut inputs);
    dispatch(isa, Inputs::<T, W, 1> { x, extents, part, tiles: 0..count, channels: 0..c, to, layout });
    let mut products = Scratch::<f32>::take(across * across * part.room() * width);
    for panel in panels.clone() {
        let pixels = pixels
            .as_ref()
            .map(|[written, read]| [written.when(panel == panels.start), read.when(panel + 1 == panels.end)]);
        let channels = panel * width..o.min((panel + 1) * width);
        let (inputs, columns) = (&*inputs, channels.len());
        dispatch(isa, Panel { inputs, part, filter, panel, columns, pixels, products: &mut products });
        finish::<T, W, 1>(isa, outputs, &products, channels);
    }
}

/// The products of a panel at all positions, as [`finish`] takes them.
struct Panel<'a, W> {
    /// `[tile][position][channel]`
    inputs: &'a [W],
    part: &'a Part,
    filter: &'a BlockFilter<W>,
    panel: usize,
    columns: usize,
    pixels: Option<[PixelRows; 2]>,
    products: &'a mut [f32],
}

impl<W: Float> Task for Panel<'_, W> {
    type Output = ();
    const BF16: bool = W::PER_WORD > 1;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Panel { inputs, part, filter, panel, columns, mut pixels, products } = self;
        let (width, depth, across) = (S::LANES * S::VECTORS, filter.c, const { values::<W>(1) });
        let (words, panel_len, position_len) = (depth / W::PER_WORD, depth * width, part.room() * width);
        // Floats of a tile, and values of all panels of a position.
        let (tile_len, panels_len) = (across * across * words, filter.panels.len() / (across * across));
        let filters = &filter.panels[panel * panel_len..];
        assert!(inputs.len() >= part.places.len() * across * across * depth);
        for (position, products) in products.chunks_exact_mut(position_len).enumerate() {
            let b = &filters[position * panels_len..][..panel_len];
            // The filters at the next position.
            let next = b.as_ptr().wrapping_add(panels_len);
            let tiles = part.tiles_at([position / across, position % across]);
            let mut next = Shares::new(next, panel_len, 2 * tiles.len().div_ceil(TILE_ROWS));
            let sums = products.chunks_exact_mut(TILE_ROWS * width);
            for (first, sums) in tiles.clone().step_by(TILE_ROWS).zip(sums) {
                let rows = TILE_ROWS.min(tiles.end - first);
                let start = inputs.as_ptr().cast::<f32>().wrapping_add(first * tile_len + position * words);
                let runs = &[std::array::from_fn(|lane| start.wrapping_add(lane.min(rows - 1) * tile_len))];
                let [first, second] = [next.next(words), next.next(words)];
                // SAFETY: a tile has `depth` values at each position, as asserted, `b` has as many full rows, and there is room for a full
                // tile of sums.
                unsafe {
                    if let Some(pixels) = &mut pixels {
                        let [written, read] = pixels;
                        let ahead = Far([first, second, written.next(words), read.next(words)]);
                        products_of(simd, runs, words, b, [rows, columns], sums, ahead);
                    } else {
                        products_of(simd, runs, words, b, [rows, columns], sums, Far([first, second]));
                    }
                }
            }
        }
    }
}

/// The products of a tile over so many words.
///
/// # Safety
/// Runs have these words, `b` as many full rows; there is room for a full tile of sums.
#[inline(always)]
unsafe fn products_of<S: Simd, W: Float>(
    simd: S,
    runs: &[[*const f32; TILE_ROWS]],
    words: usize,
    b: &[W],
    extents: [usize; 2],
    sums: &mut [f32],
    ahead: impl Ahead,
) {
    let tile = Tile::of_sums(runs, words, b, extents, sums.as_mut_ptr(), ahead);
    // SAFETY: the contract.
    unsafe { tile.compute(simd) };
}
