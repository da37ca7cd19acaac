//! `C = A^T B`, summed over the rows of A and B: the gradient to a filter or to the weight of a linear layer.
//!
//! A is read in place through a [`Gather`], as in [`super::gemm`]; here its runs lie along the rows of C. B is copied, a
//! slice of rows and some columns at a time, so that it stays near while the whole depth of A passes by. There
//! are far more rows than elements of C in a convolution's early layers and far fewer in its late ones, so the rows are
//! split into parts by their number, every part makes a C of its own, and the parts are added in order at the end: the
//! same bits however many threads there are.
//!
//! The sum is over rows, so that with bf16 a word must hold one value of each of two rows: both sides are interleaved, A too,
//! a tap and a piece of its run at a time. So is f32 copied where more than one panel of columns uses the copy.

use super::float::Float;
use super::gather::Gather;
use super::gemm::Ahead;
use super::simd::{Isa, Simd, Task, dispatch};
use crate::tensor::pool::Scratch;
use rayon::prelude::*;
use std::ops::Range;

/// Rows of B that are copied together, in words.
pub(super) const SLICE: usize = 128;
/// Columns of B that a task takes, one panel or more: A passes by once for all of them. With a slice's rows they are 32 KiB.
const COLUMNS: usize = 64;
/// Values of A's runs that are copied together, so that they stay in L1.
const PIECE: usize = 48;
/// Rows of the result that are transposed together.
const TRANSPOSED_ROWS: usize = 32;
/// Rows of A and B that make one part.
const PART: usize = 4096;
/// The runs are divided among tasks until there are this many.
const TASKS: usize = 8;
/// Rows of a micro-kernel's tile.
pub(super) const TILE_ROWS: usize = 6;
/// Words of a cache line.
const LINE: usize = 16;

/// How the result is stored.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// `[depth of A, columns of B]`.
    RowMajor,
    /// `[columns of B, depth of A]`, the order of filters.
    ColumnMajor,
}

/// `c = (rows of a through gather)^T b`; `b` is `[target rows of the gather, columns]`.
pub fn multiply_transposed<T: Float>(
    isa: Isa,
    a: &[T],
    gather: &Gather,
    b: &[T],
    columns: usize,
    c: &mut [f32],
    order: Order,
) {
    gather.check(a.len(), b.len() / columns.max(1));
    let depth = gather.depth();
    assert_eq!(c.len(), depth * columns, "the result has the depth of A times the columns of B");
    if c.is_empty() {
        return;
    }
    let (rows, ranges) = (gather.rows(), columns.div_ceil(COLUMNS));
    if rows == 0 {
        return c.fill(0.0);
    }
    let parts = rows.div_ceil(PART);
    let tap_groups = TASKS.div_ceil(parts * ranges).min(gather.taps.len());
    let taps_each = gather.taps.len().div_ceil(tap_groups);
    // [part][range of columns][depth][column]; the tasks of a range take consecutive taps, hence consecutive pieces of it.
    let mut partial = Scratch::<f32>::take(parts * ranges * depth * COLUMNS);
    partial
        .par_chunks_mut(depth * COLUMNS)
        .enumerate()
        .flat_map(|(i, range)| {
            range.par_chunks_mut(taps_each * gather.run * COLUMNS).enumerate().map(move |(group, out)| (i, group, out))
        })
        .for_each(|(i, group, out)| {
            let (part, range) = (i / ranges, i % ranges);
            let taps = group * taps_each..((group + 1) * taps_each).min(gather.taps.len());
            let rows = (part * PART).min(rows)..((part + 1) * PART).min(rows);
            let columns = range * COLUMNS..columns.min((range + 1) * COLUMNS);
            dispatch(isa, Part { a, gather, b, stride: b.len() / gather.target_rows(), rows, taps, columns, out });
        });
    reduce(&partial, parts, depth, columns, COLUMNS, c, order);
}

/// Adds the parts, `[part][panel][depth][width]`, in order and stores the sums.
pub(super) fn reduce(
    partial: &[f32],
    parts: usize,
    depth: usize,
    columns: usize,
    width: usize,
    c: &mut [f32],
    order: Order,
) {
    let panels = columns.div_ceil(width);
    let sum = |panel: usize, k: usize, out: &mut [f32]| {
        let at =
            |part: usize| &partial[((part * panels + panel) * depth + k) * width..][..out_len(columns, panel, width)];
        out.copy_from_slice(at(0));
        for part in 1..parts {
            out.iter_mut().zip(at(part)).for_each(|(out, x)| *out += x);
        }
    };
    match order {
        Order::RowMajor => c.par_chunks_mut(columns).enumerate().for_each(|(k, row)| {
            for (panel, out) in row.chunks_mut(width).enumerate() {
                sum(panel, k, out);
            }
        }),
        Order::ColumnMajor => c.par_chunks_mut(width * depth).enumerate().for_each(|(panel, out)| {
            let columns = out_len(columns, panel, width);
            // Transposed a few rows at a time, so that both sides stay in L1.
            let mut rows = vec![0.0; TRANSPOSED_ROWS * columns];
            for start in (0..depth).step_by(TRANSPOSED_ROWS) {
                let count = TRANSPOSED_ROWS.min(depth - start);
                for (k, row) in (start..start + count).zip(rows.chunks_exact_mut(columns)) {
                    sum(panel, k, row);
                }
                for column in 0..columns {
                    let out = &mut out[column * depth + start..][..count];
                    out.iter_mut().zip(rows[column..].iter().step_by(columns)).for_each(|(out, &x)| *out = x);
                }
            }
        }),
    }
}

fn out_len(columns: usize, panel: usize, width: usize) -> usize {
    width.min(columns - panel * width)
}

/// Some rows, some taps and some columns, at most [`COLUMNS`].
struct Part<'a, T> {
    a: &'a [T],
    gather: &'a Gather,
    b: &'a [T],
    stride: usize,
    rows: Range<usize>,
    taps: Range<usize>,
    columns: Range<usize>,
    /// `[taps * run, COLUMNS]`.
    out: &'a mut [f32],
}

impl<T: Float> Task for Part<'_, T> {
    type Output = ();
    const BF16: bool = T::PER_WORD > 1;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Part { a, gather, b, stride, rows, taps, columns, out } = self;
        let (run, width) = (gather.run, S::LANES * S::VECTORS);
        assert!(COLUMNS.is_multiple_of(width) && columns.len() <= COLUMNS && out.len() == taps.len() * run * COLUMNS);
        if rows.is_empty() {
            out.fill(0.0);
        }
        let rows_of_slice = SLICE * T::PER_WORD;
        // A padded tap reads zeros, and so does a row that fills the last word.
        let zeros = vec![T::default(); run];
        let sources = gather.runs(a, &zeros);
        let nothing = [T::default(); COLUMNS];
        // [panel][word][column of the panel]
        let panels = columns.len().div_ceil(width);
        let mut packed = Scratch::<T>::take(panels * rows_of_slice * width);
        let mut pointers = vec![zeros.as_slice(); taps.len() * rows_of_slice];
        // f32 may be read where it lies. But long runs are often a power of two apart, and the few values that a tile takes of each
        // displace one another from L1: where many panels share a copy it is faster.
        let in_place = T::PER_WORD == 1 && (run <= PIECE || panels == 1);
        let (piece, copied) = if in_place { (run, 0) } else { (PIECE, rows_of_slice * PIECE) };
        let mut interleaved = Scratch::<T>::take(copied);
        let mut words = Vec::with_capacity(SLICE);
        let mut targets = Vec::with_capacity(rows_of_slice);
        for start in rows.clone().step_by(rows_of_slice) {
            let slice = start..rows.end.min(start + rows_of_slice);
            let count = slice.len().next_multiple_of(T::PER_WORD);
            targets.clear();
            let (mut positions, mut position) = (gather.positions(slice.clone()), [0; 3]);
            for i in 0..count {
                let row = start + i;
                position = positions.next().unwrap_or(position);
                targets.push(gather.target_row(position));
                let runs = sources.at(position).skip(taps.start).take(taps.len());
                for (tap, run) in runs.enumerate() {
                    pointers[tap * rows_of_slice + i] = if slice.contains(&row) { run } else { &zeros };
                }
            }
            for (panel, packed) in packed.chunks_exact_mut(rows_of_slice * width).enumerate() {
                let columns = columns.start + panel * width..columns.end.min(columns.start + (panel + 1) * width);
                let row_of_b = |row: usize| match slice.contains(&row) {
                    true => &b[targets[row - start] * stride..][columns.clone()],
                    false => &nothing[..columns.len()],
                };
                for (word, packed) in packed.chunks_exact_mut(width * T::PER_WORD).take(count / T::PER_WORD).enumerate()
                {
                    let first = start + word * T::PER_WORD;
                    let (values, rest) = packed.split_at_mut(columns.len() * T::PER_WORD);
                    T::interleave(&[row_of_b(first), row_of_b(first + T::PER_WORD - 1)], values);
                    rest.fill(T::default());
                }
            }
            for (pointers, out) in pointers.chunks_exact(rows_of_slice).zip(out.chunks_exact_mut(run * COLUMNS)) {
                let first = start == rows.start;
                for begin in (0..run).step_by(piece) {
                    let piece = begin..run.min(begin + piece);
                    words.clear();
                    if in_place {
                        words.extend(pointers[..count].iter().map(|run| run.as_ptr().cast()));
                    } else {
                        let targets = interleaved.chunks_exact_mut(piece.len() * T::PER_WORD);
                        for (target, rows) in targets.zip(pointers[..count].chunks_exact(T::PER_WORD)) {
                            T::interleave(&[&rows[0][piece.clone()], &rows[T::PER_WORD - 1][piece.clone()]], target);
                            words.push(target.as_ptr().cast());
                        }
                    }
                    for (panel, packed) in packed.chunks_exact(rows_of_slice * width).enumerate() {
                        let out = &mut out[begin * COLUMNS + panel * width..];
                        multiply_runs(simd, &words, 0..piece.len(), 0, packed, first, out, COLUMNS, ());
                    }
                }
            }
        }
    }
}

/// `out [words, width] (+)= sum over rows of run x b`, for some words of the runs; `pitch` values from one row of `out` to the next. As
/// many rows of `b` are packed as there are runs. Words of each run are asked for before their turn, after the last those that lie `beyond`
/// its end; `ahead` is asked for with each run and each tile.
#[expect(clippy::too_many_arguments, reason = "a product's operands and how they lie")]
#[inline(always)]
pub(super) fn multiply_runs<S: Simd, T: Float>(
    simd: S,
    runs: &[*const f32],
    words: Range<usize>,
    beyond: usize,
    b: &[T],
    first: bool,
    out: &mut [f32],
    pitch: usize,
    mut ahead: impl Ahead,
) {
    let width = S::LANES * S::VECTORS;
    assert!(b.len() >= runs.len() * width * T::PER_WORD && pitch >= width);
    let mut tile = Tile::<T> { runs, next: 0, b: b.as_ptr().cast(), first, pitch, kind: std::marker::PhantomData };
    let mut channel = words.start;
    while channel < words.end {
        tile.next = channel + LINE + if channel + LINE < words.end { 0 } else { beyond };
        let out = &mut out[(channel - words.start) * pitch..];
        // SAFETY: runs are readable for these words, and the chosen tile ends within them; `b` and `out` have as many full
        // rows as the tile reads, and writes as it asserts.
        channel += unsafe {
            match words.end - channel {
                6.. => tile.compute::<S, 6>(simd, channel, out, &mut ahead),
                4.. => tile.compute::<S, 4>(simd, channel, out, &mut ahead),
                3 => tile.compute::<S, 3>(simd, channel, out, &mut ahead),
                2 => tile.compute::<S, 2>(simd, channel, out, &mut ahead),
                _ => tile.compute::<S, 1>(simd, channel, out, &mut ahead),
            }
        };
    }
}

/// A tile of C: consecutive elements of the runs by one panel, summed over a slice of rows.
struct Tile<'a, T> {
    runs: &'a [*const f32],
    /// The word of each run that is asked for.
    next: usize,
    b: *const f32,
    first: bool,
    pitch: usize,
    kind: std::marker::PhantomData<T>,
}

impl<T: Float> Tile<'_, T> {
    /// Computes `R` rows of C from element `channel` of the runs on, and returns `R`.
    ///
    /// # Safety
    /// As for [`Tile::micro_kernel`].
    #[inline(always)]
    unsafe fn compute<S: Simd, const R: usize>(
        &self,
        simd: S,
        channel: usize,
        out: &mut [f32],
        ahead: &mut impl Ahead,
    ) -> usize {
        const { assert!(R <= TILE_ROWS) };
        // SAFETY: passed on.
        unsafe {
            match S::VECTORS {
                2 => self.micro_kernel::<S, R, 2>(simd, channel, out, ahead),
                _ => self.micro_kernel::<S, R, 4>(simd, channel, out, ahead),
            }
        }
        R
    }

    /// # Safety
    /// Each run is readable for `channel + R` words of any alignment, `b` for a row of the tile's width for each run; `V` is
    /// `S::VECTORS`.
    #[inline(always)]
    unsafe fn micro_kernel<S: Simd, const R: usize, const V: usize>(
        &self,
        simd: S,
        channel: usize,
        out: &mut [f32],
        ahead: &mut impl Ahead,
    ) {
        let width = V * S::LANES;
        assert!(out.len() >= (R - 1) * self.pitch + width);
        let mut sums = [[simd.splat(0.0); V]; R];
        if !self.first {
            // What they are added to in the end has come by then.
            for r in 0..R {
                for v in 0..V {
                    simd.prefetch_near(out.as_ptr().wrapping_add(r * self.pitch + v * S::LANES));
                }
            }
        }
        // A copy, which stays in registers.
        let (mut b, mut asked) = (self.b, *ahead);
        for &run in self.runs {
            asked.ask(simd);
            // A tile takes a part of a line of each, and a later one what follows.
            simd.prefetch_near(run.wrapping_add(self.next));
            // SAFETY: the assertion above, and the contract.
            unsafe {
                let b_row: [S::V; V] = std::array::from_fn(|v| simd.load(b.add(v * S::LANES)));
                let a = run.add(channel);
                for (r, sums) in sums.iter_mut().enumerate() {
                    let a = simd.splat(a.add(r).read_unaligned());
                    for (sum, &b) in sums.iter_mut().zip(&b_row) {
                        *sum = T::multiply_words(simd, a, b, *sum);
                    }
                }
                b = b.add(width);
            }
        }
        *ahead = asked;
        // The sums are not moved into an iterator: that would pass them through memory.
        for (r, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                // SAFETY: as asserted, `out` has `V` vectors of `R` rows.
                unsafe {
                    let out = out.as_mut_ptr().add(r * self.pitch + v * S::LANES);
                    let sum = if self.first { *sum } else { simd.add(simd.load(out), *sum) };
                    simd.store(out, sum);
                }
            }
        }
    }
}
