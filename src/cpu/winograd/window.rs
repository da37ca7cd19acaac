//! What a tile sees of an image.

use super::strips::MAX_CHANNELS;
use super::transforms::MAX;
use crate::cpu::float::Float;
use crate::cpu::simd::Simd;
use std::marker::PhantomData;
use std::ops::Range;

/// Pixels of an image by row and column, at most [`MAX`] of either; what is not in the image is zero.
pub(super) struct Window<'a, T> {
    /// Where the first column of each row is, or would be; of rows that are not in the image, of zeros.
    rows: [*const T; MAX],
    /// The columns that are in the image.
    columns: Range<usize>,
    channels: usize,
    /// Where its first pixel is or would be, and values from there to the next row.
    first: *const T,
    row_len: usize,
    image: PhantomData<&'a [T]>,
}

impl<'a, T: Float> Window<'a, T> {
    /// Of an image of `x` `[n, h, w, c]` from row `top` and column `left` on, which may be before its first; as many rows and columns
    /// as `seen` says.
    #[inline(always)]
    pub fn new(x: &'a [T], image: usize, [h, w, c]: [usize; 3], [top, left]: [isize; 2], seen: usize) -> Self {
        static ZEROS: [f32; MAX * MAX_CHANNELS] = [0.0; MAX * MAX_CHANNELS];
        assert!(c <= MAX_CHANNELS);
        let image = &x[image * h * w * c..][..h * w * c];
        let first = image.as_ptr().wrapping_offset((top * w as isize + left) * c as isize);
        let rows = std::array::from_fn(|i| {
            let inside = i < seen && (0..h as isize).contains(&(top + i as isize));
            if inside { first.wrapping_add(i * w * c) } else { ZEROS.as_ptr().cast() }
        });
        let column = |at: isize| (at - left).clamp(0, seen as isize) as usize;
        Window { rows, columns: column(0)..column(w as isize), channels: c, first, row_len: w * c, image: PhantomData }
    }

    /// Of nothing: all zero.
    pub fn empty() -> Self {
        Window {
            rows: [std::ptr::null(); MAX],
            columns: 0..0,
            channels: 0,
            first: std::ptr::null(),
            row_len: 0,
            image: PhantomData,
        }
    }

    /// The columns that are in the image.
    #[inline(always)]
    pub fn columns(&self) -> Range<usize> {
        self.columns.clone()
    }

    /// Asks for a part of a row's first `seen` columns: of as many as the row has vectors of channels the one of `channel`. Pixels of a row
    /// lie together.
    #[inline(always)]
    pub fn prefetch<S: Simd>(&self, simd: S, seen: usize, [row, channel]: [usize; 2]) {
        const LINE: usize = 64;
        let first = self.first.wrapping_add(row * self.row_len + channel * seen);
        for line in 0..(seen * S::LANES * size_of::<T>()).div_ceil(LINE) {
            simd.prefetch(first.wrapping_byte_add(line * LINE).cast());
        }
    }

    /// A vector of the channels of a pixel.
    ///
    /// # Safety
    /// There is such a column, and a vector of channels from `channel` on.
    #[inline(always)]
    pub unsafe fn load<S: Simd>(&self, simd: S, i: usize, j: usize, channel: usize) -> S::V {
        debug_assert!(self.columns.contains(&j) && channel + S::LANES <= self.channels);
        // SAFETY: a pixel of the image, or one of a row of zeros that is as long as there may be columns and channels.
        unsafe { T::load(simd, self.rows[i].wrapping_add(j * self.channels + channel)) }
    }
}
