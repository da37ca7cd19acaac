//! Pictures rearranged so that the rows of a tile are equally far apart.
//!
//! A tile of the left side is 16 outputs one after the other, each seen through one tap, and 32 values of the depth. The
//! instruction that loads it takes an address and the distance between rows. So the input is copied once, into planes of pixels
//! in which neighbouring outputs see neighbouring pixels whatever the stride, rows follow each other without a gap, and the padding is
//! written out; then the tile of any tap is the tile of the first one, moved. Positions that belong to no output, at the ends of rows, are
//! computed and dropped. A copy costs one pass over the input, packing the patches would cost one for each tap.
//!
//! Many small pictures lie in turn: a position of each, then the next of each ([`Part::in_turn`]).

mod fill;

use super::super::gather::Gather;
use super::amx::{STEP, TILE};
pub(super) use fill::copy_step;
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
    /// Whether a position of all pictures follows one of all, instead of a picture a picture: then 16 pictures at one place are a tile, none
    /// of which lies between rows, and at an edge all of which see padding at once.
    pub in_turn: bool,
}

impl Part {
    /// Pictures that lie one after the other.
    fn stacked(&self) -> usize {
        if self.in_turn { 1 } else { self.pictures.len() }
    }

    /// Pictures whose positions lie in turn.
    pub fn together(&self) -> usize {
        if self.in_turn { self.pictures.len() } else { 1 }
    }
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
        part.stacked() * self.rows(part) + self.shared
    }

    /// Those rows, each of all pictures in turn.
    fn rows_of_pictures(&self, part: &Part) -> impl Iterator<Item = (usize, usize)> {
        let together = part.together();
        (0..self.rows_of_plane(part)).flat_map(move |row| (0..together).map(move |turn| (row, turn)))
    }

    /// The row of the source, of those of all pictures, that one of a plane sees, if it is not padding; of picture `i` of those in turn.
    fn source_row(&self, part: &Part, plane: [isize; 2], row: usize, i: usize) -> Option<usize> {
        let rows = self.rows(part);
        // Where pictures share rows, those are of zeros.
        let picture = (row / rows).min(part.stacked() - 1);
        let within = (row - picture * rows + part.rows.start) as isize;
        let y = plane[0] + within * self.step[0] as isize;
        let inside = (0..self.source[0] as isize).contains(&y);
        inside.then(|| (part.pictures.start + picture + i) * self.source[0] + y as usize)
    }

    /// Whether every position is a pixel of whole steps.
    pub fn takes_whole_pixels(&self) -> bool {
        !self.merged && self.channels.is_multiple_of(STEP)
    }

    /// Where the pixel begins that each of the first `count` positions of each plane sees, [`NONE`] where that is padding.
    pub fn pixels(&self, part: &Part, count: usize) -> Vec<usize> {
        let mut pixels = vec![NONE; self.planes.len() * count];
        let together = part.together();
        for (&plane, pixels) in self.planes.iter().zip(pixels.chunks_exact_mut(count)) {
            let Inside { positions, first } = self.columns_inside(plane[1], self.step[1], self.pitch);
            for (row, turn) in self.rows_of_pictures(part) {
                let Some(source) = self.source_row(part, plane, row, turn) else { continue };
                let start = (source * self.source[1] + first) * self.pixel;
                let row = &mut pixels[row * self.pitch * together..][..self.pitch * together];
                let inside =
                    row[positions.start * together + turn..].iter_mut().step_by(together).take(positions.len());
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
        (((part.stacked() - 1) * self.rows(part) + part.rows.len() - 1) * self.pitch + self.grid[1]) * part.together()
    }

    /// Values of a chunk of a plane, with room for a whole tile from any output on.
    pub fn chunk_len(&self, part: &Part) -> usize {
        let furthest = self.taps.iter().map(|(_, [y, x])| y * self.pitch + x).max().unwrap_or(0) * part.together();
        let read = ((self.positions(part) + STEP).next_multiple_of(TILE) + furthest) * self.width + self.steps * STEP;
        let written = self.rows_of_plane(part) * self.pitch * part.together() * self.width;
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
    pub fn tap(&self, tap: usize, part: &Part) -> (usize, usize) {
        let (plane, [y, x]) = self.taps[tap];
        (plane, (y * self.pitch + x) * part.together())
    }

    /// The tap of each step of the depth, and where its left side begins for the first position: by chunks, then by taps, so that what
    /// one tap reads the next finds in L1.
    pub fn offsets(&self, part: &Part) -> Vec<(usize, usize)> {
        let len = self.chunk_len(part);
        let at = |chunk: usize, tap: usize, step: usize| {
            let (plane, moved) = self.tap(tap, part);
            (tap, (plane * self.chunks + chunk) * len + moved * self.width + step * STEP)
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
            let (stacked, turn) = if part.in_turn { (0, i) } else { (i, 0) };
            for (j, row) in part.rows.clone().enumerate() {
                let first = (stacked * self.rows(part) + j) * self.pitch * part.together() + turn;
                let target = (picture * self.target[0] + y0 + row * sy) * self.target[1] + x0 - before;
                let positions = targets[first..].iter_mut().step_by(part.together()).take(self.grid[1]);
                for (x, position) in positions.enumerate() {
                    *position = target + x * sx;
                }
            }
        }
        targets
    }

    /// Where the rows of outputs begin, with the row of the grid of each, and how many positions they are.
    pub fn rows_of_outputs(&self, part: &Part) -> (impl Iterator<Item = (usize, usize)>, usize) {
        let (rows, row_len) = (self.rows(part), self.pitch * part.together());
        let within = part.rows.clone().enumerate();
        let starts =
            (0..part.stacked()).flat_map(move |i| within.clone().map(move |(j, row)| ((i * rows + j) * row_len, row)));
        (starts, self.grid[1] * part.together())
    }

    /// Positions of a row of a plane.
    pub fn row_len(&self, part: &Part) -> usize {
        self.pitch * part.together()
    }

    /// Taps as bits, by row of the grid and by column: those that see the source from there, if it is inside in the other direction. None
    /// are told apart where taps are rows or there are more of them than bits.
    pub fn seen(&self) -> [Vec<u64>; 2] {
        std::array::from_fn(|axis| {
            let sees = |at: usize| {
                if self.merged || self.taps.len() > u64::BITS as usize {
                    return u64::MAX;
                }
                let inside = |(plane, place): &(usize, [usize; 2])| {
                    let at = self.planes[*plane][axis] + ((at + place[axis]) * self.step[axis]) as isize;
                    (0..self.source[axis] as isize).contains(&at)
                };
                self.taps.iter().enumerate().fold(0, |seen, (i, tap)| seen | u64::from(inside(tap)) << i)
            };
            (0..self.grid[axis]).map(sees).collect()
        })
    }

    /// What share of the products of whole pictures are left when none is of positions between rows and of padding.
    pub fn share_in_turn(&self) -> f64 {
        let seen = self.seen();
        let within = |tap: usize, axis: usize| seen[axis].iter().filter(|&taps| taps >> tap & 1 == 1).count();
        let taps = self.taps.len().min(u64::BITS as usize);
        let needed: usize = (0..taps).map(|tap| within(tap, 0) * within(tap, 1)).sum();
        let all = taps * (self.grid[0] + self.span - self.shared) * self.pitch;
        needed as f64 / all as f64
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
