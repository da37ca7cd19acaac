//! The matrix product under everything: `C = A B`, A read in place through a [`Gather`], B packed once.
//!
//! Blocking (Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", 2008, with the packing of A left
//! out): B is cut into panels as wide as the micro-kernel's tile and into blocks of depth, which stay in L1 while all rows of
//! a block of C pass by; some panels take a block of depth one after the other, so that A comes from L2. A is not packed: its
//! elements are broadcast, so that they need no particular order, and a row is read through one pointer for each tap (the "indirection buffer" of Dukhan, "The indirect
//! convolution algorithm", 2019). Every element of C is computed by the same sequence of operations wherever it lies and
//! however the work is split, so the result depends neither on the threads nor on the other rows of the batch.
//!
//! Depth is counted in words of 32 bits: an f32, or a pair of bf16 ([`Float`]).

use super::float::{Float, convert};
use super::gather::Gather;
use super::parallel::for_each;
use super::simd::{Isa, Simd, Task, dispatch};
use crate::tensor::pool::Scratch;
use rayon::prelude::*;
use std::borrow::Cow;
use std::ops::Range;

/// Rows of a micro-kernel's tile; six pointers and the loop's own fit x86-64's general registers.
pub(super) const TILE_ROWS: usize = 6;
/// Columns that take a block of depth before the next block: one panel or more.
const COLUMNS: usize = 64;
/// Words of a panel's block of depth: 128 rows of 64 columns fill 32 KiB of L1.
const BLOCK_WORDS: usize = 8 << 10;
/// The rows of it at most, that those of A that are read with them stay in L1 too.
const MAX_DEPTH: usize = 256;
/// Rows of C that a task computes, unless there are too few tasks then.
const BLOCK_ROWS: usize = 192;
/// Fewer row blocks than this, and the panels become tasks of their own.
const FEW_BLOCKS: usize = 16;
/// Rows of B that are packed together, so that what they write stays in L1.
const PACK_ROWS: usize = 64;

/// The right side of a product, `[depth, columns]`, packed in panels: `[panel][word][tile columns][value of the word]`,
/// zero-padded.
pub struct PackedB<T = f32> {
    isa: Isa,
    /// In values, a multiple of a word's.
    depth: usize,
    columns: usize,
    panels: Scratch<T>,
}

/// Filters as the type of activations.
pub(super) fn narrowed<T: Float>(x: &[f32]) -> Cow<'_, [T]> {
    if T::PER_WORD == 1 {
        return Cow::Borrowed(bytemuck::cast_slice(x));
    }
    let mut narrow = vec![T::default(); x.len()];
    convert(x, &mut narrow);
    Cow::Owned(narrow)
}

/// A run of `run` values of the depth, in whole words.
fn padded_run<T: Float>(run: usize) -> usize {
    run.next_multiple_of(T::PER_WORD)
}

impl<T: Float> PackedB<T> {
    /// `copy(columns, width, out)` fills the panel of some columns.
    fn pack(isa: Isa, depth: usize, columns: usize, copy: impl Fn(Range<usize>, usize, &mut [T]) + Sync) -> Self {
        let width = isa.tile_columns();
        let mut panels = Scratch::take(columns.div_ceil(width) * depth * width);
        if depth > 0 {
            panels.par_chunks_mut(depth * width).enumerate().for_each(|(panel, out)| {
                copy(panel * width..columns.min((panel + 1) * width), width, out);
            });
        }
        PackedB { isa, depth, columns, panels }
    }

    /// From the columns one after the other, `[columns, depth]`: filters `[O, KH*KW*I]`, a linear layer's `[out, in]`. The
    /// depth consists of runs of `run` values, each of which begins with a new word.
    pub fn from_columns(isa: Isa, b: &[f32], depth: usize, columns: usize, run: usize) -> Self {
        let b = &*narrowed::<T>(b);
        assert!(b.len() == depth * columns && depth.is_multiple_of(run.max(1)));
        let padded = padded_run::<T>(run);
        Self::pack(isa, depth / run.max(1) * padded, columns, |range, width, out| {
            if padded != run || range.len() < width {
                out.fill(T::default());
            }
            for start in (0..depth).step_by(PACK_ROWS) {
                for (i, column) in range.clone().enumerate() {
                    let values = &b[column * depth..][start..depth.min(start + PACK_ROWS)];
                    for (k, &value) in (start..).zip(values) {
                        let k = if padded == run { k } else { k / run * padded + k % run };
                        out[(k / T::PER_WORD * width + i) * T::PER_WORD + k % T::PER_WORD] = value;
                    }
                }
            }
        })
    }

    /// From rows of `columns` contiguous values, in runs of `run`; row `k` begins at `start(k)` in `b`.
    pub fn from_rows(
        isa: Isa,
        b: &[f32],
        depth: usize,
        columns: usize,
        run: usize,
        start: impl Fn(usize) -> usize + Sync,
    ) -> Self {
        assert!(depth.is_multiple_of(run.max(1)));
        let b = &*narrowed::<T>(b);
        let padded = padded_run::<T>(run);
        let nothing = vec![T::default(); columns];
        Self::pack(isa, depth / run.max(1) * padded, columns, |range, width, out| {
            // Row `k` counts the padding, of which there is at most one row at the end of a run.
            let row = |k: usize| match k % padded < run {
                true => &b[start(k / padded * run + k % padded)..][..columns][range.clone()],
                false => &nothing[range.clone()],
            };
            for (word, out) in out.chunks_exact_mut(width * T::PER_WORD).enumerate() {
                let (values, rest) = out.split_at_mut(range.len() * T::PER_WORD);
                let first = word * T::PER_WORD;
                T::interleave(&[row(first), row(first + T::PER_WORD - 1)], values);
                rest.fill(T::default());
            }
        })
    }

    /// The rows of a panel, `[depth in words][tile columns]`.
    pub(super) fn panel(&self, panel: usize) -> &[T] {
        let len = self.depth * self.isa.tile_columns();
        &self.panels[panel * len..][..len]
    }

    /// Number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }
}

/// What happens to a finished element of C: `relu(c + bias[column] + residual)`.
#[derive(Clone, Copy)]
pub struct Epilogue<'a, T = f32> {
    /// One value for each column.
    pub bias: Option<&'a [f32]>,
    /// As C.
    pub residual: Option<&'a [T]>,
    /// Whether negative results become zero.
    pub relu: bool,
}

impl<T: Float> Epilogue<'_, T> {
    /// Panics unless it fits a result of `columns` columns and `values` values.
    pub(super) fn check(&self, columns: usize, values: usize) {
        assert!(self.bias.is_none_or(|bias| bias.len() == columns), "one bias a column");
        assert!(self.residual.is_none_or(|residual| residual.len() == values), "the residual is shaped as the result");
    }

    /// Finishes a vector of sums and stores it at `c[at..]`; `bias` is that of its columns.
    ///
    /// # Safety
    /// `c` is valid for writing a vector at `at`, and the residual as long as `c`.
    #[inline(always)]
    pub(super) unsafe fn store<S: Simd>(&self, simd: S, mut sum: S::V, bias: Option<S::V>, c: *mut T, at: usize) {
        // SAFETY: the contract.
        unsafe {
            if let Some(bias) = bias {
                sum = simd.add(sum, bias);
            }
            if let Some(residual) = self.residual {
                sum = simd.add(sum, T::load(simd, residual.as_ptr().add(at)));
            }
            if self.relu {
                sum = simd.relu(sum);
            }
            T::store(simd, c.add(at), sum);
        }
    }
}

impl<T> Default for Epilogue<'_, T> {
    fn default() -> Self {
        Epilogue { bias: None, residual: None, relu: false }
    }
}

/// `target rows of c = epilogue(rows of a through gather, times b)`. `c` is `[target rows, columns]`; rows that the gather
/// does not name are left alone. Runs of the gather are whole words.
pub fn multiply<T: Float>(a: &[T], gather: &Gather, b: &PackedB<T>, c: &mut [T], epilogue: Epilogue<T>) {
    gather.check(a.len(), c.len() / b.columns.max(1));
    assert_eq!(gather.depth(), b.depth, "inner extents agree");
    assert!(gather.run.is_multiple_of(T::PER_WORD), "runs are whole words");
    epilogue.check(b.columns, c.len());
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
    for_each(tasks, |task| {
        let (rows_of, first) = (task / panels.div_ceil(group), task % panels.div_ceil(group) * group);
        let rows = (rows_of * block).min(rows)..((rows_of + 1) * block).min(rows);
        let panels = first..(first + group).min(panels);
        dispatch(b.isa, Block { a, gather, b, c: &out, epilogue, rows, panels });
    });
}

/// The result, shared by tasks that write disjoint parts of it.
pub(super) struct Output<T>(*mut T);
// SAFETY: each task of a product or a convolution writes its own rows and panels alone.
unsafe impl<T> Sync for Output<T> {}

impl<T> Output<T> {
    /// The tasks must be over before `result` is used again.
    pub(super) fn new(result: &mut [T]) -> Self {
        Output(result.as_mut_ptr())
    }

    pub(super) fn pointer(&self) -> *mut T {
        self.0
    }
}

/// Some rows and some panels of a product.
struct Block<'a, T> {
    a: &'a [T],
    gather: &'a Gather,
    b: &'a PackedB<T>,
    c: &'a Output<T>,
    epilogue: Epilogue<'a, T>,
    rows: Range<usize>,
    panels: Range<usize>,
}

/// A block of B's rows: some whole taps, or a part of one.
#[derive(Clone)]
struct DepthBlock {
    taps: Range<usize>,
    /// Words of a run.
    words: Range<usize>,
}

/// Cuts `taps` runs of `run` words into blocks of at most `depth`, or one tap; but not short runs that are little more than one block.
fn depth_blocks(taps: usize, run: usize, depth: usize) -> Vec<DepthBlock> {
    if run > depth {
        let parts = run.div_ceil(depth);
        let part = run.div_ceil(parts);
        let words = (0..parts).map(|i| i * part..run.min((i + 1) * part));
        return (0..taps)
            .flat_map(|tap| words.clone().map(move |words| DepthBlock { taps: tap..tap + 1, words }))
            .collect();
    }
    // Blocks of about the same depth: a shallow one would pass sums through memory for a few products.
    let most = if taps * run <= depth + depth / 4 { taps } else { (depth / run.max(1)).max(1) };
    let together = taps.div_ceil(taps.div_ceil(most).max(1)).max(1);
    (0..taps).step_by(together).map(|tap| DepthBlock { taps: tap..taps.min(tap + together), words: 0..run }).collect()
}

impl<T: Float> Task for Block<'_, T> {
    type Output = ();
    const BF16: bool = T::PER_WORD > 1;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Block { a, gather, b, c, epilogue, rows, panels } = self;
        let taps = gather.taps.len();
        let tiles = rows.len().div_ceil(TILE_ROWS);
        // What a padded tap reads.
        let zeros = vec![T::default(); gather.run];
        // The runs of each tile: [tile][tap][row]. A tile past the end repeats its last row.
        let mut runs = vec![[std::ptr::null(); TILE_ROWS]; tiles * taps];
        let mut targets = vec![[0; TILE_ROWS]; tiles];
        let (mut positions, mut position) = (gather.positions(rows.clone()), [0; 3]);
        for i in 0..tiles * TILE_ROWS {
            position = positions.next().unwrap_or(position);
            let (tile, lane) = (i / TILE_ROWS, i % TILE_ROWS);
            for (runs, run) in runs[tile * taps..].iter_mut().zip(gather.runs(position, a, &zeros)) {
                runs[lane] = run.as_ptr().cast();
            }
            targets[tile][lane] = gather.target_row(position) * b.columns;
        }
        let run = gather.run / T::PER_WORD;
        let width = S::LANES * S::VECTORS;
        let blocks = depth_blocks(taps, run, (BLOCK_WORDS / width).min(MAX_DEPTH));
        let sums_len = tiles * TILE_ROWS * width;
        // What the blocks of depth before have summed, [panel][tile][row][column].
        let mut partial = Scratch::<f32>::take(if blocks.len() > 1 { COLUMNS / width * sums_len } else { 0 });
        for first in panels.clone().step_by(COLUMNS / width) {
            let panels = first..panels.end.min(first + COLUMNS / width);
            for (i, block) in blocks.iter().enumerate() {
                let words = block.words.len();
                for panel in panels.clone() {
                    let column = panel * width;
                    let b_block = &b.panel(panel)[(block.taps.start * run + block.words.start) * width * T::PER_WORD..];
                    assert!(b_block.len() >= block.taps.len() * words * width * T::PER_WORD && block.words.end <= run);
                    for tile in 0..tiles {
                        let sums = partial.get_mut((panel - first) * sums_len + tile * TILE_ROWS * width..);
                        let sums = sums.map_or(std::ptr::null_mut(), |sums| sums.as_mut_ptr());
                        let tile = Tile {
                            runs: &runs[tile * taps..][block.taps.clone()],
                            words,
                            first: block.words.start,
                            b: b_block.as_ptr().cast(),
                            c: c.0,
                            targets: &targets[tile],
                            rows: TILE_ROWS.min(rows.len() - tile * TILE_ROWS),
                            column,
                            columns: width.min(b.columns - column),
                            before: (i > 0).then_some(sums),
                            after: (i + 1 < blocks.len()).then_some(sums),
                            epilogue,
                        };
                        // SAFETY: `runs` are readable for all words of a run and `b` for all of the block's times the tile's
                        // width, as checked above; there is more than one block where sums are kept, and room for a tile of
                        // them; `targets` are rows of C, and this task alone writes these columns of them.
                        unsafe { tile.compute(simd) };
                    }
                }
            }
        }
    }
}

/// One call of the micro-kernel: up to [`TILE_ROWS`] rows of C, one panel, one block of depth.
pub(super) struct Tile<'a, T> {
    /// For each run, where each of the rows has it; past the last row anything readable.
    pub(super) runs: &'a [[*const f32; TILE_ROWS]],
    pub(super) words: usize,
    /// The first word of a run.
    pub(super) first: usize,
    pub(super) b: *const f32,
    pub(super) c: *mut T,
    pub(super) targets: &'a [usize; TILE_ROWS],
    pub(super) rows: usize,
    pub(super) column: usize,
    pub(super) columns: usize,
    /// Sums to go on from, a full tile of them.
    pub(super) before: Option<*mut f32>,
    /// Where sums are left for the next block of depth; after the last one the result goes to `c`.
    pub(super) after: Option<*mut f32>,
    pub(super) epilogue: Epilogue<'a, T>,
}

impl<'a, T: Float> Tile<'a, T> {
    /// A tile that goes through all `words` of a run and leaves its sums.
    #[inline(always)]
    pub(super) fn of_sums(
        runs: &'a [[*const f32; TILE_ROWS]],
        words: usize,
        b: &[T],
        [rows, columns]: [usize; 2],
        sums: *mut f32,
    ) -> Self {
        Tile {
            runs,
            words,
            first: 0,
            b: b.as_ptr().cast(),
            c: std::ptr::null_mut(),
            targets: &[0; TILE_ROWS],
            rows,
            column: 0,
            columns,
            before: None,
            after: Some(sums),
            epilogue: Epilogue::default(),
        }
    }

    /// Chooses the kernel for the rows and the vectors that the columns need.
    ///
    /// # Safety
    /// As for [`Tile::micro_kernel`].
    #[inline(always)]
    pub(super) unsafe fn compute<S: Simd>(&self, simd: S) {
        // SAFETY: passed on.
        unsafe {
            match self.rows {
                ..=2 => self.compute_rows::<S, 2>(simd),
                3..=4 => self.compute_rows::<S, 4>(simd),
                _ => self.compute_rows::<S, TILE_ROWS>(simd),
            }
        }
    }

    /// # Safety
    /// As for [`Tile::micro_kernel`].
    #[inline(always)]
    unsafe fn compute_rows<S: Simd, const R: usize>(&self, simd: S) {
        // SAFETY: passed on; every narrower kernel reads the same rows of B and fewer of their columns.
        unsafe {
            match self.columns.div_ceil(S::LANES) {
                1 => self.micro_kernel::<S, R, 1>(simd),
                2 => self.micro_kernel::<S, R, 2>(simd),
                3 => self.micro_kernel::<S, R, 3>(simd),
                _ => self.micro_kernel::<S, R, 4>(simd),
            }
        }
    }

    /// # Safety
    /// Each pointer of `runs` is readable for `words` words of any alignment from `first` on, `b` for as many rows of
    /// the full tile's width, `before` and `after` for a full tile, and `targets + column` for `columns` values of `c`, which
    /// nothing else touches meanwhile.
    #[inline(always)]
    unsafe fn micro_kernel<S: Simd, const R: usize, const V: usize>(&self, simd: S) {
        let width = S::LANES * S::VECTORS;
        let mut sums = [[simd.splat(0.0); V]; R];
        if let Some(before) = self.before {
            for (r, sums) in sums.iter_mut().enumerate() {
                for (v, sum) in sums.iter_mut().enumerate() {
                    // SAFETY: a full tile of sums.
                    *sum = unsafe { simd.load(before.add(r * width + v * S::LANES)) };
                }
            }
        }
        let mut b = self.b;
        for pointers in self.runs {
            let pointers = *pointers;
            let (mut at, end) = (self.first, self.first + self.words);
            while at < end {
                // SAFETY: the contract above.
                let b_row: [S::V; V] = std::array::from_fn(|v| unsafe { simd.load(b.add(v * S::LANES)) });
                for r in 0..R {
                    // SAFETY: the contract above.
                    let a = simd.splat(unsafe { pointers[r].add(at).read_unaligned() });
                    for v in 0..V {
                        sums[r][v] = T::multiply_words(simd, a, b_row[v], sums[r][v]);
                    }
                }
                // SAFETY: one row further within B, or one past its end.
                b = unsafe { b.add(width) };
                at += 1;
            }
        }
        // Through memory, so that nothing below asks for a register by its number: the sums would not be kept in registers
        // above either.
        let mut room = std::mem::MaybeUninit::<[f32; TILE_ROWS * 64]>::uninit();
        let after = self.after.unwrap_or(room.as_mut_ptr().cast());
        for (r, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                // SAFETY: a full tile of sums, or the room for the widest.
                unsafe { simd.store(after.add(r * width + v * S::LANES), *sum) };
            }
        }
        if self.after.is_some() {
            return;
        }
        for (r, target) in self.targets.iter().enumerate().take(self.rows) {
            let at = target + self.column;
            // SAFETY: the row's `V` vectors have just been stored, here as there is no other place for them.
            let sums = unsafe { std::slice::from_raw_parts(after.add(r * width), V * S::LANES) };
            // SAFETY: `columns` values from there are ours; the residual is as long as C; the buffers hold the widest tile.
            unsafe {
                let residual = self.epilogue.residual.map(|x| x.as_ptr().add(at));
                if self.columns == V * S::LANES {
                    self.finish::<S, V>(simd, sums, self.c.add(at), residual);
                    continue;
                }
                // A last panel that does not fill its vectors goes through buffers that do.
                let (mut c_row, mut residual_row) = ([T::default(); 64], [T::default(); 64]);
                let residual = residual.map(|residual| {
                    std::ptr::copy_nonoverlapping(residual, residual_row.as_mut_ptr(), self.columns);
                    residual_row.as_ptr()
                });
                self.finish::<S, V>(simd, sums, c_row.as_mut_ptr(), residual);
                std::ptr::copy_nonoverlapping(c_row.as_ptr(), self.c.add(at), self.columns);
            }
        }
    }

    /// Applies the epilogue to a row of the tile and stores it.
    ///
    /// # Safety
    /// `c` and `residual` are valid for `V * LANES` values.
    #[inline(always)]
    unsafe fn finish<S: Simd, const V: usize>(&self, simd: S, sums: &[f32], c: *mut T, residual: Option<*const T>) {
        for at in (0..V * S::LANES).step_by(S::LANES) {
            // SAFETY: the contract above; a bias has as many values as C has columns.
            unsafe {
                let mut sum = simd.load(sums[at..at + S::LANES].as_ptr());
                if let Some(bias) = self.epilogue.bias {
                    sum = simd.add(sum, load_bias(simd, &bias[self.column..], at));
                }
                if let Some(residual) = residual {
                    sum = simd.add(sum, T::load(simd, residual.add(at)));
                }
                if self.epilogue.relu {
                    sum = simd.relu(sum);
                }
                T::store(simd, c.add(at), sum);
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
