//! Pixels that a transform will read or write. Products leave memory idle, and transforms wait for nothing else: so it is products that ask for
//! what is transformed next.

use super::parts::{Place, TileGrid};
use crate::cpu::gemm::Stream;
use std::ops::Range;

/// The pixels of some tiles, a row of a tile at a time, whose pixels lie together.
#[derive(Clone, Copy)]
pub(super) struct PixelRows {
    first: *const f32,
    /// Rows, and floats of a row and of one of a tile.
    height: usize,
    row: usize,
    row_of_tile: usize,
    grid: TileGrid,
    /// Tiles before the end, and the rows left of the first of them.
    tiles: [usize; 2],
    rows_left: usize,
}

impl PixelRows {
    /// Of an image of as many pixels as the output that the grid is of, from `first` on.
    pub(super) fn new<T>(
        first: *const T,
        [height, width, channels]: [usize; 3],
        grid: TileGrid,
        tiles: Range<usize>,
    ) -> Self {
        let pixel = channels * size_of::<T>() / size_of::<f32>();
        let [row, row_of_tile] = [width * pixel, grid.outputs() * pixel];
        PixelRows {
            first: first.cast(),
            height,
            row,
            row_of_tile,
            grid,
            tiles: [tiles.start, tiles.end],
            rows_left: grid.outputs(),
        }
    }

    /// The next row, to be asked for while `words` words are multiplied; nothing after the last.
    pub(super) fn next(&mut self, words: usize) -> Stream {
        let [tile, end] = self.tiles;
        if tile >= end {
            return Stream::new(self.first, 0, words);
        }
        let Place { image, top, left } = self.grid.place(tile);
        let row = image * self.height + top + self.grid.outputs() - self.rows_left;
        let start = row * self.row + left * (self.row_of_tile / self.grid.outputs());
        self.rows_left -= 1;
        if self.rows_left == 0 {
            (self.tiles[0], self.rows_left) = (tile + 1, self.grid.outputs());
        }
        Stream::new(self.first.wrapping_add(start), self.row_of_tile, words)
    }
}
