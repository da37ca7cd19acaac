//! Pictures rearranged so that the rows of a tile are equally far apart.
//!
//! A tile of the left side is 16 outputs one after the other, each seen through one tap, and 32 values of the depth. The
//! instruction that loads it takes an address and the distance between rows. So the input is copied once, into planes of pixels
//! in which neighbouring outputs see neighbouring pixels whatever the stride, rows follow each other without a gap, and the padding is
//! written out; then the tile of any tap is the tile of the first one, moved. Positions that belong to no output, at the ends of rows, are
//! computed and dropped. A copy costs one pass over the input, packing the patches would cost one for each tap.

use super::super::float::{Float, split};
use super::super::gather::Gather;
use super::super::simd::Simd;
use super::amx::{STEP, TILE};
use super::{Parts, slices};
use half::bf16;
use std::ops::Range;

/// Pixels from one that is copied to one that is asked for.
pub(super) const AHEAD: usize = 16;

/// How the pictures of a [`Gather`] lie in planes.
pub(super) struct Arrangement {
    grid: [usize; 2],
    source: [usize; 2],
    step: [usize; 2],
    target: [usize; 2],
    target_step: [usize; 2],
    target_start: [usize; 2],
    /// Values between pixels of the source.
    pixel: usize,
    /// Channels of a pixel.
    channels: usize,
    /// Row and column of the source at which a plane begins; its own are `step` of them apart.
    planes: Vec<[isize; 2]>,
    /// The plane of each tap, and how many rows and columns into it the first output's pixel lies.
    taps: Vec<(usize, [usize; 2])>,
    /// Rows that a plane has beyond those of the grid, and how many of them are also the next picture's first.
    span: usize,
    shared: usize,
    /// Positions in a row.
    pitch: usize,
    /// Values of a position in a chunk of a plane.
    width: usize,
    /// Chunks of a plane, of `width` values a position.
    chunks: usize,
    /// Steps of the depth that begin one after the other at a tap's place in a chunk.
    steps: usize,
    /// Whether a tap is a row of the filter.
    merged: bool,
}

/// Some rows of the grids of some pictures.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub pictures: Range<usize>,
    pub rows: Range<usize>,
}

impl Arrangement {
    /// For the taps of `gather` one by one, in chunks of [`STEP`] channels.
    pub fn new(gather: &Gather) -> Self {
        let [sy, sx] = gather.step.map(|s| s as isize);
        // Taps that are a multiple of the stride apart read the same plane.
        let class = |&[dy, dx]: &[isize; 2]| [dy.rem_euclid(sy), dx.rem_euclid(sx)];
        let mut classes: Vec<[isize; 2]> = gather.taps.iter().map(class).collect();
        classes.sort_unstable();
        classes.dedup();
        let first_row = gather.taps.iter().map(|tap| tap[0].div_euclid(sy)).min().unwrap_or(0);
        let first_column = gather.taps.iter().map(|tap| tap[1].div_euclid(sx)).min().unwrap_or(0);
        let planes: Vec<[isize; 2]> =
            classes.iter().map(|&[y, x]| [first_row * sy + y, first_column * sx + x]).collect();
        let place = |tap: &[isize; 2]| {
            let plane = classes.iter().position(|other| *other == class(tap)).expect("every tap's class is listed");
            let [y, x] = planes[plane];
            (plane, [((tap[0] - y) / sy) as usize, ((tap[1] - x) / sx) as usize])
        };
        let taps = gather.taps.iter().map(place).collect();
        Self::with_planes(gather, planes, taps, STEP, 1, false)
    }

    /// For a filter of `kw` columns whose taps are `gather`'s, row by row, over pixels of few channels: a position holds the
    /// pixels up to the next one's, and a step of the depth goes on into the next positions.
    pub fn of_rows(gather: &Gather, kw: usize) -> Self {
        let [sy, sx] = gather.step.map(|s| s as isize);
        let rows: Vec<[isize; 2]> = gather.taps.iter().copied().step_by(kw).collect();
        let mut classes: Vec<isize> = rows.iter().map(|tap| tap[0].rem_euclid(sy)).collect();
        classes.sort_unstable();
        classes.dedup();
        let first_row = rows.iter().map(|tap| tap[0].div_euclid(sy)).min().unwrap_or(0);
        let column = rows.first().map_or(0, |tap| tap[1]);
        let planes: Vec<_> = classes.iter().map(|class| [first_row * sy + class, column]).collect();
        let place = |tap: &[isize; 2]| {
            let plane = classes.iter().position(|&other| other == tap[0].rem_euclid(sy)).expect("its class is listed");
            (plane, [((tap[0] - planes[plane][0]) / sy) as usize, 0])
        };
        let taps = rows.iter().map(place).collect();
        let pixel = merged_pixel(gather.run);
        let steps = (kw * pixel).div_ceil(STEP);
        let mut arrangement = Self::with_planes(gather, planes, taps, sx as usize * pixel, steps, true);
        // The last output's steps end in its own row.
        let beyond = (steps * STEP).div_ceil(arrangement.width) - 1;
        arrangement.pitch += beyond;
        arrangement
    }

    fn with_planes(
        gather: &Gather,
        planes: Vec<[isize; 2]>,
        taps: Vec<(usize, [usize; 2])>,
        width: usize,
        steps: usize,
        merged: bool,
    ) -> Self {
        let most = |axis: usize| taps.iter().map(|(_, place)| place[axis]).max().unwrap_or(0);
        let (span, beyond) = (most(0), most(1));
        // What is padding at the end of one and at the beginning of the next is there once.
        let shared = |axis: usize, beyond: usize| {
            let count = (gather.grid[axis] + beyond) as isize;
            let (step, source) = (gather.step[axis] as isize, gather.source[axis] as isize);
            let padded = |plane: &[isize; 2], at: isize| !(0..source).contains(&(plane[axis] + at * step));
            let fits = |s: isize| planes.iter().all(|p| (0..s).all(|i| padded(p, i) && padded(p, count - 1 - i)));
            (0..=beyond).rev().find(|&s| fits(s as isize)).unwrap_or(0)
        };
        let (shared_rows, shared_columns) = (shared(0, span), if merged { 0 } else { shared(1, beyond) });
        Arrangement {
            grid: gather.grid,
            source: gather.source,
            step: gather.step,
            target: gather.target,
            target_step: gather.target_step,
            target_start: gather.target_start,
            pixel: gather.pixel,
            channels: gather.run,
            span,
            shared: shared_rows,
            pitch: gather.grid[1] + beyond - shared_columns,
            width,
            chunks: if merged { 1 } else { gather.run.div_ceil(STEP) },
            steps,
            merged,
            planes,
            taps,
        }
    }

    /// Rows from one picture to the next.
    fn rows(&self, part: &Part) -> usize {
        part.rows.len() + self.span - self.shared
    }

    /// Rows of a plane that are filled.
    fn rows_of_plane(&self, part: &Part) -> usize {
        part.pictures.len() * self.rows(part) + self.shared
    }

    /// The row of the source, of those of all pictures, that one of a plane sees, if it is not padding.
    fn source_row(&self, part: &Part, plane: [isize; 2], row: usize) -> Option<usize> {
        let rows = self.rows(part);
        // Where pictures share rows, those are of zeros.
        let picture = (row / rows).min(part.pictures.len() - 1);
        let within = (row - picture * rows + part.rows.start) as isize;
        let y = plane[0] + within * self.step[0] as isize;
        let inside = (0..self.source[0] as isize).contains(&y);
        inside.then(|| (part.pictures.start + picture) * self.source[0] + y as usize)
    }

    /// Whether every position is a pixel of whole steps.
    pub fn takes_whole_pixels(&self) -> bool {
        !self.merged && self.channels.is_multiple_of(STEP)
    }

    /// Where the pixel begins that each of the first `count` positions of each plane sees, [`NONE`] where that is padding.
    pub fn pixels(&self, part: &Part, count: usize) -> Vec<usize> {
        let mut pixels = vec![NONE; self.planes.len() * count];
        for (&plane, pixels) in self.planes.iter().zip(pixels.chunks_exact_mut(count)) {
            let Inside { positions, first } = self.columns_inside(plane[1], self.step[1], self.pitch);
            for row in 0..self.rows_of_plane(part) {
                let Some(source) = self.source_row(part, plane, row) else { continue };
                let start = (source * self.source[1] + first) * self.pixel;
                let inside = pixels[row * self.pitch..][..self.pitch][positions.clone()].iter_mut();
                inside.enumerate().for_each(|(i, pixel)| *pixel = start + i * self.step[1] * self.pixel);
            }
        }
        pixels
    }

    /// Positions that are computed.
    pub fn positions(&self, part: &Part) -> usize {
        if part.rows.is_empty() || part.pictures.is_empty() || self.grid[1] == 0 {
            return 0;
        }
        ((part.pictures.len() - 1) * self.rows(part) + part.rows.len() - 1) * self.pitch + self.grid[1]
    }

    /// Values of a chunk of a plane, with room for whole tiles.
    pub fn chunk_len(&self, part: &Part) -> usize {
        let furthest = self.taps.iter().map(|(_, [y, x])| y * self.pitch + x).max().unwrap_or(0);
        let read = (self.positions(part).next_multiple_of(TILE) + furthest) * self.width + self.steps * STEP;
        let written = self.rows_of_plane(part) * self.pitch * self.width;
        read.max(written).next_multiple_of(STEP)
    }

    /// Values of all planes.
    pub fn len(&self, part: &Part) -> usize {
        self.planes.len() * self.chunks * self.chunk_len(part)
    }

    /// Values from one position to the next.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Chunks of a plane.
    pub fn chunks(&self) -> usize {
        self.chunks
    }

    /// Steps of the depth that a tap takes, in chunks or one after the other.
    pub fn steps_of_tap(&self) -> usize {
        self.chunks * self.steps
    }

    /// Positions of a chunk of `len` values whose steps end in it.
    pub fn positions_in(&self, len: usize) -> usize {
        (len - self.steps * STEP) / self.width + 1
    }

    /// With rows of an even number of positions: a tap then begins at an even one, if it is the first of its row.
    pub fn with_even_rows(mut self) -> Self {
        self.pitch = self.pitch.next_multiple_of(2);
        self
    }

    /// Number of planes.
    pub fn planes(&self) -> usize {
        self.planes.len()
    }

    /// The plane of a tap, and how many positions after an output's own that tap's is.
    pub fn tap(&self, tap: usize) -> (usize, usize) {
        let (plane, [y, x]) = self.taps[tap];
        (plane, y * self.pitch + x)
    }

    /// Where each step of the depth begins for the first position: by chunks, then by taps, so that what one tap reads the next finds
    /// in L1.
    pub fn offsets(&self, part: &Part) -> Vec<usize> {
        let len = self.chunk_len(part);
        let at = |chunk: usize, tap: usize, step: usize| {
            let (plane, moved) = self.tap(tap);
            (plane * self.chunks + chunk) * len + moved * self.width + step * STEP
        };
        let taps = 0..self.taps.len();
        (0..self.chunks)
            .flat_map(|chunk| taps.clone().flat_map(move |tap| (0..self.steps).map(move |step| (chunk, tap, step))))
            .map(|(chunk, tap, step)| at(chunk, tap, step))
            .collect()
    }

    /// The row of the target that each position computes, less `before`, [`NONE`] where there is no output, for whole tiles.
    pub fn targets(&self, part: &Part, before: usize) -> Vec<usize> {
        let mut targets = vec![NONE; self.positions(part).next_multiple_of(TILE)];
        let ([y0, x0], [sy, sx]) = (self.target_start, self.target_step);
        for (i, picture) in part.pictures.clone().enumerate() {
            for (j, row) in part.rows.clone().enumerate() {
                let first = (i * self.rows(part) + j) * self.pitch;
                let target = (picture * self.target[0] + y0 + row * sy) * self.target[1] + x0 - before;
                for (x, position) in targets[first..][..self.grid[1]].iter_mut().enumerate() {
                    *position = target + x * sx;
                }
            }
        }
        targets
    }

    /// Some chunks of the planes of a part of `x`, split, to `out`, where they lie as [`Arrangement::offsets`] has it for
    /// that many chunks.
    #[inline(always)]
    pub fn fill<S: Simd, T: Float>(&self, simd: S, x: &[T], part: &Part, chunks: Range<usize>, out: &mut Parts) {
        let out = &mut slices(out)[..];
        let len = self.chunk_len(part);
        let row_len = self.pitch * self.width;
        for (i, &plane) in self.planes.iter().enumerate() {
            let inside = match self.merged {
                true => self.columns_inside(plane[1], 1, row_len / merged_pixel(self.channels)),
                false => self.columns_inside(plane[1], self.step[1], self.pitch),
            };
            for row in 0..self.rows_of_plane(part) {
                let source = self.source_row(part, plane, row).map(|row| {
                    let row_len = self.source[1] * self.pixel;
                    &x[row * row_len..][..row_len]
                });
                for (j, chunk) in chunks.clone().enumerate() {
                    let at = (i * chunks.len() + j) * len + row * row_len;
                    match source {
                        None => zero(simd, out, at..at + row_len),
                        Some(source) if self.merged => self.fill_merged(simd, source, &inside, at, out),
                        Some(source) => self.fill_row(simd, source, &inside, chunk, at, out),
                    }
                }
            }
            let written = self.rows_of_plane(part) * row_len;
            for j in 0..chunks.len() {
                let at = (i * chunks.len() + j) * len;
                zero(simd, out, at + written..at + len);
            }
        }
    }

    /// A chunk of a row's pixels.
    #[inline(always)]
    fn fill_row<S: Simd, T: Float>(
        &self,
        simd: S,
        source: &[T],
        inside: &Inside,
        chunk: usize,
        at: usize,
        out: &mut [&mut [bf16]],
    ) {
        let Inside { positions, first } = inside;
        zero(simd, out, at..at + positions.start * STEP);
        zero(simd, out, at + positions.end * STEP..at + self.pitch * STEP);
        if positions.is_empty() {
            return;
        }
        let (step, channel) = (self.step[1] * self.pixel, chunk * STEP);
        let count = (self.channels - channel).min(STEP);
        let source = &source[first * self.pixel + channel..];
        assert!(source.len() >= (positions.len() - 1) * step + count);
        for (i, position) in positions.clone().enumerate() {
            let at = at + position * STEP;
            if count == STEP {
                // SAFETY: the last position's values are inside the row, as asserted.
                let values = unsafe { &*source.as_ptr().add(i * step).cast::<[T; STEP]>() };
                simd.prefetch_near(values.as_ptr().wrapping_add(AHEAD * step).cast());
                copy_step(simd, values, at, out);
            } else {
                split(simd, &source[i * step..][..count], at, out);
                out.iter_mut().for_each(|part| part[at + count..at + STEP].fill(bf16::ZERO));
            }
        }
    }

    /// A row's pixels, each widened to whole words by zeros.
    #[inline(always)]
    fn fill_merged<S: Simd, T: Float>(
        &self,
        simd: S,
        source: &[T],
        inside: &Inside,
        at: usize,
        out: &mut [&mut [bf16]],
    ) {
        let pixel = merged_pixel(self.channels);
        let count = self.pitch * self.width / pixel;
        let Range { start: first, end: last } = inside.positions.clone();
        zero(simd, out, at..at + count * pixel);
        if first == last {
            return;
        }
        let values = &source[inside.first * self.pixel..][..(last - first) * self.pixel];
        if T::PER_WORD == 2 {
            return self.spread(simd, bytemuck::cast_slice(values), &mut out[0][at + first * pixel..at + last * pixel]);
        }
        let mut narrow: Parts = super::parts(out.len(), values.len());
        split(simd, values, 0, &mut slices(&mut narrow));
        for (out, narrow) in out.iter_mut().zip(&narrow) {
            self.spread(simd, narrow, &mut out[at + first * pixel..at + last * pixel]);
        }
    }

    /// Pixels, one after the other, to their places among zeros.
    #[inline(always)]
    fn spread<S: Simd>(&self, simd: S, pixels: &[bf16], out: &mut [bf16]) {
        let mut done = 0;
        if self.channels == 3 && self.pixel == 3 {
            // As long as as many values as pixels are spread to can be read.
            while 3 * done + 2 * S::LANES <= pixels.len() {
                let (from, to) = (&pixels[3 * done..][..2 * S::LANES], &mut out[4 * done..][..2 * S::LANES]);
                // SAFETY: as many values are there.
                unsafe { simd.spread_pixels(from.as_ptr(), to.as_mut_ptr()) };
                done += S::LANES / 2;
            }
        }
        let (out, pixels) = (&mut out[done * merged_pixel(self.channels)..], &pixels[done * self.pixel..]);
        for (out, values) in out.chunks_exact_mut(merged_pixel(self.channels)).zip(pixels.chunks_exact(self.pixel)) {
            out[..self.channels].copy_from_slice(&values[..self.channels]);
        }
    }
}

/// Values of a step to `out[..][at..]`, split.
#[inline(always)]
pub(super) fn copy_step<S: Simd, T: Float>(simd: S, values: &[T; STEP], at: usize, out: &mut [&mut [bf16]]) {
    if T::PER_WORD == 2 {
        // As they are.
        let to = &mut out[0][at..at + STEP];
        for i in (0..STEP / 2).step_by(S::LANES) {
            // SAFETY: either side is as many words.
            unsafe {
                simd.store(to.as_mut_ptr().cast::<f32>().add(i), simd.load(values.as_ptr().cast::<f32>().add(i)))
            };
        }
    } else {
        split(simd, values, at, out);
    }
}

/// No row.
pub(super) const NONE: usize = usize::MAX;

/// Values that a pixel of few channels takes, so that a whole number of them is a step.
pub(super) fn merged_pixel(channels: usize) -> usize {
    channels.next_power_of_two().max(2)
}

/// Positions of a plane's row that see the source.
#[derive(Clone)]
struct Inside {
    positions: Range<usize>,
    /// Column of the first one's pixel.
    first: usize,
}

impl Arrangement {
    /// Which of `count` positions, `step` columns apart from `column` on, lie inside the source.
    fn columns_inside(&self, column: isize, step: usize, count: usize) -> Inside {
        let up_to = |end: isize| ((end - column).max(0) as usize).div_ceil(step).min(count);
        let (first, last) = (up_to(0), up_to(self.source[1] as isize));
        Inside { positions: first..last.max(first), first: (column + (first * step) as isize).max(0) as usize }
    }
}

/// What is shorter than a step is filled by itself.
#[inline(always)]
fn zero<S: Simd>(simd: S, parts: &mut [&mut [bf16]], range: Range<usize>) {
    for part in parts {
        let (steps, rest) = part[range.clone()].as_chunks_mut::<STEP>();
        for step in steps {
            for i in (0..STEP / 2).step_by(S::LANES) {
                // SAFETY: a step is so many words.
                unsafe { simd.store(step.as_mut_ptr().cast::<f32>().add(i), simd.splat(0.0)) };
            }
        }
        rest.fill(bf16::ZERO);
    }
}
