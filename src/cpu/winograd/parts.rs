//! The tiles of an output, and how they are ordered by their extents.

use super::points::{Axis, positions};
use super::transforms::LANES;
use crate::cpu::conv::ConvShape;
use crate::cpu::gemm::TILE_ROWS;
use crate::cpu::parallel::piece;
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

/// Bytes of a convolution's inputs, or of its outputs, up to which threads find them in their own caches.
const NEAR: usize = 2 << 20;

/// What a convolution reads and what it writes.
#[derive(Clone, Copy)]
pub(super) struct Extents {
    pub images: usize,
    /// Rows, columns and channels.
    pub input: [usize; 3],
    pub output: [usize; 3],
}

impl Extents {
    pub fn of(shape: &ConvShape) -> Self {
        let [oh, ow] = shape.output();
        Extents { images: shape.n, input: [shape.h, shape.w, shape.c], output: [oh, ow, shape.o] }
    }

    /// Whether inputs or outputs, of type `T`, come from further than the caches of the threads themselves. If not, they come as fast
    /// without being asked for, and requests take the places of loads.
    pub fn are_far<T>(&self) -> bool {
        let values = [self.input, self.output].map(|extents| self.images * extents.iter().product::<usize>());
        values.iter().max().is_some_and(|values| values * size_of::<T>() > NEAR)
    }

    /// Of the gradient to the input.
    pub fn turned(self) -> Self {
        Extents { input: self.output, output: self.input, ..self }
    }
}

/// The tiles of a convolution's output.
#[derive(Clone, Copy)]
pub(super) struct TileGrid {
    images: usize,
    /// Tiles of an image, down and across.
    across: [usize; 2],
    /// Outputs of a tile along an axis.
    outputs: usize,
}

impl TileGrid {
    pub fn new(Extents { images, output: [h, w, _], .. }: Extents, outputs: usize) -> Self {
        TileGrid { images, across: [h, w].map(|extent| extent.div_ceil(outputs)), outputs }
    }

    pub fn count(&self) -> usize {
        self.images * self.across[0] * self.across[1]
    }

    pub fn place(&self, tile: usize) -> Place {
        let [down, across] = self.across;
        let (top, left) = (tile / across % down * self.outputs, tile % across * self.outputs);
        Place { image: tile / (down * across), top, left }
    }
}

/// Tiles by their extents: whole ones, those at the right edge, at the bottom, and in the corner.
pub(super) const CLASSES: usize = 4;

/// Some tiles of an output, ordered by class.
pub(super) struct Part {
    pub places: Vec<Place>,
    /// The class of each.
    class_of: Vec<usize>,
    /// The tiles of each class.
    classes: [Range<usize>; CLASSES],
    /// Outputs of each class's tiles, down and across.
    pub outputs: [[usize; 2]; CLASSES],
    /// Positions of the tiles at the bottom, down, and of those at the right, across.
    edges: [usize; 2],
    /// The tiles that have a position, by [`Part::kind`].
    pub tiles: [Vec<usize>; CLASSES],
    /// Where among those the first of each class is.
    firsts: [[usize; CLASSES]; CLASSES],
}

impl Part {
    /// All tiles of the output, in `parts` of about the same size.
    pub fn all(extents: Extents, axis: Axis, parts: usize) -> Vec<Part> {
        (0..parts).map(|i| Part::one_of(extents, axis, [i, parts])).collect()
    }

    /// Part `i` of `parts` of [`Part::all`].
    pub fn one_of(extents: Extents, axis: Axis, [i, parts]: [usize; 2]) -> Part {
        let count = TileGrid::new(extents, axis.outputs).count();
        Part::new(extents, axis, piece(i, parts, count))
    }

    /// Some tiles.
    pub fn new(extents: Extents, axis: Axis, tiles: Range<usize>) -> Part {
        let (output, grid, whole) = (extents.output, TileGrid::new(extents, axis.outputs), axis.outputs);
        let [down_edge, right_edge] = std::array::from_fn(|i| output[i] - (grid.across[i] - 1) * whole);
        let outputs = [[whole; 2], [whole, right_edge], [down_edge, whole], [down_edge, right_edge]];
        let mut places: Vec<(usize, Place)> = tiles
            .map(|tile| {
                let place = grid.place(tile);
                let [bottom, right] = [place.top + whole > output[0], place.left + whole > output[1]];
                (usize::from(bottom) * 2 + usize::from(right), place)
            })
            .collect();
        places.sort_by_key(|(class, _)| *class);
        let start = |class: usize| places.partition_point(|(of, _)| *of < class);
        let classes: [Range<usize>; CLASSES] = std::array::from_fn(|class| start(class)..start(class + 1));
        // A kind of positions lacks the tiles of an edge, or of the other, or of both, or of none.
        let has = |kind: usize, class: &usize| class & !kind == 0;
        let tiles = std::array::from_fn(|kind| {
            (0..CLASSES).filter(|class| has(kind, class)).flat_map(|class| classes[class].clone()).collect()
        });
        let firsts = std::array::from_fn(|kind| {
            std::array::from_fn(|class| {
                (0..class).filter(|class| has(kind, class)).map(|class| classes[class].len()).sum()
            })
        });
        let (class_of, places) = places.into_iter().unzip();
        let edges = [down_edge, right_edge].map(|outputs| positions(axis, outputs));
        Part { places, class_of, classes, outputs, edges, tiles, firsts }
    }

    /// Which edges' tiles have position `[i, j]`: 1 for those at the right, 2 for those at the bottom.
    pub fn kind(&self, [i, j]: [usize; 2]) -> usize {
        usize::from(i < self.edges[0]) * 2 + usize::from(j < self.edges[1])
    }

    /// Tiles that a position has room for: whole tiles of the micro-kernel.
    pub fn room(&self) -> usize {
        self.places.len().next_multiple_of(TILE_ROWS)
    }

    pub fn class_of(&self, tile: usize) -> usize {
        self.class_of[tile]
    }

    /// The tiles of each class.
    pub fn classes(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        self.classes.iter().cloned()
    }

    /// The tiles that have a position.
    pub fn tiles_at(&self, position: [usize; 2]) -> &[usize] {
        &self.tiles[self.kind(position)]
    }

    /// Where among those the first tile of a class is, or would be.
    pub fn first_at(&self, position: [usize; 2], class: usize) -> usize {
        self.firsts[self.kind(position)][class]
    }
}
