//! Pooling over `[n, h, w, c]`.

mod rows;

use super::float::Float;
use super::parallel::for_each_of;
use super::simd::{Isa, dispatch, vectorised};
use crate::tensor::pool::Scratch;
use rayon::prelude::*;
use rows::{Ordered, PoolRow, PoolRowWithPlaces};
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
    pub(super) fn covering(&self, p: usize, windows: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
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

/// [`max_pool`] of `x * signs`, a sign a channel, and which of the window's `kernel * kernel` places each came from (the first of equals).
/// NaN is greater than any number, as in PyTorch.
pub fn signed_max_pool<T: Float>(x: &[T], signs: &[f32], shape: &PoolShape, maxima: &mut [T], places: &mut [u8]) {
    match T::PER_WORD {
        1 => pool_with_places::<f32>(bytemuck::cast_slice(x), signs, shape, bytemuck::cast_slice_mut(maxima), places),
        _ => pool_with_places::<i16>(bytemuck::cast_slice(x), signs, shape, bytemuck::cast_slice_mut(maxima), places),
    }
}

fn pool_with_places<K: Ordered>(x: &[K], signs: &[f32], shape: &PoolShape, maxima: &mut [K], places: &mut [u8]) {
    let ([oh, ow], row_len) = (shape.output(), shape.w * shape.c);
    let out_len = ow * shape.c;
    assert!(x.len() == shape.n * shape.h * row_len && signs.len() == shape.c, "buffers fit the shape");
    assert!([maxima.len(), places.len()] == [shape.n * oh * out_len; 2], "buffers fit the shape");
    let signs: Vec<K> = signs.iter().map(|&sign| K::sign(sign)).collect();
    maxima.par_chunks_mut(out_len).zip(places.par_chunks_mut(out_len)).enumerate().for_each(|(i, (y, places))| {
        let (image, row) = (i / oh, i % oh);
        let x = &x[(image * shape.h + shape.rows(row).start) * row_len..];
        dispatch(Isa::current(), PoolRowWithPlaces { x, signs: &signs, shape, row, y, places });
    });
}

/// Gradient to the input: each input position collects from the windows it is the maximum of.
pub fn max_pool_backward<T: Float>(dy: &[T], places: &[u8], shape: &PoolShape, dx: &mut [T]) {
    let ([oh, ow], c) = (shape.output(), shape.c);
    let columns = Covering::columns(shape);
    dx.par_chunks_mut(shape.w * c).enumerate().for_each(|(row, dx)| {
        let (image, row) = (row / shape.h, row % shape.h);
        T::write(dx, |dx| {
            dx.fill(0.0);
            for (ky, oy) in shape.covering(row, oh) {
                let windows = (image * oh + oy) * ow * c..(image * oh + oy + 1) * ow * c;
                T::read(&dy[windows.clone()], |dy| {
                    add_to_maxima_of_row(dy, &places[windows], ky * shape.kernel, &columns, dx, c)
                });
            }
        });
    });
}

/// The windows that cover each coordinate along an axis, with its place in them: found once, for it takes divisions.
pub(super) struct Covering {
    windows: Vec<(usize, usize)>,
    /// Where those of each coordinate begin, and where the last's end.
    starts: Vec<usize>,
}

impl Covering {
    /// Of the columns.
    pub fn columns(shape: &PoolShape) -> Self {
        let mut covering = Covering { windows: Vec::new(), starts: vec![0] };
        for column in 0..shape.w {
            covering.windows.extend(shape.covering(column, shape.output()[1]));
            covering.starts.push(covering.windows.len());
        }
        covering
    }

    /// Those of a coordinate, as [`PoolShape::covering`] gives them.
    #[inline(always)]
    pub fn of(&self, coordinate: usize) -> &[(usize, usize)] {
        &self.windows[self.starts[coordinate]..self.starts[coordinate + 1]]
    }
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

vectorised! {
    /// Adds a row of windows' gradients to the pixels of `c` channels that they took, of the row whose places begin with `first`.
    fn add_to_maxima_of_row(dy: &[f32], places: &[u8], first: usize, columns: &Covering, dx: &mut [f32], c: usize) {
        for (ix, dx) in dx.chunks_exact_mut(c).enumerate() {
            for &(kx, ox) in columns.of(ix) {
                let (place, at) = ((first + kx) as u8, ox * c..(ox + 1) * c);
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
