//! `C = B^T A` on tiles, summed over positions: the gradient to a filter.
//!
//! The tile's depth is the positions of outputs: on the left the gradients of output channels at 32 of them, and on the right those
//! pixels of the input, two by two, that a tap sees from there. The former are turned once; the latter are a plane
//! (`Arrangement`) whose neighbouring positions are paired, once beginning with an even and once with an odd one: then every tap is a
//! run of pairs. What is bf16, and the left side, comes with its even channels first, because that is how words of two rows are cheapest to
//! make; the sums are put in order while the tiles multiply the next ones.
//!
//! A task takes some output channels and some pictures. It turns their gradients and then, 32 input channels at a time,
//! pairs the input and multiplies: for each tap and 32 output channels over all positions, so that sums are stored once. Where its
//! operands would not fit L2 it takes the pictures in slices, or in strips of rows. An even number of pictures in turn needs the even pairs
//! alone, and steps that see nothing but padding are left out.
//!
//! Of few channels the pixels under a row of the filter are one run of the plane: positions overlap, and a tap is a row.

mod pairs;
mod places;

use super::super::conv::{Making, OutputGradient};
use super::super::elementwise;
use super::super::float::{Float, split};
use super::super::gather::Gather;
use super::super::parallel::piece;
use super::super::simd::{Isa, Simd, Task, dispatch};
use super::amx::{Again, STEP, TILE, Tiles};
use super::planes::{AHEAD, Arrangement, NONE, Part, copy_step, merged_pixel};
use super::{HALF, Parts, Sums, blocks, parts_of, slices};
use crate::tensor::pool::Scratch;
use half::bf16;
use pairs::{in_order, pair, zeros};
use places::{Places, Unfinished};
use rayon::prelude::*;
use std::marker::PhantomData;
use std::ops::Range;

/// Output channels of a task.
const COLUMNS: usize = 128;
/// A gradient is divided among at least so many tasks, if it has as many pictures.
const TASKS: usize = 4;
/// Bytes of a slice's operands: half of an L2 of 2 MiB.
const SLICE: usize = 1 << 20;
/// Pictures in turn, at least: fewer leave as many positions between rows.
const FEWEST_IN_TURN: usize = 4;
/// Strips of pictures in turn, at most, and rows of each, at least: those around a strip are paired for it, too.
const MOST_STRIPS: usize = 2;
const FEWEST_ROWS: usize = 5;

/// Most output channels whose gradients each task can make for itself: of more, several tasks take the same pictures.
pub const MADE_COLUMNS: usize = COLUMNS;

/// `c [columns of b, depth of a] = b^T (rows of a through gather)`, as [`super::super::gemm_transposed::multiply_transposed`]
/// in column-major order. With `kw`, the columns of the filter, the taps of each of its rows are taken together.
pub fn multiply_transposed<U: Tiles, T: Float>(
    isa: Isa,
    a: &[T],
    gather: &Gather,
    kw: Option<usize>,
    b: OutputGradient<T>,
    columns: usize,
    c: &mut [f32],
) {
    let depth = gather.depth();
    gather.check(a.len(), gather.rows());
    assert_eq!(gather.target, gather.grid, "every position is a row of B");
    if let OutputGradient::There(b) = b {
        assert_eq!(b.len(), gather.rows() * columns, "as many rows as positions");
    }
    assert_eq!(c.len(), depth * columns, "the result has the depth of A times the columns of B");
    if gather.rows() == 0 || c.is_empty() {
        return c.fill(0.0);
    }
    let arrangement = arrangement(gather, kw);
    let (taps, steps) = (gather.taps.len() / kw.unwrap_or(1), arrangement.steps_of_tap());
    let (ranges, row) = (columns.div_ceil(COLUMNS), taps * steps * TILE);
    let parts = TASKS.div_ceil(ranges).min(gather.images);
    // Sums of a part of the pictures are [column][tap][step of a tap][32], as they are in `c` where a tap is whole steps; they are of
    // the first part in place, and those of the others are added.
    let in_place = kw.is_none() && gather.run.is_multiple_of(STEP);
    let mut padded = (!in_place).then(|| Scratch::<f32>::take(columns * row));
    let sums = padded.as_deref_mut().unwrap_or(&mut *c);
    let mut others = Scratch::<f32>::take((parts - 1) * columns * row);
    let of_parts = std::iter::once(&mut *sums).chain(others.chunks_mut(columns * row));
    let tasks: Vec<_> = of_parts.flat_map(|sums| sums.chunks_mut(COLUMNS * row)).collect();
    tasks.into_par_iter().enumerate().for_each(|(task, sums)| {
        let (part, first) = (task / ranges, task % ranges * COLUMNS);
        let pictures = piece(part, parts, gather.images);
        let (columns, width, tiles) = (first..columns.min(first + COLUMNS), columns, PhantomData::<U>);
        dispatch(isa, Sum { a, gather, arrangement: &arrangement, taps, b, pictures, width, columns, sums, tiles });
    });
    for part in others.chunks_exact(columns * row) {
        elementwise::add_assign(sums, part);
    }
    if let Some(sums) = padded {
        // Pixels of a tap, and what each of them takes there and in the result.
        let (pixels, pixel) = (kw.unwrap_or(1), kw.map_or(gather.run, |_| merged_pixel(gather.run)));
        for (c, sums) in c.chunks_exact_mut(depth / taps).zip(sums.chunks_exact(steps * TILE)) {
            for (c, sums) in c.chunks_exact_mut(depth / taps / pixels).zip(sums.chunks(pixel)) {
                c.copy_from_slice(&sums[..c.len()]);
            }
        }
    }
}

fn arrangement(gather: &Gather, kw: Option<usize>) -> Arrangement {
    match kw {
        Some(kw) => Arrangement::of_rows(gather, kw).with_even_rows(),
        None => Arrangement::new(gather),
    }
}

/// The sums of some columns over some pictures, `[column][tap][step of a tap][32]`.
struct Sum<'a, U, T> {
    a: &'a [T],
    gather: &'a Gather,
    arrangement: &'a Arrangement,
    taps: usize,
    b: OutputGradient<'a, T>,
    pictures: Range<usize>,
    /// Columns of `b` in all.
    width: usize,
    columns: Range<usize>,
    sums: &'a mut [f32],
    tiles: PhantomData<U>,
}

impl<U: Tiles, T: Float> Task for Sum<'_, U, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let (count, [height, _]) = (parts_of::<T>(), self.gather.grid);
        let (slices, strips, in_turn) = self.shares(count);
        let (start, all) = (self.pictures.start, self.pictures.len());
        for (slice, strip) in (0..slices).flat_map(|slice| (0..strips).map(move |strip| (slice, strip))) {
            let pictures = piece(slice, slices, all);
            let pictures = start + pictures.start..start + pictures.end;
            let part = Part { pictures, rows: piece(strip, strips, height), in_turn };
            let first = slice == 0 && strip == 0;
            match count {
                1 => self.slice::<S, 1>(simd, &part, first),
                _ => self.slice::<S, 2>(simd, &part, first),
            }
        }
    }
}

impl<U: Tiles, T: Float> Sum<'_, U, T> {
    /// In how many slices the pictures are taken, and each of these in how many strips, for operands to fit; and whether pictures are taken in
    /// turn: then taps see even positions alone, and few positions are between rows.
    fn shares(&self, count: usize) -> (usize, usize, bool) {
        let ([height, _], pictures) = (self.gather.grid, self.pictures.len());
        // What a position takes: the gradients, and versions of 32 channels.
        let position = |versions: usize| (self.columns.len() + versions * TILE) * count * size_of::<bf16>();
        let bytes = |pictures: usize, in_turn: bool, versions: usize| {
            position(versions) * self.arrangement.positions(&Part { pictures: 0..pictures, rows: 0..height, in_turn })
        };
        // Gradients that are made are made of whole pictures.
        if self.arrangement.takes_whole_pixels() && matches!(self.b, OutputGradient::There(_)) {
            for slices in (1..=pictures / FEWEST_IN_TURN).filter(|&slices| pictures.is_multiple_of(2 * slices)) {
                let strips = bytes(pictures / slices, true, self.arrangement.planes()).div_ceil(SLICE);
                if strips == 1 || strips <= MOST_STRIPS && height >= FEWEST_ROWS * strips {
                    return (slices, strips, true);
                }
            }
        }
        let picture = bytes(1, false, 2);
        let slices = pictures.div_ceil((SLICE / picture).clamp(1, pictures));
        (slices, if slices < pictures { 1 } else { picture.div_ceil(SLICE).min(height) }, false)
    }

    #[inline(always)]
    fn slice<S: Simd, const PARTS: usize>(&mut self, simd: S, part: &Part, first: bool) {
        let (arrangement, taps) = (self.arrangement, self.taps);
        let depth = blocks::depth(arrangement, part);
        let turned = self.turn_gradients(simd, part, &depth, PARTS);
        let len = arrangement.chunk_len(part);
        let there = arrangement.positions_in(len);
        let pairs = there.div_ceil(2);
        // Where they are, if they are whole steps; others are in planes.
        let directly = arrangement.takes_whole_pixels();
        let mut planes: Parts = super::parts(PARTS, if directly { 0 } else { arrangement.planes() * len });
        let pixels = if directly { arrangement.pixels(part, there) } else { Vec::new() };
        let furthest = pixels.iter().filter(|&&pixel| pixel != NONE).max();
        assert!(furthest.is_none_or(|pixel| pixel + self.gather.run <= self.a.len()), "pixels are inside");
        // [part][plane][beginning with an even or an odd position][half][pair][channel][position of the pair]
        let mut paired: Parts = super::parts(PARTS, arrangement.planes() * 2 * pairs * 2 * TILE);
        let paired = &mut slices(&mut paired)[..];
        let half = pairs * TILE;
        let mut wanted = vec![[false; 2]; arrangement.planes()];
        // Of each tap where the right side begins, and the steps in which it sees something, with how much further they are.
        let right = |tap: usize| {
            let (plane, moved) = arrangement.tap(tap, part);
            wanted[plane][moved % 2] = true;
            let steps = depth.iter().enumerate().filter(|(_, positions)| positions.sees(tap));
            let steps: Vec<_> = steps.map(|(step, positions)| (step, positions.start / 2 * TILE)).collect();
            let furthest = steps.iter().map(|(_, further)| further / TILE).max().unwrap_or(0);
            assert!(moved / 2 + furthest + HALF <= pairs, "runs of pairs end inside the plane");
            ((plane * 2 + moved % 2) * 2 * half + moved / 2 * TILE, steps)
        };
        let right: Vec<_> = (0..taps).map(right).collect();
        let mut tiles = U::new();
        // While a block is multiplied, the sums of the one before it are put in their places, some rows at each step.
        let mut block = Sums::default();
        let (steps, mut unfinished) = (arrangement.steps_of_tap(), Unfinished::default());
        let fewest = right.iter().map(|(_, steps)| steps.len()).min().unwrap_or(0);
        let rows = TILE.div_ceil(fewest.max(1));
        let places = Places {
            first,
            in_order: directly && in_order::<T>(),
            row: taps * steps * TILE,
            columns: self.columns.len(),
            sums: self.sums.as_mut_ptr(),
        };
        assert_eq!(self.sums.len(), places.columns * places.row);
        for chunk in 0..arrangement.steps_of_tap() {
            if directly {
                // SAFETY: there are as many pixels as positions.
                let pixel = |plane, at| match unsafe { *pixels.get_unchecked(plane * there + at) } {
                    NONE => zeros::<T>(),
                    pixel => self.a.as_ptr().wrapping_add(pixel + chunk * STEP),
                };
                pair(simd, (there, AHEAD * part.together()), pixel, paired, &wanted);
            } else {
                // A run of more than a chunk goes on in the same planes.
                let mut channel = chunk * STEP;
                if chunk < arrangement.chunks() {
                    arrangement.fill(simd, self.a, part, chunk..chunk + 1, &mut planes);
                    channel = 0;
                }
                let width = arrangement.width();
                assert!((there - 1) * width + channel + STEP <= len, "steps end in their plane");
                for (planes, paired) in planes.iter().zip(paired.chunks_exact_mut(1)) {
                    let pixel = |plane, at| planes.as_ptr().wrapping_add(plane * len + at * width + channel);
                    pair(simd, (there, 0), pixel, paired, &wanted);
                }
            }
            let lefts: [*const bf16; PARTS] = std::array::from_fn(|part| turned[part].as_ptr());
            let rights: [*const bf16; PARTS] = std::array::from_fn(|part| paired[part].as_ptr());
            for (tap, (right, steps_of_tap)) in right.iter().enumerate() {
                for group in 0..self.columns.len().div_ceil(TILE) {
                    // SAFETY: the left side's tiles lie one after the other in `turned`, those of the right side in `paired`, as
                    // asserted for each tap; the places of a block's sums are inside `self.sums`.
                    unsafe {
                        tiles.start(std::ptr::null(), 0);
                        for &(step, further) in steps_of_tap {
                            let left = (2 * group * depth.len() + step) * HALF * STEP;
                            let lower = left + depth.len() * HALF * STEP;
                            let right = right + further;
                            let a = lefts.map(|part| [part.add(left), part.add(lower)]);
                            let b = rights.map(|part| [part.add(right), part.add(right + half)]);
                            tiles.multiply_parts(a, STEP, b, Again::Neither);
                            unfinished.finish(simd, &block, &places, rows);
                        }
                        // Where there are few steps.
                        unfinished.finish(simd, &block, &places, TILE);
                        tiles.finish(block.0.as_mut_ptr().cast(), TILE);
                    }
                    unfinished = Unfinished { row: 0, group, at: (tap * steps + chunk) * TILE };
                }
            }
        }
        // SAFETY: as above.
        unsafe { unfinished.finish(simd, &block, &places, TILE) };
    }

    /// [`Sum::turn`] of the gradients of a part, which follow one another.
    #[inline(always)]
    fn turn_gradients<S: Simd>(&self, simd: S, part: &Part, depth: &[blocks::Tile], count: usize) -> Parts {
        let ([height, columns], pictures) = (self.gather.grid, &part.pictures);
        let start = pictures.start * height + part.rows.start;
        let rows = start..start + (pictures.len() - 1) * height + part.rows.len();
        let row_len = columns * self.width;
        match self.b {
            OutputGradient::There(b) => {
                self.turn(simd, part, depth, &b[rows.start * row_len..rows.end * row_len], start * columns, count)
            }
            OutputGradient::Made(Making { make, .. }) => {
                let mut made = Scratch::take(rows.len() * row_len);
                make(rows, &mut made);
                self.turn(simd, part, depth, &made, start * columns, count)
            }
        }
    }

    /// The gradients `b` of the columns, `[16 columns][32 positions][column][position]`, zero where there is no output; `before` positions
    /// come before them.
    #[inline(always)]
    fn turn<S: Simd>(
        &self,
        simd: S,
        part: &Part,
        depth: &[blocks::Tile],
        b: &[T],
        before: usize,
        count: usize,
    ) -> Parts {
        let of_positions = self.arrangement.targets(part, before);
        let targets: Vec<usize> = depth.iter().flat_map(|tile| tile.targets(&of_positions, STEP)).collect();
        let (groups, steps) = (self.columns.len().div_ceil(TILE), targets.len() / STEP);
        let mut parts: Parts = super::parts(count, groups * 2 * HALF * targets.len());
        let turned = &mut slices(&mut parts)[..];
        // Two rows of each part, and the words of 16 pairs of them, of even and of odd columns.
        let mut rows = [[bf16::ZERO; 2 * TILE]; 2];
        let mut rows = rows.each_mut().map(|row| &mut row[..]);
        let rows = &mut rows[..count];
        let mut words = [[[0.0f32; HALF * HALF]; 2]; 2];
        for (step, positions) in targets.chunks_exact(STEP).enumerate() {
            for group in 0..groups {
                for (i, pair) in positions.chunks_exact(2).enumerate() {
                    self.gradients(simd, b, pair[0], group * TILE, 0, rows);
                    self.gradients(simd, b, pair[1], group * TILE, TILE, rows);
                    for (words, rows) in words.iter_mut().zip(&*rows) {
                        for j in (0..HALF).step_by(S::LANES) {
                            // SAFETY: twice as many values as lanes from `2 j` on lie in either row, and so many words in row `i`.
                            unsafe {
                                let row = rows.as_ptr().add(2 * j);
                                let [even, odd] = simd.pair_rows(row, row.add(TILE));
                                simd.store(words[0].as_mut_ptr().add(i * HALF + j), even);
                                simd.store(words[1].as_mut_ptr().add(i * HALF + j), odd);
                            }
                        }
                    }
                }
                for (words, turned) in words.iter().zip(&mut *turned) {
                    for (odd, words) in words.iter().enumerate() {
                        let to = &mut turned[((2 * group + odd) * steps + step) * HALF * STEP..][..HALF * STEP];
                        // SAFETY: 16 rows of 16 words on either side.
                        unsafe { super::transpose(simd, words.as_ptr(), HALF, to.as_mut_ptr().cast()) };
                    }
                }
            }
        }
        parts
    }

    /// The gradients of a pixel of the target for 32 of the columns from `first` on, to `rows[..][at..]`.
    #[inline(always)]
    fn gradients<S: Simd>(&self, simd: S, b: &[T], target: usize, first: usize, at: usize, rows: &mut [&mut [bf16]]) {
        if target == NONE {
            return rows.iter_mut().for_each(|row| row[at..at + TILE].fill(bf16::ZERO));
        }
        let start = target * self.width + self.columns.start;
        simd.prefetch_near(b.as_ptr().wrapping_add(start + first + AHEAD * self.width).cast());
        let row = &b[start..][..self.columns.len()];
        let row = &row[first..row.len().min(first + TILE)];
        if let Ok(row) = <&[T; TILE]>::try_from(row) {
            copy_step(simd, row, at, rows);
        } else {
            split(simd, row, at, rows);
            rows.iter_mut().for_each(|part| part[at + row.len()..at + TILE].fill(bf16::ZERO));
        }
    }
}
