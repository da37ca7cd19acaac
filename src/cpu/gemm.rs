//! The matrix product under everything: `C = A B`, A read in place through a [`Gather`], B packed once.
//!
//! Blocking (Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", 2008, with the packing of A left
//! out): B is cut into panels as wide as the micro-kernel's tile and into blocks of about `DEPTH` rows, which stay in L1
//! while all rows of a block of C pass by. A is not packed: its elements are broadcast, so that they need no particular
//! order, and a row is read through one pointer for each tap (the "indirection buffer" of Dukhan, "The indirect
//! convolution algorithm", 2019). Every element of C is computed by the same sequence of operations wherever it lies and
//! however the work is split, so the result depends neither on the threads nor on the other rows of the batch.

use super::gather::{Gather, PADDING};
use super::simd::{Isa, Simd, Task, dispatch};
use crate::tensor::pool::Scratch;
use rayon::prelude::*;
use std::ops::Range;

/// Rows of a micro-kernel's tile; six pointers and the loop's own fit x86-64's general registers.
pub(super) const TILE_ROWS: usize = 6;
/// Rows of a block of B: 128 rows of 64 columns fill 32 KiB of L1.
const DEPTH: usize = 128;
/// Rows of C that a task computes, unless there are too few tasks then.
const BLOCK_ROWS: usize = 192;
/// Fewer row blocks than this, and the panels become tasks of their own.
const FEW_BLOCKS: usize = 16;

/// What a padded tap reads.
static ZEROS: [f32; DEPTH] = [0.0; DEPTH];

/// The right side of a product, `[depth, columns]`, packed in panels: `[panel][depth][tile columns]`, zero-padded.
pub struct PackedB {
    isa: Isa,
    depth: usize,
    columns: usize,
    panels: Scratch<f32>,
}

impl PackedB {
    /// Packs the matrix whose element at `(row, column)` is `at(row, column)`.
    fn pack(isa: Isa, depth: usize, columns: usize, copy: impl Fn(Range<usize>, usize, &mut [f32]) + Sync) -> Self {
        let width = isa.tile_columns();
        let count = columns.div_ceil(width);
        let mut panels = Scratch::take(count * depth * width);
        if depth > 0 {
            panels.par_chunks_mut(depth * width).enumerate().for_each(|(panel, out)| {
                let columns = panel * width..columns.min((panel + 1) * width);
                copy(columns, width, out);
            });
        }
        PackedB { isa, depth, columns, panels }
    }

    /// From the columns one after the other, `[columns, depth]`: filters `[O, KH*KW*I]`, a linear layer's `[out, in]`.
    pub fn from_columns(isa: Isa, b: &[f32], depth: usize, columns: usize) -> Self {
        assert_eq!(b.len(), depth * columns);
        Self::pack(isa, depth, columns, |range, width, out| {
            let used = range.len();
            for (i, column) in range.enumerate() {
                for (k, &value) in b[column * depth..][..depth].iter().enumerate() {
                    out[k * width + i] = value;
                }
            }
            out.chunks_exact_mut(width).for_each(|row| row[used..].fill(0.0));
        })
    }

    /// From rows of `columns` contiguous values; row `k` begins at `start(k)` in `b`.
    pub fn from_rows(isa: Isa, b: &[f32], depth: usize, columns: usize, start: impl Fn(usize) -> usize + Sync) -> Self {
        Self::pack(isa, depth, columns, |range, width, out| {
            for (k, row) in out.chunks_exact_mut(width).enumerate() {
                let source = &b[start(k)..][..columns];
                row[..range.len()].copy_from_slice(&source[range.clone()]);
                row[range.len()..].fill(0.0);
            }
        })
    }

    /// The rows of a panel, `[depth, tile columns]`.
    pub(super) fn panel(&self, panel: usize) -> &[f32] {
        let len = self.depth * self.isa.tile_columns();
        &self.panels[panel * len..][..len]
    }

    /// Number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }
}

/// What happens to a finished element of C: `relu(c + bias[column] + residual)`.
#[derive(Clone, Copy, Default)]
pub struct Epilogue<'a> {
    /// One value for each column.
    pub bias: Option<&'a [f32]>,
    /// As C.
    pub residual: Option<&'a [f32]>,
    /// Whether negative results become zero.
    pub relu: bool,
}

/// `target rows of c = epilogue(rows of a through gather, times b)`. `c` is `[target rows, columns]`; rows that the gather
/// does not name are left alone.
pub fn multiply(a: &[f32], gather: &Gather, b: &PackedB, c: &mut [f32], epilogue: Epilogue) {
    gather.check(a.len(), c.len() / b.columns.max(1));
    assert_eq!(gather.depth(), b.depth, "inner extents agree");
    assert!(epilogue.bias.is_none_or(|bias| bias.len() == b.columns), "one bias a column");
    assert!(epilogue.residual.is_none_or(|residual| residual.len() == c.len()), "the residual is shaped as the result");
    let rows = gather.rows();
    if rows == 0 || b.columns == 0 {
        return;
    }
    let width = b.isa.tile_columns();
    let panels = b.columns.div_ceil(width);
    let blocks = rows.div_ceil(BLOCK_ROWS);
    let block = rows.div_ceil(blocks).next_multiple_of(TILE_ROWS);
    let group = if blocks < FEW_BLOCKS { 1 } else { panels };
    let out = Output::new(c);
    let tasks = blocks * panels.div_ceil(group);
    (0..tasks).into_par_iter().for_each(|task| {
        let (rows_of, first) = (task / panels.div_ceil(group), task % panels.div_ceil(group) * group);
        let rows = (rows_of * block).min(rows)..((rows_of + 1) * block).min(rows);
        let panels = first..(first + group).min(panels);
        dispatch(b.isa, Block { a, gather, b, c: &out, epilogue, rows, panels });
    });
}

/// The result, shared by tasks that write disjoint parts of it.
pub(super) struct Output(*mut f32);
// SAFETY: each task of a product or a convolution writes its own rows and panels alone.
unsafe impl Sync for Output {}

impl Output {
    /// The tasks must be over before `result` is used again.
    pub(super) fn new(result: &mut [f32]) -> Self {
        Output(result.as_mut_ptr())
    }

    pub(super) fn pointer(&self) -> *mut f32 {
        self.0
    }
}

/// Some rows and some panels of a product.
struct Block<'a> {
    a: &'a [f32],
    gather: &'a Gather,
    b: &'a PackedB,
    c: &'a Output,
    epilogue: Epilogue<'a>,
    rows: Range<usize>,
    panels: Range<usize>,
}

/// A block of B's rows: some whole taps, or a part of one.
#[derive(Clone)]
struct DepthBlock {
    taps: Range<usize>,
    channels: Range<usize>,
}

/// Cuts `taps` runs of `run` floats into blocks of at most [`DEPTH`], or one tap.
fn depth_blocks(taps: usize, run: usize) -> Vec<DepthBlock> {
    if run > DEPTH {
        let parts = run.div_ceil(DEPTH);
        let part = run.div_ceil(parts);
        let channels = (0..parts).map(|i| i * part..run.min((i + 1) * part));
        return (0..taps)
            .flat_map(|tap| channels.clone().map(move |channels| DepthBlock { taps: tap..tap + 1, channels }))
            .collect();
    }
    let together = (DEPTH / run.max(1)).max(1);
    (0..taps)
        .step_by(together)
        .map(|tap| DepthBlock { taps: tap..taps.min(tap + together), channels: 0..run })
        .collect()
}

impl Task for Block<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Block { a, gather, b, c, epilogue, rows, panels } = self;
        let taps = gather.taps.len();
        let tiles = rows.len().div_ceil(TILE_ROWS);
        // Offsets of the runs of each tile: [tile][tap][row]. A tile past the end repeats its last row.
        let mut offsets = vec![[PADDING; TILE_ROWS]; tiles * taps];
        let mut targets = vec![[0; TILE_ROWS]; tiles];
        for i in 0..tiles * TILE_ROWS {
            let row = (rows.start + i).min(rows.end - 1);
            let (tile, lane) = (i / TILE_ROWS, i % TILE_ROWS);
            for (tap, offset) in gather.offsets(row).enumerate() {
                offsets[tile * taps + tap][lane] = offset;
            }
            targets[tile][lane] = gather.target_row(row) * b.columns;
        }
        let blocks = depth_blocks(taps, gather.run);
        let width = S::LANES * S::VECTORS;
        let mut pointers = Vec::with_capacity(DEPTH);
        for panel in panels {
            let packed = b.panel(panel);
            let column = panel * width;
            let columns = width.min(b.columns - column);
            for (i, block) in blocks.iter().enumerate() {
                let run = block.channels.len();
                let b_block = &packed[(block.taps.start * gather.run + block.channels.start) * width..];
                assert!(b_block.len() >= block.taps.len() * run * width && run <= DEPTH);
                for tile in 0..tiles {
                    pointers.clear();
                    pointers.extend(offsets[tile * taps..][block.taps.clone()].iter().map(|lanes| {
                        lanes.map(|offset| match offset {
                            PADDING => ZEROS.as_ptr(),
                            // In bounds: `Gather::check` has compared the furthest run with the source.
                            offset => a[offset + block.channels.start..].as_ptr(),
                        })
                    }));
                    let tile = Tile {
                        runs: &pointers,
                        run,
                        b: b_block.as_ptr(),
                        c: c.0,
                        targets: &targets[tile],
                        rows: TILE_ROWS.min(rows.len() - tile * TILE_ROWS),
                        column,
                        columns,
                        first: i == 0,
                        epilogue: (i + 1 == blocks.len()).then_some(epilogue),
                    };
                    // SAFETY: `runs` are readable for `run` floats and `b` for all of them times the tile's width, as
                    // checked above; `targets` are rows of C, and this task alone writes these columns of them.
                    unsafe { tile.compute(simd) };
                }
            }
        }
    }
}

/// One call of the micro-kernel: up to [`TILE_ROWS`] rows of C, one panel, one block of depth.
pub(super) struct Tile<'a> {
    pub(super) runs: &'a [[*const f32; TILE_ROWS]],
    pub(super) run: usize,
    pub(super) b: *const f32,
    pub(super) c: *mut f32,
    pub(super) targets: &'a [usize; TILE_ROWS],
    pub(super) rows: usize,
    pub(super) column: usize,
    pub(super) columns: usize,
    pub(super) first: bool,
    pub(super) epilogue: Option<Epilogue<'a>>,
}

impl Tile<'_> {
    /// Chooses the number of vectors that the columns need.
    ///
    /// # Safety
    /// As for [`Tile::micro_kernel`].
    #[inline(always)]
    pub(super) unsafe fn compute<S: Simd>(&self, simd: S) {
        // SAFETY: passed on; every narrower kernel reads the same rows of B and fewer of their columns.
        unsafe {
            match self.columns.div_ceil(S::LANES) {
                1 => self.micro_kernel::<S, 1>(simd),
                2 => self.micro_kernel::<S, 2>(simd),
                3 => self.micro_kernel::<S, 3>(simd),
                _ => self.micro_kernel::<S, 4>(simd),
            }
        }
    }

    /// # Safety
    /// Each pointer of `runs` is readable for `run` floats, `b` for as many rows of the full tile's width, and `targets +
    /// column` for `columns` floats of `c`, which nothing else touches meanwhile.
    #[inline(always)]
    unsafe fn micro_kernel<S: Simd, const V: usize>(&self, simd: S) {
        let width = S::LANES * S::VECTORS;
        let mut sums = [[simd.splat(0.0); V]; TILE_ROWS];
        let mut b = self.b;
        for pointers in self.runs {
            let pointers = *pointers;
            for k in 0..self.run {
                // SAFETY: the contract above.
                let b_row: [S::V; V] = std::array::from_fn(|v| unsafe { simd.load(b.add(v * S::LANES)) });
                for r in 0..TILE_ROWS {
                    // SAFETY: the contract above.
                    let a = simd.splat(unsafe { *pointers[r].add(k) });
                    for v in 0..V {
                        sums[r][v] = simd.mul_add(a, b_row[v], sums[r][v]);
                    }
                }
                // SAFETY: one row further within B, or one past its end.
                b = unsafe { b.add(width) };
            }
        }
        if self.columns == V * S::LANES {
            for (r, sums) in sums.into_iter().enumerate().take(self.rows) {
                let at = self.targets[r] + self.column;
                // SAFETY: `columns` floats from there are ours; the residual is as long as C.
                unsafe {
                    let residual = self.epilogue.and_then(|e| e.residual).map(|x| x.as_ptr().add(at));
                    self.finish(simd, sums, self.c.add(at), residual);
                }
            }
        } else {
            // A last panel that does not fill its vectors goes through a buffer that does.
            let mut c_row = [0.0; 64];
            let mut residual_row = [0.0; 64];
            for (r, sums) in sums.into_iter().enumerate().take(self.rows) {
                let at = self.targets[r] + self.column;
                // SAFETY: `columns` floats from there are ours; the buffers hold the widest tile.
                unsafe {
                    let c = std::slice::from_raw_parts_mut(self.c.add(at), self.columns);
                    c_row[..self.columns].copy_from_slice(c);
                    let residual = self.epilogue.and_then(|e| e.residual).map(|x| {
                        residual_row[..self.columns].copy_from_slice(&x[at..at + self.columns]);
                        residual_row.as_ptr()
                    });
                    self.finish(simd, sums, c_row.as_mut_ptr(), residual);
                    c.copy_from_slice(&c_row[..self.columns]);
                }
            }
        }
    }

    /// Adds what earlier blocks of depth left in `c`, applies the epilogue after the last, and stores.
    ///
    /// # Safety
    /// `c` and `residual` are valid for `V * LANES` floats.
    #[inline(always)]
    unsafe fn finish<S: Simd, const V: usize>(
        &self,
        simd: S,
        sums: [S::V; V],
        c: *mut f32,
        residual: Option<*const f32>,
    ) {
        for (v, mut sum) in sums.into_iter().enumerate() {
            let at = v * S::LANES;
            // SAFETY: the contract above; a bias has as many values as C has columns.
            unsafe {
                if !self.first {
                    sum = simd.add(simd.load(c.add(at)), sum);
                }
                if let Some(epilogue) = self.epilogue {
                    if let Some(bias) = epilogue.bias {
                        sum = simd.add(sum, load_bias(simd, &bias[self.column..], at));
                    }
                    if let Some(residual) = residual {
                        sum = simd.add(sum, simd.load(residual.add(at)));
                    }
                    if epilogue.relu {
                        sum = simd.relu(sum);
                    }
                }
                simd.store(c.add(at), sum);
            }
        }
    }
}

/// A vector of `bias` from `at` on, zero past its end.
#[inline(always)]
fn load_bias<S: Simd>(simd: S, bias: &[f32], at: usize) -> S::V {
    let rest = &bias[at.min(bias.len())..];
    if rest.len() >= S::LANES {
        // SAFETY: just checked.
        return unsafe { simd.load(rest.as_ptr()) };
    }
    let mut padded = [0.0; 64];
    padded[..rest.len()].copy_from_slice(rest);
    // SAFETY: 64 floats are at least a vector.
    unsafe { simd.load(padded.as_ptr()) }
}
