//! Convolution geometry: where the rows of an implicit matrix lie in memory.
//!
//! Convolution is a matrix product whose left side, the patches, is never built. Row `m` of it belongs to one output
//! position; it consists of one run of contiguous floats for each tap of the filter (the channels of one pixel), or of
//! zeros where the tap falls on the padding. A [`Gather`] computes where those runs begin. The forward pass, the gradient
//! to the input, and the gradient to the filter all read their activations through it; a plain matrix is the case of one
//! tap.

use std::ops::Range;

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

/// The runs of `source` that the rows of a [`Gather`] consist of.
pub struct Runs<'a, T> {
    gather: &'a Gather,
    source: &'a [T],
    /// What a tap reads that falls on padding, as long as a run.
    zeros: &'a [T],
    /// Rows and columns of the source from where no tap does.
    inside: [Range<isize>; 2],
    /// How far each tap's run is from the position's own pixel, in floats.
    distances: Vec<isize>,
}

impl<'a, T> Runs<'a, T> {
    /// Those of the row at a position, in the order of the taps.
    #[inline]
    pub fn at(&self, [n, y, x]: [usize; 3]) -> impl Iterator<Item = &'a [T]> {
        let Gather { source: [height, width], step: [sy, sx], pixel, run, ref taps, .. } = *self.gather;
        let (source, zeros) = (self.source, self.zeros);
        let start = ((n * height + y * sy) * width + x * sx) * pixel;
        let (y, x) = ((y * sy) as isize, (x * sx) as isize);
        let inside = self.inside[0].contains(&y) && self.inside[1].contains(&x);
        taps.iter().zip(&self.distances).map(move |(&[dy, dx], distance)| {
            // A negative coordinate becomes a huge unsigned one: one comparison rejects both sides.
            match inside || ((y + dy) as usize) < height && ((x + dx) as usize) < width {
                true => &source[start.wrapping_add_signed(*distance)..][..run],
                false => zeros,
            }
        })
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

    /// The runs of `source`, for which [`Gather::check`] has made sure that there are any; `zeros` are as long as one.
    pub fn runs<'a, T>(&'a self, source: &'a [T], zeros: &'a [T]) -> Runs<'a, T> {
        let inside = [0, 1].map(|axis| {
            let taps = || self.taps.iter().map(|tap| tap[axis]);
            -taps().min().unwrap_or(0)..self.source[axis] as isize - taps().max().unwrap_or(0)
        });
        let distance = |[dy, dx]: &[isize; 2]| (dy * self.source[1] as isize + dx) * self.pixel as isize;
        Runs { gather: self, source, zeros, inside, distances: self.taps.iter().map(distance).collect() }
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
