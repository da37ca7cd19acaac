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
    /// Tiles that have not begun.
    tiles: Range<usize>,
    /// Rows that are left of the one that has, and where the next of them begins, in floats from the first. Where a tile begins takes
    /// divisions, and there may be a few hundred products for a block.
    left: usize,
    at: usize,
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
        PixelRows { first: first.cast(), grid, height, row: width * pixel, pixel, tiles, left: 0, at: 0 }
    }

    /// All of them, or none.
    pub(super) fn when(&self, wanted: bool) -> Self {
        PixelRows { tiles: if wanted { self.tiles.clone() } else { 0..0 }, ..*self }
    }

    /// The next row, to be asked for while `words` words are multiplied; nothing after the last.
    #[inline(always)]
    pub(super) fn next(&mut self, words: usize) -> Stream {
        let floats = self.grid.outputs() * self.pixel;
        match self.next_row() {
            Some(start) => Stream::new(self.first.wrapping_add(start), floats, words),
            None => Stream::new(self.first, 0, 1),
        }
    }

    /// Where it begins.
    #[inline(always)]
    fn next_row(&mut self) -> Option<usize> {
        if self.left == 0 {
            let Place { image, top, left } = self.grid.place(self.tiles.next()?);
            self.at = (image * self.height + top) * self.row + left * self.pixel;
            self.left = self.grid.outputs();
        }
        let start = self.at;
        (self.at, self.left) = (start + self.row, self.left - 1);
        Some(start)
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
            while let Some(start) = rows.next_row() {
                asked[start..][..grid.outputs() * image[2]].iter_mut().for_each(|times| *times += 1);
            }
        }
        assert!(asked.iter().all(|&times| times == 1), "{asked:?}");
    }
}
