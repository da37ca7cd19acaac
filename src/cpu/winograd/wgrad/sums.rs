//! The sums over tiles that a filter's gradient is made of, and the transforms before and after them.

use super::super::axes::*;
use super::super::parts::{Extents, Place, TileGrid, spread};
use super::super::transforms::*;
use super::super::window::Window;
use crate::cpu::conv::ConvShape;
use crate::cpu::float::Float;
use crate::cpu::gemm::{Far, Output, Stream};
use crate::cpu::gemm_transposed::{SLICE, TILE_ROWS, multiply_runs};
use crate::cpu::parallel::for_each;
use crate::cpu::simd::{Isa, Simd, Task, dispatch};
use crate::tensor::pool::Scratch;
use rayon::prelude::*;
use std::marker::PhantomData;
use std::ops::Range;

/// Words of tiles a task transforms.
const BLOCK_WORDS: usize = 8;

/// Sums over tiles of the products of inputs and gradients, `[position][panel][o][column]`, and how they come to be and are used.
pub(super) struct Sums<W, const M: usize> {
    isa: Isa,
    c: usize,
    o: usize,
    pub(super) layout: Layout,
    products: PhantomData<W>,
}

/// Some transformed tiles.
pub(super) struct Transformed<W> {
    inputs: Scratch<W>,
    gradients: Scratch<W>,
    words: usize,
}

impl<W: Float, const M: usize> Sums<W, M> {
    pub(super) fn new(isa: Isa, c: usize, o: usize) -> Self {
        let width = isa.tile_columns();
        let layout = Layout {
            width,
            panels: c.div_ceil(width),
            word_of_inputs: width * W::PER_WORD,
            word_of_gradients: spread(o * W::PER_WORD),
        };
        Sums { isa, c, o, layout, products: PhantomData }
    }

    /// Values of a position, and of them those that are used.
    pub(super) fn position_len(&self) -> [usize; 2] {
        let used = self.layout.panels * self.o * self.layout.width;
        [spread(used), used]
    }

    pub(super) fn len(&self) -> usize {
        slots_of::<M>().pow(2) * self.position_len()[0]
    }

    /// How many tiles take so many bytes when they are transformed, but one at least.
    pub(super) fn tiles_of(&self, bytes: usize) -> usize {
        (bytes / (slots_of::<M>().pow(2) * (self.c + self.o) * size_of::<W>())).max(1)
    }

    pub(super) fn transform<T: Float>(
        &self,
        x: &[T],
        dy: &[T],
        shape: &ConvShape,
        tiles: Range<usize>,
    ) -> Transformed<W> {
        let (all, layout, words) = (slots_of::<M>().pow(2), self.layout, tiles.len().div_ceil(W::PER_WORD));
        let mut inputs = Scratch::<W>::take(all * layout.inputs(words));
        let mut gradients = Scratch::<W>::take(all * layout.gradients(words));
        let (to_inputs, to_gradients) = (&Output::new(&mut inputs), &Output::new(&mut gradients));
        for_each(words.div_ceil(BLOCK_WORDS), |block| {
            let block = block * BLOCK_WORDS..words.min((block + 1) * BLOCK_WORDS);
            let (tiles, grid) = (tiles.clone(), TileGrid::new(Extents::of(shape), M));
            let (inputs, gradients) = (to_inputs, to_gradients);
            dispatch(
                self.isa,
                TransformTiles::<T, W, M> { x, dy, shape, grid, tiles, block, words, layout, inputs, gradients },
            );
        });
        Transformed { inputs, gradients, words }
    }

    /// Adds the products of some filters at a position for a panel, or begins with them.
    pub(super) fn multiply(
        &self,
        Transformed { inputs, gradients, words }: &Transformed<W>,
        [position, panel]: [usize; 2],
        filters: Range<usize>,
        first: bool,
        sums: &mut [f32],
    ) {
        let Layout { word_of_inputs, word_of_gradients: word, .. } = self.layout;
        let panel_len = words * word_of_inputs;
        let inputs = &inputs[position * self.layout.inputs(*words) + panel * panel_len..][..panel_len];
        let position_len = self.layout.gradients(*words);
        let gradients = &gradients[position * position_len..][..words * word];
        dispatch(self.isa, Multiply { gradients, inputs, word, position_len, filters, first, sums });
    }

    /// [`Sums::multiply`] of all.
    pub(super) fn add(&self, tiles: &Transformed<W>, first: bool, sums: &mut [f32]) {
        let [position_len, used] = self.position_len();
        let positions = sums.par_chunks_exact_mut(position_len).map(|sums| &mut sums[..used]).enumerate();
        let panel_len = self.o * self.layout.width;
        let tasks = positions.flat_map(|(position, sums)| {
            sums.par_chunks_exact_mut(panel_len).enumerate().map(move |(panel, sums)| (position, panel, sums))
        });
        tasks.for_each(|(position, panel, sums)| self.multiply(tiles, [position, panel], 0..self.o, first, sums));
    }

    /// The gradient of a filter for a panel of channels, from the first of its sums on; `position_len` values from one position to the next.
    pub(super) fn finish(&self, sums: &[f32], position_len: usize, [filter, panel]: [usize; 2], out: &Output<f32>) {
        let channels = panel * self.layout.width..self.c.min((panel + 1) * self.layout.width);
        let (position, c) = (position_len, self.c);
        dispatch(self.isa, ToFilter::<W, M> { sums, position, filter, channels, c, out, products: PhantomData });
    }

    /// [`Sums::finish`] of all.
    pub(super) fn finish_all(&self, sums: &[f32], out: &Output<f32>) {
        let Layout { panels, width, .. } = self.layout;
        for_each(self.o * panels, |i| {
            let (filter, panel) = (i / panels, i % panels);
            self.finish(&sums[(panel * self.o + filter) * width..], self.position_len()[0], [filter, panel], out);
        });
    }
}

/// Slots along an axis of a tile of `M` outputs.
pub(super) const fn slots_of<const M: usize>() -> usize {
    M + TAPS - 1
}

/// How transformed tiles lie: inputs `[position][panel][word][column]`, gradients `[position][word][o]`.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    /// Columns of a panel, and panels.
    pub(super) width: usize,
    pub(super) panels: usize,
    /// Values from one word to the next. Those of gradients are spread: a product takes a few of each.
    word_of_inputs: usize,
    word_of_gradients: usize,
}

impl Layout {
    /// Values from one position to the next of so many words, spread: a tile has a vector at each.
    fn inputs(&self, words: usize) -> usize {
        spread(self.panels * words * self.word_of_inputs)
    }

    fn gradients(&self, words: usize) -> usize {
        spread(words * self.word_of_gradients)
    }
}

/// Some words of tiles of the input and of the output's gradient, transformed.
struct TransformTiles<'a, T, W, const M: usize> {
    x: &'a [T],
    dy: &'a [T],
    shape: &'a ConvShape,
    grid: TileGrid,
    tiles: Range<usize>,
    block: Range<usize>,
    /// All words of the tiles.
    words: usize,
    layout: Layout,
    inputs: &'a Output<W>,
    gradients: &'a Output<W>,
}

impl<T: Float, W: Float, const M: usize> Task for TransformTiles<'_, T, W, M> {
    type Output = ();
    const BF16: bool = T::PER_WORD * W::PER_WORD > 1;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let ConvShape { c, o, .. } = *self.shape;
        assert!(c.is_multiple_of(S::LANES) && o.is_multiple_of(S::LANES), "channels are whole vectors");
        let Layout { width, word_of_inputs, word_of_gradients, .. } = self.layout;
        let (inputs_len, gradients_len) = (self.layout.inputs(self.words), self.layout.gradients(self.words));
        let mut rooms = [Room::new(), Room::new()];
        let inputs_of =
            |word: usize| self.tiles_of(word).map(|tile| tile.map_or(Window::empty(), |tile| self.inputs_of(tile)));
        let gradients_of =
            |word: usize| self.tiles_of(word).map(|tile| tile.map_or(Window::empty(), |tile| self.gradients_of(tile)));
        let (mut next_inputs, mut next_gradients) = (inputs_of(self.block.start), gradients_of(self.block.start));
        for word in self.block.clone() {
            let next = self.block.end.min(word + 2) - 1;
            let inputs = std::mem::replace(&mut next_inputs, inputs_of(next));
            let gradients = std::mem::replace(&mut next_gradients, gradients_of(next));
            let pixels = |i: usize, channel: usize| Pixels {
                window: &inputs[i],
                next: (&next_inputs[i], slots_of::<M>()),
                channel,
            };
            let outputs =
                |i: usize, channel: usize| Pixels { window: &gradients[i], next: (&next_gradients[i], M), channel };
            // The next vector of channels, or the next word's first.
            let after = |channel: usize, all: usize| match channel + S::LANES {
                channel if channel < all => (word, channel),
                _ => (next, 0),
            };
            let to_inputs = |(word, channel): (usize, usize)| {
                let at = (channel / width * self.words + word) * word_of_inputs + channel % width * W::PER_WORD;
                self.inputs.pointer().wrapping_add(at)
            };
            for channel in (0..c).step_by(S::LANES) {
                let (first, next) = (to_inputs((word, channel)), to_inputs(after(channel, c)));
                // SAFETY: pixels have `c` values; there is room for each word at each position, and these are this task's.
                unsafe {
                    let words = Plane { first, steps: [slots_of::<M>() * inputs_len, inputs_len] };
                    let tiles = [pixels(0, channel), pixels(1, channel)];
                    transform_words::<Input<W, 1, M>, S, W>(simd, tiles, &mut rooms, words, next);
                }
            }
            let to_gradients = |(word, channel): (usize, usize)| {
                self.gradients.pointer().wrapping_add(word * word_of_gradients + channel * W::PER_WORD)
            };
            for channel in (0..o).step_by(S::LANES) {
                let (first, next) = (to_gradients((word, channel)), to_gradients(after(channel, o)));
                // SAFETY: as above, of `o` values.
                unsafe {
                    let words = Plane { first, steps: [slots_of::<M>() * gradients_len, gradients_len] };
                    let tiles = [outputs(0, channel), outputs(1, channel)];
                    transform_words::<Gradient<W, M>, S, W>(simd, tiles, &mut rooms, words, next);
                }
            }
        }
    }
}

impl<T: Float, W: Float, const M: usize> TransformTiles<'_, T, W, M> {
    /// The first tile of a word, and the last where that is another; there is none beyond the last of all.
    #[inline(always)]
    fn tiles_of(&self, word: usize) -> [Option<usize>; 2] {
        let tile = |i: usize| Some(self.tiles.start + word * W::PER_WORD + i).filter(|tile| *tile < self.tiles.end);
        [tile(0), if W::PER_WORD > 1 { tile(W::PER_WORD - 1) } else { None }]
    }

    /// What a tile sees of the input.
    #[inline(always)]
    fn inputs_of(&self, tile: usize) -> Window<'_, T> {
        let (ConvShape { h, w, c, .. }, Place { image, top, left }) = (*self.shape, self.grid.place(tile));
        let first = [top, left].map(|at| at as isize - 1);
        Window::new(self.x, image, [h, w, c], first, slots_of::<M>())
    }

    /// The gradients of a tile's outputs.
    #[inline(always)]
    fn gradients_of(&self, tile: usize) -> Window<'_, T> {
        let ([oh, ow], o, Place { image, top, left }) = (self.shape.output(), self.shape.o, self.grid.place(tile));
        Window::new(self.dy, image, [oh, ow, o], [top as isize, left as isize], M)
    }
}

/// `sums [filters, width] (+)= gradients [words, o]^T inputs [words, width]` of some filters.
struct Multiply<'a, W> {
    gradients: &'a [W],
    inputs: &'a [W],
    /// Values from one word of gradients to the next, and from one position to the next.
    word: usize,
    position_len: usize,
    filters: Range<usize>,
    first: bool,
    sums: &'a mut [f32],
}

impl<W: Float> Task for Multiply<'_, W> {
    type Output = ();
    const BF16: bool = W::PER_WORD > 1;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = S::LANES * S::VECTORS;
        assert!(self.filters.end * W::PER_WORD <= self.word);
        let mut runs: Vec<*const f32> = Vec::with_capacity(SLICE);
        let inputs = self.inputs.chunks(SLICE * width * W::PER_WORD);
        for (i, (gradients, inputs)) in self.gradients.chunks(SLICE * self.word).zip(inputs).enumerate() {
            runs.clear();
            let rows = gradients.chunks_exact(self.word);
            runs.extend(rows.map(|row| row[self.filters.start * W::PER_WORD..].as_ptr().cast()));
            // The next slice, or what lies after the last: the next panel or position.
            let next = inputs.as_ptr_range().end.cast();
            let ahead =
                Far([Stream::new(next, runs.len() * width, runs.len() * self.filters.len().div_ceil(TILE_ROWS))]);
            // After the last of the filters come the first in the next slice, or at the next position.
            let last = (i + 1) * SLICE * self.word >= self.gradients.len();
            let next = if last { self.position_len - i * SLICE * self.word } else { SLICE * self.word };
            let (filters, first) = (0..self.filters.len(), self.first && i == 0);
            let beyond = next / W::PER_WORD - filters.len();
            multiply_runs(simd, &runs, filters, beyond, inputs, first, self.sums, width, ahead);
        }
    }
}

/// `G^T m G` of some channels of a filter.
struct ToFilter<'a, W, const M: usize> {
    /// From the first of the filter's sums on, `[position][..][column]`.
    sums: &'a [f32],
    /// Values of a position.
    position: usize,
    filter: usize,
    channels: Range<usize>,
    /// All channels.
    c: usize,
    /// Filters `[o, 3, 3, c]`.
    out: &'a Output<f32>,
    products: PhantomData<W>,
}

impl<W: Float, const M: usize> Task for ToFilter<'_, W, M> {
    type Output = ();
    const BF16: bool = W::PER_WORD > 1;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (steps, columns) = ([slots_of::<M>() * self.position, self.position], self.channels.len());
        assert!(columns.is_multiple_of(S::LANES) && self.channels.end <= self.c);
        assert!(self.sums.len() >= (slots_of::<M>().pow(2) - 1) * self.position + columns);
        let mut room = Room::new();
        for column in (0..columns).step_by(S::LANES) {
            // SAFETY: as asserted, a vector from `column` on is there at every position; these channels of the filter, of which each
            // tap has `c`, are this task's alone.
            unsafe {
                let sums = Plane { first: self.sums.as_ptr().add(column).cast_mut(), steps };
                let first = self.out.pointer().add(self.filter * TAPS * TAPS * self.c + self.channels.start + column);
                let out = Plane { first, steps: [TAPS * self.c, self.c] };
                along_both::<FilterGradient<W, M>, S>(simd, &mut room, sums, out);
            }
        }
    }
}
