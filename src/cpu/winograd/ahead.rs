//! Pixels that a transform will read or write. Products leave memory idle, and transforms wait for nothing else: so it is products that ask for
//! what is transformed next.

use super::parts::{Place, TileGrid};
use crate::cpu::gemm::Stream;
use std::ops::Range;

/// The pixels of some tiles, a row of a tile at a time, whose pixels lie together.
pub(super) struct PixelRows {
    first: *const f32,
    grid: TileGrid,
    /// Rows of an image, and floats of such a row and of a pixel.
    height: usize,
    row: usize,
    pixel: usize,
    /// Rows of tiles that are left.
    rows: Range<usize>,
}

impl PixelRows {
    /// Of images with as many pixels as the outputs that the grid is of, from `first` on. Tiles, and rows of a tile, may be beyond those that
    /// there are.
    pub(super) fn new<T>(
        first: *const T,
        [height, width, channels]: [usize; 3],
        grid: TileGrid,
        tiles: Range<usize>,
    ) -> Self {
        let pixel = channels * size_of::<T>() / size_of::<f32>();
        let rows = tiles.start * grid.outputs()..tiles.end * grid.outputs();
        PixelRows { first: first.cast(), grid, height, row: width * pixel, pixel, rows }
    }

    /// These rows, or none of them.
    pub(super) fn when(&self, wanted: bool) -> Self {
        PixelRows { rows: if wanted { self.rows.clone() } else { 0..0 }, ..*self }
    }

    /// The next row, to be asked for while `words` words are multiplied; nothing after the last.
    pub(super) fn next(&mut self, words: usize) -> Stream {
        let Range { start, end } = self.next_floats().unwrap_or(0..0);
        Stream::new(self.first.wrapping_add(start), end - start, words)
    }

    /// Where it lies, in floats from the first.
    fn next_floats(&mut self) -> Option<Range<usize>> {
        let (row, outputs) = (self.rows.next()?, self.grid.outputs());
        let Place { image, top, left } = self.grid.place(row / outputs);
        let start = (image * self.height + top + row % outputs) * self.row + left * self.pixel;
        Some(start..start + outputs * self.pixel)
    }
}

#[cfg(test)]
mod tests {
    use super::super::parts::Extents;
    use super::*;

    #[test]
    fn rows_of_tiles_are_their_pixels() {
        let (n, image) = (2, [8, 12, 3]);
        let extents = Extents { images: n, input: image, output: image };
        let (grid, values) = (TileGrid::new(extents, 4), n * image.iter().product::<usize>());
        let mut asked = vec![0; values];
        // In two pieces, the second of which has what the first has not.
        for tiles in [0..5, 5..grid.count()] {
            let mut rows = PixelRows::new(asked.as_ptr().cast::<f32>(), image, grid, tiles);
            while let Some(floats) = rows.next_floats() {
                asked[floats].iter_mut().for_each(|times| *times += 1);
            }
        }
        assert!(asked.iter().all(|&times| times == 1), "{asked:?}");
    }
}
