//! Tiles on both sides of the products: the transforms of their inputs, and of their sums to outputs.

use super::axes::*;
use super::parts::{Extents, Part, Place};
use super::points::*;
use super::transforms::*;
use super::window::Window;
use crate::cpu::float::Float;
use crate::cpu::gemm::{Epilogue, Output};
use crate::cpu::simd::{Isa, Simd, Task, dispatch};
use std::marker::PhantomData;
use std::ops::Range;

/// How the transformed inputs of a part lie: values from one to the next.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    /// Slots down.
    pub row: usize,
    /// Slots across.
    pub slot: usize,
    pub tile: usize,
    /// Blocks of words of channels.
    pub block: usize,
    /// The words of a block, which lie one after the other.
    pub words: usize,
}

/// The channels of one picture's inputs in two halves: tasks in the order of their channels, as those are that compute outputs, so that a
/// thread transforms what it has computed itself. What another has written comes from further away.
pub(super) fn halves(channels: usize, lanes: usize) -> [Range<usize>; 2] {
    let middle = (channels / 2).next_multiple_of(lanes);
    [0..middle, middle..channels]
}

/// What is transformed of inputs, `B^T`.
pub(super) struct OfInputs<W, const STRIDE: usize>(PhantomData<W>);

impl<W: Float, const STRIDE: usize> OfTiles for OfInputs<W, STRIDE> {
    type Of<const M: usize> = Input<W, STRIDE, M>;
    const AXIS: Axis = axis::<W>(STRIDE);
}

/// A side of the products that pixels are transformed to.
pub(super) trait Side: OfTiles {
    /// Pixels that a whole tile sees along an axis, and what they are transformed to.
    const SEEN: usize;
    const RESULTS: usize;
    /// The first pixel that a tile sees whose first output is `output`.
    fn first(output: usize) -> isize;

    /// What a tile sees of pictures of these extents.
    #[inline(always)]
    fn window<T: Float>(pictures: &[T], extents: [usize; 3], place: Place) -> Window<'_, T> {
        let first = [Self::first(place.top), Self::first(place.left)];
        Window::new(pictures, place.image, extents, first, Self::SEEN)
    }
}

impl<W: Float, const STRIDE: usize> Side for OfInputs<W, STRIDE> {
    const SEEN: usize = inputs(Self::AXIS, Self::AXIS.outputs);
    const RESULTS: usize = slots(Self::AXIS);
    #[inline(always)]
    fn first(output: usize) -> isize {
        first_input(Self::AXIS, output)
    }
}

/// `B^T d B` of some channels of some tiles of a part.
pub(super) struct Inputs<'a, T, W, const STRIDE: usize> {
    pub x: &'a [T],
    pub extents: Extents,
    pub part: &'a Part,
    pub tiles: Range<usize>,
    /// Whole vectors.
    pub channels: Range<usize>,
    /// All of the part's, which the tasks share.
    pub to: &'a Output<W>,
    pub layout: Layout,
}

impl<T: Float, W: Float, const STRIDE: usize> Task for Inputs<'_, T, W, STRIDE> {
    type Output = ();
    const BF16: bool = T::PER_WORD * W::PER_WORD > 1;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        assert!(self.channels.end <= self.extents.input[2] && self.channels.len().is_multiple_of(S::LANES));
        let (mut room, far) = ([Room::new()], self.extents.are_far::<T>());
        let Layout { row, slot, tile: tile_step, block: block_step, words } = self.layout;
        let block = words * W::PER_WORD;
        let start = |tile: usize, channel: usize| {
            let at = tile * tile_step + channel / block * block_step + channel % block;
            Plane { first: self.to.pointer().wrapping_add(at), steps: [row, slot] }
        };
        for tile in self.tiles.clone() {
            // The next tile, or the last again.
            let following = self.tiles.end.min(tile + 2) - 1;
            let transform = OfTile::<OfInputs<W, STRIDE>>::new(self.part.outputs[self.part.class_of(tile)]);
            let window =
                |tile: usize| OfInputs::<W, STRIDE>::window(self.x, self.extents.input, self.part.places[tile]);
            let (window, next_window) = (&window(tile), &if far { Some(window(following)) } else { None });
            for channel in self.channels.clone().step_by(S::LANES) {
                let seen = OfInputs::<W, STRIDE>::SEEN;
                let pixels = Pixels { window, next: next_window.as_ref().map(|next| (next, seen)), channel };
                let [tile_ahead, channel_ahead] = vector_ahead::<S>([tile, following], channel, &self.channels);
                let next = far.then_some(start(tile_ahead, channel_ahead));
                let slots = Asking { to: start(tile, channel), next };
                // SAFETY: channels are whole vectors; there is room for those of each tile at each pair of slots, and these tiles are this
                // task's.
                unsafe { transform.apply(simd, &mut room, [pixels], slots) };
            }
        }
    }
}

/// What becomes of the sums of a part.
pub(super) struct Outputs<'a, T, W> {
    pub part: &'a Part,
    pub extents: Extents,
    pub epilogue: Epilogue<'a, T>,
    pub y: &'a Output<T>,
    pub transform: PhantomData<W>,
}

/// Transforms sums of some channels, `[position down][position across][panel][tile][column]`, to outputs; a position has the tiles that
/// there are there, and whole tiles of the micro-kernel.
pub(super) fn finish<T: Float, W: Float, const STRIDE: usize>(
    isa: Isa,
    outputs: &Outputs<T, W>,
    sums: &[f32],
    channels: Range<usize>,
) {
    let (part, width) = (outputs.part, isa.tile_columns());
    let across = positions(axis::<W>(STRIDE), axis::<W>(STRIDE).outputs);
    let position_len = sums.len() / across.pow(2);
    for (class, tiles) in part.classes().enumerate().filter(|(_, tiles)| !tiles.is_empty()) {
        let starts =
            &Starts::new(across, |[i, j]| (i * across + j) * position_len + part.first_at([i, j], class) * width);
        for (row, tile) in tiles.enumerate() {
            for (panel, start) in channels.clone().step_by(width).enumerate() {
                let channels = start..channels.end.min(start + width);
                let sums = &sums[(panel * part.room() + row) * width..];
                dispatch(isa, Finish::<T, W, STRIDE> { outputs, tile, channels, sums, starts });
            }
        }
    }
}

/// `A^T m A` of some channels of a tile with the epilogue.
pub(super) struct Finish<'a, T, W, const STRIDE: usize> {
    pub outputs: &'a Outputs<'a, T, W>,
    pub tile: usize,
    /// Whole vectors.
    pub channels: Range<usize>,
    pub sums: &'a [f32],
    pub starts: &'a Starts,
}

/// Where the sums of each position begin; those of the channels lie together.
pub(super) struct Starts {
    at: [usize; MAX * MAX],
    last: usize,
}

impl Starts {
    /// `at` says so for each of `across` positions down and across.
    pub(super) fn new(across: usize, at: impl Fn([usize; 2]) -> usize) -> Self {
        let mut starts = Starts { at: [0; MAX * MAX], last: 0 };
        for (i, row) in starts.at.chunks_exact_mut(across).enumerate().take(across) {
            for (j, start) in row.iter_mut().enumerate() {
                *start = at([i, j]);
                starts.last = starts.last.max(*start);
            }
        }
        starts
    }
}

/// What is transformed of sums, `A^T`.
struct OfSums<W, const STRIDE: usize>(PhantomData<W>);

impl<W: Float, const STRIDE: usize> OfTiles for OfSums<W, STRIDE> {
    type Of<const M: usize> = Sums<W, STRIDE, M>;
    const AXIS: Axis = axis::<W>(STRIDE);
}

impl<T: Float, W: Float, const STRIDE: usize> Task for Finish<'_, T, W, STRIDE> {
    type Output = ();
    const BF16: bool = T::PER_WORD * W::PER_WORD > 1;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Outputs { part, extents, epilogue, y, .. } = self.outputs;
        let (mut room, far, [_, w, o]) = ([Room::new()], extents.are_far::<T>(), extents.output);
        let tile = part.outputs[part.class_of(self.tile)];
        let following = self.first_output((self.tile + 1).min(part.places.len() - 1));
        assert!(self.channels.len().is_multiple_of(S::LANES));
        assert!(self.sums.len() >= self.starts.last + self.channels.len());
        for (i, channel) in self.channels.clone().step_by(S::LANES).enumerate() {
            let next = far.then_some(following + channel);
            let sums = PositionSums { finish: &self, first: i * S::LANES, across: tile[1], next };
            // SAFETY: a bias has as many values as there are channels, and a vector of them begins here.
            let bias = epilogue.bias.map(|bias| unsafe { simd.load(bias[channel..][..S::LANES].as_ptr()) });
            let first = self.first_output(self.tile) + channel;
            // Copies, which no store to the result can change.
            let outputs = Finished { epilogue: *epilogue, bias, y: y.pointer(), first, steps: [w * o, o] };
            // SAFETY: a vector of the channels is there at every position, as asserted; outputs of the tile lie inside the image and are this
            // task's alone.
            unsafe { OfTile::<OfSums<W, STRIDE>>::new(tile).apply(simd, &mut room, [sums], outputs) };
        }
    }
}

impl<T: Float, W: Float, const STRIDE: usize> Finish<'_, T, W, STRIDE> {
    /// Positions across all tiles.
    const ALL: usize = positions(axis::<W>(STRIDE), axis::<W>(STRIDE).outputs);

    /// The first value of a tile's outputs.
    #[inline(always)]
    fn first_output(&self, tile: usize) -> usize {
        let Outputs { part, extents, .. } = self.outputs;
        let (Place { image, top, left }, [h, w, o]) = (part.places[tile], extents.output);
        ((image * h + top) * w + left) * o
    }
}

/// A vector of the sums at each position of a tile.
struct PositionSums<'a, T, W, const STRIDE: usize> {
    finish: &'a Finish<'a, T, W, STRIDE>,
    /// Of the channels.
    first: usize,
    /// Outputs of a row.
    across: usize,
    /// Where the vector's outputs of the next tile begin, if they, what is added to them and the sums that follow are to be asked for.
    next: Option<usize>,
}

impl<T: Float, W: Float, S: Simd, const STRIDE: usize> Source<S> for PositionSums<'_, T, W, STRIDE> {
    #[inline(always)]
    fn prefetch(&self, simd: S, j: usize) {
        let Outputs { extents, epilogue, y, .. } = self.finish.outputs;
        let [_, w, o] = extents.output;
        let Some(next) = self.next.filter(|_| j < const { axis::<W>(STRIDE).outputs }) else { return };
        let mut at = next + j * w * o;
        for _ in 0..self.across {
            simd.prefetch(y.pointer().wrapping_add(at).cast_const().cast());
            if let Some(residual) = epilogue.residual {
                simd.prefetch(residual.as_ptr().wrapping_add(at).cast());
            }
            at += o;
        }
    }

    #[inline(always)]
    unsafe fn load(&self, simd: S, i: usize, j: usize) -> S::V {
        let at = self.finish.starts.at[i * Finish::<T, W, STRIDE>::ALL + j] + self.first;
        let sums = self.finish.sums.as_ptr().wrapping_add(at);
        if self.next.is_some() {
            simd.prefetch_near(sums.wrapping_add(S::LANES));
        }
        // SAFETY: the caller's.
        unsafe { simd.load(sums) }
    }
}

/// Outputs with the epilogue: from `first` on, so many values from one to the next down and across.
struct Finished<'a, T, V> {
    epilogue: Epilogue<'a, T>,
    bias: Option<V>,
    y: *mut T,
    first: usize,
    steps: [usize; 2],
}

impl<T: Float, S: Simd> Sink<S, 1> for Finished<'_, T, S::V> {
    #[inline(always)]
    unsafe fn store(&self, simd: S, i: usize, j: usize, [value]: [S::V; 1]) {
        let at = self.first + i * self.steps[0] + j * self.steps[1];
        // SAFETY: the caller's; the residual is as long.
        unsafe { self.epilogue.store(simd, value, self.bias, self.y, at) };
    }
}
