//! Winograd's algorithm for a few tiles of many channels: the last layers of one picture.
//!
//! What [`super::strips`] does, bit by bit, but transformed filters are never stored. Where four tiles share a filter, passing
//! its 36 values through L2 takes longer than the products. So a task takes one vector of output channels and one row of
//! positions at a time. For one word of input channels after the other it transforms the filters, in registers, to the values of that
//! row, and multiplies each with the inputs of all tiles. Taps, which stay in L1, are read once for each row, and their transform along
//! the columns is not shared among rows: that is less than what stores would cost.

use super::parts::Part;
use super::points::*;
use super::strips::{StripFilter, WORDS};
use super::tiles::{Inputs, Layout, Outputs};
use super::transforms::*;
use crate::cpu::conv::ConvShape;
use crate::cpu::float::Float;
use crate::cpu::gemm::{Epilogue, Output};
use crate::cpu::simd::{Isa, Simd, Task, dispatch};
use crate::tensor::pool::Scratch;
use rayon::prelude::*;
use std::marker::PhantomData;
use std::ops::Range;

/// Tiles whose sums at a row of positions fill the registers.
const TILES: usize = 4;
/// Registers that sums take.
const SUMS: usize = VALUES * TILES;
/// More tiles than these, divided by the values of a word, and filters are better transformed once for all.
const MAX_TILES: usize = 8;
/// Words of input channels whose taps are used for all rows before the next: they stay in L1. With a stride sums of several slots
/// meet, and their order is that of the strips.
const fn together(stride: usize) -> usize {
    if stride == 1 { WORDS / 2 } else { WORDS }
}

/// Whether so many tiles are few.
pub(super) fn suits<W: Float>(isa: Isa, tiles: usize) -> bool {
    tiles <= MAX_TILES / W::PER_WORD && isa.registers() > SUMS
}

/// `y = epilogue(conv(x, filter))` for a 3x3 filter of padding one and stride `STRIDE`, which [`suits`].
pub(super) fn forward<T: Float, W: Float, const STRIDE: usize>(
    x: &[T],
    filter: &StripFilter<W>,
    shape: &ConvShape,
    epilogue: Epilogue<T>,
    y: &mut [T],
) {
    let part = &Part::all(shape, 1)[0];
    let (tiles, corners) = (part.places.len(), are_corners(part));
    let (words, slots) = (shape.c / W::PER_WORD, slots(axis(STRIDE)));
    let tile = slots * W::PER_WORD;
    let word = tiles.next_multiple_of(TILES) * tile;
    let layout = Layout { row: words * word, slot: W::PER_WORD, tile, word };
    let mut inputs = Scratch::<W>::take(slots * layout.row);
    if STRIDE > 1 {
        // A tile at an edge may have a position, but not all slots that meet there.
        inputs.fill(W::default());
    }
    let to = &Output::new(&mut inputs);
    (0..tiles).into_par_iter().for_each(|tile| {
        dispatch(filter.isa, Inputs::<T, W, STRIDE> { x, shape, part, tiles: tile..tile + 1, to, layout });
    });
    let (inputs, y) = (&inputs, &Output::new(y));
    (0..shape.o / filter.isa.lanes()).into_par_iter().for_each(|vector| {
        let outputs = Outputs { part, shape, epilogue, y, transform: PhantomData };
        dispatch(filter.isa, Vector::<T, W, STRIDE> { inputs, layout, filter, vector, corners, outputs });
    });
}

/// The outputs of a vector of channels in all tiles.
struct Vector<'a, T, W, const STRIDE: usize> {
    /// `[slot down][word][tile][slot across]`, whole groups of tiles; positions and tiles that there are not may read anything.
    inputs: &'a [W],
    layout: Layout,
    filter: &'a StripFilter<W>,
    vector: usize,
    /// Whether the tiles are [`CORNER_TILES`].
    corners: bool,
    outputs: Outputs<'a, T, W, STRIDE>,
}

impl<T: Float, W: Float, const STRIDE: usize> Task for Vector<'_, T, W, STRIDE> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // The others never come here, and need not be compiled.
        if const { S::REGISTERS <= SUMS } {
            unreachable!("{} registers", S::REGISTERS);
        }
        let (words, tiles) = (self.filter.c / W::PER_WORD, self.outputs.part.places.len());
        let across = positions(axis(STRIDE), OUTPUTS);
        // [group of tiles][position down][position across][tile of the group], vectors.
        let group = across * across * TILES * S::LANES;
        let mut sums = Scratch::<f32>::take(tiles.div_ceil(TILES) * group);
        for start in (0..words).step_by(together(STRIDE)) {
            let words = start..words.min(start + together(STRIDE));
            for row in 0..slots(axis(STRIDE)) {
                for (i, sums) in sums.chunks_exact_mut(group).enumerate() {
                    let sums = &mut sums[position_of(axis(STRIDE), row) * across * TILES * S::LANES..];
                    self.multiply(simd, words.clone(), row, i, sums);
                }
            }
        }
        let mut room = Room::new();
        for tile in 0..tiles {
            let sums = &sums[tile / TILES * group..][..group];
            let starts = std::array::from_fn(|position| (position * TILES + tile % TILES) * S::LANES);
            self.outputs.finish(simd, tile, self.vector * S::LANES, sums, &starts, &mut room);
        }
    }
}

impl<T: Float, W: Float, const STRIDE: usize> Vector<'_, T, W, STRIDE> {
    /// Adds the products of some words of channels at a slot down, for a group of tiles, to `sums[position across][tile]`.
    #[inline(always)]
    fn multiply<S: Simd>(&self, simd: S, words: Range<usize>, row: usize, group: usize, sums: &mut [f32]) {
        let (word_len, tiles) = (TAPS * TAPS * S::LANES * W::PER_WORD, self.layout.tile * TILES);
        let taps = &self.filter.taps[self.filter.start(self.vector, words.start)..][..words.len() * word_len];
        let inputs =
            &self.inputs[row * self.layout.row + group * tiles..][..(words.end - 1) * self.layout.word + tiles];
        assert!(sums.len() >= positions(axis(STRIDE), OUTPUTS) * TILES * S::LANES);
        let product = Product {
            taps: taps.as_ptr(),
            inputs: inputs[words.start * self.layout.word..].as_ptr().cast(),
            step: self.layout.word / W::PER_WORD,
            words: words.len(),
            corners: self.corners,
            sums: sums.as_mut_ptr(),
            first: words.start == 0 && row == position_of(axis(STRIDE), row),
        };
        // SAFETY: there are as many taps, inputs and sums, as the slices say.
        unsafe {
            match value_of(row) {
                0 => product.add_phases::<S, STRIDE, 0>(simd),
                1 => product.add_phases::<S, STRIDE, 1>(simd),
                2 => product.add_phases::<S, STRIDE, 2>(simd),
                3 => product.add_phases::<S, STRIDE, 3>(simd),
                4 => product.add_phases::<S, STRIDE, 4>(simd),
                _ => product.add_phases::<S, STRIDE, 5>(simd),
            }
        }
    }
}

/// Whether a tile has products with row `row` of a filter's values at slot `i` across of a phase. With `corners`, where the tiles
/// are [`CORNER_TILES`], some have three outputs.
const fn has(corners: bool, stride: usize, row: usize, phase: usize, i: usize, tile: usize) -> bool {
    if tile >= TILES || i >= phase_slots(axis(stride), phase) {
        return false;
    }
    let [down, across] = if corners { CORNER_TILES[tile] } else { [OUTPUTS; 2] };
    // The last value stands for several slots with a stride, some of which every tile has.
    let any = stride > 1 && row == VALUES - 1;
    (any || has_slot(axis(stride), down, row)) && has_slot(axis(stride), across, first_slot(axis(stride), phase) + i)
}

/// The tiles of a picture of seven by seven outputs, in the order of a part.
const CORNER_TILES: [[usize; 2]; TILES] = [[4, 4], [4, 3], [3, 4], [3, 3]];

/// Whether a part has the tiles [`CORNER_TILES`].
fn are_corners(part: &Part) -> bool {
    part.outputs == CORNER_TILES && part.classes.iter().all(|class| class.len() == 1)
}

/// Some words of input channels at a slot down.
struct Product<W> {
    /// `[word][tap]`, vectors of words.
    taps: *const W,
    /// `[word][tile][slot across]`, words; `step` from one word of channels to the next.
    inputs: *const f32,
    step: usize,
    words: usize,
    /// As [`Vector::corners`].
    corners: bool,
    /// `[position across][tile]`, vectors.
    sums: *mut f32,
    /// Whether there are no sums yet.
    first: bool,
}

impl<W: Float> Product<W> {
    /// Adds the products with row `ROW` of the filters' values.
    ///
    /// # Safety
    /// All pointers are valid for what they are said to point to, for a group of tiles.
    #[inline(always)]
    unsafe fn add_phases<S: Simd, const STRIDE: usize, const ROW: usize>(&self, simd: S) {
        // SAFETY: the contract.
        unsafe {
            match self.corners {
                true => self.add::<S, STRIDE, ROW, 0, true>(simd, self.first),
                false => self.add::<S, STRIDE, ROW, 0, false>(simd, self.first),
            }
            if STRIDE > 1 {
                match self.corners {
                    true => self.add::<S, STRIDE, ROW, 1, true>(simd, false),
                    false => self.add::<S, STRIDE, ROW, 1, false>(simd, false),
                }
            }
        }
    }

    /// Adds those at the slots across of a phase.
    ///
    /// # Safety
    /// As for [`Product::add_phases`].
    #[inline(always)]
    unsafe fn add<S: Simd, const STRIDE: usize, const ROW: usize, const PHASE: usize, const CORNERS: bool>(
        &self,
        simd: S,
        first: bool,
    ) {
        let mut sums = [[simd.splat(0.0); TILES]; VALUES];
        let sum = |i: usize, tile: usize| self.sums.wrapping_add((i * TILES + tile) * S::LANES);
        if !first {
            unrolled!(I => {
                unrolled!(TILE => {
                    if const { has(CORNERS, STRIDE, ROW, PHASE, I, TILE) } {
                        // SAFETY: the contract.
                        sums[I % VALUES][TILE % TILES] = unsafe { simd.load(sum(I, TILE)) };
                    }
                });
            });
        }
        let tap_len = S::LANES * W::PER_WORD;
        for word in 0..self.words {
            let taps = self.taps.wrapping_add(word * TAPS * TAPS * tap_len);
            let inputs = self.inputs.wrapping_add(word * self.step);
            if PHASE == 0 {
                // The rows of the filters' values share the lines of the words that come next.
                let ahead = taps.wrapping_add(self.words * TAPS * TAPS * tap_len);
                unrolled!(TAP => {
                    if TAP % VALUES == ROW {
                        simd.prefetch(ahead.wrapping_add(TAP * tap_len).cast());
                    }
                });
            }
            // `[value of a word][column]`
            let mut columns = [[simd.splat(0.0); TAPS]; 2];
            unrolled!(COLUMN => {
                if COLUMN < TAPS {
                    let mut column = [[simd.splat(0.0); TAPS]; 2];
                    unrolled!(TAP => {
                        if TAP < TAPS {
                            // SAFETY: the contract.
                            let [low, high] = unsafe { W::load_words(simd, taps.add((TAP * TAPS + COLUMN) * tap_len)) };
                            column[0][TAP % TAPS] = low;
                            column[1][TAP % TAPS] = high;
                        }
                    });
                    columns[0][COLUMN % TAPS] = filter_values::<S, W, STRIDE>(simd, column[0])[ROW];
                    columns[1][COLUMN % TAPS] = filter_values::<S, W, STRIDE>(simd, column[1])[ROW];
                }
            });
            unrolled!(I => {
                if const { I < phase_slots(axis(STRIDE), PHASE) } {
                    let slot = const { first_slot(axis(STRIDE), PHASE) + I };
                    // One value after the other, as there are no registers for all.
                    let low = filter_values::<S, W, STRIDE>(simd, columns[0])[value_of(slot) % VALUES];
                    let high = filter_values::<S, W, STRIDE>(simd, columns[1])[value_of(slot) % VALUES];
                    let value = W::words(simd, low, high);
                    unrolled!(TILE => {
                        if const { has(CORNERS, STRIDE, ROW, PHASE, I, TILE) } {
                            // SAFETY: the contract.
                            let input = unsafe { inputs.add(TILE * slots(axis(STRIDE)) + slot).read_unaligned() };
                            let sum = &mut sums[I % VALUES][TILE % TILES];
                            *sum = W::multiply_words(simd, simd.splat(input), value, *sum);
                        }
                    });
                }
            });
        }
        unrolled!(I => {
            unrolled!(TILE => {
                if const { has(CORNERS, STRIDE, ROW, PHASE, I, TILE) } {
                    // SAFETY: the contract.
                    unsafe { simd.store(sum(I, TILE), sums[I % VALUES][TILE % TILES]) };
                }
            });
        });
    }
}
