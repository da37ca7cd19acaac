//! `C = B^T A` on tiles, summed over positions: the gradient to a filter.
//!
//! The tile's depth is the positions of outputs: on the left the gradients of output channels at 32 of them, and on the right those
//! pixels of the input, two by two, that a tap sees from there. The former are turned once; the latter are a plane
//! (`Arrangement`) whose neighbouring positions are paired, once beginning with an even and once with an odd one: then every tap is a
//! run of pairs. Either side comes with its even channels first, because that is how words of two rows are cheapest to make; the sums
//! are put in order while the tiles multiply the next ones.
//!
//! A task takes some output channels and some pictures. It turns their gradients and then, 32 input channels at a time,
//! pairs the input and multiplies: for each tap and 32 output channels over all positions, so that sums are stored once. Where its
//! operands would not fit L2 it takes the pictures in slices, or each of them in strips of rows.
//!
//! Of few channels the pixels under a row of the filter are one run of the plane: positions overlap, and a tap is a row.

use super::super::conv::OutputGradient;
use super::super::elementwise;
use super::super::float::{Float, split};
use super::super::gather::Gather;
use super::super::simd::{Isa, Simd, Task, dispatch};
use super::amx::{STEP, TILE, Tiles};
use super::planes::{AHEAD, Arrangement, NONE, Part, copy_step, merged_pixel};
use super::{HALF, Parts, multiply_parts, parts_of, slices};
use crate::tensor::pool::Scratch;
use half::bf16;
use rayon::prelude::*;
use std::marker::PhantomData;
use std::ops::Range;

/// Output channels of a task.
const COLUMNS: usize = 128;
/// A gradient is divided among at least so many tasks, if it has as many pictures.
const TASKS: usize = 4;
/// Bytes of a slice's operands: half of an L2 of 2 MiB.
const SLICE: usize = 1 << 20;

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
        let pictures = part * gather.images / parts..(part + 1) * gather.images / parts;
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
        // What a position takes: the gradients, and two versions of 32 channels.
        let position = (self.columns.len() + 2 * TILE) * count * size_of::<bf16>();
        let picture = position * self.arrangement.positions(&Part { pictures: 0..1, rows: 0..height });
        let pictures = self.pictures.len();
        let slices = pictures.div_ceil((SLICE / picture).clamp(1, pictures));
        let strips = if slices < pictures { 1 } else { picture.div_ceil(SLICE).min(height) };
        for (slice, strip) in (0..slices).flat_map(|slice| (0..strips).map(move |strip| (slice, strip))) {
            let of = |i: usize| self.pictures.start + i * pictures / slices;
            let pictures = of(slice)..of(slice + 1);
            let part = Part { pictures, rows: strip * height / strips..(strip + 1) * height / strips };
            let first = slice == 0 && strip == 0;
            match count {
                1 => self.slice::<S, 1>(simd, &part, first),
                _ => self.slice::<S, 2>(simd, &part, first),
            }
        }
    }
}

impl<U: Tiles, T: Float> Sum<'_, U, T> {
    #[inline(always)]
    fn slice<S: Simd, const PARTS: usize>(&mut self, simd: S, part: &Part, first: bool) {
        let (arrangement, taps) = (self.arrangement, self.taps);
        let positions = arrangement.positions(part).next_multiple_of(STEP);
        let turned = self.turn_gradients(simd, part, PARTS);
        let len = arrangement.chunk_len(part);
        let there = arrangement.positions_in(len);
        let pairs = there.div_ceil(2);
        // Pixels that are whole steps are paired where they are, others in planes.
        let directly = T::PER_WORD == 2 && arrangement.takes_whole_pixels();
        let mut planes: Parts = super::parts(PARTS, if directly { 0 } else { arrangement.planes() * len });
        let pixels = if directly { arrangement.pixels(part, there) } else { Vec::new() };
        // [part][plane][beginning with an even or an odd position][half][pair][channel][position of the pair]
        let mut paired: Parts = super::parts(PARTS, arrangement.planes() * 2 * pairs * 2 * TILE);
        let half = pairs * TILE;
        let right = |tap: usize| {
            let (plane, moved) = arrangement.tap(tap);
            // Steps begin at even positions.
            assert!(moved / 2 + positions / 2 <= pairs, "runs of pairs end inside the plane");
            (plane * 2 + moved % 2) * 2 * half + moved / 2 * TILE
        };
        let right: Vec<usize> = (0..taps).map(right).collect();
        let mut wanted = vec![[false; 2]; arrangement.planes()];
        for (plane, moved) in (0..taps).map(|tap| arrangement.tap(tap)) {
            wanted[plane][moved % 2] = true;
        }
        let mut tiles = U::new();
        // While a block is multiplied, the sums of the one before it are put in their places, some rows at each step.
        let mut blocks = [Block::default(), Block::default()];
        let [mut now, mut before] = blocks.each_mut();
        let (steps, mut unfinished) = (arrangement.steps_of_tap(), Unfinished::default());
        let rows = TILE.div_ceil(positions / STEP);
        let places =
            Places { first, row: taps * steps * TILE, columns: self.columns.len(), sums: self.sums.as_mut_ptr() };
        assert_eq!(self.sums.len(), places.columns * places.row);
        for chunk in 0..arrangement.steps_of_tap() {
            // In planes a run of more than a chunk goes on in the same one.
            let mut first = chunk * STEP;
            if !directly && chunk < arrangement.chunks() {
                arrangement.fill(simd, self.a, part, chunk..chunk + 1, &mut planes);
                first = 0;
            }
            if directly {
                let x: &[bf16] = bytemuck::cast_slice(self.a);
                let furthest = pixels.iter().filter(|&&pixel| pixel != NONE).max();
                assert!(furthest.is_none_or(|pixel| pixel + first + STEP <= x.len()), "pixels are inside");
                // SAFETY: as asserted, and there are as many pixels as positions.
                let pixel = |at: usize| match unsafe { *pixels.get_unchecked(at) } {
                    NONE => ZEROS.as_ptr(),
                    pixel => x.as_ptr().wrapping_add(pixel + first),
                };
                pair(simd, (there, AHEAD), |plane, at| pixel(plane * there + at), &mut paired[0], &wanted);
            } else {
                let width = arrangement.width();
                assert!((there - 1) * width + first + STEP <= len, "steps end in their plane");
                for (planes, paired) in planes.iter().zip(&mut paired) {
                    let pixel = |plane, at| planes.as_ptr().wrapping_add(plane * len + at * width + first);
                    pair(simd, (there, 0), pixel, paired, &wanted);
                }
            }
            let lefts: [*const bf16; PARTS] = std::array::from_fn(|part| turned[part].as_ptr());
            let rights: [*const bf16; PARTS] = std::array::from_fn(|part| paired[part].as_ptr());
            for (tap, &right) in right.iter().enumerate() {
                for group in 0..self.columns.len().div_ceil(TILE) {
                    // SAFETY: the left side's tiles lie one after the other in `turned`, those of the right side in `paired`, as
                    // asserted for each tap; the places of a block's sums are inside `self.sums`.
                    unsafe {
                        tiles.start(std::ptr::null(), 0);
                        for step in 0..positions / STEP {
                            let left = (2 * group * positions / STEP + step) * HALF * STEP;
                            let lower = left + positions * HALF;
                            let right = right + step * HALF * TILE;
                            let a = lefts.map(|part| [part.add(left), part.add(lower)]);
                            let b = rights.map(|part| [part.add(right), part.add(right + half)]);
                            multiply_parts(&mut tiles, a, STEP, b);
                            unfinished.finish(simd, before, &places, rows);
                        }
                        tiles.finish(now.0.as_mut_ptr().cast(), TILE);
                    }
                    std::mem::swap(&mut now, &mut before);
                    unfinished = Unfinished { row: 0, group, at: (tap * steps + chunk) * TILE };
                }
            }
        }
        // SAFETY: as above.
        unsafe { unfinished.finish(simd, before, &places, TILE) };
    }

    /// [`Sum::turn`] of the gradients of a part, which follow one another.
    #[inline(always)]
    fn turn_gradients<S: Simd>(&self, simd: S, part: &Part, count: usize) -> Parts {
        let ([height, columns], pictures) = (self.gather.grid, &part.pictures);
        let start = pictures.start * height + part.rows.start;
        let rows = start..start + (pictures.len() - 1) * height + part.rows.len();
        let row_len = columns * self.width;
        match self.b {
            OutputGradient::There(b) => {
                self.turn(simd, part, &b[rows.start * row_len..rows.end * row_len], start * columns, count)
            }
            OutputGradient::Made(make) => {
                let mut made = Scratch::take(rows.len() * row_len);
                make(rows, &mut made);
                self.turn(simd, part, &made, start * columns, count)
            }
        }
    }

    /// The gradients `b` of the columns, `[16 columns][32 positions][column][position]`, zero where there is no output; `before` positions
    /// come before them.
    #[inline(always)]
    fn turn<S: Simd>(&self, simd: S, part: &Part, b: &[T], before: usize, count: usize) -> Parts {
        let targets = self.arrangement.targets(part, before);
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

/// The sums of 32 columns and a step, the even ones first on either side.
#[derive(Default)]
#[repr(align(64))]
struct Block([[f32; TILE]; TILE]);

/// Where sums go.
struct Places {
    /// Whether they are the first, or are added to what is there.
    first: bool,
    columns: usize,
    /// Values from one column to the next.
    row: usize,
    sums: *mut f32,
}

/// Rows of a block, of a column each, that are not in their places.
struct Unfinished {
    row: usize,
    /// The block's 32 columns.
    group: usize,
    /// Where in its columns it begins.
    at: usize,
}

impl Default for Unfinished {
    fn default() -> Self {
        Unfinished { row: TILE, group: 0, at: 0 }
    }
}

impl Unfinished {
    /// Puts some rows in their places, as far as there are.
    ///
    /// # Safety
    /// The places are valid, and nobody else's.
    #[inline(always)]
    unsafe fn finish<S: Simd>(&mut self, simd: S, block: &Block, places: &Places, rows: usize) {
        let end = TILE.min(self.row + rows);
        for row in std::mem::replace(&mut self.row, end)..end {
            let column = self.group * TILE + row % HALF * 2 + row / HALF;
            if column >= places.columns {
                continue;
            }
            let (even, odd) = block.0[row].split_at(HALF);
            for i in (0..HALF).step_by(S::LANES) {
                // SAFETY: a vector from `i` on is in either half; the contract.
                unsafe {
                    let mut sums = simd.interleave(simd.load(even.as_ptr().add(i)), simd.load(odd.as_ptr().add(i)));
                    let to = places.sums.add(column * places.row + self.at + 2 * i);
                    if !places.first {
                        sums = [simd.add(simd.load(to), sums[0]), simd.add(simd.load(to.add(S::LANES)), sums[1])];
                    }
                    simd.store(to, sums[0]);
                    simd.store(to.add(S::LANES), sums[1]);
                }
            }
        }
    }
}

/// What padding holds.
static ZEROS: [bf16; STEP] = [bf16::ZERO; STEP];

/// Pairs of neighbouring positions of planes, of so many each; the 32 values of one are at `pixel(plane, position)`. `[plane][beginning
/// with an even or an odd position][even or odd channels][pair][channel][position of the pair]`; of the pairs of a plane those are made
/// that are `wanted`, beginning with an even or with an odd one.
#[inline(always)]
fn pair<S: Simd>(
    simd: S,
    (positions, ahead): (usize, usize),
    pixel: impl Fn(usize, usize) -> *const bf16,
    paired: &mut [bf16],
    wanted: &[[bool; 2]],
) {
    let pairs = positions.div_ceil(2);
    let version = 2 * pairs * TILE;
    assert!(positions > 0 && paired.len() >= wanted.len() * 2 * version);
    for (plane, (wanted, paired)) in wanted.iter().zip(paired.chunks_exact_mut(2 * version)).enumerate() {
        for j in 0..pairs {
            for at in [2 * j + ahead, 2 * j + ahead + 1].into_iter().filter(|_| ahead > 0) {
                simd.prefetch_near(pixel(plane, at.min(positions - 1)).cast());
            }
            // Past the end there is nothing that meets a gradient.
            let [first, second, third] =
                [2 * j, 2 * j + 1, 2 * j + 2].map(|position| pixel(plane, position.min(positions - 1)));
            // SAFETY: positions' values are there; a pair is inside its version.
            unsafe {
                let out = paired.as_mut_ptr().add(j * TILE);
                if wanted[0] {
                    pair_two(simd, first, second, out, pairs * TILE);
                }
                if wanted[1] {
                    pair_two(simd, second, third, out.add(version), pairs * TILE);
                }
            }
        }
    }
}

/// The words of two positions' values, of the even ones to `out` and of the odd ones `half` values further.
///
/// # Safety
/// So many values are there.
#[inline(always)]
unsafe fn pair_two<S: Simd>(simd: S, first: *const bf16, second: *const bf16, out: *mut bf16, half: usize) {
    for channel in (0..STEP).step_by(2 * S::LANES) {
        // SAFETY: the contract.
        unsafe {
            let words = simd.pair_rows(first.add(channel), second.add(channel));
            simd.store(out.add(channel).cast(), words[0]);
            simd.store(out.add(half + channel).cast(), words[1]);
        }
    }
}
