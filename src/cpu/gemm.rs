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

mod ahead;
mod epilogue;
mod packed;
mod tile;

use super::float::Float;
use super::gather::Gather;
use super::parallel::for_each;
use super::simd::{Simd, Task, dispatch};
use crate::tensor::pool::Scratch;
pub(super) use ahead::{Ahead, Far, Near, Shares, Stream};
pub use epilogue::Epilogue;
pub(super) use epilogue::Output;
pub use packed::PackedB;
use std::ops::Range;
pub(super) use tile::{TILE_ROWS, Tile};

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
        let (mut positions, mut position, sources) = (gather.positions(rows.clone()), [0; 3], gather.runs(a, &zeros));
        for i in 0..tiles * TILE_ROWS {
            position = positions.next().unwrap_or(position);
            let (tile, lane) = (i / TILE_ROWS, i % TILE_ROWS);
            for (runs, run) in runs[tile * taps..].iter_mut().zip(sources.at(position)) {
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
        let partial = &mut partial[..];
        for first in panels.clone().step_by(COLUMNS / width) {
            let panels = first..panels.end.min(first + COLUMNS / width);
            for (i, block) in blocks.iter().enumerate() {
                let words = block.words.len();
                for panel in panels.clone() {
                    let column = panel * width;
                    let b_block = &b.panel(panel)[(block.taps.start * run + block.words.start) * width * T::PER_WORD..];
                    let b_len = block.taps.len() * words * width;
                    assert!(b_block.len() >= b_len * T::PER_WORD && block.words.end <= run);
                    // What follows of B, which few rows read once.
                    let next = b_block.as_ptr().cast::<f32>().wrapping_add(b_len);
                    let mut next = Shares::new(next, b_len, 2 * tiles);
                    for tile in 0..tiles {
                        let asked_with = block.taps.len() * words;
                        let ahead = Far([next.next(asked_with), next.next(asked_with)]);
                        let sums = partial.get_mut((panel - first) * sums_len + tile * TILE_ROWS * width..);
                        let sums = sums.map_or(std::ptr::null_mut(), |sums| sums.as_mut_ptr());
                        let tile = Tile {
                            runs: &runs[tile * taps..][block.taps.clone()],
                            words,
                            first: block.words.start,
                            b: b_block.as_ptr().cast(),
                            c: c.pointer(),
                            targets: &targets[tile],
                            rows: TILE_ROWS.min(rows.len() - tile * TILE_ROWS),
                            column,
                            columns: width.min(b.columns - column),
                            before: (i > 0).then_some(sums),
                            after: (i + 1 < blocks.len()).then_some(sums),
                            epilogue,
                            ahead,
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
