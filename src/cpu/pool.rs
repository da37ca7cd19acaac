//! Pooling over `[n, h, w, c]`.

use super::float::Float;
use super::parallel::for_each_of;
use super::simd::{Isa, Simd, Task, dispatch, vectorised};
use crate::tensor::pool::Scratch;
use rayon::prelude::*;
use std::ops::Range;

/// Extents of a max pooling; padding is never the maximum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct PoolShape {
    /// Images.
    pub n: usize,
    /// Input rows.
    pub h: usize,
    /// Input columns.
    pub w: usize,
    /// Channels.
    pub c: usize,
    /// Rows and columns of the window.
    pub kernel: usize,
    /// Rows and columns between windows.
    pub stride: usize,
    /// Rows and columns around the input; at most half the window.
    pub padding: usize,
}

impl PoolShape {
    /// Output rows and columns.
    pub fn output(&self) -> [usize; 2] {
        [self.h, self.w].map(|extent| (extent + 2 * self.padding - self.kernel) / self.stride + 1)
    }

    /// Input coordinates along one axis that window `i` covers.
    fn covered(&self, i: usize, extent: usize) -> Range<usize> {
        let first = i * self.stride;
        first.saturating_sub(self.padding)..(first + self.kernel - self.padding).min(extent)
    }

    /// The same, with their place in the window.
    fn covered_places(&self, i: usize, extent: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (first, padding) = (i * self.stride, self.padding);
        self.covered(i, extent).map(move |p| (p + padding - first, p))
    }

    /// Input rows that a row of windows covers.
    pub(super) fn rows(&self, row: usize) -> Range<usize> {
        self.covered(row, self.h)
    }

    /// Windows along one axis that cover input coordinate `p`, with its place in each.
    fn covering(&self, p: usize, windows: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (kernel, stride, position) = (self.kernel, self.stride, p + self.padding);
        let first = (position + 1).saturating_sub(kernel).div_ceil(stride);
        let last = (position / stride + 1).min(windows);
        (first..last).map(move |window| (position - window * stride, window))
    }
}

/// Maxima of windows. NaN is greater than any number, as in PyTorch.
pub fn max_pool<T: Float>(x: &[T], shape: &PoolShape, y: &mut [T]) {
    let ([oh, ow], row_len) = (shape.output(), shape.w * shape.c);
    y.par_chunks_mut(ow * shape.c).enumerate().for_each(|(row, y)| {
        let image = &x[row / oh * shape.h * row_len..][..shape.h * row_len];
        max_pool_row(&image[shape.rows(row % oh).start * row_len..], shape, row % oh, y);
    });
}

/// [`max_pool`] of images that `compute(image, rows, out)` gives some rows of, `together` at a time: they stay in L2 until they are pooled.
pub(super) fn max_pool_as_computed<T: Float>(
    shape: &PoolShape,
    together: usize,
    y: &mut [T],
    compute: impl Fn(usize, Range<usize>, &mut [T]) + Sync,
) {
    let ([windows, windows_across], row_len) = (shape.output(), shape.w * shape.c);
    let pooled_len = windows_across * shape.c;
    assert_eq!(y.len(), shape.n * windows * pooled_len);
    // Where tasks meet, rows that both need are computed twice.
    let parts = rayon::current_num_threads().div_ceil(shape.n.max(1)).min(windows.div_ceil(together / 2)).max(1);
    let part = windows.div_ceil(parts);
    let pieces = y
        .chunks_mut(windows * pooled_len)
        .enumerate()
        .flat_map(|(image, y)| y.chunks_mut(part * pooled_len).enumerate().map(move |(i, y)| (image, i * part, y)));
    for_each_of(pieces, |(image, first, y)| {
        // Rows that are there, from the first that is still needed on.
        let mut kept = Scratch::<T>::take((together + shape.kernel) * row_len);
        let mut there = 0..0;
        let end = shape.rows((first + part).min(windows) - 1).end;
        for (row, y) in (first..).zip(y.chunks_exact_mut(pooled_len)) {
            let needed = shape.rows(row);
            while there.end < needed.end {
                let done = needed.start.min(there.end) - there.start;
                kept.copy_within(done * row_len..there.len() * row_len, 0);
                let start = there.end.max(needed.start);
                let rows = start..end.min(start + together);
                there = needed.start..rows.end;
                let out = &mut kept[(start - there.start) * row_len..][..rows.len() * row_len];
                compute(image, rows, out);
            }
            max_pool_row(&kept[(needed.start - there.start) * row_len..], shape, row, y);
        }
    });
}

/// A row of [`max_pool`] from the rows of an image that it covers, the first of which `x` begins with.
pub(super) fn max_pool_row<T: Float>(x: &[T], shape: &PoolShape, row: usize, y: &mut [T]) {
    match T::PER_WORD {
        1 => pool_row::<f32>(bytemuck::cast_slice(x), shape, row, bytemuck::cast_slice_mut(y)),
        _ => pool_row::<i16>(bytemuck::cast_slice(x), shape, row, bytemuck::cast_slice_mut(y)),
    }
}

fn pool_row<K: Ordered>(x: &[K], shape: &PoolShape, row: usize, y: &mut [K]) {
    let mut greatest = Scratch::<K>::take(shape.w * shape.c);
    dispatch(Isa::current(), PoolRow { x, shape, rows: shape.rows(row).len(), greatest: &mut greatest, y });
}

/// [`max_pool`], and which of the window's `kernel * kernel` places each came from (the first of equals). NaN is
/// greater than any number, as in PyTorch.
pub fn max_pool_with_places<T: Float>(x: &[T], shape: &PoolShape, y: &mut [T], places: &mut [u8]) {
    let ([oh, ow], row_len) = (shape.output(), shape.w * shape.c);
    let rows = y.par_chunks_mut(ow * shape.c).zip(places.par_chunks_mut(ow * shape.c)).enumerate();
    rows.for_each(|(row, (y, places))| {
        let image = &x[row / oh * shape.h * row_len..][..shape.h * row_len];
        max_pool_row_with_places(&image[shape.rows(row % oh).start * row_len..], shape, row % oh, y, places);
    });
}

/// A row of [`max_pool_with_places`] from the rows of an image that it covers, the first of which `x` begins with.
pub(super) fn max_pool_row_with_places<T: Float>(
    x: &[T],
    shape: &PoolShape,
    row: usize,
    y: &mut [T],
    places: &mut [u8],
) {
    let c = shape.c;
    T::write(y, |y| {
        y.fill(f32::NEG_INFINITY);
        places.fill(u8::MAX);
        for ((ky, _), x) in shape.covered_places(row, shape.h).zip(x.chunks_exact(shape.w * c)) {
            T::read(x, |x| take_maxima_of_row(x, ky, shape, y, places));
        }
    });
}

/// Gradient to the input: each input position collects from the windows it is the maximum of.
pub fn max_pool_backward<T: Float>(dy: &[T], places: &[u8], shape: &PoolShape, dx: &mut [T]) {
    let image = shape.output().iter().product::<usize>() * shape.c;
    dx.par_chunks_mut(shape.w * shape.c).enumerate().for_each(|(row, dx)| {
        let image = row / shape.h * image..(row / shape.h + 1) * image;
        max_pool_backward_row(&dy[image.clone()], &places[image], shape, row % shape.h, dx);
    });
}

/// A row of [`max_pool_backward`]; `dy` and `places` are those of its image.
pub(super) fn max_pool_backward_row<T: Float>(dy: &[T], places: &[u8], shape: &PoolShape, row: usize, dx: &mut [T]) {
    let ([oh, ow], c) = (shape.output(), shape.c);
    T::write(dx, |dx| {
        dx.fill(0.0);
        for (ky, oy) in shape.covering(row, oh) {
            let places = &places[oy * ow * c..][..ow * c];
            T::read(&dy[oy * ow * c..][..ow * c], |dy| add_to_maxima_of_row(dy, places, ky, shape, dx));
        }
    });
}

/// Mean over the pixels of each image, `[n, pixels, c]` to `[n, c]`.
pub fn global_average<T: Float>(x: &[T], pixels: usize, c: usize, y: &mut [f32]) {
    y.par_chunks_mut(c).zip(x.par_chunks(pixels * c)).for_each(|(y, x)| T::read(x, |x| average_rows(x, y)));
}

/// Gradient to the input of [`global_average`].
pub fn global_average_backward<T: Float>(dy: &[f32], pixels: usize, c: usize, dx: &mut [T]) {
    dx.par_chunks_mut(pixels * c).zip(dy.par_chunks(c)).for_each(|(dx, dy)| {
        T::write(dx, |dx| {
            for dx in dx.chunks_exact_mut(c) {
                dx.iter_mut().zip(dy).for_each(|(dx, &dy)| *dx = dy / pixels as f32);
            }
        });
    });
}

/// The first three of what a window covers, the last again where there are fewer: most windows have as many, and their greatest takes one
/// pass.
#[inline(always)]
fn three<T: Copy>(mut covered: impl Iterator<Item = T>) -> [T; 3] {
    let first = covered.next().expect("a window covers something");
    let second = covered.next().unwrap_or(first);
    [first, second, covered.next().unwrap_or(second)]
}

/// Values by their order, as which they are compared: f32 are their own, and the bits of bf16 become integers that 32 lanes compare.
trait Ordered: bytemuck::Pod {
    /// NaN is greater than any number.
    fn order(self) -> Self;
    /// The value of an order.
    fn value(self) -> Self;
    /// The greater of two orders.
    fn greater(self, other: Self) -> Self;
}

impl Ordered for f32 {
    #[inline(always)]
    fn order(self) -> f32 {
        self
    }
    #[inline(always)]
    fn value(self) -> f32 {
        self
    }
    #[inline(always)]
    fn greater(self, other: f32) -> f32 {
        if self > other || self.is_nan() { self } else { other }
    }
}

/// The bits of a bf16: a sign, and what grows with the magnitude from 0 up to infinity and NaN.
impl Ordered for i16 {
    #[inline(always)]
    fn order(self) -> i16 {
        // Negative infinity becomes the least, and negative NaNs, which would be less, wrap round to the greatest.
        turned(self).wrapping_sub(NANS)
    }
    #[inline(always)]
    fn value(self) -> i16 {
        turned(self.wrapping_add(NANS))
    }
    #[inline(always)]
    fn greater(self, other: i16) -> i16 {
        self.max(other)
    }
}

/// NaNs of either sign.
const NANS: i16 = 0x7f;

/// Negative ones so that they grow with their value; done twice it is nothing.
#[inline(always)]
fn turned(bits: i16) -> i16 {
    bits ^ (bits >> 15 & i16::MAX)
}

/// A row of windows from the rows that they cover, with room for the greatest of those; the compiler vectorises the loops by itself.
struct PoolRow<'a, K> {
    x: &'a [K],
    shape: &'a PoolShape,
    rows: usize,
    greatest: &'a mut [K],
    y: &'a mut [K],
}

impl<K: Ordered> Task for PoolRow<'_, K> {
    type Output = ();
    const BF16: bool = false;

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        let PoolRow { x, shape, rows, greatest, y } = self;
        let c = shape.c;
        // First along the columns of a window's rows, whole rows at a time.
        let mut rows = x.chunks_exact(shape.w * c).take(rows);
        let [first, second, third] = three(&mut rows);
        for (((y, a), b), c) in greatest.iter_mut().zip(first).zip(second).zip(third) {
            *y = c.order().greater(b.order().greater(a.order()));
        }
        for row in rows {
            for (y, x) in greatest.iter_mut().zip(row) {
                *y = x.order().greater(*y);
            }
        }
        for (window, y) in y.chunks_exact_mut(c).enumerate() {
            let mut covered = shape.covered(window, shape.w).map(|ix| &greatest[ix * c..][..c]);
            let [first, second, third] = three(&mut covered);
            for (((y, a), b), c) in y.iter_mut().zip(first).zip(second).zip(third) {
                *y = c.greater(b.greater(*a));
            }
            for pixel in covered {
                for (y, x) in y.iter_mut().zip(pixel) {
                    *y = x.greater(*y);
                }
            }
        }
        y.iter_mut().for_each(|y| *y = y.value());
    }
}

vectorised! {
    /// Of the pixels of the row at place `ky` of the windows, each that is greater than the window's maximum.
    fn take_maxima_of_row(x: &[f32], ky: usize, shape: &PoolShape, y: &mut [f32], places: &mut [u8]) {
        let c = shape.c;
        for (ox, (y, places)) in y.chunks_exact_mut(c).zip(places.chunks_exact_mut(c)).enumerate() {
            for (kx, ix) in shape.covered_places(ox, shape.w) {
                let place = (ky * shape.kernel + kx) as u8;
                for ((y, places), &x) in y.iter_mut().zip(&mut *places).zip(&x[ix * c..][..c]) {
                    // The first place is taken whatever it holds, so that a window of -inf has a maximum too.
                    let greater = x > *y || x.is_nan() || *places == u8::MAX;
                    *y = if greater { x } else { *y };
                    *places = if greater { place } else { *places };
                }
            }
        }
    }

    /// Adds a row of windows' gradients to the pixels, of the row at place `ky`, that they took.
    fn add_to_maxima_of_row(dy: &[f32], places: &[u8], ky: usize, shape: &PoolShape, dx: &mut [f32]) {
        let (c, [_, ow]) = (shape.c, shape.output());
        for (ix, dx) in dx.chunks_exact_mut(c).enumerate() {
            for (kx, ox) in shape.covering(ix, ow) {
                let (place, at) = ((ky * shape.kernel + kx) as u8, ox * c..(ox + 1) * c);
                for ((dx, &dy), &p) in dx.iter_mut().zip(&dy[at.clone()]).zip(&places[at]) {
                    *dx += if p == place { dy } else { 0.0 };
                }
            }
        }
    }

    fn average_rows(x: &[f32], y: &mut [f32]) {
        let c = y.len();
        y.fill(0.0);
        for row in x.chunks_exact(c) {
            for (y, &x) in y.iter_mut().zip(row) {
                *y += x;
            }
        }
        let pixels = (x.len() / c) as f32;
        for y in y {
            *y /= pixels;
        }
    }
}
