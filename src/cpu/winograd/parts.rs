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

    /// Outputs of a tile along an axis.
    pub fn outputs(&self) -> usize {
        self.outputs
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

/// Tiles by their extents: those at the bottom, whole ones, those at the right edge, and in the corner. What whole tiles have and those of an
/// edge lack, whichever it is, the tiles of a run of classes have.
pub(super) const CLASSES: usize = 4;
/// The class of a tile that is not, or that is, at the bottom, and then at the right edge.
const CLASS: [[usize; 2]; 2] = [[1, 2], [0, 3]];
/// The classes that have what tiles at the bottom do not, or do, and then those at the right edge.
const HAVING: [[Range<usize>; 2]; 2] = [[1..2, 1..3], [0..2, 0..4]];

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
}

impl Part {
    /// All tiles of the output, in `parts` of about the same size.
    pub fn all(extents: Extents, axis: Axis, parts: usize) -> Vec<Part> {
        (0..parts).map(|i| Part::one_of(extents, axis, [i, parts])).collect()
    }

    /// Part `i` of `parts` of [`Part::all`].
    pub fn one_of(extents: Extents, axis: Axis, [i, parts]: [usize; 2]) -> Part {
        let count = TileGrid::new(extents, axis.outputs).count();
        Part::new(extents, axis, piece(i, parts, count), 1)
    }

    /// Some tiles, those of a class filled up to a multiple of `together` by tiles of an image beyond the last.
    pub fn new(extents: Extents, axis: Axis, tiles: Range<usize>, together: usize) -> Part {
        let (output, grid, whole) = (extents.output, TileGrid::new(extents, axis.outputs), axis.outputs);
        let edges @ [down_edge, right_edge] = std::array::from_fn(|i| output[i] - (grid.across[i] - 1) * whole);
        let outputs = [[down_edge, whole], [whole; 2], [whole, right_edge], edges];
        let mut places: Vec<(usize, Place)> = tiles
            .map(|tile| {
                let place = grid.place(tile);
                let [bottom, right] = [place.top + whole > output[0], place.left + whole > output[1]];
                (CLASS[usize::from(bottom)][usize::from(right)], place)
            })
            .collect();
        let beyond = Place { image: extents.images, top: 0, left: 0 };
        let mut counts = [0usize; CLASSES];
        places.iter().for_each(|(class, _)| counts[*class] += 1);
        for (class, count) in counts.into_iter().enumerate() {
            places.extend(std::iter::repeat_n((class, beyond), count.next_multiple_of(together) - count));
        }
        places.sort_by_key(|(class, _)| *class);
        let start = |class: usize| places.partition_point(|(of, _)| *of < class);
        let classes: [Range<usize>; CLASSES] = std::array::from_fn(|class| start(class)..start(class + 1));
        let (class_of, places) = places.into_iter().unzip();
        Part { places, class_of, classes, outputs, edges: edges.map(|outputs| positions(axis, outputs)) }
    }

    /// The tiles that have what those at the bottom have or not, and those at the right edge.
    pub fn tiles_having(&self, [bottom, right]: [bool; 2]) -> Range<usize> {
        let Range { start, end } = HAVING[usize::from(bottom)][usize::from(right)];
        self.classes[start].start..self.classes[end - 1].end
    }

    /// Whether tiles at the bottom have position `[i, j]`, and those at the right edge.
    fn edges_have(&self, [i, j]: [usize; 2]) -> [bool; 2] {
        [i < self.edges[0], j < self.edges[1]]
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
    pub fn tiles_at(&self, position: [usize; 2]) -> Range<usize> {
        self.tiles_having(self.edges_have(position))
    }

    /// Where among those the first tile of a class is, or would be.
    pub fn first_at(&self, position: [usize; 2], class: usize) -> usize {
        self.classes[class].start.saturating_sub(self.tiles_at(position).start)
    }
}
