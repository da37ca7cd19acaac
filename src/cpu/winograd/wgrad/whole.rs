//! Tiles of a stride of one: whole ones, which zeros fill up at an edge.

use super::super::axes::*;
use super::super::parts::{Extents, Place, TileGrid};
use super::super::transforms::*;
use super::super::window::Window;
use super::sums::Layout;
use crate::cpu::float::Float;
use crate::cpu::gemm::Output;
use crate::cpu::parallel::for_each;
use crate::cpu::simd::{Isa, Simd, Task, dispatch};
use std::ops::Range;

/// Words of tiles a task transforms.
const BLOCK_WORDS: usize = 8;

/// Transforms some tiles of inputs and of gradients, to as much room as the layout says.
pub(super) fn transform<T: Float, W: Float, const M: usize>(
    isa: Isa,
    [x, dy]: [&[T]; 2],
    extents: Extents,
    tiles: Range<usize>,
    layout: Layout,
    [inputs, gradients]: [&Output<W>; 2],
) {
    let words = tiles.len().div_ceil(W::PER_WORD);
    for_each(words.div_ceil(BLOCK_WORDS), |block| {
        let block = block * BLOCK_WORDS..words.min((block + 1) * BLOCK_WORDS);
        let (tiles, grid) = (tiles.clone(), TileGrid::new(extents, M));
        dispatch(
            isa,
            TransformTiles::<T, W, M> { x, dy, extents, grid, tiles, block, words, layout, inputs, gradients },
        );
    });
}

/// Some words of tiles of the input and of the output's gradient, transformed.
struct TransformTiles<'a, T, W, const M: usize> {
    x: &'a [T],
    dy: &'a [T],
    extents: Extents,
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
        let Extents { input: [.., c], output: [.., o], .. } = self.extents;
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
                next: (&next_inputs[i], Input::<W, 1, M>::VALUES),
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
                    let words = Plane { first, steps: [Input::<W, 1, M>::RESULTS * inputs_len, inputs_len] };
                    let tiles = [pixels(0, channel), pixels(1, channel)];
                    transform_words::<Input<W, 1, M>, Input<W, 1, M>, S, W>(simd, tiles, &mut rooms, words, next);
                }
            }
            let to_gradients = |(word, channel): (usize, usize)| {
                self.gradients.pointer().wrapping_add(word * word_of_gradients + channel * W::PER_WORD)
            };
            for channel in (0..o).step_by(S::LANES) {
                let (first, next) = (to_gradients((word, channel)), to_gradients(after(channel, o)));
                // SAFETY: as above, of `o` values.
                unsafe {
                    let words = Plane { first, steps: [Gradient::<W, 1, M>::RESULTS * gradients_len, gradients_len] };
                    let tiles = [outputs(0, channel), outputs(1, channel)];
                    transform_words::<Gradient<W, 1, M>, Gradient<W, 1, M>, S, W>(simd, tiles, &mut rooms, words, next);
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
        let Place { image, top, left } = self.grid.place(tile);
        let first = [top, left].map(|at| at as isize - 1);
        Window::new(self.x, image, self.extents.input, first, Input::<W, 1, M>::VALUES)
    }

    /// The gradients of a tile's outputs.
    #[inline(always)]
    fn gradients_of(&self, tile: usize) -> Window<'_, T> {
        let Place { image, top, left } = self.grid.place(tile);
        Window::new(self.dy, image, self.extents.output, [top as isize, left as isize], M)
    }
}
