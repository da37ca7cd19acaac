//! The products of some words with the inputs of a few tiles, at a row of positions.

use super::super::parts::Part;
use super::super::points::*;
use super::super::strips::WORDS;
use super::super::transforms::*;
use super::{SLOTS, TILES, sums, together};
use crate::cpu::float::Float;
use crate::cpu::simd::Simd;
use std::mem::MaybeUninit;

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

pub(super) use at_value;

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
const CORNER_TILES: [[usize; 2]; TILES] = [[3, 4], [4, 4], [4, 3], [3, 3]];

/// Whether a part has the tiles [`CORNER_TILES`].
pub(super) fn are_corners(part: &Part) -> bool {
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

/// The taps of some words, transformed along the columns to a row and to the one at the opposite point: `[word][row][column]`, vectors. What
/// the first part of a row leaves for the second, and a row for the next, in L1.
#[repr(align(64))]
pub(super) struct Columns(MaybeUninit<[f32; WORDS * 2 * TAPS * LANES]>);

impl Columns {
    pub(super) fn new() -> Self {
        Columns(MaybeUninit::uninit())
    }

    pub(super) fn as_mut_ptr(&mut self) -> *mut f32 {
        self.0.as_mut_ptr().cast()
    }
}

/// Some words of input channels at a slot down.
pub(super) struct Product<W> {
    /// `[word][tap]`, vectors of words.
    pub taps: *const W,
    /// `[tile][slot across][word]`, words; what comes next follows.
    pub inputs: *const f32,
    pub words: usize,
    /// As in [`super::Vector`].
    pub group: usize,
    pub corners: bool,
    /// Of [`Columns`]; where this row is the second of two at opposite points, the first has been added before it.
    pub columns: *mut f32,
    /// `[position across][tile]`, vectors.
    pub sums: *mut f32,
    /// Whether there are no sums yet.
    pub first: bool,
}

impl<W: Float> Product<W> {
    /// Adds the products with row `ROW` of the filters' values.
    ///
    /// # Safety
    /// All pointers are valid for what they are said to point to, for a group of tiles, and there are no more than [`WORDS`] words.
    #[inline(always)]
    pub(super) unsafe fn add_row<S: Simd, const STRIDE: usize, const ROW: usize>(&self, simd: S) {
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

    /// Whether there are two parts with the same taps: those of a phase.
    const fn parts_share<S: Simd, const STRIDE: usize, const GROUP: usize>() -> bool {
        STRIDE == 1 && W::PER_WORD == 1 && Self::slots::<S, STRIDE, GROUP, 1>()[1] > 0
    }

    /// Whether a row is one of two that follow each other at opposite points: the first leaves the second's columns.
    const fn rows_share<const STRIDE: usize, const ROW: usize>() -> bool {
        let [first, second] = opposite_points::<Filter<W, STRIDE>, ROW>();
        STRIDE == 1 && W::PER_WORD == 1 && first + 1 == second
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
        let shared = const { Self::parts_share::<S, STRIDE, GROUP>() };
        let (of_two, second) = const {
            let of_two = Self::rows_share::<STRIDE, ROW>();
            (of_two, of_two && opposite_points::<Filter<W, STRIDE>, ROW>()[1] == ROW)
        };
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
                        // Into L2: L1 is full of the words that are here.
                        simd.prefetch(ahead.wrapping_add(LINE * tap_len).cast());
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
            let [room, opposite] = [0, 1].map(|row| self.columns.wrapping_add((word * 2 + row) * TAPS * S::LANES));
            let left = if second { opposite } else { room };
            unrolled!(COLUMN => {
                if COLUMN < TAPS && (second || PART == 1 && shared) {
                    // SAFETY: the contract; the row before or the first part has left it there.
                    columns[0][COLUMN] = unsafe { simd.load(left.add(COLUMN * S::LANES)) };
                } else if COLUMN < TAPS {
                    let mut column = [[simd.splat(0.0); MAX]; 2];
                    unrolled!(TAP => {
                        if TAP < TAPS {
                            // SAFETY: the contract.
                            let [low, high] = unsafe { W::load_words(simd, taps.add((TAP * TAPS + COLUMN) * tap_len)) };
                            column[0][TAP] = low;
                            column[1][TAP] = high;
                        }
                    });
                    if of_two {
                        let [this, other] = at_opposite_points::<Filter<W, STRIDE>, S, ROW>(simd, &column[0]);
                        columns[0][COLUMN] = this;
                        // SAFETY: the contract.
                        unsafe { simd.store(opposite.add(COLUMN * S::LANES), other) };
                    } else {
                        columns[0][COLUMN] = at_point::<Filter<W, STRIDE>, S, ROW>(simd, &column[0]);
                    }
                    if const { W::PER_WORD > 1 } {
                        columns[1][COLUMN] = at_point::<Filter<W, STRIDE>, S, ROW>(simd, &column[1]);
                    }
                    if shared {
                        // SAFETY: the contract.
                        unsafe { simd.store(room.add(COLUMN * S::LANES), columns[0][COLUMN]) };
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
