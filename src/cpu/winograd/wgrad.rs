//! Winograd's algorithm for the gradient to a 3x3 filter: a fifth or a quarter of the multiplications, with a stride little more than half, as
//! in [`super`].
//!
//! Forward, a tile's outputs are `A^T [(G g G^T) * (B^T d B)] A`. That is linear in the filter `g`, so its gradient is the
//! transposed map of the outputs' gradient: `dg = G^T [sum over tiles of (A dy A^T) * (B^T d B)] G`. The sum, for every
//! pair of channels at each position, is a matrix product over the tiles. With a stride inputs have more slots than filters have values and
//! outputs positions: what belongs to a value is summed over its slots as well.

mod sums;
mod tiles;

use super::Algorithm;
use super::parts::spread;
use crate::cpu::conv::ConvShape;
use crate::cpu::float::Float;
use crate::cpu::gemm::Output;
use crate::cpu::parallel::{for_each, piece};
use crate::cpu::simd::Isa;
use crate::tensor::pool::Scratch;
use sums::Sums;

/// Bytes of transformed tiles that are multiplied together; they are read once, from the last cache. As many as the sums take, if
/// that is more: otherwise adding to these would take longer.
const TRANSFORMED: usize = 4 << 20;
/// Groups of many tiles. Each has sums of its own, so that a thread can multiply what it has transformed itself: what another has written
/// comes from further away. The more groups, the more sums pass through memory; further threads share a group's work.
const GROUPS: usize = 2;
/// So many parts of tiles are enough for that.
const PARTS_OF_GROUPS: usize = 4;
/// Groups of pictures at most, of few channels, whose sums are small.
const GROUPS_OF_PICTURES: usize = 8;
/// Filters whose sums at all positions a task computes, where there are enough such tasks: they stay in L2.
const BLOCK_FILTERS: usize = 32;
const TASKS: usize = 8;

/// With more channels than these, of input or output, sums take longer to transform than few tiles take to multiply; and where
/// few pixels are summed, what is exactly zero should stay so: an optimiser that divides by the size of a gradient would make steps
/// of rounding errors.
const MAX_CHANNELS_OF_FEW: usize = 256;
/// Pixels that are enough for more channels.
const MANY_PIXELS: usize = 512;

/// Whether the gradient to the filter of this convolution is taken by this algorithm.
pub fn suits<T: Float>(isa: Isa, shape: &ConvShape) -> bool {
    // Rounding errors of bf16 are large enough to matter to such an optimiser in any layer.
    let exact = T::PER_WORD == 1 || !super::multiplies::<T>(isa);
    let few = exact && shape.c.max(shape.o) <= MAX_CHANNELS_OF_FEW;
    let enough = few || has_many_pixels(shape);
    // With a stride little more than half of the products are left: tiles multiply all of them sooner.
    let saves = shape.stride == [1, 1] || !isa.has_tiles();
    saves && enough && super::algorithm(isa, shape, shape.c, shape.o) != Algorithm::Direct
}

/// Whether sums go over so many pixels that rounding errors of transformed values do not matter.
pub(super) fn has_many_pixels(shape: &ConvShape) -> bool {
    shape.n * shape.output().iter().product::<usize>() >= MANY_PIXELS
}

/// Gradient to filters `[o, 3, 3, c]`, for what [`suits`] accepts.
pub fn backward_filter<T: Float>(isa: Isa, x: &[T], dy: &[T], shape: &ConvShape, dfilter: &mut [f32]) {
    match super::multiplies::<T>(isa) {
        true => backward_filter_by::<T, T>(isa, x, dy, shape, dfilter),
        false => backward_filter_by::<T, f32>(isa, x, dy, shape, dfilter),
    }
}

/// [`backward_filter`] with products of type `W`.
pub fn backward_filter_by<T: Float, W: Float>(isa: Isa, x: &[T], dy: &[T], shape: &ConvShape, dfilter: &mut [f32]) {
    match shape.stride {
        [2, 2] => backward_filter_of::<T, W, 2>(isa, x, dy, shape, dfilter),
        _ => backward_filter_of::<T, W, 1>(isa, x, dy, shape, dfilter),
    }
}

/// [`backward_filter_by`] of a stride.
fn backward_filter_of<T: Float, W: Float, const STRIDE: usize>(
    isa: Isa,
    x: &[T],
    dy: &[T],
    shape: &ConvShape,
    dfilter: &mut [f32],
) {
    let (c, o) = (shape.c, shape.o);
    shape.check(x.len(), dy.len());
    assert_eq!(dfilter.len(), o * 9 * c);
    let (count, sums) = (Sums::<W, STRIDE>::tiles(shape), Sums::<W, STRIDE>::new(isa, c, o));
    if count == 0 {
        return dfilter.fill(0.0);
    }
    let (all, panels, width) = (Sums::<W, STRIDE>::ALL_VALUES, sums.panels, sums.width);
    let part = sums.tiles_of(TRANSFORMED.max(all * panels * o * width * size_of::<f32>())).min(count);
    let out = &Output::new(dfilter);
    let blocks = o.div_ceil(BLOCK_FILTERS);
    let many = all * c * o >= 2 * count * sums.transformed();
    if many && part >= count && panels * blocks >= TASKS {
        // More sums than tiles, and all tiles at once: some sums of all positions at a time, which need not go to memory.
        let tiles = sums.transform(x, dy, shape, 0..count);
        for_each(panels * blocks, |task| {
            let (panel, block) = (task / blocks, task % blocks);
            let filters = block * BLOCK_FILTERS..o.min((block + 1) * BLOCK_FILTERS);
            // [value][o][column]
            let value_len = spread(filters.len() * width);
            let mut some = Scratch::<f32>::take(all * value_len);
            for (value, some) in some.chunks_exact_mut(value_len).enumerate() {
                sums.multiply(&tiles, [value, panel], filters.clone(), true, some);
            }
            for (i, filter) in filters.enumerate() {
                sums.finish(&some[i * width..], value_len, [filter, panel], out);
            }
        });
        return;
    }
    let groups = if count.div_ceil(part) < PARTS_OF_GROUPS { 1 } else { GROUPS };
    sums.in_groups(groups, out, |group, total| {
        let tiles = piece(group, groups, count);
        let part = tiles.len().div_ceil(tiles.len().div_ceil(part));
        for start in tiles.clone().step_by(part) {
            let some = sums.transform(x, dy, shape, start..tiles.end.min(start + part));
            sums.add(&some, start == tiles.start, total);
        }
    });
}

/// Whether [`backward_filter_by_pictures`] is for this convolution: a picture's tiles take more room than the sums.
pub fn suits_pictures<T: Float>(isa: Isa, shape: &ConvShape) -> bool {
    let image = ConvShape { n: 1, ..*shape };
    let tiles = match super::multiplies::<T>(isa) {
        true => Sums::<T, 1>::tiles(&image),
        false => Sums::<f32, 1>::tiles(&image),
    };
    shape.stride == [1, 1] && suits::<T>(isa, shape) && shape.c * shape.o <= tiles * (shape.c + shape.o)
}

/// [`backward_filter`] where the outputs' gradients are made picture by picture: `make(picture, dy)` is to fill one's. What is made
/// of it stays in cache.
pub fn backward_filter_by_pictures<T: Float>(
    isa: Isa,
    x: &[T],
    shape: &ConvShape,
    make: &(dyn Fn(usize, &mut [T]) + Sync),
    dfilter: &mut [f32],
) {
    assert!(suits_pictures::<T>(isa, shape), "a convolution that this is for");
    match super::multiplies::<T>(isa) {
        true => by_pictures_of::<T, T>(isa, x, shape, make, dfilter),
        false => by_pictures_of::<T, f32>(isa, x, shape, make, dfilter),
    }
}

/// [`backward_filter_by_pictures`] with products of type `W`.
fn by_pictures_of<T: Float, W: Float>(
    isa: Isa,
    x: &[T],
    shape: &ConvShape,
    make: &(dyn Fn(usize, &mut [T]) + Sync),
    dfilter: &mut [f32],
) {
    let image = ConvShape { n: 1, ..*shape };
    let [x_len, dy_len] = [image.h * image.w * image.c, image.output().iter().product::<usize>() * image.o];
    assert!(x.len() == shape.n * x_len && dfilter.len() == shape.o * 9 * shape.c);
    if shape.n == 0 {
        return dfilter.fill(0.0);
    }
    let (count, sums) = (Sums::<W, 1>::tiles(&image), Sums::<W, 1>::new(isa, shape.c, shape.o));
    let part = sums.tiles_of(TRANSFORMED);
    let pictures = shape.n.div_ceil(GROUPS_OF_PICTURES);
    let groups = shape.n.div_ceil(pictures);
    sums.in_groups(groups, &Output::new(dfilter), |group, total| {
        let mut dy = Scratch::<T>::take(dy_len);
        for picture in group * pictures..shape.n.min((group + 1) * pictures) {
            make(picture, &mut dy);
            for start in (0..count).step_by(part) {
                let some = start..count.min(start + part);
                let some = sums.transform(&x[picture * x_len..][..x_len], &dy, &image, some);
                sums.add(&some, picture == group * pictures && start == 0, total);
            }
        }
    });
}
