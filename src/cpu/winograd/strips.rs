//! Winograd's algorithm for 3x3 filters of many channels, with a stride of one or two, and the gradient to the input of the latter.
//!
//! Transformed filters are four or nine times as large as filters. Where there are many channels they do not fit a cache, and reading
//! them would take longer than making them: so they are made when they are used. All inputs are transformed first. Then a task
//! takes a strip of output channels and one row of positions after the other: for some input channels after others it transforms the
//! filters to the row's values, which stay in L2 with the row's sums, and adds the products. In the end it transforms the sums back.
//!
//! Tiles at the bottom and at the right end where the image does (`points.rs`). Tiles of a task are ordered by their
//! extents, so that those that have a position lie together.

mod filter;

use super::check_operands;
use super::few;
use super::parts::{Extents, Part, TileGrid, spread};
use super::points::*;
use super::tiles::{Inputs, Layout, Outputs, finish, halves};
use super::transforms::*;
use crate::cpu::conv::ConvShape;
use crate::cpu::float::Float;
use crate::cpu::gemm::{Epilogue, Near, Output, Stream, TILE_ROWS, Tile};
use crate::cpu::parallel::{for_each, for_each_of};
use crate::cpu::simd::{Simd, Task, dispatch};
use crate::tensor::pool::Scratch;
pub use filter::StripFilter;
use std::marker::PhantomData;
use std::ops::Range;

/// Output channels of a task; a whole number of the micro-kernel's panels.
const STRIP: usize = 64;
/// Tiles of a task, about, times the values of a word: the more, the less the transforms of filters matter beside the products, but sums of a
/// row should stay in L2.
const PART: usize = 128;
/// Bytes of transformed inputs that are used before more are made: they stay in the last cache.
const TRANSFORMED: usize = 11 << 20;
/// Where a strided convolution has so few strips, a task transforms the inputs of its own tiles and takes all strips of them: inputs that
/// are used so seldom would take as long to go through the last cache as the products do. With a stride of one there are more values of a
/// filter, 81 and not 36, than to transform them for so few tiles.
const FEW_STRIPS: usize = 2;
/// Bytes of what such a task has of inputs and of the sums of a strip: they stay in L2.
const ALONE: usize = 3 << 19;
/// Tiles of such a task at least.
const ENOUGH_TILES: usize = 24;
/// Fewer such tasks are as many for each thread.
const ENOUGH_PARTS: usize = 8;
/// Words of input channels whose filters are transformed together: their filters at a position stay in L1 while the tiles pass,
/// and those of a row of positions in L2.
pub(super) const WORDS: usize = 64;
/// If there are no more than these, all together: then sums are stored once, and need not be loaded again. Not with a stride of two, whose
/// sums of several slots would be added up in another order than [`few`] has.
const ALL_WORDS: usize = 128;
/// Words ahead of the one whose filters are transformed whose taps are asked for.
const WORDS_AHEAD: usize = 4;
/// What a tile reads that lacks a slot.
static ZEROS: [f32; ALL_WORDS] = [0.0; ALL_WORDS];
/// Tiles whose inputs a task transforms.
const TOGETHER: usize = 4;
/// Tiles that one picture has at most; pictures of a batch are already apart.
const ONE_PICTURE: usize = 64;
/// Input channels at most: what a pixel of padding can stand for.
pub(super) const MAX_CHANNELS: usize = 512;

/// `y = epilogue(conv(x, filter))` for a 3x3 filter of padding one and stride one or two.
pub fn forward<T: Float, W: Float>(
    x: &[T],
    filter: &StripFilter<W>,
    shape: &ConvShape,
    epilogue: Epilogue<T>,
    y: &mut [T],
) {
    check_operands(shape, [filter.c, filter.o], x, &epilogue, y);
    assert!([shape.kh, shape.kw] == [TAPS; 2] && shape.padding == [1, 1] && shape.c <= MAX_CHANNELS);
    match shape.stride {
        [1, 1] => Convolution::<T, W, 1>::new(x, filter, Extents::of(shape), epilogue, y).in_few_or_strips(),
        [2, 2] => Convolution::<T, W, 2>::new(x, filter, Extents::of(shape), epilogue, y).in_few_or_strips(),
        stride => panic!("strides {stride:?} have no tiles"),
    }
}

/// Gradient to the input of a 3x3 filter of padding one and a stride of two; `filter` is [`StripFilter::for_backward_input`].
pub fn backward_input<T: Float, W: Float>(
    dy: &[T],
    filter: &StripFilter<W>,
    shape: &ConvShape,
    epilogue: Epilogue<T>,
    dx: &mut [T],
) {
    assert!([shape.kh, shape.kw] == [TAPS; 2] && shape.padding == [1, 1] && shape.stride == [2, 2]);
    assert_eq!([shape.o, shape.c], [filter.c, filter.o], "the filter's channels");
    assert!(shape.o <= MAX_CHANNELS);
    shape.check(dx.len(), dy.len());
    epilogue.check(shape.c, dx.len());
    let extents = Extents::of(shape).turned();
    Convolution::<T, W, HALF>::new(dy, filter, extents, epilogue, dx).in_strips();
}

/// What the tasks of a convolution share.
struct Convolution<'a, T, W, const STRIDE: usize> {
    x: &'a [T],
    filter: &'a StripFilter<W>,
    extents: Extents,
    epilogue: Epilogue<'a, T>,
    y: Output<T>,
    /// How many there are of all.
    tiles: usize,
    strips: usize,
}

impl<'a, T: Float, W: Float, const STRIDE: usize> Convolution<'a, T, W, STRIDE> {
    const AXIS: Axis = axis::<W>(STRIDE);

    fn new(x: &'a [T], filter: &'a StripFilter<W>, extents: Extents, epilogue: Epilogue<'a, T>, y: &mut [T]) -> Self {
        let tiles = TileGrid::new(extents, Self::AXIS.outputs).count();
        let strips = extents.output[2].div_ceil(STRIP);
        Convolution { x, filter, extents, epilogue, y: Output::new(y), tiles, strips }
    }

    fn in_few_or_strips(&self) {
        let Convolution { x, filter, extents, epilogue, ref y, tiles, .. } = *self;
        match few::suits::<W>(filter.isa, STRIDE, tiles) {
            true if tiles > 0 => few::forward::<T, W, STRIDE>(x, filter, extents, epilogue, y),
            _ => self.in_strips(),
        }
    }

    fn in_strips(&self) {
        match self.parts_alone() {
            Some(parts) => for_each(parts, |i| self.alone(&Part::one_of(self.extents, Self::AXIS, [i, parts]))),
            None if self.tiles > 0 => self.together(),
            None => {}
        }
    }

    /// Bytes of a tile's transformed inputs.
    fn inputs_of_tile(&self) -> usize {
        slots(Self::AXIS).pow(2) * self.filter.c * size_of::<W>()
    }

    /// In how many parts tiles should go all the way alone, if they should.
    fn parts_alone(&self) -> Option<usize> {
        let sums_of_tile = positions(Self::AXIS, Self::AXIS.outputs).pow(2) * STRIP * size_of::<f32>();
        let part = ALONE / (self.inputs_of_tile() + sums_of_tile) / TILE_ROWS * TILE_ROWS;
        if STRIDE == 1 || self.strips > FEW_STRIPS || part < ENOUGH_TILES {
            return None;
        }
        let (parts, threads) = (self.tiles.div_ceil(part), rayon::current_num_threads());
        let few = parts < ENOUGH_PARTS;
        let parts = if few { parts.next_multiple_of(threads) } else { parts };
        (!few || self.tiles >= parts * ENOUGH_TILES).then_some(parts)
    }

    /// All outputs of a part, on this thread.
    fn alone(&self, part: &Part) {
        let mut inputs = self.room(part);
        self.transform(part, 0..part.places.len(), 0..self.filter.c, &Output::new(&mut inputs));
        (0..self.strips).for_each(|strip| self.strip(part, &inputs, strip));
    }

    /// All tiles: threads share the inputs that they transform.
    fn together(&self) {
        let (c, isa) = (self.filter.c, self.filter.isa);
        let groups = (self.tiles * self.inputs_of_tile()).div_ceil(TRANSFORMED);
        let parts_of_group = self.tiles.div_ceil(groups.max(1)).div_ceil(PART * W::PER_WORD);
        let parts = Part::all(self.extents, Self::AXIS, groups * parts_of_group);
        let channels = if self.tiles > ONE_PICTURE { [0..c, 0..0] } else { halves(c, isa.lanes()) };
        for parts in parts.chunks(parts_of_group.max(1)) {
            let mut inputs: Vec<Scratch<W>> = parts.iter().map(|part| self.room(part)).collect();
            let to: Vec<Output<W>> = inputs.iter_mut().map(|inputs| Output::new(inputs)).collect();
            let pieces = channels
                .iter()
                .filter(|channels| !channels.is_empty())
                .flat_map(|channels| parts.iter().enumerate().map(move |(i, part)| (i, part.places.len(), channels)))
                .flat_map(|(i, tiles, channels)| {
                    let starts = (0..tiles).step_by(TOGETHER);
                    starts.map(move |start| (i, start..tiles.min(start + TOGETHER), channels.clone()))
                });
            for_each_of(pieces, |(i, tiles, channels)| self.transform(&parts[i], tiles, channels, &to[i]));
            for_each(parts.len() * self.strips, |task| {
                let (part, strip) = (task / self.strips, task % self.strips);
                self.strip(&parts[part], &inputs[part], strip);
            });
        }
    }

    /// Room for the transformed inputs of a part.
    fn room(&self, part: &Part) -> Scratch<W> {
        Scratch::take(slots(Self::AXIS) * self.layout(part).row)
    }

    /// What is multiplied at a slot, some words of all tiles, lies together.
    fn layout(&self, part: &Part) -> Layout {
        let all = self.filter.c / W::PER_WORD;
        let words = if STRIDE != 2 && all <= ALL_WORDS { all } else { all.min(WORDS) };
        let tile = words * W::PER_WORD;
        let block = part.places.len() * tile;
        let slot = spread(all.div_ceil(words) * block);
        Layout { row: slots(Self::AXIS) * slot, slot, tile, block, words }
    }

    /// Transforms the inputs of some tiles of a part.
    fn transform(&self, part: &Part, tiles: Range<usize>, channels: Range<usize>, to: &Output<W>) {
        let (x, extents, layout) = (self.x, self.extents, self.layout(part));
        dispatch(self.filter.isa, Inputs::<T, W, STRIDE> { x, extents, part, tiles, channels, to, layout });
    }

    /// The outputs of a strip in all tiles of a part.
    fn strip(&self, part: &Part, inputs: &[W], strip: usize) {
        let Convolution { filter, extents, epilogue, .. } = *self;
        let (isa, o) = (filter.isa, extents.output[2]);
        let outputs = &Outputs { part, extents, epilogue, y: &self.y, transform: PhantomData::<W> };
        let sums = dispatch(isa, Strip::<W, STRIDE> { inputs, layout: self.layout(part), filter, strip, part });
        finish::<T, W, STRIDE>(isa, outputs, &sums, strip * STRIP..o.min((strip + 1) * STRIP));
    }
}

/// The sums of a strip of channels in all tiles of a part, as [`finish`] takes them.
struct Strip<'a, W, const STRIDE: usize> {
    /// `[slot down][slot across][block of words][tile][word]`
    inputs: &'a [W],
    layout: Layout,
    filter: &'a StripFilter<W>,
    strip: usize,
    part: &'a Part,
}

impl<W: Float, const STRIDE: usize> Task for Strip<'_, W, STRIDE> {
    type Output = Scratch<f32>;
    const BF16: bool = W::PER_WORD > 1;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Scratch<f32> {
        let width = S::LANES * S::VECTORS;
        let c = self.filter.c;
        let columns = STRIP.min(self.filter.o - self.strip * STRIP);
        let panels = columns.div_ceil(width);
        let across = const { positions(axis::<W>(STRIDE), axis::<W>(STRIDE).outputs) };
        let position_len = spread(panels * self.part.room() * width);
        let mut sums = Scratch::<f32>::take(across * across * position_len);
        let words = c / W::PER_WORD;
        let value_len = spread(panels * self.layout.words * width * W::PER_WORD);
        let mut filters = Scratch::<W>::take(const { values::<W>(STRIDE) } * value_len);
        // Taps are read from memory once and then from L2, and sums, of which there is more, one after the other.
        for start in (0..words).step_by(self.layout.words) {
            let words = start..words.min(start + self.layout.words);
            for value in 0..const { values::<W>(STRIDE) } {
                self.transform_filters(simd, value, words.clone(), columns, &mut filters);
                let rows = 0..slots(axis::<W>(STRIDE));
                for row in rows.filter(|&row| Slots::<W, STRIDE>::value(row) == value) {
                    let i = Slots::<W, STRIDE>::position(row);
                    let sums = &mut sums[i * across * position_len..][..across * position_len];
                    for (j, sums) in sums.chunks_exact_mut(position_len).enumerate() {
                        let at = Products { position: [i, j], row, words: words.clone(), columns };
                        self.multiply(simd, at, &filters, sums);
                    }
                }
            }
        }
        sums
    }
}

/// Some of the products at a position.
struct Products {
    position: [usize; 2],
    /// The slot down, one of those that meet there.
    row: usize,
    words: Range<usize>,
    columns: usize,
}

impl<W: Float, const STRIDE: usize> Strip<'_, W, STRIDE> {
    /// Row `row` of `G g G^T` of the filters of some words of channels: `[value across][panel][word][column]`.
    #[inline(always)]
    fn transform_filters<S: Simd>(&self, simd: S, row: usize, words: Range<usize>, columns: usize, filters: &mut [W]) {
        unrolled!(ROW => {
            if const { ROW < values::<W>(STRIDE) } && ROW == row {
                self.transform_row::<S, ROW>(simd, words.clone(), columns, filters);
            }
        });
    }

    #[inline(always)]
    fn transform_row<S: Simd, const ROW: usize>(
        &self,
        simd: S,
        words: Range<usize>,
        columns: usize,
        filters: &mut [W],
    ) {
        // Values of a tap, of all of a word's, and of a panel's row.
        let tap_len = S::LANES * W::PER_WORD;
        let word_len = TAPS * TAPS * tap_len;
        let row = S::VECTORS * tap_len;
        let panel = words.len() * row;
        let vectors = columns.div_ceil(S::LANES);
        let value_len = spread(vectors.div_ceil(S::VECTORS) * panel);
        assert!(filters.len() >= values::<W>(STRIDE) * value_len);
        for word in words.clone() {
            for vector in 0..vectors {
                let start = self.filter.start(self.strip * STRIP / S::LANES + vector, word);
                let taps = &self.filter.taps[start..][..word_len];
                let at = vector / S::VECTORS * panel + (word - words.start) * row + vector % S::VECTORS * tap_len;
                if ROW == 0 {
                    // The other rows find them in L2.
                    let ahead = taps.as_ptr().wrapping_add(WORDS_AHEAD * word_len);
                    for tap in 0..TAPS * TAPS {
                        simd.prefetch_near(ahead.wrapping_add(tap * tap_len).cast());
                    }
                }
                for part in (0..tap_len).step_by(S::LANES) {
                    let taps = taps[part..].as_ptr();
                    let mut columns = [simd.splat(0.0); MAX];
                    unrolled!(COLUMN => {
                        if COLUMN < TAPS {
                            // SAFETY: a part of each tap.
                            let column = vectors!(simd, TAPS, TAP => unsafe {
                                W::load(simd, taps.add((TAP * TAPS + COLUMN) * tap_len))
                            });
                            columns[COLUMN] = at_point::<Filter<W, STRIDE>, S, ROW>(simd, &column);
                        }
                    });
                    let vectors = Filter::<W, STRIDE>::apply(simd, &columns);
                    unrolled!(VALUE => {
                        if const { VALUE < values::<W>(STRIDE) } {
                            let to = filters.as_mut_ptr().wrapping_add(VALUE * value_len + at + part);
                            // SAFETY: a vector of a row within the value's panels, as asserted.
                            unsafe { W::store(simd, to, vectors[VALUE]) };
                            // Where the next word's goes.
                            simd.prefetch_near(to.wrapping_add(row).cast_const().cast());
                        }
                    });
                }
            }
        }
    }

    /// Adds products to the sums of a position, `[panel][tile][column]`; filters are those of the row.
    #[inline(always)]
    fn multiply<S: Simd>(&self, simd: S, at: Products, filters: &[W], sums: &mut [f32]) {
        let Products { position: [i, j], row, words, columns } = at;
        let (part, layout) = (self.part, self.layout);
        let (depth, width) = (words.len() * W::PER_WORD, S::LANES * S::VECTORS);
        let panels = columns.div_ceil(width);
        let tiles = part.tiles_at([i, j]);
        if tiles.is_empty() {
            return;
        }
        for slot in (0..slots(axis::<W>(STRIDE))).filter(|&slot| Slots::<W, STRIDE>::position(slot) == j) {
            let filters =
                &filters[Slots::<W, STRIDE>::value(slot) * spread(panels * depth * width)..][..panels * depth * width];
            let inputs =
                &self.inputs[row * layout.row + slot * layout.slot + words.start / layout.words * layout.block..];
            let inputs = &inputs[..(part.places.len() - 1) * layout.tile + depth];
            // For each class, where the inputs of a first tile would begin and how far it is to the next, or zeros if it lacks one of the slots.
            let starts = part.outputs.map(|[down, across]| {
                let has = Slots::<W, STRIDE>::has(down, row) && Slots::<W, STRIDE>::has(across, slot);
                if has { (inputs.as_ptr(), layout.tile) } else { (ZEROS[..words.len()].as_ptr().cast(), 0) }
            });
            let run = |tile: usize| {
                let (start, step) = starts[part.class_of(tile)];
                start.wrapping_add(tile * step).cast::<f32>()
            };
            let first = words.start == 0 && [row, slot] == [i, j];
            for start in (0..tiles.len()).step_by(TILE_ROWS) {
                let runs: [[*const f32; TILE_ROWS]; 1] =
                    [std::array::from_fn(|lane| run((tiles.start + start + lane).min(tiles.end - 1)))];
                // After the last tiles come the first at the next slot.
                let next = match tiles.start + start + TILE_ROWS {
                    next if next < tiles.end => run(next),
                    _ => run(tiles.start).wrapping_add(layout.slot / W::PER_WORD),
                };
                let sums = sums.chunks_exact_mut(part.room() * width);
                for ((panel, b), sums) in filters.chunks_exact(depth * width).enumerate().zip(sums) {
                    let sums = sums[start * width..][..TILE_ROWS * width].as_mut_ptr();
                    let extents = [TILE_ROWS.min(tiles.len() - start), width.min(columns - panel * width)];
                    // The first panel brings the inputs for all.
                    let inputs = if panel == 0 { TILE_ROWS * words.len() } else { 0 };
                    let ahead = Near([
                        Stream::new(next, inputs, words.len()),
                        Stream::new(sums.wrapping_add(TILE_ROWS * width), TILE_ROWS * width, words.len()),
                    ]);
                    let tile = Tile::of_sums(&runs, words.len(), b, extents, sums, ahead);
                    let tile = Tile { before: (!first).then_some(sums), ..tile };
                    // SAFETY: runs are readable for `words`, `b` has as many full rows, and there is a full tile of sums.
                    unsafe { tile.compute(simd) };
                }
            }
        }
    }
}
