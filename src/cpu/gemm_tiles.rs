//! The products of [`super::gemm`] and [`super::gemm_transposed`] on tiles: `C = A B` and `C = B^T A`, A through a [`Gather`].
//!
//! Tiles multiply bf16 alone. An f32 is the sum of two bf16 and a rest of 2^-18 of it, or of three and nothing. The products of
//! two such sums that matter are three, with an error of some 2^-18, or six, with that of f32 (Henry, Tang and Heinecke,
//! "Leveraging the bfloat16 artificial intelligence datatype for higher-precision computations", 2019). [`Splitting`] says
//! which. What is packed is packed in so many parts; values that are bf16 have one.
//!
//! Blocking: a block of rows and depth of A is packed, `ROWS` by `DEPTH`, which is an eighth of a 2 MiB L2 for each part; for
//! each panel of 32 columns the panel's piece of B, 32 KiB, stays in L1 while the rows of the block pass by. Sums over the blocks
//! of depth before lie in a buffer of f32. These sizes follow from counting bytes.

use super::amx::{STEP, TILE, Tiles};
use super::float::{Float, split};
use super::gather::{Gather, PADDING};
use super::gemm::{Epilogue, Output, finish_row};
use super::simd::{Isa, Simd, Task, dispatch};
use crate::tensor::pool::Scratch;
use half::bf16;
use rayon::prelude::*;
use std::ops::Range;

/// Rows of A in a block.
const ROWS: usize = 256;
/// Values of the depth in a block.
const DEPTH: usize = 512;
/// Rows of A and B that make one part of a sum over rows.
const PART: usize = 4096;
/// A sum over rows is divided among at least so many tasks, if it has as many taps.
const TASKS: usize = 4;
/// Words along either side of what is transposed at once.
const SQUARE: usize = 16;

/// How many bf16 stand for an f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Splitting {
    /// Two: three products.
    Two,
    /// Three: six products, as exact as f32.
    Three,
}

impl Splitting {
    fn parts<T: Float>(self) -> usize {
        match self {
            _ if T::PER_WORD == 2 => 1,
            Splitting::Two => 2,
            Splitting::Three => 3,
        }
    }
}

/// What is packed, from the most significant part on.
type Parts = Vec<Scratch<bf16>>;

fn parts(count: usize, len: usize) -> Parts {
    (0..count).map(|_| Scratch::take(len)).collect()
}

/// Which part of one side is multiplied with which of the other: the smallest products first.
fn products(parts: usize) -> &'static [[usize; 2]] {
    match parts {
        1 => &[[0, 0]],
        2 => &[[0, 1], [1, 0], [0, 0]],
        _ => &[[1, 1], [0, 2], [2, 0], [0, 1], [1, 0], [0, 0]],
    }
}

/// The right side of a product: for each part `[panel of 32 columns][pair of rows][column][row of the pair]`, zero-padded.
pub struct TileFilter {
    parts: Parts,
    depth: usize,
    columns: usize,
}

impl TileFilter {
    /// From rows of `columns` contiguous values; row `k` begins at `start(k)` in `b`.
    pub fn from_rows<T: Float>(
        isa: Isa,
        b: &[f32],
        depth: usize,
        columns: usize,
        splitting: Splitting,
        start: impl Fn(usize) -> usize + Sync,
    ) -> Self {
        let padded = depth.next_multiple_of(STEP);
        let mut parts = parts(splitting.parts::<T>(), columns.div_ceil(TILE) * padded * TILE);
        let out: Vec<_> = parts.iter_mut().map(|part| Output::new(part)).collect();
        (0..padded / 2).into_par_iter().for_each(|pair| {
            let mut rows = [0, 1].map(|_| Self::room(out.len(), columns));
            for (row, k) in rows.iter_mut().zip([2 * pair, 2 * pair + 1]) {
                let values = if k < depth { &b[start(k)..][..columns] } else { &[] };
                dispatch(isa, SplitRow { values, parts: row });
            }
            for (i, out) in out.iter().enumerate() {
                for panel in 0..columns.div_ceil(TILE) {
                    // SAFETY: this pair of rows is this task's alone, in every panel.
                    let words = unsafe {
                        let at = (panel * padded / 2 + pair) * 2 * TILE;
                        std::slice::from_raw_parts_mut(out.pointer().add(at), 2 * TILE)
                    };
                    bf16::interleave(&rows.each_ref().map(|row| &row[i][panel * TILE..][..TILE]), words);
                }
            }
        });
        drop(out);
        TileFilter { parts, depth, columns }
    }

    /// From the columns one after the other, `[columns, depth]`.
    pub fn from_columns<T: Float>(isa: Isa, b: &[f32], depth: usize, columns: usize, splitting: Splitting) -> Self {
        assert_eq!(b.len(), depth * columns);
        let padded = depth.next_multiple_of(STEP);
        let mut parts = parts(splitting.parts::<T>(), columns.div_ceil(TILE) * padded * TILE);
        let out: Vec<_> = parts.iter_mut().map(|part| Output::new(part)).collect();
        (0..columns.next_multiple_of(TILE)).into_par_iter().for_each(|column| {
            let mut split = Self::room(out.len(), depth);
            let values = if column < columns { &b[column * depth..][..depth] } else { &[] };
            dispatch(isa, SplitRow { values, parts: &mut split });
            for (out, part) in out.iter().zip(&split) {
                let first = column / TILE * padded * TILE + column % TILE * 2;
                for (pair, values) in part[..padded].chunks_exact(2).enumerate() {
                    // SAFETY: this column is this task's alone.
                    unsafe {
                        out.pointer().add(first + pair * 2 * TILE).cast::<[bf16; 2]>().write([values[0], values[1]])
                    };
                }
            }
        });
        drop(out);
        TileFilter { parts, depth, columns }
    }

    /// For the parts of a row, padded.
    fn room(count: usize, len: usize) -> Parts {
        parts(count, len.next_multiple_of(TILE))
    }
}

/// `values` split into `parts`, which end in zeros.
struct SplitRow<'a> {
    values: &'a [f32],
    parts: &'a mut Parts,
}

impl Task for SplitRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        split(simd, self.values, 0, self.parts);
        self.parts.iter_mut().for_each(|part| part[self.values.len()..].fill(bf16::ZERO));
    }
}

/// `target rows of c = epilogue(rows of a through gather, times b)`, as [`super::gemm::multiply`].
pub fn multiply<U: Tiles, T: Float>(
    isa: Isa,
    a: &[T],
    gather: &Gather,
    b: &TileFilter,
    c: &mut [T],
    epilogue: Epilogue<T>,
) {
    gather.check(a.len(), c.len() / b.columns.max(1));
    assert_eq!(gather.depth(), b.depth, "inner extents agree");
    epilogue.check(b.columns, c.len());
    let rows = gather.rows();
    let out = Output::new(c);
    (0..rows.div_ceil(ROWS)).into_par_iter().for_each(|block| {
        let rows = block * ROWS..rows.min((block + 1) * ROWS);
        let sums = block_sums::<U, T>(isa, a, gather, b, rows.clone());
        let width = b.columns.next_multiple_of(TILE);
        for (row, sums) in rows.zip(sums.chunks_exact(width)) {
            // SAFETY: rows of the target are this task's alone; the gather's targets lie inside `c`.
            unsafe { finish_row(isa, &sums[..b.columns], &out, gather.target_row(row) * b.columns, epilogue) };
        }
    });
}

/// The product of some rows, `[rows, columns]`, both padded to whole tiles.
fn block_sums<U: Tiles, T: Float>(
    isa: Isa,
    a: &[T],
    gather: &Gather,
    b: &TileFilter,
    rows: Range<usize>,
) -> Scratch<f32> {
    let groups = rows.len().div_ceil(TILE);
    let (width, padded_depth) = (b.columns.next_multiple_of(TILE), b.depth.next_multiple_of(STEP));
    let mut sums = Scratch::<f32>::take(groups * TILE * width);
    let mut packed = parts(b.parts.len(), groups * TILE * DEPTH);
    let offsets: Vec<usize> = rows.flat_map(|row| gather.offsets(row)).collect();
    let mut tiles = U::new();
    for start in (0..padded_depth).step_by(DEPTH) {
        let depth = start..padded_depth.min(start + DEPTH);
        let (packed, rows) = (&mut packed, groups * TILE);
        dispatch(isa, PackRows { a, gather, offsets: &offsets, depth: depth.clone(), rows, packed });
        for panel in 0..width / TILE {
            for group in 0..groups {
                let target = &mut sums[group * TILE * width + panel * TILE..];
                let left = |part: usize| &packed[part][group * TILE * DEPTH..][..TILE * DEPTH];
                let right = |part: usize| &b.parts[part][(panel * padded_depth + start) * TILE..][..depth.len() * TILE];
                let operands = products(b.parts.len()).iter().map(|&[a, b]| (left(a), right(b)));
                tile_product(&mut tiles, operands, depth.len(), start == 0, target, width);
            }
        }
    }
    sums
}

/// Adds the products of `[TILE, DEPTH]` and `[depth / 2, TILE, 2]` to `sums`, or sets them if they are the first.
#[inline(always)]
fn tile_product<'a, U: Tiles>(
    tiles: &mut U,
    operands: impl Iterator<Item = (&'a [bf16], &'a [bf16])>,
    depth: usize,
    first: bool,
    sums: &mut [f32],
    stride: usize,
) {
    assert!(sums.len() >= (TILE - 1) * stride + TILE && depth <= DEPTH && depth.is_multiple_of(STEP));
    // SAFETY: `sums` holds a tile, and the operands the steps that are taken, as asserted here and below.
    unsafe {
        tiles.start(if first { std::ptr::null() } else { sums.as_ptr() }, stride);
        for (a, b) in operands {
            assert!(a.len() >= TILE * DEPTH && b.len() >= depth * TILE);
            for step in (0..depth).step_by(STEP) {
                tiles.multiply(a.as_ptr().add(step), DEPTH, b.as_ptr().add(step * TILE), 2 * TILE);
            }
        }
        tiles.finish(sums.as_mut_ptr(), stride);
    }
}

/// Some of the depth of rows of A to `[row][DEPTH]`, with zeros where there is nothing. `offsets` are `[row][tap]`.
struct PackRows<'a, T> {
    a: &'a [T],
    gather: &'a Gather,
    offsets: &'a [usize],
    depth: Range<usize>,
    /// Padded.
    rows: usize,
    packed: &'a mut Parts,
}

impl<T: Float> Task for PackRows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let PackRows { a, gather, offsets, depth, rows, packed } = self;
        let (taps, run) = (gather.taps.len(), gather.run);
        for row in 0..rows {
            let offsets = offsets.get(row * taps..(row + 1) * taps).unwrap_or_default();
            let mut at = depth.start;
            while at < depth.end {
                // One tap's values, or zeros up to the end.
                let (tap, within) = (at / run, at % run);
                let count = if tap < offsets.len() { (run - within).min(depth.end - at) } else { depth.end - at };
                let place = row * DEPTH + at - depth.start;
                match offsets.get(tap) {
                    Some(&offset) if offset != PADDING => split(simd, &a[offset + within..][..count], place, packed),
                    _ => packed.iter_mut().for_each(|part| part[place..place + count].fill(bf16::ZERO)),
                }
                at += count;
            }
        }
    }
}

/// `c [columns of b, depth of a] = b^T (rows of a through gather)`, as [`super::gemm_transposed::multiply_transposed`] in
/// column-major order.
pub fn multiply_transposed<U: Tiles, T: Float>(
    isa: Isa,
    a: &[T],
    gather: &Gather,
    b: &[T],
    columns: usize,
    c: &mut [f32],
) {
    gather.check(a.len(), b.len() / columns.max(1));
    let (taps, run) = (gather.taps.len(), gather.run);
    assert_eq!(c.len(), taps * run * columns, "the result has the depth of A times the columns of B");
    let rows = gather.rows();
    let parts = rows.div_ceil(PART).max(1);
    let each = taps.div_ceil(TASKS.div_ceil(parts).min(taps));
    // [part][tap][column of B, padded][value of the run, padded]
    let (padded_columns, padded_run) = (columns.next_multiple_of(TILE), run.next_multiple_of(TILE));
    let tap_len = padded_columns * padded_run;
    let mut partial = Scratch::<f32>::take(parts * taps * tap_len);
    let tasks: Vec<(usize, usize, &mut [f32])> = partial
        .chunks_exact_mut(taps * tap_len)
        .enumerate()
        .flat_map(|(part, out)| {
            out.chunks_mut(each * tap_len).enumerate().map(move |(group, out)| (part, group * each, out))
        })
        .collect();
    tasks.into_par_iter().for_each(|(part, first_tap, out)| {
        let (rows, taps) = (part * PART..rows.min((part + 1) * PART), first_tap..first_tap + out.len() / tap_len);
        sum_rows::<U, T>(isa, a, gather, b, columns, rows, taps, out);
    });
    c.par_chunks_mut(taps * run).enumerate().for_each(|(column, c)| {
        for (tap, c) in c.chunks_exact_mut(run).enumerate() {
            let at = |part: usize| &partial[((part * taps + tap) * padded_columns + column) * padded_run..][..run];
            c.copy_from_slice(at(0));
            for part in 1..parts {
                c.iter_mut().zip(at(part)).for_each(|(c, x)| *c += x);
            }
        }
    });
}

/// The sum over some rows for some taps, `[tap][column][value]`, both padded.
#[allow(clippy::too_many_arguments)]
fn sum_rows<U: Tiles, T: Float>(
    isa: Isa,
    a: &[T],
    gather: &Gather,
    b: &[T],
    columns: usize,
    rows: Range<usize>,
    taps: Range<usize>,
    out: &mut [f32],
) {
    let (padded_columns, padded_run) = (columns.next_multiple_of(TILE), gather.run.next_multiple_of(TILE));
    if rows.is_empty() {
        out.fill(0.0);
    }
    let count = Splitting::Two.parts::<T>();
    // Pairs of rows side by side, of B and, a tap at a time, of A; and B turned, [column][row].
    let (mut pairs, mut turned) = (parts(count, DEPTH * padded_columns), parts(count, padded_columns * DEPTH));
    let mut paired = parts(count, DEPTH * padded_run);
    let mut tiles = U::new();
    for start in rows.clone().step_by(DEPTH) {
        let slice = start..rows.end.min(start + DEPTH);
        let depth = slice.len().next_multiple_of(STEP);
        let offsets: Vec<usize> = slice.clone().flat_map(|row| gather.offsets(row)).collect();
        let rows_of_b: Vec<Option<usize>> = slice.map(|row| Some(gather.target_row(row) * columns)).collect();
        dispatch(isa, PairRows { x: b, rows: &rows_of_b, run: columns, depth, out: &mut pairs });
        pairs.iter().zip(&mut turned).for_each(|(pairs, turned)| turn(pairs, depth, padded_columns, turned));
        for (tap, out) in taps.clone().zip(out.chunks_exact_mut(padded_columns * padded_run)) {
            let rows_of_a: Vec<Option<usize>> = offsets[tap..]
                .iter()
                .step_by(gather.taps.len())
                .map(|&offset| (offset != PADDING).then_some(offset))
                .collect();
            dispatch(isa, PairRows { x: a, rows: &rows_of_a, run: gather.run, depth, out: &mut paired });
            for panel in 0..padded_run / TILE {
                for group in 0..padded_columns / TILE {
                    let target = &mut out[group * TILE * padded_run + panel * TILE..];
                    let left = |part: usize| &turned[part][group * TILE * DEPTH..][..TILE * DEPTH];
                    let right = |part: usize| &paired[part][panel * DEPTH * TILE..][..DEPTH * TILE];
                    let operands = products(count).iter().map(|&[b, a]| (left(b), right(a)));
                    tile_product(&mut tiles, operands, depth, start == rows.start, target, padded_run);
                }
            }
        }
    }
}

/// Rows of `run` values to `[panel of 32 values][pair of rows][value][row of the pair]`; `None` is a row of zeros, and so are
/// those up to `depth`.
struct PairRows<'a, T> {
    x: &'a [T],
    rows: &'a [Option<usize>],
    run: usize,
    depth: usize,
    out: &'a mut Parts,
}

impl<T: Float> Task for PairRows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let PairRows { x, rows, run, depth, out } = self;
        let padded = run.next_multiple_of(TILE);
        let mut pair = [0, 1].map(|_| parts(out.len(), padded));
        pair.iter_mut().flatten().for_each(|part| part.fill(bf16::ZERO));
        for i in 0..depth / 2 {
            for (row, place) in pair.iter_mut().zip([2 * i, 2 * i + 1]) {
                match rows.get(place) {
                    Some(Some(offset)) => split(simd, &x[*offset..][..run], 0, row),
                    _ => row.iter_mut().for_each(|part| part.fill(bf16::ZERO)),
                }
            }
            for (part, out) in out.iter_mut().enumerate() {
                for panel in 0..padded / TILE {
                    let words = &mut out[(panel * DEPTH / 2 + i) * 2 * TILE..][..2 * TILE];
                    bf16::interleave(&pair.each_ref().map(|row| &row[part][panel * TILE..][..TILE]), words);
                }
            }
        }
    }
}

/// What [`PairRows`] gave to `[column][row]`, a row of it `DEPTH` long.
fn turn(pairs: &[bf16], depth: usize, columns: usize, turned: &mut [bf16]) {
    let pairs: &[u32] = bytemuck::cast_slice(pairs);
    let turned: &mut [u32] = bytemuck::cast_slice_mut(turned);
    for first in (0..columns).step_by(SQUARE) {
        let panel = &pairs[first / TILE * (DEPTH / 2) * TILE + first % TILE..];
        for word in (0..depth / 2).step_by(SQUARE) {
            let square: [[u32; SQUARE]; SQUARE] =
                std::array::from_fn(|i| std::array::from_fn(|column| panel[(word + i) * TILE + column]));
            for column in 0..SQUARE {
                let row = &mut turned[(first + column) * (DEPTH / 2) + word..][..SQUARE];
                row.iter_mut().zip(&square).for_each(|(out, words)| *out = words[column]);
            }
        }
    }
}
