//! Winograd's convolution: a 3x3 filter of stride one at a fifth of the multiplications, with a stride about half, the network's first
//! layer two fifths.
//!
//! Lavin and Gray, "Fast algorithms for convolutional neural networks", 2016. In F(7x7, 3x3) a tile of 7x7 outputs needs 9x9
//! inputs `d` and is `A^T [(G g G^T) * (B^T d B)] A`, where `*` is elementwise: 81 products instead of 441. Summed over channels,
//! each of the 81 positions is a matrix product of tiles and channels with channels and filters. The transforms cost the more the
//! fewer filters share a transformed input, and the more points there are, the more of the rounding they amplify: with bf16, and with
//! a stride of two, tiles are of 4x4.
//!
//! Whether it is used depends on the filter alone, never on the batch: a picture's features must not depend on its company.
//! Transforms are f32. Products of bf16 are taken as they are where the machine has an instruction for them, else they are f32 too.

mod ahead;
mod axes;
pub mod blocks;
mod few;
mod matrices;
mod pairs;
mod parts;
mod points;
pub mod rows;
pub mod strips;
mod tiles;
mod tilings;
mod transforms;
pub mod wgrad;
mod window;

use super::conv::ConvShape;
use super::float::Float;
use super::gemm::Epilogue;
use super::simd::Isa;
use blocks::BlockFilter;
use parts::{Extents, TileGrid};
use rows::RowFilter;
use strips::StripFilter;

/// How a convolution from `c` to `o` channels runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// As a product over the patches.
    Direct,
    /// By [`blocks`].
    Blocks,
    /// By [`strips`].
    Strips,
    /// By [`rows`].
    Rows,
}

/// The algorithm for a convolution of this geometry from `c` to `o` channels, but for the first layer's. Winograd's is for 3x3
/// filters, padding one, and whole vectors of channels.
pub fn algorithm(isa: Isa, shape: &ConvShape, c: usize, o: usize) -> Algorithm {
    let lanes = isa.lanes();
    let fits =
        [shape.kh, shape.kw] == [3, 3] && shape.padding == [1, 1] && c.is_multiple_of(lanes) && o.is_multiple_of(lanes);
    match (shape.stride, c.max(o)) {
        _ if !fits => Algorithm::Direct,
        ([1, 1], ..=blocks::MAX_CHANNELS) => Algorithm::Blocks,
        ([1, 1], ..=strips::MAX_CHANNELS) => Algorithm::Strips,
        ([2, 2], ..=strips::MAX_CHANNELS) => Algorithm::Strips,
        _ => Algorithm::Direct,
    }
}

/// Whether the machine has an instruction for products of this type; else values are widened first, and products f32.
pub fn multiplies<T: Float>(isa: Isa) -> bool {
    T::PER_WORD == 1 || isa.multiplies_pairs()
}

/// Blocks of fewer tiles take the filters of strips: with products of f32 filters that are transformed beforehand are nine times as large,
/// and reading them takes longer than making them. Both sum the same values in the same order, to the same bits.
const FEW_TILES: usize = 24;

/// Whether what [`blocks`] are for has so few tiles.
fn has_few_tiles<W: Float>(shape: &ConvShape) -> bool {
    W::PER_WORD == 1 && TileGrid::new(Extents::of(shape), transforms::axis::<W>(1).outputs).count() < FEW_TILES
}

/// Filters for Winograd's algorithm whose products are of type `W`.
pub enum Winograd<W> {
    /// Along rows alone.
    Rows(RowFilter<W>),
    /// Transformed beforehand; the others, where there are any, for few tiles.
    Blocks(BlockFilter<W>, Option<StripFilter<W>>),
    /// Transformed when they are used.
    Strips(StripFilter<W>),
}

impl<W: Float> Winograd<W> {
    pub(super) fn new(isa: Isa, algorithm: Algorithm, filter: &[f32], shape: &ConvShape) -> Self {
        match algorithm {
            Algorithm::Rows => Winograd::Rows(RowFilter::new(isa, filter, shape)),
            Algorithm::Strips => Winograd::Strips(StripFilter::new(isa, filter, shape.o, shape.c)),
            _ => Winograd::Blocks(
                BlockFilter::new(isa, filter, shape.o, shape.c),
                (W::PER_WORD == 1).then(|| StripFilter::new(isa, filter, shape.o, shape.c)),
            ),
        }
    }

    /// For a convolution of this shape alone.
    pub(super) fn for_backward_input(isa: Isa, algorithm: Algorithm, filter: &[f32], shape: &ConvShape) -> Self {
        match algorithm {
            Algorithm::Blocks if !has_few_tiles::<W>(shape) => {
                Winograd::Blocks(BlockFilter::for_backward_input(isa, filter, shape.o, shape.c), None)
            }
            _ => Winograd::Strips(StripFilter::for_backward_input(isa, filter, shape.o, shape.c)),
        }
    }

    /// See [`super::conv::PackedFilter::pictures_together`].
    pub(super) fn pictures_together(&self, shape: &ConvShape) -> usize {
        match self {
            Winograd::Rows(_) => 1,
            Winograd::Blocks(..) => {
                let picture = Extents { images: 1, ..Extents::of(shape) };
                let tiles = TileGrid::new(picture, transforms::axis::<W>(1).outputs);
                blocks::ENOUGH_TILES.div_ceil(tiles.count().max(1))
            }
            Winograd::Strips(_) => shape.n,
        }
    }

    pub(super) fn forward<T: Float>(&self, x: &[T], shape: &ConvShape, epilogue: Epilogue<T>, y: &mut [T]) {
        match self {
            Winograd::Rows(filter) => rows::forward(x, filter, shape, epilogue, y),
            Winograd::Blocks(_, Some(filter)) if has_few_tiles::<W>(shape) => {
                strips::forward(x, filter, shape, epilogue, y)
            }
            Winograd::Blocks(filter, _) => blocks::forward(x, filter, shape, epilogue, y),
            Winograd::Strips(filter) => strips::forward(x, filter, shape, epilogue, y),
        }
    }

    /// Gradient to the input by [`Winograd::for_backward_input`] of a convolution of stride one or two, in place of what `dx` holds or added
    /// to it.
    pub(super) fn backward_input<T: Float>(&self, dy: &[T], shape: &ConvShape, dx: &mut [T], accumulate: bool) {
        let epilogue = Epilogue::adding(accumulate);
        match self {
            Winograd::Strips(filter) if shape.stride == [2, 2] => {
                strips::backward_input(dy, filter, shape, epilogue, dx)
            }
            filter => filter.forward(dy, &ConvShape { c: shape.o, o: shape.c, ..*shape }, epilogue, dx),
        }
    }
}

/// Panics unless the operands of a convolution fit each other; the filter is from `c` to `o` channels.
fn check_operands<T: Float>(shape: &ConvShape, [c, o]: [usize; 2], x: &[T], epilogue: &Epilogue<T>, y: &[T]) {
    assert_eq!([shape.c, shape.o], [c, o], "the filter's channels");
    shape.check(x.len(), y.len());
    epilogue.check(shape.o, y.len());
}
