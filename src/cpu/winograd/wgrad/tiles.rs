//! Tiles of inputs and of gradients, transformed for the products that are summed over them.
//!
//! They end where the image does: filled up, those of 14 or 7 outputs would take a third more products with a stride, and a fifth more in bf16. The
//! tiles of a word are of the same extents.

use super::super::axes::*;
use super::super::parts::{Part, spread};
use super::super::points::{Axis, positions};
use super::super::tiles::Side;
use super::super::transforms::*;
use super::super::window::Window;
use crate::cpu::float::Float;
use crate::cpu::gemm::Output;
use crate::cpu::simd::{Simd, Task};
use std::marker::PhantomData;
use std::ops::Range;

/// The outputs' gradients.
pub(super) struct OfGradients<W, const STRIDE: usize>(PhantomData<W>);

impl<W: Float, const STRIDE: usize> OfTiles for OfGradients<W, STRIDE> {
    type Of<const M: usize> = Gradient<W, STRIDE, M>;
    const AXIS: Axis = axis::<W>(STRIDE);
}

impl<W: Float, const STRIDE: usize> Side for OfGradients<W, STRIDE> {
    const SEEN: usize = Self::AXIS.outputs;
    const RESULTS: usize = positions(Self::AXIS, Self::AXIS.outputs);
    #[inline(always)]
    fn first(output: usize) -> isize {
        output as isize
    }
}

/// How the transformed tiles of a side lie: `[result][panel][word][channel]`.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    /// Channels of a panel, and panels.
    pub(super) channels: usize,
    pub(super) panels: usize,
    /// Values from one word to the next.
    pub(super) word: usize,
}

impl Layout {
    /// Values from one result to the next of so many words, spread: a tile has a vector at each.
    pub(super) fn result(&self, words: usize) -> usize {
        spread(self.panels * words * self.word)
    }
}

/// Some words of tiles of a side, transformed.
pub(super) struct TransformTiles<'a, T, W, X> {
    /// Pictures `[n, h, w, channels]`.
    pub(super) pictures: &'a [T],
    pub(super) n: usize,
    pub(super) extents: [usize; 3],
    /// Whole words of tiles.
    pub(super) part: &'a Part,
    pub(super) words: Range<usize>,
    /// Room for the whole part. A tile has the results of its extents alone; others are not written.
    pub(super) to: &'a Output<W>,
    pub(super) layout: Layout,
    pub(super) side: PhantomData<X>,
}

impl<T: Float, W: Float, X: Side> Task for TransformTiles<'_, T, W, X> {
    type Output = ();
    const BF16: bool = T::PER_WORD * W::PER_WORD > 1;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let ([.., channels], all) = (self.extents, self.part.places.len() / W::PER_WORD);
        assert!(channels.is_multiple_of(S::LANES), "channels are whole vectors");
        let (layout, result) = (self.layout, self.layout.result(all));
        let start = |word: usize, channel: usize| {
            let at = (channel / layout.channels * all + word) * layout.word + channel % layout.channels * W::PER_WORD;
            self.to.pointer().wrapping_add(at)
        };
        let mut rooms = [Room::new(), Room::new()];
        let mut next_windows = self.windows(self.words.start);
        for word in self.words.clone() {
            let following = self.words.end.min(word + 2) - 1;
            let windows = std::mem::replace(&mut next_windows, self.windows(following));
            let tile = OfTile::<X>::new(self.part.outputs[self.part.class_of(word * W::PER_WORD)]);
            for channel in (0..channels).step_by(S::LANES) {
                let pixels =
                    |i: usize| Pixels { window: &windows[i], next: Some((&next_windows[i], X::SEEN)), channel };
                let [ahead, channel_ahead] = vector_ahead::<S>([word, following], channel, &(0..channels));
                let words = Plane { first: start(word, channel), steps: [X::RESULTS * result, result] };
                let next = start(ahead, channel_ahead);
                // SAFETY: pixels have as many channels; there is room for each word at each result, and these are this task's.
                unsafe { transform_words(simd, &tile, [pixels(0), pixels(1)], &mut rooms, words, next) };
            }
        }
    }
}

impl<T: Float, W: Float, X: Side> TransformTiles<'_, T, W, X> {
    /// What the first tile of a word sees, and the last where that is another; of a picture that there is not, nothing.
    #[inline(always)]
    fn windows(&self, word: usize) -> [Window<'_, T>; 2] {
        let window = |i: usize| match self.part.places[word * W::PER_WORD + i] {
            place if place.image < self.n => X::window(self.pictures, self.extents, place),
            _ => Window::empty(),
        };
        [window(0), if W::PER_WORD > 1 { window(W::PER_WORD - 1) } else { Window::empty() }]
    }
}
