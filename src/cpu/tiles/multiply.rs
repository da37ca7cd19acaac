//! `y = epilogue(conv(x, filter))` on tiles.
//!
//! A task takes some rows of some pictures, or some of the columns, and rearranges its pictures by itself, so that they are in its L2 when
//! the tiles are loaded. For each panel of 32 columns all its positions pass by, 32 at a time, over the whole depth: sums are never
//! stored before they are complete. The depth goes by 32 channels and then by taps, which makes neighbouring steps read the same
//! cache lines, so that the left side comes from L1 and the right side, a stream, from L2; the next panel is asked for meanwhile.

use super::super::float::Float;
use super::super::gather::Gather;
use super::super::gemm::{Epilogue, Output};
use super::super::parallel::for_each_of;
use super::super::portable::Scalar;
use super::super::simd::{Isa, Simd, Task, dispatch};
use super::amx::{STEP, TILE, Tiles};
use super::planes::{Arrangement, NONE, Part};
use super::{HALF, Parts, RIGHT, TileFilter, multiply_parts, parts_of};
use half::bf16;
use std::marker::PhantomData;
use std::ops::Range;

/// Bytes of a task's planes: half of an L2 of 2 MiB.
const PLANES: usize = 1 << 20;
/// Bytes of a right side that stays in L2 from one task to the next.
const SMALL_FILTER: usize = 512 << 10;

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
        for_each_of(self.jobs(b), |(part, panels)| match b.parts {
            1 => {
                dispatch(isa, Job::<U, T, 1> { product: self, part, panels, a, b, c: &c, epilogue, tiles: PhantomData })
            }
            _ => {
                dispatch(isa, Job::<U, T, 2> { product: self, part, panels, a, b, c: &c, epilogue, tiles: PhantomData })
            }
        });
    }

    /// How the work is shared: by pictures while their planes fit, by rows where one alone does not, and further where there are fewer such
    /// parts than threads. No result depends on it.
    fn jobs(&self, b: &TileFilter) -> Vec<(Part, Range<usize>)> {
        let (images, height) = (self.gather.images, self.gather.grid[0]);
        let panels = b.columns.div_ceil(TILE);
        let threads = rayon::current_num_threads();
        let wanted = if images < 2 * threads { 2 * threads } else { threads };
        let bytes = |pictures: usize| {
            let part = Part { pictures: 0..pictures, rows: 0..height };
            self.arrangement.len(&part) * size_of::<bf16>() * b.parts
        };
        // Only a picture alone is cut into rows.
        let fitting =
            images.div_ceil((PLANES / bytes(1).max(1)).max(1)).next_multiple_of(threads).max(wanted).min(images);
        let missing = wanted.div_ceil(fitting);
        let by_columns = b.panels.len() * size_of::<bf16>() > bytes(images.div_ceil(fitting));
        let (strips, columns) = match fitting == images {
            true if by_columns => (bytes(1).div_ceil(PLANES), missing),
            true => (missing.max(bytes(1).div_ceil(PLANES)), 1),
            false => (1, missing),
        };
        let (groups, strips, columns) = (fitting, strips.clamp(1, height), columns.min(panels));
        let piece = |i: usize, count: usize, of: usize| i * of / count..(i + 1) * of / count;
        let mut jobs = Vec::with_capacity(groups * strips * columns);
        for group in 0..groups {
            for strip in 0..strips {
                let part = Part { pictures: piece(group, groups, images), rows: piece(strip, strips, height) };
                jobs.extend((0..columns).map(|i| (part.clone(), piece(i, columns, panels))));
            }
        }
        jobs
    }
}

/// What one task computes, with `PARTS` parts of either side.
struct Job<'a, U, T, const PARTS: usize> {
    product: &'a Product,
    part: Part,
    panels: Range<usize>,
    a: &'a [T],
    b: &'a TileFilter,
    c: &'a Output<T>,
    epilogue: Epilogue<'a, T>,
    tiles: PhantomData<U>,
}

impl<U: Tiles, T: Float, const PARTS: usize> Task for Job<'_, U, T, PARTS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let arrangement = &self.product.arrangement;
        let (len, width) = (arrangement.len(&self.part), arrangement.width());
        let mut planes: Parts = super::parts(PARTS, len);
        arrangement.fill(simd, self.a, &self.part, 0..arrangement.chunks(), &mut planes);
        let left: [*const bf16; PARTS] = std::array::from_fn(|part| planes[part].as_ptr());
        let offsets = arrangement.offsets(&self.part);
        let targets = arrangement.targets(&self.part);
        let furthest = offsets.iter().max().map_or(0, |offset| offset + (targets.len() - 1) * width + STEP);
        assert!(furthest <= len && offsets.len() == self.b.steps, "tiles lie inside the planes");
        // Lines of the next panel that are asked for at each step.
        let (blocks, lines) = (targets.len() / TILE, PARTS * RIGHT * size_of::<bf16>() / 64);
        let large = self.b.panels.len() * size_of::<bf16>() > SMALL_FILTER;
        let mut sums = [[0.0f32; TILE]; TILE];
        let mut tiles = U::new();
        for panel in self.panels.clone() {
            let right = self.b.panel(panel);
            let next = if large && panel + 1 < self.panels.end { self.b.panel(panel + 1) } else { &[] };
            for block in 0..blocks {
                let ahead = if next.is_empty() { 0..0 } else { block * lines / blocks..(block + 1) * lines / blocks };
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
                        for line in ahead.clone() {
                            simd.prefetch(next.as_ptr().wrapping_add(step * PARTS * RIGHT + line * 32).cast());
                        }
                    }
                    tiles.finish(sums.as_mut_ptr().cast(), TILE);
                }
                self.finish(simd, &sums, &targets[block * TILE..][..TILE], panel * TILE);
            }
        }
    }
}

impl<U, T: Float, const PARTS: usize> Job<'_, U, T, PARTS> {
    /// Finishes the sums of some positions from `column` on.
    #[inline(always)]
    fn finish<S: Simd>(&self, simd: S, sums: &[[f32; TILE]; TILE], targets: &[usize], column: usize) {
        const { assert!(TILE.is_multiple_of(S::LANES) && S::LANES >= 4) };
        // In locals, which no result can overwrite.
        let (epilogue, c, columns) = (self.epilogue, self.c.pointer(), self.b.columns);
        let count = (columns - column).min(TILE);
        let mut bias = [0.0; TILE];
        if let Some(values) = epilogue.bias {
            bias[..count].copy_from_slice(&values[column..column + count]);
        }
        let mut vectors = [simd.splat(0.0); TILE / 4];
        for (i, vector) in vectors.iter_mut().enumerate().take(TILE / S::LANES) {
            // SAFETY: vectors of the tile's columns.
            *vector = unsafe { simd.load(bias.as_ptr().add(i * S::LANES)) };
        }
        for (sums, &target) in sums.iter().zip(targets) {
            if target == NONE {
                continue;
            }
            let at = target * columns + column;
            if count == TILE {
                for (i, &bias) in vectors.iter().enumerate().take(TILE / S::LANES) {
                    // SAFETY: rows of the target are this task's alone and lie inside `c`, and so do the tile's columns of them.
                    unsafe {
                        let sum = simd.load(sums.as_ptr().add(i * S::LANES));
                        epilogue.store(simd, sum, Some(bias), c, at + i * S::LANES);
                    }
                }
            } else {
                for i in 0..count {
                    // SAFETY: as above, for the columns that there are.
                    unsafe { epilogue.store(Scalar, sums[i], Some(bias[i]), c, at + i) };
                }
            }
        }
    }
}
