//! Winograd's algorithm for a few tiles of many channels: the last layers of one picture.
//!
//! What [`super::strips`] does, bit by bit, but transformed filters are never stored. Where a few tiles share a filter, passing
//! its values, 36 or 81, through L2 takes longer than the products. So a task takes one vector of output channels and one row of
//! positions at a time. For one word of input channels after the other it transforms the filters, in registers, to the values of that
//! row, and multiplies each with the inputs of all tiles. Taps, which stay in L1, are read once for each row, and their transform along
//! the columns is not shared among rows: that is less than what stores would cost.

use super::parts::{Extents, Part};
use super::points::*;
use super::strips::{StripFilter, WORDS};
use super::tiles::{Finish, Inputs, Layout, Outputs, Starts, halves};
use super::transforms::*;
use crate::cpu::float::Float;
use crate::cpu::gemm::{Epilogue, Output};
use crate::cpu::parallel::for_each;
use crate::cpu::simd::{Isa, Simd, Task, dispatch};
use crate::tensor::pool::Scratch;
use std::marker::PhantomData;
use std::ops::Range;

/// Tiles whose sums at a row of positions, or at half of a long one, fill the registers.
const TILES: usize = 4;

/// Runs `$body` with `$VALUE` the constant that `$value` is.
macro_rules! at_value {
    ($value:expr, $VALUE:ident => $body:block) => { at_value!(@ $value, $VALUE $body 0 1 2 3 4 5 6 7 8) };
    (@ $value:expr, $VALUE:ident $body:block $($i:literal)*) => {
        match $value {
            $($i => {
                const $VALUE: usize = $i;
                $body
            })*
            _ => unreachable!("values of a filter along an axis"),
        }
    };
}

/// Registers that sums take, of as many as there are.
const fn sums(registers: usize) -> usize {
    if registers > 24 { 24 } else { 10 }
}
/// More tiles than these, divided by the values of a word, and filters are better transformed once for all.
const MAX_TILES: usize = 8;
/// Words of input channels whose taps are used for all rows before the next: they stay in L1. With a stride sums of several slots
/// meet, and their order is that of the strips.
const fn together(stride: usize) -> usize {
    if stride == 1 { WORDS / 2 } else { WORDS }
}

/// Whether so many tiles are few. Where registers are, those of groups of one or two tiles.
pub(super) fn suits<W: Float>(isa: Isa, stride: usize, tiles: usize) -> bool {
    let axis = axis::<W>(stride);
    match sums(isa.registers()) >= SLOTS * TILES {
        true => tiles <= MAX_TILES / W::PER_WORD,
        false => group(tiles, phase_slots(axis, 0)) < TILES,
    }
}

/// Slots of a row whose sums are in registers together for [`TILES`] tiles.
const SLOTS: usize = 6;

/// Tiles whose sums are in registers together: where phases are long, those of one or two tiles at a whole row.
fn group(tiles: usize, phase: usize) -> usize {
    if phase > SLOTS && tiles <= 2 { tiles } else { TILES }
}

/// `y = epilogue(conv(x, filter))` for a 3x3 filter of padding one and stride `STRIDE`, which [`suits`].
pub(super) fn forward<T: Float, W: Float, const STRIDE: usize>(
    x: &[T],
    filter: &StripFilter<W>,
    extents: Extents,
    epilogue: Epilogue<T>,
    y: &Output<T>,
) {
    let axis = axis::<W>(STRIDE);
    let ([_, _, c], [_, _, o]) = (extents.input, extents.output);
    let part = &Part::all(extents, axis, 1)[0];
    let (tiles, words, slots) = (part.places.len(), c / W::PER_WORD, slots(axis));
    let (group, corners) = (group(tiles, phase_slots(axis, 0)), are_corners(part));
    let slot = together(STRIDE) * W::PER_WORD;
    let row = tiles.next_multiple_of(group) * slots * slot;
    let layout = Layout { row, slot, tile: slots * slot, block: slots * row, words: together(STRIDE) };
    let mut inputs = Scratch::<W>::take(words.div_ceil(layout.words) * layout.block);
    if STRIDE > 1 {
        // A tile at an edge may have a position, but not all slots that meet there.
        inputs.fill(W::default());
    }
    let to = &Output::new(&mut inputs);
    let halves = halves(c, filter.isa.lanes());
    for_each(halves.len() * tiles, |i| {
        let (tile, channels) = (i % tiles, halves[i / tiles].clone());
        dispatch(filter.isa, Inputs::<T, W, STRIDE> { x, extents, part, tiles: tile..tile + 1, channels, to, layout });
    });
    let outputs = &Outputs { part, extents, epilogue, y, transform: PhantomData::<W> };
    let (inputs, isa, across) = (&inputs, filter.isa, positions(axis, axis.outputs));
    for_each(o / isa.lanes(), |vector| {
        let sums = &dispatch(isa, Vector::<W, STRIDE> { inputs, layout, filter, vector, tiles, group, corners });
        let of_group = sums.len() / tiles.div_ceil(group);
        for tile in 0..tiles {
            let start = |[i, j]: [usize; 2]| ((i * across + j) * TILES + tile % group) * isa.lanes();
            let starts = &Starts::new(across, start);
            let (sums, channels) = (&sums[tile / group * of_group..], vector * isa.lanes()..(vector + 1) * isa.lanes());
            dispatch(isa, Finish::<T, W, STRIDE> { outputs, tile, channels, sums, starts });
        }
    });
}

/// Sums of a vector of channels in all tiles: `[group of tiles][position down][position across][tile of the group]`, vectors.
struct Vector<'a, W, const STRIDE: usize> {
    /// `[block of words][slot down][tile][slot across][word]`, whole groups of tiles and whole blocks; positions and tiles that there are
    /// not may read anything.
    inputs: &'a [W],
    layout: Layout,
    filter: &'a StripFilter<W>,
    vector: usize,
    tiles: usize,
    /// Tiles whose sums are in registers together.
    group: usize,
    /// Whether the tiles are [`CORNER_TILES`].
    corners: bool,
}

impl<W: Float, const STRIDE: usize> Task for Vector<'_, W, STRIDE> {
    type Output = Scratch<f32>;
    const BF16: bool = W::PER_WORD > 1;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Scratch<f32> {
        let words = self.filter.c / W::PER_WORD;
        let across = const { positions(axis::<W>(STRIDE), axis::<W>(STRIDE).outputs) };
        let group = across * across * TILES * S::LANES;
        let mut sums = Scratch::<f32>::take(self.tiles.div_ceil(self.group) * group);
        for start in (0..words).step_by(together(STRIDE)) {
            let words = start..words.min(start + together(STRIDE));
            for row in 0..const { slots(axis::<W>(STRIDE)) } {
                for (i, sums) in sums.chunks_exact_mut(group).enumerate() {
                    let sums = &mut sums[Slots::<W, STRIDE>::position(row) * across * TILES * S::LANES..];
                    self.multiply(simd, words.clone(), row, i, sums);
                }
            }
        }
        sums
    }
}

impl<W: Float, const STRIDE: usize> Vector<'_, W, STRIDE> {
    /// Adds the products of some words of channels at a slot down, for a group of tiles, to `sums[position across][tile]`.
    #[inline(always)]
    fn multiply<S: Simd>(&self, simd: S, words: Range<usize>, row: usize, group: usize, sums: &mut [f32]) {
        let axis = axis::<W>(STRIDE);
        let (word_len, tiles) = (TAPS * TAPS * S::LANES * W::PER_WORD, self.layout.tile * self.group);
        let taps = &self.filter.taps[self.filter.start(self.vector, words.start)..][..words.len() * word_len];
        let block = &self.inputs[words.start / together(STRIDE) * self.layout.block..][..self.layout.block];
        let inputs = &block[row * self.layout.row + group * tiles..][..tiles];
        assert!(sums.len() >= positions(axis, axis.outputs) * TILES * S::LANES);
        let product = Product {
            taps: taps.as_ptr(),
            inputs: inputs.as_ptr().cast(),
            words: words.len(),
            group: self.group,
            corners: self.corners,
            sums: sums.as_mut_ptr(),
            first: words.start == 0 && row == Slots::<W, STRIDE>::position(row),
        };
        let value = Slots::<W, STRIDE>::value(row);
        unrolled!(ROW => {
            if const { ROW < values::<W>(STRIDE) } && ROW == value {
                // SAFETY: there are as many taps, inputs and sums, as the slices say.
                unsafe { product.add_row::<S, STRIDE, ROW>(simd) };
            }
        });
    }
}

/// The slots of a row that are taken together, the first and how many: those of a phase, or where there is one that is too long
/// for `tiles` tiles in so many registers, a half of it. Opposite points stay together.
const fn part_of_row<W: Float>(registers: usize, stride: usize, tiles: usize, part: usize) -> [usize; 2] {
    let axis = axis::<W>(stride);
    let all = phase_slots(axis, 0);
    match (stride, part) {
        (1, 0) if all * tiles <= sums(registers) => [0, all],
        (1, 0) => [0, SLOTS - 1],
        (1, _) if all * tiles <= sums(registers) => [all, 0],
        (1, _) => [SLOTS - 1, all - (SLOTS - 1)],
        _ => [first_slot(axis, part), phase_slots(axis, part)],
    }
}

/// The tiles of a picture of seven by seven outputs, in the order of a part, where whole tiles have four.
const CORNER_TILES: [[usize; 2]; TILES] = [[4, 4], [4, 3], [3, 4], [3, 3]];

/// Whether a part has the tiles [`CORNER_TILES`].
fn are_corners(part: &Part) -> bool {
    part.outputs == CORNER_TILES && part.classes().all(|class| class.len() == 1)
}

/// Whether tile `tile` has products with row `row` of a filter's values at a slot across. `corners`: where the tiles are
/// [`CORNER_TILES`], some have three outputs.
const fn has_product<W: Float>(stride: usize, corners: bool, row: usize, slot: usize, tile: usize) -> bool {
    if !corners {
        return true;
    }
    let (axis, [down, across]) = (axis::<W>(stride), CORNER_TILES[tile]);
    // The last value stands for several slots with a stride, some of which every tile has.
    let any = stride > 1 && row + 1 == values::<W>(stride);
    (any || has_slot(axis, down, row)) && has_slot(axis, across, slot)
}

/// Which of some slots across, the first and how many, and of `group` tiles have products with row `row` of a filter's values, as bits:
/// `[slot][tile]`.
const fn products<W: Float>([first, count]: [usize; 2], stride: usize, corners: bool, row: usize, group: usize) -> u64 {
    let (mut products, mut i) = (0, 0);
    while i < count * TILES {
        let (slot, tile) = (first + i / TILES, i % TILES);
        if tile < group && has_product::<W>(stride, corners, row, slot, tile) {
            products |= 1 << i;
        }
        i += 1;
    }
    products
}

/// The position of each of some slots, the first and how many.
const fn positions_of<W: Float>([first, count]: [usize; 2], stride: usize) -> [usize; MAX] {
    let (mut positions, mut i) = ([0; MAX], 0);
    while i < count {
        positions[i] = position_of(axis::<W>(stride), first + i);
        i += 1;
    }
    positions
}

/// Of the lines of a word's taps, how many rows before `row` of `rows` ask for, and how many it does.
const fn lines_of(row: usize, rows: usize) -> [usize; 2] {
    let start = row * TAPS * TAPS / rows;
    [start, (row + 1) * TAPS * TAPS / rows - start]
}

/// Some words of input channels at a slot down.
struct Product<W> {
    /// `[word][tap]`, vectors of words.
    taps: *const W,
    /// `[tile][slot across][word]`, words; what comes next follows.
    inputs: *const f32,
    words: usize,
    /// As in [`Vector`].
    group: usize,
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
    unsafe fn add_row<S: Simd, const STRIDE: usize, const ROW: usize>(&self, simd: S) {
        let long = const { phase_slots(axis::<W>(STRIDE), 0) > SLOTS };
        // SAFETY: the contract.
        unsafe {
            match self.group {
                1 if long => self.add_parts::<S, STRIDE, ROW, 1, false>(simd),
                2 if long => self.add_parts::<S, STRIDE, ROW, 2, false>(simd),
                // The others never come here, and need not be compiled.
                _ if const { S::REGISTERS < SLOTS * TILES } => unreachable!("{} registers", S::REGISTERS),
                _ if !long && self.corners => self.add_parts::<S, STRIDE, ROW, TILES, true>(simd),
                _ => self.add_parts::<S, STRIDE, ROW, TILES, false>(simd),
            }
        }
    }

    /// # Safety
    /// As for [`Product::add_row`].
    #[inline(always)]
    unsafe fn add_parts<S: Simd, const STRIDE: usize, const ROW: usize, const GROUP: usize, const CORNERS: bool>(
        &self,
        simd: S,
    ) {
        // SAFETY: the contract.
        unsafe {
            self.add::<S, STRIDE, ROW, 0, GROUP, CORNERS>(simd);
            if const { Self::slots::<S, STRIDE, GROUP, 1>()[1] > 0 } {
                self.add::<S, STRIDE, ROW, 1, GROUP, CORNERS>(simd);
            }
        }
    }

    /// The slots of a part of a row, the first and how many.
    const fn slots<S: Simd, const STRIDE: usize, const GROUP: usize, const PART: usize>() -> [usize; 2] {
        part_of_row::<W>(S::REGISTERS, STRIDE, GROUP, PART)
    }

    /// Slot `i` of a part of a row.
    const fn slot<S: Simd, const STRIDE: usize, const GROUP: usize, const PART: usize>(i: usize) -> usize {
        Self::slots::<S, STRIDE, GROUP, PART>()[0] + i
    }

    /// Adds those at a part of the slots across, for `GROUP` tiles.
    ///
    /// # Safety
    /// As for [`Product::add_row`].
    #[inline(always)]
    unsafe fn add<
        S: Simd,
        const STRIDE: usize,
        const ROW: usize,
        const PART: usize,
        const GROUP: usize,
        const CORNERS: bool,
    >(
        &self,
        simd: S,
    ) {
        let mut sums = [[simd.splat(0.0); TILES]; MAX];
        // Computed once, and the compiler folds what depends on them: a constant for each slot and tile would be a million of them.
        let products = const { products::<W>(Self::slots::<S, STRIDE, GROUP, PART>(), STRIDE, CORNERS, ROW, GROUP) };
        let positions = const { positions_of::<W>(Self::slots::<S, STRIDE, GROUP, PART>(), STRIDE) };
        macro_rules! has {
            ($slot:expr, $tile:expr) => {
                products >> ($slot * TILES + $tile) & 1 == 1
            };
        }
        // Runs `$body` for every slot and tile that has products, with where their sum is.
        macro_rules! at_each {
            ($I:ident, $TILE:ident, $sum:ident => $body:expr) => {
                unrolled!($I => {
                    unrolled!($TILE in 0 1 2 3 => {
                        if has!($I, $TILE) {
                            let $sum = self.sums.wrapping_add((positions[$I] * TILES + $TILE) * S::LANES);
                            $body
                        }
                    });
                })
            };
        }
        // The slots of a later phase add to the positions of an earlier one.
        if !(self.first && const { STRIDE == 1 || PART == 0 }) {
            // SAFETY: the contract.
            at_each!(I, TILE, sum => sums[I][TILE] = unsafe { simd.load(sum) });
        }
        let tap_len = S::LANES * W::PER_WORD;
        for word in 0..self.words {
            let taps = self.taps.wrapping_add(word * TAPS * TAPS * tap_len);
            let inputs = self.inputs.wrapping_add(word);
            if PART == 0 {
                // The rows of the filters' values share the lines of the words that come next, which they ask for one after the other:
                // so the memory asks for others ahead itself.
                let [before, lines] = const { lines_of(ROW, values::<W>(STRIDE)) };
                let first = (self.words * (TAPS * TAPS + before) + word * lines) * tap_len;
                let ahead = self.taps.wrapping_add(first);
                unrolled!(LINE => {
                    if LINE < lines {
                        simd.prefetch_near(ahead.wrapping_add(LINE * tap_len).cast());
                    }
                });
                // And the inputs that come next, as many as this word's filters are multiplied with.
                let of_word = const { GROUP * slots(axis::<W>(STRIDE)) };
                let ahead = self.inputs.wrapping_add(of_word * (together(STRIDE) + word));
                unrolled!(LINE => {
                    if LINE * LANES < of_word {
                        simd.prefetch_near(ahead.wrapping_add(LINE * LANES));
                    }
                });
            }
            // `[value of a word][column]`
            let mut columns = [[simd.splat(0.0); MAX]; 2];
            unrolled!(COLUMN => {
                if COLUMN < TAPS {
                    let mut column = [[simd.splat(0.0); MAX]; 2];
                    unrolled!(TAP => {
                        if TAP < TAPS {
                            // SAFETY: the contract.
                            let [low, high] = unsafe { W::load_words(simd, taps.add((TAP * TAPS + COLUMN) * tap_len)) };
                            column[0][TAP] = low;
                            column[1][TAP] = high;
                        }
                    });
                    columns[0][COLUMN] = at_point::<Filter<W, STRIDE>, S, ROW>(simd, &column[0]);
                    if const { W::PER_WORD > 1 } {
                        columns[1][COLUMN] = at_point::<Filter<W, STRIDE>, S, ROW>(simd, &column[1]);
                    }
                }
            });
            let across = const { slots(axis::<W>(STRIDE)) };
            unrolled!(I => {
                if const { I < Self::slots::<S, STRIDE, GROUP, PART>()[1] } {
                    let slot = const { Self::slot::<S, STRIDE, GROUP, PART>(I) };
                    // One value after the other, as there are no registers for all.
                    let value = at_value!(const { value_of::<W>(STRIDE, Self::slot::<S, STRIDE, GROUP, PART>(I)) }, VALUE => {
                        let low = at_point::<Filter<W, STRIDE>, S, VALUE>(simd, &columns[0]);
                        let high = if const { W::PER_WORD > 1 } { at_point::<Filter<W, STRIDE>, S, VALUE>(simd, &columns[1]) } else { low };
                        W::words(simd, low, high)
                    });
                    unrolled!(TILE in 0 1 2 3 => {
                        if has!(I, TILE) {
                            // SAFETY: the contract.
                            let input = unsafe { inputs.add((TILE * across + slot) * together(STRIDE)).read_unaligned() };
                            let sum = &mut sums[I][TILE];
                            *sum = W::multiply_words(simd, simd.splat(input), value, *sum);
                        }
                    });
                }
            });
        }
        // SAFETY: the contract.
        at_each!(I, TILE, sum => unsafe { simd.store(sum, sums[I][TILE]) });
    }
}
