//! Tiles on both sides of the products: the transforms of their inputs, and of their sums to outputs.

use super::parts::{Extents, Part, Place};
use super::points::*;
use super::transforms::*;
use super::window::Window;
use crate::cpu::float::Float;
use crate::cpu::gemm::{Epilogue, Output};
use crate::cpu::simd::{Simd, Task};
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
        let (mut room, far) = (Room::new(), self.extents.are_far::<T>());
        for tile in self.tiles.clone() {
            let [down, across] = self.part.outputs[self.part.class_of(tile)];
            let window = &self.window(tile);
            let next = if far { Some(self.window(self.following(tile))) } else { None };
            for channel in self.channels.clone().step_by(S::LANES) {
                with_outputs!(axis::<W>(STRIDE), down, M => {
                    self.transform_columns::<S, M>(simd, window, next.as_ref(), channel, across, &mut room)
                });
                with_outputs!(axis::<W>(STRIDE), across, M => {
                    self.transform_rows::<S, M>(simd, tile, channel, down, far, &mut room)
                });
            }
        }
    }
}

impl<'a, T: Float, W: Float, const STRIDE: usize> Inputs<'a, T, W, STRIDE> {
    /// The next tile, or the last again.
    #[inline(always)]
    fn following(&self, tile: usize) -> usize {
        self.tiles.end.min(tile + 2) - 1
    }

    /// What a tile sees.
    #[inline(always)]
    fn window(&self, tile: usize) -> Window<'a, T> {
        let Place { image, top, left } = self.part.places[tile];
        let first = [top, left].map(|at| first_input(axis::<W>(STRIDE), at));
        let seen = const { inputs(axis::<W>(STRIDE), axis::<W>(STRIDE).outputs) };
        Window::new(self.x, image, self.extents.input, first, seen)
    }

    /// Along the columns of a tile of `M` outputs down, to the room. What is to be asked for meanwhile is a part of `next`.
    #[inline(always)]
    fn transform_columns<S: Simd, const M: usize>(
        &self,
        simd: S,
        window: &Window<T>,
        next: Option<&Window<T>>,
        channel: usize,
        across: usize,
        room: &mut Room,
    ) {
        let seen = const { inputs(axis::<W>(STRIDE), axis::<W>(STRIDE).outputs) };
        let vector = (channel - self.channels.start) / S::LANES;
        for j in 0..inputs(axis::<W>(STRIDE), across) {
            if let Some(next) = next {
                next.prefetch(simd, seen, vector * seen + j);
            }
            let values = match window.has_column(j) {
                true => {
                    // SAFETY: there is such a column; channels are whole vectors.
                    let column = vectors!(simd, inputs(axis::<W>(STRIDE), M), I => unsafe {
                        window.load(simd, I, j, channel)
                    });
                    Input::<W, STRIDE, M>::apply(simd, &column)
                }
                false => [simd.splat(0.0); MAX],
            };
            let room = room.at::<S>(0, j);
            unrolled!(SLOT => {
                if const { has::<W>(STRIDE, M, SLOT) } {
                    // SAFETY: vectors `[slot, j]` of the room.
                    unsafe { simd.store(room.add(SLOT * MAX * S::LANES), values[SLOT]) };
                }
            });
        }
    }

    /// Along the rows that the room has of a tile of `M` outputs across. If results go far, the places of the next are asked for.
    #[inline(always)]
    fn transform_rows<S: Simd, const M: usize>(
        &self,
        simd: S,
        tile: usize,
        channel: usize,
        down: usize,
        far: bool,
        room: &mut Room,
    ) {
        let Layout { row: row_step, slot: slot_step, tile: tile_step, block: block_step, words } = self.layout;
        let block = words * W::PER_WORD;
        let start = |tile: usize, channel: usize| tile * tile_step + channel / block * block_step + channel % block;
        let first = start(tile, channel);
        let next = match channel + S::LANES {
            channel if channel < self.channels.end => start(tile, channel),
            _ => start(self.following(tile), self.channels.start),
        };
        for row in (0..slots(axis::<W>(STRIDE))).filter(|&slot| Slots::<W, STRIDE>::has(down, slot)) {
            let room = room.at::<S>(row, 0);
            // SAFETY: the columns have stored a vector for each row that the tile has and each input across.
            let row_of_room =
                vectors!(simd, inputs(axis::<W>(STRIDE), M), I => unsafe { simd.load(room.add(I * S::LANES)) });
            let values = Input::<W, STRIDE, M>::apply(simd, &row_of_room);
            let row = self.to.pointer().wrapping_add(row * row_step);
            let (to, next) = (row.wrapping_add(first), row.wrapping_add(next));
            unrolled!(SLOT => {
                if const { has::<W>(STRIDE, M, SLOT) } {
                    // SAFETY: there is room for the channels of each tile at each pair of slots, and this tile is this task's.
                    unsafe { W::store(simd, to.add(SLOT * slot_step), values[SLOT]) };
                    if far {
                        // So many places, each in a line of its own, do not come by themselves.
                        simd.prefetch_near(next.wrapping_add(SLOT * slot_step).cast_const().cast());
                    }
                }
            });
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

impl<T: Float, W: Float, const STRIDE: usize> Task for Finish<'_, T, W, STRIDE> {
    type Output = ();
    const BF16: bool = T::PER_WORD * W::PER_WORD > 1;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (mut room, far) = (Room::new(), self.outputs.extents.are_far::<T>());
        let part = self.outputs.part;
        let [down, across] = part.outputs[part.class_of(self.tile)];
        assert!(self.channels.len().is_multiple_of(S::LANES));
        assert!(self.sums.len() >= self.starts.last + self.channels.len());
        for (i, channel) in self.channels.clone().step_by(S::LANES).enumerate() {
            let sums = &self.sums[i * S::LANES..];
            with_outputs!(axis::<W>(STRIDE), down, M => {
                self.transform_columns::<S, M>(simd, i, sums, across, far, &mut room)
            });
            with_outputs!(axis::<W>(STRIDE), across, M => self.transform_rows::<S, M>(simd, channel, down, &mut room));
        }
    }
}

impl<T: Float, W: Float, const STRIDE: usize> Finish<'_, T, W, STRIDE> {
    /// `A^T m` along the columns of a tile of `M` outputs down, to the room.
    #[inline(always)]
    fn transform_columns<S: Simd, const M: usize>(
        &self,
        simd: S,
        vector: usize,
        sums: &[f32],
        across: usize,
        far: bool,
        room: &mut Room,
    ) {
        let all = const { positions(axis::<W>(STRIDE), axis::<W>(STRIDE).outputs) };
        for j in 0..positions(axis::<W>(STRIDE), across) {
            if far {
                self.prefetch_next(simd, vector * all + j, across);
                unrolled!(I => {
                    if I < positions(axis::<W>(STRIDE), M) {
                        simd.prefetch_near(sums.as_ptr().wrapping_add(self.starts.at[I * all + j] + S::LANES));
                    }
                });
            }
            // SAFETY: a vector of the channels, as asserted.
            let column = vectors!(simd, positions(axis::<W>(STRIDE), M), I => unsafe {
                simd.load(sums.as_ptr().add(self.starts.at[I * all + j]))
            });
            let outputs = Sums::<W, STRIDE, M>::apply(simd, &column);
            let room = room.at::<S>(0, j);
            unrolled!(I => {
                if I < M {
                    // SAFETY: vectors `[output, j]` of the room.
                    unsafe { simd.store(room.add(I * MAX * S::LANES), outputs[I]) };
                }
            });
        }
    }

    /// The first value of a row of a tile's outputs.
    #[inline(always)]
    fn first_of_row(&self, tile: usize, i: usize) -> usize {
        let Outputs { part, extents, .. } = self.outputs;
        let (Place { image, top, left }, [h, w, o]) = (part.places[tile], extents.output);
        ((image * h + top + i) * w + left) * o
    }

    /// Asks for a part of the next tile's outputs, and of what is added to them: a vector of each pixel of a row.
    #[inline(always)]
    fn prefetch_next<S: Simd>(&self, simd: S, step: usize, across: usize) {
        let Outputs { part, extents, epilogue, y, .. } = self.outputs;
        let vectors = self.channels.len() / S::LANES;
        let (row, vector) = (step / vectors, step % vectors);
        if row >= const { axis::<W>(STRIDE).outputs } {
            return;
        }
        let tile = (self.tile + 1).min(part.places.len() - 1);
        let first = self.first_of_row(tile, row) + self.channels.start + vector * S::LANES;
        for j in 0..across {
            let at = first + j * extents.output[2];
            simd.prefetch(y.pointer().wrapping_add(at).cast_const().cast());
            if let Some(residual) = epilogue.residual {
                simd.prefetch(residual.as_ptr().wrapping_add(at).cast());
            }
        }
    }

    /// `A^T m A` with the epilogue, of a tile of `M` outputs across, from the room to the result.
    #[inline(always)]
    fn transform_rows<S: Simd, const M: usize>(&self, simd: S, channel: usize, down: usize, room: &mut Room) {
        let Outputs { extents, epilogue, y, .. } = self.outputs;
        let o = extents.output[2];
        // Copies, which no store to the result can change.
        let (epilogue, y) = (*epilogue, y.pointer());
        // SAFETY: a bias has as many values as there are channels, and a vector of them begins here.
        let bias = epilogue.bias.map(|bias| unsafe { simd.load(bias[channel..][..S::LANES].as_ptr()) });
        for i in 0..down {
            let room = room.at::<S>(i, 0);
            // SAFETY: the columns have stored a vector for each row of outputs and each position across.
            let row =
                vectors!(simd, positions(axis::<W>(STRIDE), M), J => unsafe { simd.load(room.add(J * S::LANES)) });
            let outputs = Sums::<W, STRIDE, M>::apply(simd, &row);
            let first = self.first_of_row(self.tile, i) + channel;
            unrolled!(J => {
                if J < M {
                    // SAFETY: outputs of the tile lie inside the image and are this task's alone; the residual is as long.
                    unsafe { epilogue.store(simd, outputs[J], bias, y, first + J * o) };
                }
            });
        }
    }
}
