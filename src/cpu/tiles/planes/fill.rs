//! Filling planes: pixels to their places, the padding around them, and words of pixels of few channels.

use super::super::super::float::{Float, split};
use super::super::super::simd::Simd;
use super::super::amx::STEP;
use super::super::{Parts, parts, slices};
use super::{AHEAD, Arrangement, Inside, Part, merged_pixel};
use half::bf16;
use std::ops::Range;

impl Arrangement {
    /// Some chunks of the planes of a part of `x`, split, to `out`, where they lie as [`Arrangement::offsets`] has it for
    /// that many chunks.
    #[inline(always)]
    pub fn fill<S: Simd, T: Float>(&self, simd: S, x: &[T], part: &Part, chunks: Range<usize>, out: &mut Parts) {
        let out = &mut slices(out)[..];
        let len = self.chunk_len(part);
        let row_len = self.pitch * self.width;
        for (i, &plane) in self.planes.iter().enumerate() {
            let inside = match self.merged {
                true => self.columns_inside(plane[1], 1, row_len / merged_pixel(self.channels)),
                false => self.columns_inside(plane[1], self.step[1], self.pitch),
            };
            let together = part.together();
            for (row, turn) in self.rows_of_pictures(part) {
                let source = self.source_row(part, plane, row, turn).map(|row| {
                    let row_len = self.source[1] * self.pixel;
                    &x[row * row_len..][..row_len]
                });
                for (j, chunk) in chunks.clone().enumerate() {
                    let at = (i * chunks.len() + j) * len + row * row_len * together;
                    match source {
                        None if turn > 0 => {}
                        None => zero(simd, out, at..at + row_len * together),
                        Some(source) if self.merged => self.fill_merged(simd, source, &inside, at, out),
                        Some(source) => {
                            let place = (at + turn * STEP, together * STEP);
                            self.fill_row(simd, source, &inside, chunk, place, out)
                        }
                    }
                }
            }
            let written = self.rows_of_plane(part) * row_len * together;
            for j in 0..chunks.len() {
                let at = (i * chunks.len() + j) * len;
                zero(simd, out, at + written..at + len);
            }
        }
    }

    /// A chunk of a row's pixels, from `at` on and `pitch` apart.
    #[inline(always)]
    fn fill_row<S: Simd, T: Float>(
        &self,
        simd: S,
        source: &[T],
        inside: &Inside,
        chunk: usize,
        (at, pitch): (usize, usize),
        out: &mut [&mut [bf16]],
    ) {
        let Inside { positions, first } = inside;
        for position in (0..positions.start).chain(positions.end..self.pitch) {
            zero(simd, out, at + position * pitch..at + position * pitch + STEP);
        }
        if positions.is_empty() {
            return;
        }
        let (step, channel) = (self.step[1] * self.pixel, chunk * STEP);
        let count = (self.channels - channel).min(STEP);
        let source = &source[first * self.pixel + channel..];
        assert!(source.len() >= (positions.len() - 1) * step + count);
        for (i, position) in positions.clone().enumerate() {
            let at = at + position * pitch;
            if count == STEP {
                // SAFETY: the last position's values are inside the row, as asserted.
                let values = unsafe { &*source.as_ptr().add(i * step).cast::<[T; STEP]>() };
                simd.prefetch_near(values.as_ptr().wrapping_add(AHEAD * step).cast());
                copy_step(simd, values, at, out);
            } else {
                split(simd, &source[i * step..][..count], at, out);
                out.iter_mut().for_each(|part| part[at + count..at + STEP].fill(bf16::ZERO));
            }
        }
    }

    /// A row's pixels, each widened to whole words by zeros.
    #[inline(always)]
    fn fill_merged<S: Simd, T: Float>(
        &self,
        simd: S,
        source: &[T],
        inside: &Inside,
        at: usize,
        out: &mut [&mut [bf16]],
    ) {
        let pixel = merged_pixel(self.channels);
        let count = self.pitch * self.width / pixel;
        let Range { start: first, end: last } = inside.positions.clone();
        zero(simd, out, at..at + count * pixel);
        if first == last {
            return;
        }
        let values = &source[inside.first * self.pixel..][..(last - first) * self.pixel];
        if T::PER_WORD == 2 {
            return self.spread(simd, bytemuck::cast_slice(values), &mut out[0][at + first * pixel..at + last * pixel]);
        }
        let mut narrow: Parts = parts(out.len(), values.len());
        split(simd, values, 0, &mut slices(&mut narrow));
        for (out, narrow) in out.iter_mut().zip(&narrow) {
            self.spread(simd, narrow, &mut out[at + first * pixel..at + last * pixel]);
        }
    }

    /// Pixels, one after the other, to their places among zeros.
    #[inline(always)]
    fn spread<S: Simd>(&self, simd: S, pixels: &[bf16], out: &mut [bf16]) {
        let mut done = 0;
        if self.channels == 3 && self.pixel == 3 {
            // As long as as many values as pixels are spread to can be read.
            while 3 * done + 2 * S::LANES <= pixels.len() {
                let (from, to) = (&pixels[3 * done..][..2 * S::LANES], &mut out[4 * done..][..2 * S::LANES]);
                // SAFETY: as many values are there.
                unsafe { simd.spread_pixels(from.as_ptr(), to.as_mut_ptr()) };
                done += S::LANES / 2;
            }
        }
        let (out, pixels) = (&mut out[done * merged_pixel(self.channels)..], &pixels[done * self.pixel..]);
        for (out, values) in out.chunks_exact_mut(merged_pixel(self.channels)).zip(pixels.chunks_exact(self.pixel)) {
            out[..self.channels].copy_from_slice(&values[..self.channels]);
        }
    }
}

/// Values of a step to `out[..][at..]`, split.
#[inline(always)]
pub(in super::super) fn copy_step<S: Simd, T: Float>(simd: S, values: &[T; STEP], at: usize, out: &mut [&mut [bf16]]) {
    if T::PER_WORD == 2 {
        // As they are.
        let to = &mut out[0][at..at + STEP];
        for i in (0..STEP / 2).step_by(S::LANES) {
            // SAFETY: either side is as many words.
            unsafe {
                simd.store(to.as_mut_ptr().cast::<f32>().add(i), simd.load(values.as_ptr().cast::<f32>().add(i)))
            };
        }
    } else {
        split(simd, values, at, out);
    }
}

/// What is shorter than a step is filled by itself.
#[inline(always)]
fn zero<S: Simd>(simd: S, parts: &mut [&mut [bf16]], range: Range<usize>) {
    for part in parts {
        let (steps, rest) = part[range.clone()].as_chunks_mut::<STEP>();
        for step in steps {
            for i in (0..STEP / 2).step_by(S::LANES) {
                // SAFETY: a step is so many words.
                unsafe { simd.store(step.as_mut_ptr().cast::<f32>().add(i), simd.splat(0.0)) };
            }
        }
        rest.fill(bf16::ZERO);
    }
}
