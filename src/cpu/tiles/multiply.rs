//! `y = epilogue(conv(x, filter))` on tiles.
//!
//! A task takes some rows of some pictures, or some of the columns, and rearranges its pictures by itself, so that they are in its L2 when
//! the tiles are loaded. For each panel of 32 columns all its positions pass by, 32 at a time, over the whole depth: sums are never
//! stored before they are complete. The depth goes by 32 channels and then by taps, which makes neighbouring steps read the same
//! cache lines, so that the left side comes from L1 and the right side, a stream, from L2. It passes L1 by but for its first steps, as
//! otherwise nothing at all would stay there from one block to the next. Nothing is asked for ahead: requests share the
//! few lines that a core waits for at a time with loads of tiles, and made every product wait longer.

use super::super::float::Float;
use super::super::gather::Gather;
use super::super::gemm::{Epilogue, Output};
use super::super::parallel::{for_each, piece};
use super::super::simd::{Isa, Simd, Task, dispatch};
use super::amx::{Again, STEP, TILE, Tiles};
use super::blocks::Blocks;
use super::finish::{Results, Unfinished};
use super::planes::{Arrangement, Part};
use super::{HALF, Parts, RIGHT, Sums, TileFilter, parts_of};
use half::bf16;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Mutex;

/// Bytes of a right side that stays in an L2 of 2 MiB from one part of the left side to the next.
const RIGHT_STAYS: usize = 5 << 18;
/// Bytes of a part's planes: few where the right side stays, so that inputs and results do too, else half of L2, for it to be fetched seldom.
const PLANES: [usize; 2] = [1 << 18, 1 << 20];
/// The same of pictures in turn, whose rows overlap: an L2, if that saves fetching it once more.
const PLANES_IN_TURN: [usize; 2] = [1 << 20, 2 << 20];
/// Share of the products that pictures in turn may take to be taken so, without a stride and with one. Neighbouring taps then have no lines
/// of the left side in common, which come from L2 for each; with a stride few do anyway.
const IN_TURN: [f64; 2] = [0.7, 0.85];
/// Bytes of a panel of the right side, its first steps', that stay in L1 from one block to the next; of an L1 of 48 KiB, of which the left
/// side, sums and results take the rest.
const PANEL_STAYS: usize = 16 << 10;
/// Pieces of a few pictures' work that a thread takes: where another program slows one down, others take more of them.
const PIECES: usize = 2;

impl TileFilter {
    /// Pictures that a thread may take by themselves, of so many bytes of results each, for these to be in its L2 when they are done.
    pub fn pictures_together(&self, picture: usize, pictures: usize) -> usize {
        match self.bytes() <= RIGHT_STAYS {
            true => PLANES[0].div_ceil(picture.max(1)),
            false => pictures,
        }
    }
}

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

    /// Packs the right side for a left side of type `T`. Its columns `[columns, taps, run]` follow one another.
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

    /// The same from rows of `columns` contiguous values, row `k` of the depth from `start(k)` on.
    pub fn pack_rows<T: Float>(
        &self,
        isa: Isa,
        b: &[f32],
        columns: usize,
        start: impl Fn(usize) -> usize,
    ) -> TileFilter {
        let (taps, run, parts) = (self.gather.taps.len(), self.gather.run, parts_of::<T>());
        let step = |chunk: usize, tap: usize| {
            (chunk * STEP..run.min((chunk + 1) * STEP)).map(|i| start(tap * run + i)).collect::<Vec<_>>()
        };
        let steps = (0..run.div_ceil(STEP)).flat_map(|chunk| (0..taps).map(move |tap| (chunk, tap)));
        let steps: Vec<_> = steps.map(|(chunk, tap)| step(chunk, tap)).collect();
        TileFilter::from_rows(isa, b, columns, parts, &steps)
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
            let (part, panels) = (i / pieces, piece(i % pieces, pieces, panels));
            let slot = &prepared[rayon::current_thread_index().unwrap_or_default()];
            let mut slot = slot.lock().expect("nobody panics while holding it");
            // Another part's go back to the pool before these are taken from it: they are in this thread's L2.
            let there = slot.take().filter(|there| there.0 == part);
            let (_, prepared) =
                slot.insert(there.unwrap_or_else(|| (part, self.prepare(isa, a, &parts[part], 0, b.parts))));
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
        let part = Part { pictures: image..image + 1, rows, in_turn: false };
        let prepared = self.prepare(isa, a, &part, before, b.parts);
        self.run::<U, T>(isa, &prepared, 0..b.columns.div_ceil(TILE), b, &Output::new(c), epilogue);
    }

    /// Rearranges a part of the left side, whose targets begin after so many, in so many parts of values.
    fn prepare<T: Float>(&self, isa: Isa, a: &[T], part: &Part, before: usize, parts: usize) -> Prepared {
        let arrangement = &self.arrangement;
        let mut planes = super::parts(parts, arrangement.len(part));
        dispatch(isa, Fill { arrangement, x: a, part, planes: &mut planes });
        Prepared { planes, blocks: Blocks::new(arrangement, part, before) }
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

    /// [`Product::jobs`] of many pictures, in turn, where that takes fewer steps and some rows of them fit.
    fn jobs_in_turn(&self, b: &TileFilter) -> Option<(Vec<Part>, usize)> {
        let ([height, _], images) = (self.gather.grid, self.gather.images);
        let groups = images / HALF;
        if groups == 0 || self.merged.is_some() {
            return None;
        }
        let part =
            |group: usize, rows: Range<usize>| Part { pictures: piece(group, groups, images), rows, in_turn: true };
        let most = if self.arrangement.planes() > 1 { IN_TURN[1] } else { IN_TURN[0] };
        if self.arrangement.share_in_turn() > most {
            return None;
        }
        let bytes = |rows: usize| self.arrangement.len(&part(groups - 1, 0..rows)) * size_of::<bf16>() * b.parts;
        let planes = PLANES_IN_TURN[usize::from(b.bytes() > RIGHT_STAYS)];
        let strips = (1..=height).find(|strips| bytes(height.div_ceil(*strips)) <= planes)?;
        let parts = (0..groups * strips).map(|i| part(i / strips, piece(i % strips, strips, height)));
        let pieces = rayon::current_num_threads().div_ceil(groups * strips);
        Some((parts.collect(), pieces.min(b.columns.div_ceil(TILE))))
    }

    /// How the work is shared: by pictures while their planes fit, by rows where one alone does not, and further where there are fewer such
    /// parts than threads need to end together; and in how many pieces the columns are taken. No result depends on it.
    fn jobs(&self, b: &TileFilter) -> (Vec<Part>, usize) {
        if let Some(jobs) = self.jobs_in_turn(b) {
            return jobs;
        }
        let (images, height) = (self.gather.images, self.gather.grid[0]);
        let panels = b.columns.div_ceil(TILE);
        let threads = rayon::current_num_threads();
        let few = images < 2 * threads;
        let wanted = if few { 2 * threads } else { threads };
        let bytes = |pictures: usize| {
            let part = Part { pictures: 0..pictures, rows: 0..height, in_turn: false };
            self.arrangement.len(&part) * size_of::<bf16>() * b.parts
        };
        let planes = PLANES[usize::from(b.bytes() > RIGHT_STAYS)];
        // Only a picture alone is cut into rows.
        let groups =
            images.div_ceil((planes / bytes(1).max(1)).max(1)).next_multiple_of(threads).max(wanted).min(images);
        let by_columns = b.bytes() > bytes(images.div_ceil(groups));
        let strips = if groups < images { 1 } else { bytes(1).div_ceil(planes) };
        let strips = if by_columns || groups < images { strips } else { strips.max(wanted.div_ceil(groups)) };
        let strips = strips.clamp(1, height);
        let pieces = if few { (PIECES * threads).div_ceil(groups * strips) } else { 1 };
        let part = |i: usize| Part {
            pictures: piece(i / strips, groups, images),
            rows: piece(i % strips, strips, height),
            in_turn: false,
        };
        ((0..groups * strips).map(part).collect(), pieces.clamp(1, panels))
    }
}

/// A part of the left side.
struct Prepared {
    planes: Parts,
    blocks: Blocks,
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
        let Prepared { planes, blocks: Blocks { tiles: blocks, targets, steps } } = self.left;
        let width = self.width;
        let left: [*const bf16; PARTS] = std::array::from_fn(|part| planes[part].as_ptr());
        let furthest = steps.iter().flatten().map(|(offset, _)| offset).max();
        let last = blocks.iter().flat_map(|(tiles, _)| tiles).max();
        let end = furthest.zip(last).map_or(0, |(offset, last)| offset + (last + HALF - 1) * width + STEP);
        assert!(planes.iter().all(|part| end <= part.len()), "tiles lie inside the planes");
        assert!(steps.iter().flatten().all(|&(_, step)| step < self.b.steps), "as many steps as the right side has");
        let results = Results { epilogue: self.epilogue, c: self.c.pointer(), columns: self.b.columns };
        // While a block is multiplied, the sums of the one before it are finished, some rows at each step.
        let mut sums = Sums::default();
        let sums: *mut f32 = sums.0.as_mut_ptr().cast();
        let mut unfinished = Unfinished::none(simd);
        let fewest = steps.iter().map(Vec::len).min().unwrap_or(0);
        let rows = TILE.div_ceil(fewest.max(1));
        let kept = PANEL_STAYS / (PARTS * RIGHT * size_of::<bf16>());
        let mut tiles = U::new();
        for panel in self.panels.clone() {
            let panel_right = self.b.panel(panel);
            for (&([upper, lower], set), targets) in blocks.iter().zip(targets.chunks_exact(TILE)) {
                let tiles_of = |left: *const bf16| [upper, lower].map(|tile| left.wrapping_add(tile * width));
                let (left, right) = (left.map(tiles_of), panel_right.as_ptr());
                // SAFETY: the left side's tiles lie inside the planes, as asserted, and the right side has as many steps; the sums are
                // a block's.
                unsafe {
                    tiles.start(std::ptr::null(), 0);
                    for &(offset, step) in &steps[set] {
                        let a = left.map(|[upper, lower]| [upper.add(offset), lower.add(offset)]);
                        let right = right.add(step * PARTS * RIGHT);
                        let b =
                            std::array::from_fn(|part| [right.add(part * RIGHT), right.add(part * RIGHT + RIGHT / 2)]);
                        let again = if step < kept { Again::Both } else { Again::Left };
                        tiles.multiply_parts(a, width, b, again);
                        unfinished.finish(simd, results, rows);
                    }
                    // Where there are no steps.
                    unfinished.finish(simd, results, TILE);
                    tiles.finish(sums, TILE);
                    unfinished = Unfinished::new(simd, results, sums, targets, panel * TILE);
                }
            }
        }
        // SAFETY: as above.
        unsafe { unfinished.finish(simd, results, TILE) };
    }
}
