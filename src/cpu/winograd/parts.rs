//! The tiles of an output, and how they are ordered by their extents.

use super::axes::IN;
use super::pixel;
use super::points::{OUTPUTS, positions};
use super::transforms::{LANES, axis};
use crate::cpu::conv::ConvShape;
use crate::cpu::float::Float;
use crate::cpu::gemm::TILE_ROWS;
use std::ops::Range;

/// At least so many values, in an odd number of cache lines: what is so far apart, many times over, falls into different sets of
/// a cache, whereas powers of two would all fall into the same.
pub(super) fn spread(values: usize) -> usize {
    (values.div_ceil(LANES) | 1) * LANES
}

/// A tile: its image and its first output.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub image: usize,
    pub top: usize,
    pub left: usize,
}

/// The tiles of a convolution's output.
#[derive(Clone, Copy)]
pub(super) struct TileGrid {
    images: usize,
    /// Tiles of an image, down and across.
    across: [usize; 2],
}

impl TileGrid {
    pub fn new(shape: &ConvShape) -> Self {
        TileGrid { images: shape.n, across: shape.output().map(|extent| extent.div_ceil(OUTPUTS)) }
    }

    pub fn count(&self) -> usize {
        self.images * self.across[0] * self.across[1]
    }

    pub fn place(&self, tile: usize) -> Place {
        let [down, across] = self.across;
        Place { image: tile / (down * across), top: tile / across % down * OUTPUTS, left: tile % across * OUTPUTS }
    }

    /// Where the pixels begin that a tile sees; those on the padding read zeros.
    #[inline(always)]
    pub fn inputs<'a, T: Float>(&self, x: &'a [T], shape: &ConvShape, tile: usize) -> [[&'a [T]; IN]; IN] {
        let Place { image, top, left } = self.place(tile);
        std::array::from_fn(|i| std::array::from_fn(|j| pixel(x, shape, image, [top + i, left + j])))
    }
}

/// Tiles by their extents: whole ones, those at the right edge, at the bottom, and in the corner.
pub(super) const CLASSES: usize = 4;

/// Some tiles of an output, ordered by class.
pub(super) struct Part {
    pub places: Vec<Place>,
    /// The tiles of each class.
    pub classes: [Range<usize>; CLASSES],
    /// Outputs of each class's tiles, down and across.
    pub outputs: [[usize; 2]; CLASSES],
}

impl Part {
    /// All tiles of the output, in `parts` of about the same size.
    pub fn all(shape: &ConvShape, parts: usize) -> Vec<Part> {
        let (output, grid) = (shape.output(), TileGrid::new(shape));
        let [down_edge, right_edge] = std::array::from_fn(|axis| output[axis] - (grid.across[axis] - 1) * OUTPUTS);
        let outputs = [[OUTPUTS; 2], [OUTPUTS, right_edge], [down_edge, OUTPUTS], [down_edge, right_edge]];
        let class_of = |tile: usize| {
            let Place { top, left, .. } = grid.place(tile);
            usize::from(top + OUTPUTS >= output[0]) * 2 + usize::from(left + OUTPUTS >= output[1])
        };
        let part = |i: usize| {
            let mut ordered: Vec<usize> = (i * grid.count() / parts..(i + 1) * grid.count() / parts).collect();
            ordered.sort_by_key(|&tile| class_of(tile));
            let start = |class: usize| ordered.partition_point(|&tile| class_of(tile) < class);
            let classes = std::array::from_fn(|class| start(class)..start(class + 1));
            Part { places: ordered.into_iter().map(|tile| grid.place(tile)).collect(), classes, outputs }
        };
        (0..parts).map(part).collect()
    }

    /// Values of the inputs of one pair of slots.
    pub fn slot_len(&self, channels: usize) -> usize {
        spread(self.places.len() * channels)
    }

    /// Tiles that a position has room for: whole tiles of the micro-kernel.
    pub fn room(&self) -> usize {
        self.places.len().next_multiple_of(TILE_ROWS)
    }

    pub fn class_of(&self, tile: usize) -> usize {
        self.classes.iter().position(|tiles| tiles.contains(&tile)).expect("every tile has a class")
    }

    /// Tiles that have position `[i, j]`, class by class.
    pub fn at<const STRIDE: usize>(&self, [i, j]: [usize; 2]) -> impl Iterator<Item = (usize, Range<usize>)> + '_ {
        self.classes.iter().cloned().enumerate().filter(move |(class, _)| {
            let [down, across] = self.outputs[*class];
            i < positions(axis(STRIDE), down) && j < positions(axis(STRIDE), across)
        })
    }

    /// Which of the tiles that have position `[i, j]` is the first of each class.
    pub fn first_of_classes<const STRIDE: usize>(&self, position: [usize; 2]) -> [usize; CLASSES] {
        let (mut first, mut before) = ([0; CLASSES], 0);
        for (class, tiles) in self.at::<STRIDE>(position) {
            first[class] = before;
            before += tiles.len();
        }
        first
    }
}
