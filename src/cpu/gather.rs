//! Convolution geometry: where the rows of an implicit matrix lie in memory.
//!
//! Convolution is a matrix product whose left side, the patches, is never built. Row `m` of it belongs to one output
//! position; it consists of one run of contiguous floats for each tap of the filter (the channels of one pixel), or of
//! zeros where the tap falls on the padding. A [`Gather`] computes where those runs begin. The forward pass, the gradient
//! to the input, and the gradient to the filter all read their activations through it; a plain matrix is the case of one
//! tap.

use std::ops::Range;

/// Offset that stands for a run of zeros.
pub const PADDING: usize = usize::MAX;

/// The rows of an implicit matrix, and where the results of those rows go.
#[derive(Clone, Debug)]
pub struct Gather {
    /// Images.
    pub images: usize,
    /// Rows and columns of positions that are computed, in each image.
    pub grid: [usize; 2],
    /// Rows and columns of the source image.
    pub source: [usize; 2],
    /// Floats between neighbouring pixels of the source.
    pub pixel: usize,
    /// Contiguous floats that a tap reads, `pixel` of them but for merged taps.
    pub run: usize,
    /// Source rows and columns between neighbouring positions.
    pub step: [usize; 2],
    /// Displacement of each tap from `position * step`.
    pub taps: Vec<[isize; 2]>,
    /// Rows and columns of the image that results are written to.
    pub target: [usize; 2],
    /// Rows and columns between neighbouring positions there.
    pub target_step: [usize; 2],
    /// The first of them.
    pub target_start: [usize; 2],
}

/// Positions from which no tap falls on padding: what is found for each tap of the others is the same there for all.
pub struct Inside {
    /// Rows and columns of the source.
    along: [Range<isize>; 2],
    /// Where each tap begins, in floats from the position.
    pub taps: Vec<isize>,
}

impl Inside {
    /// Where in the source a position is, in floats, if it is one of these.
    #[inline]
    pub fn start(&self, gather: &Gather, [n, y, x]: [usize; 3]) -> Option<usize> {
        let (y, x) = (y * gather.step[0], x * gather.step[1]);
        let inside = self.along[0].contains(&(y as isize)) && self.along[1].contains(&(x as isize));
        inside.then(|| ((n * gather.source[0] + y) * gather.source[1] + x) * gather.pixel)
    }
}

impl Gather {
    /// Rows of a plain row-major matrix.
    pub fn matrix(rows: usize, columns: usize) -> Self {
        Gather {
            images: 1,
            grid: [1, rows],
            source: [1, rows],
            pixel: columns,
            run: columns,
            step: [1, 1],
            taps: vec![[0, 0]],
            target: [1, rows],
            target_step: [1, 1],
            target_start: [0, 0],
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.images * self.grid[0] * self.grid[1]
    }

    /// Length of a row.
    pub fn depth(&self) -> usize {
        self.taps.len() * self.run
    }

    /// Floats in the source.
    pub fn source_len(&self) -> usize {
        self.images * self.source[0] * self.source[1] * self.pixel
    }

    /// Pixels in the target.
    pub fn target_rows(&self) -> usize {
        self.images * self.target[0] * self.target[1]
    }

    /// Image, row and column of each of some rows, which are not found by a division each.
    #[inline]
    pub fn positions(&self, rows: Range<usize>) -> impl Iterator<Item = [usize; 3]> + use<> {
        let [gh, gw] = self.grid;
        let mut next = match gh * gw {
            0 => [0; 3],
            image => [rows.start / image, rows.start / gw % gh, rows.start % gw],
        };
        rows.map(move |_| {
            let position = next;
            next[2] += 1;
            if next[2] == gw {
                next = if next[1] + 1 == gh { [next[0] + 1, 0, 0] } else { [next[0], next[1] + 1, 0] };
            }
            position
        })
    }

    /// Row of the target that the row at a position is written to.
    #[inline]
    pub fn target_row(&self, [n, y, x]: [usize; 3]) -> usize {
        let ([y0, x0], [sy, sx]) = (self.target_start, self.target_step);
        (n * self.target[0] + y0 + y * sy) * self.target[1] + x0 + x * sx
    }

    /// Where in the source each tap of the row at a position begins, in the order of the taps. Every offset but [`PADDING`] leaves room
    /// for a run, which [`Gather::check`] has made sure of.
    #[inline]
    pub fn offsets(&self, [n, y, x]: [usize; 3]) -> impl Iterator<Item = usize> + '_ {
        let [height, width] = self.source;
        let (y, x) = ((y * self.step[0]) as isize, (x * self.step[1]) as isize);
        self.taps.iter().map(move |&[dy, dx]| {
            // A negative coordinate becomes a huge unsigned one: one comparison rejects both sides.
            let (y, x) = ((y + dy) as usize, (x + dx) as usize);
            if y < height && x < width { ((n * height + y) * width + x) * self.pixel } else { PADDING }
        })
    }

    /// The positions whose taps all see the source.
    pub fn inside(&self) -> Inside {
        let along = |axis: usize| {
            let taps = self.taps.iter().map(|tap| tap[axis]);
            -taps.clone().min().unwrap_or(0)..self.source[axis] as isize - taps.max().unwrap_or(0)
        };
        let from_position = |[dy, dx]: &[isize; 2]| (dy * self.source[1] as isize + dx) * self.pixel as isize;
        Inside { along: [along(0), along(1)], taps: self.taps.iter().map(from_position).collect() }
    }

    /// The runs of `source` that those of the row at a position are, in the order of the taps; for padding `zeros`, which are as long.
    #[inline]
    pub fn runs<'a, T>(
        &'a self,
        position: [usize; 3],
        source: &'a [T],
        zeros: &'a [T],
    ) -> impl Iterator<Item = &'a [T]> {
        self.offsets(position).map(move |offset| if offset == PADDING { zeros } else { &source[offset..][..self.run] })
    }

    /// Panics unless a source of `source` floats and a target of `target` rows fit every offset this can produce.
    pub fn check(&self, source: usize, target: usize) {
        assert!(source >= self.source_len() && target >= self.target_rows(), "buffers fit the geometry");
        assert!(self.pixel > 0, "pixels have channels");
        for (axis, start) in self.target_start.into_iter().enumerate() {
            let last = start + (self.grid[axis].max(1) - 1) * self.target_step[axis];
            assert!(self.rows() == 0 || last < self.target[axis], "targets lie inside the image");
        }
        // A merged run goes on into the next pixels of its row; the last position must leave room for it.
        let pixels = self.run.div_ceil(self.pixel) as isize;
        let reach = ((self.grid[1].max(1) - 1) * self.step[1]) as isize;
        let furthest = self.taps.iter().map(|t| t[1]).max().unwrap_or(0);
        assert!(pixels == 1 || reach + furthest + pixels <= self.source[1] as isize, "runs end inside their row");
    }
}
