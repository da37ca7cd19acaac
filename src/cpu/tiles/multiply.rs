//! `y = epilogue(conv(x, filter))` on tiles.
//!
//! A task takes some rows of some pictures, or some of the columns, and rearranges its pictures by itself, so that they are in its L2 when
//! the tiles are loaded. For each panel of 32 columns all its positions pass by, 32 at a time, over the whole depth: sums are never
//! stored before they are complete. The depth goes by 32 channels and then by taps, which makes neighbouring steps read the same
//! cache lines, so that the left side comes from L1 and the right side, a stream, from L2; the next panel is asked for meanwhile.

use super::super::float::Float;
use super::super::gather::Gather;
use super::super::gemm::{Epilogue, Output};
use super::super::parallel::for_each;
use super::super::portable::Scalar;
use super::super::simd::{Isa, Simd, Task, dispatch};
use super::amx::{STEP, TILE, Tiles};
use super::planes::{Arrangement, NONE, Part};
use super::{HALF, Parts, RIGHT, TileFilter, multiply_parts, parts_of};
use half::bf16;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Mutex;

/// Bytes of a right side that stays in an L2 of 2 MiB from one part of the left side to the next.
const RIGHT_STAYS: usize = 5 << 18;
/// Bytes of a part's planes: few where the right side stays, so that inputs and results do too, else half of L2, for it to be fetched seldom.
const PLANES: [usize; 2] = [1 << 18, 1 << 20];
/// Pieces of a few pictures' work that a thread takes: where another program slows one down, others take more of them.
const PIECES: usize = 2;

/// A product whose left side is read through a [`Gather`].
pub struct Product {
    gather: Gather,
    arrangement: Arrangement,
    /// If taps are merged, the columns of the filter.
    merged: Option<usize>,
}

impl Product {
    /// Over the taps of `gather`.
    pub fn new(gather: Gather) -> Self {
        Product { arrangement: Arrangement::new(&gather), gather, merged: None }
    }

    /// Over pixels of few channels and a filter of `kw` columns, whose taps are `gather`'s row by row.
    pub fn of_rows(gather: Gather, kw: usize) -> Self {
        Product { arrangement: Arrangement::of_rows(&gather, kw), gather, merged: Some(kw) }
    }

    /// Packs the right side, whose columns `[columns, taps, run]` follow one another.
    pub fn pack_columns<T: Float>(&self, isa: Isa, b: &[f32], columns: usize) -> TileFilter {
        let (taps, run, parts) = (self.gather.taps.len(), self.gather.run, parts_of::<T>());
        assert_eq!(b.len(), taps * run * columns);
        let Some(kw) = self.merged else {
            let step = |chunk: usize, tap: usize| (tap * run + chunk * STEP, (run - chunk * STEP).min(STEP));
            let steps = (0..run.div_ceil(STEP)).flat_map(|chunk| (0..taps).map(move |tap| step(chunk, tap)));
            return TileFilter::from_columns(isa, b, columns, parts, &steps.collect::<Vec<_>>());
        };
        // Each row of the filter as it lies in a plane.
        let pixel = super::planes::merged_pixel(run);
        let row = (kw * pixel).next_multiple_of(STEP);
        let mut wide = vec![0.0; columns * taps / kw * row];
        for (wide, narrow) in wide.chunks_exact_mut(row).zip(b.chunks_exact(kw * run)) {
            for (wide, narrow) in wide.chunks_exact_mut(pixel).zip(narrow.chunks_exact(run)) {
                wide[..run].copy_from_slice(narrow);
            }
        }
        let steps: Vec<_> = (0..taps / kw * row).step_by(STEP).map(|start| (start, STEP)).collect();
        TileFilter::from_columns(isa, &wide, columns, parts, &steps)
    }

    /// Packs the right side from rows of `columns` contiguous values, row `k` of the depth from `start(k)` on.
    pub fn pack_rows<T: Float>(
        &self,
        isa: Isa,
        b: &[f32],
        columns: usize,
        start: impl Fn(usize) -> usize,
    ) -> TileFilter {
        let (taps, run) = (self.gather.taps.len(), self.gather.run);
        let step = |chunk: usize, tap: usize| {
            (chunk * STEP..run.min((chunk + 1) * STEP)).map(|i| start(tap * run + i)).collect::<Vec<_>>()
        };
        let steps = (0..run.div_ceil(STEP)).flat_map(|chunk| (0..taps).map(move |tap| (chunk, tap)));
        let steps: Vec<_> = steps.map(|(chunk, tap)| step(chunk, tap)).collect();
        TileFilter::from_rows(isa, b, columns, parts_of::<T>(), &steps)
    }

    /// `target rows of c = epilogue(rows of a through the gather, times b)`, as [`super::super::gemm::multiply`].
    pub fn multiply<U: Tiles, T: Float>(&self, isa: Isa, a: &[T], b: &TileFilter, c: &mut [T], epilogue: Epilogue<T>) {
        let gather = &self.gather;
        gather.check(a.len(), c.len() / b.columns.max(1));
        epilogue.check(b.columns, c.len());
        if gather.rows() == 0 || b.columns == 0 {
            return;
        }
        let c = Output::new(c);
        let (parts, pieces) = self.jobs(b);
        let panels = b.columns.div_ceil(TILE);
        // A thread that goes on with a part has its planes already.
        let prepared: Vec<Mutex<Option<(usize, Prepared)>>> =
            (0..rayon::current_num_threads()).map(|_| Mutex::new(None)).collect();
        for_each(parts.len() * pieces, |i| {
            let (part, piece) = (i / pieces, i % pieces);
            let panels = piece * panels / pieces..(piece + 1) * panels / pieces;
            let slot = &prepared[rayon::current_thread_index().unwrap_or_default()];
            let mut slot = slot.lock().expect("nobody panics while holding it");
            let (_, prepared) = match slot.take() {
                Some(there) if there.0 == part => slot.insert(there),
                _ => slot.insert((part, self.prepare::<T>(isa, a, &parts[part], 0))),
            };
            self.run::<U, T>(isa, prepared, panels, b, &c, epilogue);
        });
    }

    /// Some rows of the outputs of an image, `c`, on this thread; no residual. Every output is a target.
    pub fn multiply_rows<U: Tiles, T: Float>(
        &self,
        isa: Isa,
        a: &[T],
        b: &TileFilter,
        (image, rows): (usize, Range<usize>),
        c: &mut [T],
        epilogue: Epilogue<T>,
    ) {
        let gather = &self.gather;
        gather.check(a.len(), gather.target_rows());
        assert!(gather.target == gather.grid && image < gather.images && rows.end <= gather.grid[0]);
        assert!(epilogue.residual.is_none() && c.len() == rows.len() * gather.grid[1] * b.columns);
        epilogue.check(b.columns, c.len());
        let before = (image * gather.grid[0] + rows.start) * gather.grid[1];
        let prepared = self.prepare(isa, a, &Part { pictures: image..image + 1, rows }, before);
        self.run::<U, T>(isa, &prepared, 0..b.columns.div_ceil(TILE), b, &Output::new(c), epilogue);
    }

    /// Rearranges a part of the left side, whose targets begin after so many.
    fn prepare<T: Float>(&self, isa: Isa, a: &[T], part: &Part, before: usize) -> Prepared {
        let arrangement = &self.arrangement;
        let mut planes = super::parts(parts_of::<T>(), arrangement.len(part));
        dispatch(isa, Fill { arrangement, x: a, part, planes: &mut planes });
        Prepared { planes, offsets: arrangement.offsets(part), targets: arrangement.targets(part, before) }
    }

    fn run<U: Tiles, T: Float>(
        &self,
        isa: Isa,
        left: &Prepared,
        panels: Range<usize>,
        b: &TileFilter,
        c: &Output<T>,
        epilogue: Epilogue<T>,
    ) {
        let (width, tiles) = (self.arrangement.width(), PhantomData);
        match b.parts {
            1 => dispatch(isa, Job::<U, T, 1> { left, width, panels, b, c, epilogue, tiles }),
            _ => dispatch(isa, Job::<U, T, 2> { left, width, panels, b, c, epilogue, tiles }),
        }
    }

    /// How the work is shared: by pictures while their planes fit, by rows where one alone does not, and further where there are fewer such
    /// parts than threads need to end together; and in how many pieces the columns are taken. No result depends on it.
    fn jobs(&self, b: &TileFilter) -> (Vec<Part>, usize) {
        let (images, height) = (self.gather.images, self.gather.grid[0]);
        let panels = b.columns.div_ceil(TILE);
        let threads = rayon::current_num_threads();
        let few = images < 2 * threads;
        let wanted = if few { 2 * threads } else { threads };
        let bytes = |pictures: usize| {
            let part = Part { pictures: 0..pictures, rows: 0..height };
            self.arrangement.len(&part) * size_of::<bf16>() * b.parts
        };
        let planes = PLANES[usize::from(b.panels.len() * size_of::<bf16>() > RIGHT_STAYS)];
        // Only a picture alone is cut into rows.
        let groups =
            images.div_ceil((planes / bytes(1).max(1)).max(1)).next_multiple_of(threads).max(wanted).min(images);
        let by_columns = b.panels.len() * size_of::<bf16>() > bytes(images.div_ceil(groups));
        let strips = if groups < images { 1 } else { bytes(1).div_ceil(planes) };
        let strips = if by_columns || groups < images { strips } else { strips.max(wanted.div_ceil(groups)) };
        let strips = strips.clamp(1, height);
        let pieces = if few { (PIECES * threads).div_ceil(groups * strips) } else { 1 };
        let piece = |i: usize, count: usize, of: usize| i * of / count..(i + 1) * of / count;
        let part =
            |i: usize| Part { pictures: piece(i / strips, groups, images), rows: piece(i % strips, strips, height) };
        ((0..groups * strips).map(part).collect(), pieces.clamp(1, panels))
    }
}

/// A part of the left side.
struct Prepared {
    planes: Parts,
    /// Where each step begins for the first position.
    offsets: Vec<usize>,
    /// Of each position.
    targets: Vec<usize>,
}

/// [`Arrangement::fill`] of all chunks.
struct Fill<'a, T> {
    arrangement: &'a Arrangement,
    x: &'a [T],
    part: &'a Part,
    planes: &'a mut Parts,
}

impl<T: Float> Task for Fill<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        self.arrangement.fill(simd, self.x, self.part, 0..self.arrangement.chunks(), self.planes);
    }
}

/// What one task computes, with `PARTS` parts of either side.
struct Job<'a, U, T, const PARTS: usize> {
    left: &'a Prepared,
    /// Values from one position to the next.
    width: usize,
    panels: Range<usize>,
    b: &'a TileFilter,
    c: &'a Output<T>,
    epilogue: Epilogue<'a, T>,
    tiles: PhantomData<U>,
}

impl<U: Tiles, T: Float, const PARTS: usize> Task for Job<'_, U, T, PARTS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Prepared { planes, offsets, targets } = self.left;
        let width = self.width;
        let left: [*const bf16; PARTS] = std::array::from_fn(|part| planes[part].as_ptr());
        let furthest = offsets.iter().max().map_or(0, |offset| offset + (targets.len() - 1) * width + STEP);
        assert!(planes.iter().all(|part| furthest <= part.len()), "tiles lie inside the planes");
        assert_eq!(offsets.len(), self.b.steps);
        let blocks = targets.len() / TILE;
        // While a block is multiplied, the sums of the one before it are finished, some rows at each step.
        let mut sums = [Sums::default(), Sums::default()];
        let [mut now, mut before] = sums.each_mut();
        let mut unfinished = Finished { targets: &[], column: 0, bias: [0.0; TILE] };
        let rows = TILE.div_ceil(offsets.len().max(1));
        let mut tiles = U::new();
        for panel in self.panels.clone() {
            let right = self.b.panel(panel);
            for block in 0..blocks {
                // SAFETY: the left side's tiles lie inside the planes, as asserted, and the right side has as many steps.
                unsafe {
                    tiles.start(std::ptr::null(), 0);
                    for (step, offset) in offsets.iter().enumerate() {
                        let offset = offset + block * TILE * width;
                        let right = right.as_ptr().add(step * PARTS * RIGHT);
                        let a = left.map(|left| [left.add(offset), left.add(offset + HALF * width)]);
                        let b =
                            std::array::from_fn(|part| [right.add(part * RIGHT), right.add(part * RIGHT + RIGHT / 2)]);
                        multiply_parts(&mut tiles, a, width, b);
                        self.finish(simd, before, &unfinished, step * rows..(step + 1) * rows);
                    }
                    // Where there are no steps.
                    self.finish(simd, before, &unfinished, offsets.len() * rows..TILE);
                    tiles.finish(now.0.as_mut_ptr().cast(), TILE);
                }
                std::mem::swap(&mut now, &mut before);
                unfinished = self.finished(&targets[block * TILE..][..TILE], panel * TILE);
            }
        }
        self.finish(simd, before, &unfinished, 0..TILE);
    }
}

/// The sums of a block.
#[derive(Default)]
#[repr(align(64))]
struct Sums([[f32; TILE]; TILE]);

/// Where the sums of a block go.
struct Finished<'a> {
    /// Of each position; none at all before the first block.
    targets: &'a [usize],
    /// The first of the columns.
    column: usize,
    bias: [f32; TILE],
}

impl<U, T: Float, const PARTS: usize> Job<'_, U, T, PARTS> {
    /// For the sums of some positions from `column` on.
    fn finished<'a>(&self, targets: &'a [usize], column: usize) -> Finished<'a> {
        let mut bias = [0.0; TILE];
        if let Some(values) = self.epilogue.bias {
            let values = &values[column..values.len().min(column + TILE)];
            bias[..values.len()].copy_from_slice(values);
        }
        Finished { targets, column, bias }
    }

    /// Finishes some rows of sums, as far as there are.
    #[inline(always)]
    fn finish<S: Simd>(&self, simd: S, sums: &Sums, to: &Finished, rows: Range<usize>) {
        const { assert!(TILE.is_multiple_of(2 * S::LANES)) };
        // In locals, which no result can overwrite.
        let (epilogue, c, columns, first) = (self.epilogue, self.c.pointer(), self.b.columns, to.column);
        let (targets, bias, sums) = (to.targets, to.bias.as_ptr(), sums.0.as_ptr());
        let whole = first + TILE <= columns;
        for row in rows.start..rows.end.min(targets.len()) {
            if targets[row] == NONE {
                continue;
            }
            let at = targets[row] * columns + first;
            // SAFETY: rows of the target are this task's alone and lie inside `c`, and so do the tile's columns of them, as many as there are.
            unsafe {
                let sums: *const f32 = sums.add(row).cast();
                if whole {
                    for i in (0..TILE).step_by(2 * S::LANES) {
                        let two = |values: *const f32| [i, i + S::LANES].map(|i| simd.load(values.add(i)));
                        epilogue.store_two(simd, two(sums), two(bias), c, at + i);
                    }
                } else {
                    for i in 0..columns - first {
                        epilogue.store(Scalar, *sums.add(i), Some(*bias.add(i)), c, at + i);
                    }
                }
            }
        }
    }
}
