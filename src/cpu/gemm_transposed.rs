//! `C = A^T B`, summed over the rows of A and B: the gradient to a filter or to the weight of a linear layer.
//!
//! A is read in place through a [`Gather`], as in [`super::gemm`]; here its runs lie along the rows of C. B is copied, a
//! slice of rows and one panel of columns at a time, so that it stays in L1 while the whole depth of A passes by. There
//! are far more rows than elements of C in a convolution's early layers and far fewer in its late ones, so the rows are
//! split into parts by their number, every part makes a C of its own, and the parts are added in order at the end: the
//! same bits however many threads there are.

use super::gather::{Gather, PADDING};
use super::simd::{Isa, Simd, Task, dispatch};
use crate::tensor::pool::Scratch;
use rayon::prelude::*;
use std::ops::Range;

/// Rows of B in L1: 128 rows of 64 columns are 32 KiB.
const SLICE: usize = 128;
/// Rows of A and B that make one part.
const PART: usize = 4096;
/// The runs are divided among tasks until there are this many.
const TASKS: usize = 8;
/// Rows of a micro-kernel's tile.
const TILE_ROWS: usize = 6;

/// How the result is stored.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// `[depth of A, columns of B]`.
    RowMajor,
    /// `[columns of B, depth of A]`, the order of filters.
    ColumnMajor,
}

/// `c = (rows of a through gather)^T b`; `b` is `[target rows of the gather, columns]`.
pub fn multiply_transposed(
    isa: Isa,
    a: &[f32],
    gather: &Gather,
    b: &[f32],
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
    let width = isa.tile_columns();
    let (rows, panels) = (gather.rows(), columns.div_ceil(width));
    let parts = rows.div_ceil(PART).max(1);
    let tap_groups = TASKS.div_ceil(parts * panels).min(gather.taps.len());
    let taps_each = gather.taps.len().div_ceil(tap_groups);
    // [part][panel][depth][width]; the tasks of a panel take consecutive taps, hence consecutive pieces of it.
    let mut partial = Scratch::<f32>::take(parts * panels * depth * width);
    let panel_len = depth * width;
    partial
        .par_chunks_mut(panel_len)
        .enumerate()
        .flat_map(|(i, panel)| {
            panel.par_chunks_mut(taps_each * gather.run * width).enumerate().map(move |(group, out)| (i, group, out))
        })
        .for_each(|(i, group, out)| {
            let (part, panel) = (i / panels, i % panels);
            let taps = group * taps_each..((group + 1) * taps_each).min(gather.taps.len());
            let rows = (part * PART).min(rows)..((part + 1) * PART).min(rows);
            let columns = panel * width..columns.min((panel + 1) * width);
            dispatch(isa, Part { a, gather, b, stride: b.len() / gather.target_rows(), rows, taps, columns, out });
        });
    reduce(&partial, parts, depth, columns, width, c, order);
}

/// Adds the parts in order and stores the sums.
fn reduce(partial: &[f32], parts: usize, depth: usize, columns: usize, width: usize, c: &mut [f32], order: Order) {
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
            let mut row = vec![0.0; out_len(columns, panel, width)];
            for k in 0..depth {
                sum(panel, k, &mut row);
                for (column, &value) in row.iter().enumerate() {
                    out[column * depth + k] = value;
                }
            }
        }),
    }
}

fn out_len(columns: usize, panel: usize, width: usize) -> usize {
    width.min(columns - panel * width)
}

/// Some rows, some taps and one panel of columns.
struct Part<'a> {
    a: &'a [f32],
    gather: &'a Gather,
    b: &'a [f32],
    stride: usize,
    rows: Range<usize>,
    taps: Range<usize>,
    columns: Range<usize>,
    /// `[taps * run, width]`.
    out: &'a mut [f32],
}

impl Task for Part<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Part { a, gather, b, stride, rows, taps, columns, out } = self;
        let (run, width) = (gather.run, S::LANES * S::VECTORS);
        assert!(width <= 64 && out.len() == taps.len() * run * width);
        if rows.is_empty() {
            out.fill(0.0);
        }
        // A padded tap reads zeros.
        let zeros = vec![0.0f32; run];
        let mut packed = [0.0f32; SLICE * 64];
        let mut pointers = vec![[std::ptr::null::<f32>(); SLICE]; taps.len()];
        for start in rows.clone().step_by(SLICE) {
            let slice = start..rows.end.min(start + SLICE);
            for (i, row) in slice.clone().enumerate() {
                let packed_row = &mut packed[i * width..][..width];
                packed_row[..columns.len()].copy_from_slice(&b[gather.target_row(row) * stride..][columns.clone()]);
                packed_row[columns.len()..].fill(0.0);
                let offsets = gather.offsets(row).skip(taps.start);
                for (pointers, offset) in pointers.iter_mut().zip(offsets) {
                    pointers[i] = if offset == PADDING { zeros.as_ptr() } else { a[offset..].as_ptr() };
                }
            }
            for (pointers, out) in pointers.iter().zip(out.chunks_exact_mut(run * width)) {
                let tile = Tile { runs: &pointers[..slice.len()], b: &packed, first: start == rows.start };
                let mut channel = 0;
                while channel < run {
                    let out = &mut out[channel * width..];
                    // SAFETY: runs are readable for `run` floats, and the chosen tile ends within them; `packed` and
                    // `out` have as many full rows as the tile reads and writes.
                    channel += unsafe {
                        match run - channel {
                            6.. => tile.compute::<S, 6>(simd, channel, out),
                            4.. => tile.compute::<S, 4>(simd, channel, out),
                            2.. => tile.compute::<S, 2>(simd, channel, out),
                            _ => tile.compute::<S, 1>(simd, channel, out),
                        }
                    };
                }
            }
        }
    }
}

/// A tile of C: consecutive elements of the runs by one panel, summed over a slice of rows.
struct Tile<'a> {
    runs: &'a [*const f32],
    b: &'a [f32],
    first: bool,
}

impl Tile<'_> {
    /// Computes `R` rows of C from element `channel` of the runs on, and returns `R`.
    ///
    /// # Safety
    /// As for [`Tile::micro_kernel`].
    #[inline(always)]
    unsafe fn compute<S: Simd, const R: usize>(&self, simd: S, channel: usize, out: &mut [f32]) -> usize {
        const { assert!(R <= TILE_ROWS) };
        // SAFETY: passed on.
        unsafe {
            match S::VECTORS {
                2 => self.micro_kernel::<S, R, 2>(simd, channel, out),
                _ => self.micro_kernel::<S, R, 4>(simd, channel, out),
            }
        }
        R
    }

    /// # Safety
    /// Each run is readable for `channel + R` floats; `V` is `S::VECTORS`.
    #[inline(always)]
    unsafe fn micro_kernel<S: Simd, const R: usize, const V: usize>(&self, simd: S, channel: usize, out: &mut [f32]) {
        let width = V * S::LANES;
        assert!(self.b.len() >= self.runs.len() * width && out.len() >= R * width);
        let mut sums = [[simd.splat(0.0); V]; R];
        let mut b = self.b.as_ptr();
        for &run in self.runs {
            // SAFETY: the assertion above, and the contract.
            unsafe {
                let b_row: [S::V; V] = std::array::from_fn(|v| simd.load(b.add(v * S::LANES)));
                let a = run.add(channel);
                for (r, sums) in sums.iter_mut().enumerate() {
                    let a = simd.splat(*a.add(r));
                    for (sum, &b) in sums.iter_mut().zip(&b_row) {
                        *sum = simd.mul_add(a, b, *sum);
                    }
                }
                b = b.add(width);
            }
        }
        for (sums, out) in sums.into_iter().zip(out.chunks_exact_mut(width)) {
            for (v, sum) in sums.into_iter().enumerate() {
                let out = &mut out[v * S::LANES..][..S::LANES];
                // SAFETY: `out` has `LANES` floats.
                unsafe {
                    let sum = if self.first { sum } else { simd.add(simd.load(out.as_ptr()), sum) };
                    simd.store(out.as_mut_ptr(), sum);
                }
            }
        }
    }
}
