//! Tiles of a stride of two, which end where the image does: others would be a third larger than images of 14 or 7 outputs.

use super::super::axes::*;
use super::super::parts::{Extents, Part, Place};
use super::super::tiles::{self, Inputs};
use super::super::transforms::*;
use super::super::window::Window;
use super::sums::Layout;
use crate::cpu::float::Float;
use crate::cpu::gemm::Output;
use crate::cpu::parallel::for_each;
use crate::cpu::simd::{Isa, Simd, Task, dispatch};
use std::ops::Range;

const STRIDE: usize = 2;
/// Outputs of a whole tile along an axis.
pub(super) const WHOLE: usize = axis::<f32>(STRIDE).outputs;
/// Tiles a task transforms.
const BLOCK_TILES: usize = 8;

/// Transforms the tiles of a part, of inputs and of gradients, to as much room as the layout says. A tile has the slots and positions of its
/// extents alone, and the others of its values are not written.
pub(super) fn transform<T: Float, W: Float>(
    isa: Isa,
    [x, dy]: [&[T]; 2],
    extents: Extents,
    part: &Part,
    layout: Layout,
    [to, gradients]: [&Output<W>; 2],
) {
    assert_eq!(W::PER_WORD, 1, "the tiles of a word would need the same extents");
    let (count, width) = (part.places.len(), layout.width);
    let slot = layout.inputs(count);
    let row = Input::<W, STRIDE, WHOLE>::RESULTS * slot;
    let inputs = tiles::Layout { row, slot, tile: width, block: count * width, words: width };
    for_each(count.div_ceil(BLOCK_TILES), |block| {
        let tiles = block * BLOCK_TILES..count.min((block + 1) * BLOCK_TILES);
        let (of_inputs, channels) = (tiles.clone(), 0..extents.input[2]);
        dispatch(isa, Inputs::<T, W, STRIDE> { x, extents, part, tiles: of_inputs, channels, to, layout: inputs });
        dispatch(isa, Gradients { dy, extents, part, tiles, layout, to: gradients });
    });
}

/// `A dy A^T` of some tiles.
struct Gradients<'a, T, W> {
    dy: &'a [T],
    extents: Extents,
    part: &'a Part,
    tiles: Range<usize>,
    layout: Layout,
    to: &'a Output<W>,
}

impl<T: Float, W: Float> Task for Gradients<'_, T, W> {
    type Output = ();
    const BF16: bool = T::PER_WORD > 1;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (o, step) = (self.extents.output[2], self.layout.gradients(self.part.places.len()));
        assert!(o.is_multiple_of(S::LANES), "channels are whole vectors");
        let mut rooms = [Room::new(), Room::new()];
        let start = |tile: usize, channel: usize| {
            self.to.pointer().wrapping_add(tile * self.layout.word_of_gradients + channel)
        };
        for tile in self.tiles.clone() {
            let following = self.tiles.end.min(tile + 2) - 1;
            let (window, next) = (&self.window(tile), &self.window(following));
            let [down, across] = self.part.outputs[self.part.class_of(tile)];
            for channel in (0..o).step_by(S::LANES) {
                let pixels = Pixels { window, next: (next, WHOLE), channel };
                let after = if channel + S::LANES < o { start(tile, channel + S::LANES) } else { start(following, 0) };
                let to =
                    Plane { first: start(tile, channel), steps: [Gradient::<W, STRIDE, WHOLE>::RESULTS * step, step] };
                with_outputs!(@ axis::<W>(STRIDE), down, DOWN {
                    with_outputs!(@ axis::<W>(STRIDE), across, ACROSS {
                        // SAFETY: pixels have `o` values; there is room for each tile at each position, and these are this task's.
                        unsafe {
                            transform_words::<Gradient<W, STRIDE, DOWN>, Gradient<W, STRIDE, ACROSS>, S, W>(
                                simd, [pixels; 2], &mut rooms, to, after,
                            );
                        }
                    }, 1 2 3)
                }, 1 2 3);
            }
        }
    }
}

impl<T: Float, W: Float> Gradients<'_, T, W> {
    /// The gradients of a tile's outputs.
    #[inline(always)]
    fn window(&self, tile: usize) -> Window<'_, T> {
        let Place { image, top, left } = self.part.places[tile];
        let first = [top as isize, left as isize];
        Window::new(self.dy, image, self.extents.output, first, WHOLE)
    }
}
