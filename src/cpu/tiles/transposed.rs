//! `C = B^T A` on tiles, summed over positions: the gradient to a filter.
//!
//! The tile's depth is the positions of outputs: on the left the gradients of output channels at 32 of them, and on the right those
//! pixels of the input, two by two, that a tap sees from there. The former are turned once; the latter are a plane
//! (`Arrangement`) whose neighbouring positions are paired, once beginning with an even and once with an odd one: then every tap is a
//! run of pairs. Either side comes with its even channels first, because that is how words of two rows are cheapest to make; the sums
//! are put in order when they are added up.
//!
//! A task takes some output channels and some pictures. It turns their gradients and then, 32 input channels at a time,
//! pairs the input and multiplies: for each tap and 32 output channels over all positions, so that sums are stored once. Where its
//! operands would not fit L2 it takes the pictures in slices, or each of them in strips of rows.
//!
//! Of few channels the pixels under a row of the filter are one run of the plane: positions overlap, and a tap is a row.

use super::super::conv::OutputGradient;
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
/// Values of a tile of sums.
const SUMS: usize = TILE * TILE;
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
    // Pixels of a run, and what each of them takes there and in the result.
    let (taps, pixels) = (gather.taps.len() / kw.unwrap_or(1), kw.unwrap_or(1));
    let pixel = kw.map_or(gather.run, |_| merged_pixel(gather.run));
    let (ranges, chunks) = (columns.div_ceil(COLUMNS), arrangement.steps_of_tap());
    let parts = TASKS.div_ceil(ranges).min(gather.images);
    // [part][range of columns][chunk of the run][tap][32 columns] of tiles of sums, the last range as long as the others.
    let groups = columns.min(COLUMNS).div_ceil(TILE);
    let task_len = chunks * taps * groups * SUMS;
    let mut partial = Scratch::<f32>::take(parts * ranges * task_len);
    partial.par_chunks_mut(task_len).enumerate().for_each(|(task, sums)| {
        let (part, first) = (task / ranges, task % ranges * COLUMNS);
        let pictures = part * gather.images / parts..(part + 1) * gather.images / parts;
        let (columns, width, tiles) = (first..columns.min(first + COLUMNS), columns, PhantomData::<U>);
        dispatch(isa, Sum { a, gather, arrangement: &arrangement, taps, b, pictures, width, columns, sums, tiles });
    });
    c.par_chunks_mut(depth).enumerate().for_each(|(column, c)| {
        let (range, group, row) = (column / COLUMNS, column % COLUMNS / TILE, in_order(column % TILE));
        let mut run = vec![0.0; chunks * TILE];
        for (tap, c) in c.chunks_exact_mut(depth / taps).enumerate() {
            for (chunk, sum) in run.as_chunks_mut::<TILE>().0.iter_mut().enumerate() {
                let tile = ((range * chunks + chunk) * taps + tap) * groups + group;
                *sum = [0.0; TILE];
                for part in partial.chunks_exact(ranges * task_len) {
                    let (even, odd) = part[tile * SUMS + row * TILE..][..TILE].split_at(HALF);
                    for ((sum, even), odd) in sum.as_chunks_mut::<2>().0.iter_mut().zip(even).zip(odd) {
                        *sum = [sum[0] + even, sum[1] + odd];
                    }
                }
            }
            for (c, run) in c.chunks_exact_mut(depth / taps / pixels).zip(run.chunks(pixel)) {
                c.copy_from_slice(&run[..c.len()]);
            }
        }
    });
}

fn arrangement(gather: &Gather, kw: Option<usize>) -> Arrangement {
    match kw {
        Some(kw) => Arrangement::of_rows(gather, kw).with_even_rows(),
        None => Arrangement::new(gather),
    }
}

/// Where the sums of a row or column of 32 are: the even ones first.
fn in_order(i: usize) -> usize {
    i / 2 + i % 2 * HALF
}

/// The sums of some columns over some pictures, `[step of a tap][tap][32 columns]` of tiles.
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
        let mut planes: Parts = super::parts(PARTS, arrangement.planes() * len);
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
        let mut versions: Vec<usize> =
            (0..taps).map(|tap| arrangement.tap(tap)).map(|(p, moved)| 2 * p + moved % 2).collect();
        versions.sort_unstable();
        versions.dedup();
        let mut tiles = U::new();
        // The last range may have fewer.
        let groups = self.sums.len() / (arrangement.steps_of_tap() * taps * SUMS);
        for chunk in 0..arrangement.steps_of_tap() {
            let mut from = 0;
            if chunk < arrangement.chunks() {
                arrangement.fill(simd, self.a, part, chunk..chunk + 1, &mut planes);
            } else {
                // The run goes on in the same plane.
                from = chunk * STEP;
            }
            pair(simd, &planes, &mut paired, [len, from, arrangement.width(), there], &versions);
            let lefts: [*const bf16; PARTS] = std::array::from_fn(|part| turned[part].as_ptr());
            let rights: [*const bf16; PARTS] = std::array::from_fn(|part| paired[part].as_ptr());
            for (tap, &right) in right.iter().enumerate() {
                for group in 0..self.columns.len().div_ceil(TILE) {
                    let sums = &mut self.sums[((chunk * taps + tap) * groups + group) * SUMS..][..SUMS];
                    // SAFETY: a tile of sums is there; the left side's tiles lie one after the other in `turned`, those of the right side
                    // in `paired`, as asserted for each tap.
                    unsafe {
                        tiles.start(if first { std::ptr::null() } else { sums.as_ptr() }, TILE);
                        for step in 0..positions / STEP {
                            let left = (2 * group * positions / STEP + step) * HALF * STEP;
                            let lower = left + positions * HALF;
                            let right = right + step * HALF * TILE;
                            let a = lefts.map(|part| [part.add(left), part.add(lower)]);
                            let b = rights.map(|part| [part.add(right), part.add(right + half)]);
                            multiply_parts(&mut tiles, a, STEP, b);
                        }
                        tiles.finish(sums.as_mut_ptr(), TILE);
                    }
                }
            }
        }
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

/// Pairs of neighbouring positions of planes of `len` values, `width` from one of their `positions` to the next, and of each 32 values from
/// `from` on: `[plane][beginning with an even or an odd one][even or odd channels][pair][channel][position of the pair]`. Of the first two
/// only `versions` are made.
#[inline(always)]
fn pair<S: Simd>(
    simd: S,
    planes: &Parts,
    paired: &mut Parts,
    [len, from, width, positions]: [usize; 4],
    versions: &[usize],
) {
    let pairs = positions.div_ceil(2);
    assert!((positions - 1) * width + from + STEP <= len);
    for (plane, paired) in planes.iter().zip(paired) {
        for &version in versions {
            let (i, odd) = (version / 2, version % 2);
            assert!(plane.len() >= (i + 1) * len && paired.len() >= (version + 1) * 2 * pairs * TILE);
            let (from, out) = (plane[i * len + from..].as_ptr(), paired[version * 2 * pairs * TILE..].as_mut_ptr());
            for j in 0..pairs {
                // Past the end there is nothing that meets a gradient.
                let [first, second] = [2 * j + odd, 2 * j + odd + 1].map(|position| position.min(positions - 1));
                for channel in (0..STEP).step_by(2 * S::LANES) {
                    // SAFETY: positions that are read are inside the plane, and the pair inside its version, as asserted.
                    unsafe {
                        let from = from.add(channel);
                        let words = simd.pair_rows(from.add(first * width), from.add(second * width));
                        let out = out.add(j * TILE + channel);
                        simd.store(out.cast(), words[0]);
                        simd.store(out.add(pairs * TILE).cast(), words[1]);
                    }
                }
            }
        }
    }
}
