//! Winograd's algorithm for a few tiles of many channels: the last layers of one picture.
//!
//! What [`super::strips`] does, bit by bit, but transformed filters are never stored. Where a few tiles share a filter, passing
//! its values, 36 or 81, through L2 takes longer than the products. So a task takes one vector of output channels and one row of
//! positions at a time. For one word of input channels after the other it transforms the filters, in registers, to the values of that
//! row, and multiplies each with the inputs of all tiles. Taps, which stay in L1, are read for each row; their transform along the columns is
//! shared by two rows at opposite points and by two parts of a row, through L1: more of it would take more stores.

mod product;

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
use product::{Columns, Product, are_corners, at_value};
use std::marker::PhantomData;
use std::ops::Range;

/// Tiles whose sums at a row of positions, or at half of a long one, fill the registers.
const TILES: usize = 4;

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
    let starts = &Starts::new(across, |[i, j]| (i * across + j) * TILES * isa.lanes());
    for_each(o / isa.lanes(), |vector| {
        let sums = &dispatch(isa, Vector::<W, STRIDE> { inputs, layout, filter, vector, tiles, group, corners });
        let of_group = sums.len() / tiles.div_ceil(group);
        for tile in 0..tiles {
            let sums = &sums[tile / group * of_group + tile % group * isa.lanes()..];
            let channels = vector * isa.lanes()..(vector + 1) * isa.lanes();
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
    /// As [`are_corners`] says.
    corners: bool,
}

impl<W: Float, const STRIDE: usize> Task for Vector<'_, W, STRIDE> {
    type Output = Scratch<f32>;
    const BF16: bool = W::PER_WORD > 1;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Scratch<f32> {
        let words = self.filter.c / W::PER_WORD;
        let mut sums = Scratch::<f32>::take(self.tiles.div_ceil(self.group) * Self::sums_of_group::<S>());
        let mut columns = Columns::new();
        for start in (0..words).step_by(together(STRIDE)) {
            let words = start..words.min(start + together(STRIDE));
            self.multiply(simd, words, &mut columns, &mut sums);
        }
        sums
    }
}

impl<W: Float, const STRIDE: usize> Vector<'_, W, STRIDE> {
    /// Values of the sums of a group of tiles at a position down, and at all of them.
    const fn sums_of_row<S: Simd>() -> usize {
        positions(axis::<W>(STRIDE), axis::<W>(STRIDE).outputs) * TILES * S::LANES
    }

    const fn sums_of_group<S: Simd>() -> usize {
        positions(axis::<W>(STRIDE), axis::<W>(STRIDE).outputs) * Self::sums_of_row::<S>()
    }

    /// Adds the products of some words of channels, `sums` being those of all groups of tiles. A row of so few words takes some hundred cycles:
    /// what is the same for all is found before the first.
    #[inline(always)]
    fn multiply<S: Simd>(&self, simd: S, words: Range<usize>, columns: &mut Columns, sums: &mut [f32]) {
        let (groups, tiles) = (self.tiles.div_ceil(self.group), self.layout.tile * self.group);
        let word_len = TAPS * TAPS * S::LANES * W::PER_WORD;
        let taps = &self.filter.taps[self.filter.start(self.vector, words.start)..][..words.len() * word_len];
        let block = &self.inputs[words.start / together(STRIDE) * self.layout.block..][..self.layout.block];
        assert!(
            groups * tiles <= self.layout.row && const { slots(axis::<W>(STRIDE)) } * self.layout.row <= block.len()
        );
        assert!(groups * Self::sums_of_group::<S>() <= sums.len());
        unrolled!(SLOT => {
            if const { SLOT < slots(axis::<W>(STRIDE)) } {
                let position = const { position_of(axis::<W>(STRIDE), SLOT) };
                for group in 0..groups {
                    let at = group * Self::sums_of_group::<S>() + position * Self::sums_of_row::<S>();
                    let product = Product {
                        taps: taps.as_ptr(),
                        inputs: block.as_ptr().wrapping_add(SLOT * self.layout.row + group * tiles).cast(),
                        words: words.len(),
                        group: self.group,
                        corners: self.corners,
                        columns: columns.as_mut_ptr(),
                        sums: sums.as_mut_ptr().wrapping_add(at),
                        first: words.start == 0 && position == SLOT,
                    };
                    at_value!(const { value_of::<W>(STRIDE, SLOT) }, ROW => {
                        // SAFETY: there are as many taps, inputs and sums, as asserted; slots follow each other.
                        unsafe { product.add_row::<S, STRIDE, ROW>(simd) };
                    });
                }
            }
        });
    }
}
