//! The filters of [`super`], packed.

use super::super::transforms::TAPS;
use crate::cpu::float::{Float, copy};
use crate::cpu::simd::{Isa, Simd, Task, dispatch};
use crate::tensor::pool::Scratch;
use rayon::prelude::*;
use std::ops::Range;

/// Filters in the order in which they are transformed: `[vector of output channels][word of input channels][tap][lane][channel of
/// the word]`. `W` is the type whose products are taken.
pub struct StripFilter<W> {
    pub(in crate::cpu::winograd) isa: Isa,
    pub(in crate::cpu::winograd) taps: Scratch<W>,
    pub(in crate::cpu::winograd) c: usize,
    pub(in crate::cpu::winograd) o: usize,
}

impl<W: Float> StripFilter<W> {
    /// From filters `[o, 3, 3, c]`; `c` is a whole number of words and `o` of vectors.
    pub fn new(isa: Isa, filter: &[f32], o: usize, c: usize) -> Self {
        Self::pack(isa, filter, c, o, |channels, columns, out| {
            let filters = &filter[columns.start * TAPS * TAPS * c..][..columns.len() * TAPS * TAPS * c];
            if W::PER_WORD == 1 {
                return dispatch(isa, Turn::<W> { filters: bytemuck::cast_slice(filters), c, channels, out });
            }
            let mut some = Scratch::take(columns.len() * TAPS * TAPS * channels.len());
            for (to, from) in some.chunks_exact_mut(channels.len()).zip(filters.chunks_exact(c)) {
                copy(&from[channels.clone()], to);
            }
            let c = channels.len();
            dispatch(isa, Turn { filters: &some, c, channels: 0..c, out });
        })
    }

    /// From filters `[o, 3, 3, c]`, for the gradient to the input: the convolution of the output's gradient with the filters
    /// turned by half a turn and their channels exchanged, which must be whole numbers of words and of vectors.
    pub fn for_backward_input(isa: Isa, filter: &[f32], o: usize, c: usize) -> Self {
        Self::pack(isa, filter, o, c, |channels, columns, out| {
            let filters = &filter[channels.start * TAPS * TAPS * c..channels.end * TAPS * TAPS * c];
            dispatch(isa, Exchange { filters, c, column: columns.start, out });
        })
    }

    /// From `c` to `o` channels; `copy(channels, columns, out)` fills some channels of a vector's.
    fn pack(
        isa: Isa,
        filter: &[f32],
        c: usize,
        o: usize,
        copy: impl Fn(Range<usize>, Range<usize>, &mut [W]) + Sync,
    ) -> Self {
        // Runs of a tap that are read together; what is written of them fits L1.
        const CHANNELS: usize = 64;
        let lanes = isa.lanes();
        assert_eq!(filter.len(), o * TAPS * TAPS * c);
        assert!(c.is_multiple_of(W::PER_WORD) && o.is_multiple_of(lanes), "channels are whole words and vectors");
        let mut taps = Scratch::take(filter.len());
        taps.par_chunks_exact_mut(c * TAPS * TAPS * lanes).enumerate().for_each(|(vector, out)| {
            for (i, out) in out.chunks_mut(CHANNELS * TAPS * TAPS * lanes).enumerate() {
                copy(i * CHANNELS..c.min((i + 1) * CHANNELS), vector * lanes..(vector + 1) * lanes, out);
            }
        });
        StripFilter { isa, taps, c, o }
    }

    /// Where the taps of a vector of output channels begin for a word of input channels.
    pub(in crate::cpu::winograd) fn start(&self, vector: usize, word: usize) -> usize {
        (vector * self.c + word * W::PER_WORD) * TAPS * TAPS * self.isa.lanes()
    }
}

/// A vector of columns of some filters, with their taps in the opposite order, as a [`StripFilter`] has them whose input channels these
/// filters are.
struct Exchange<'a, W> {
    /// `[channel, 3, 3, c]`
    filters: &'a [f32],
    c: usize,
    column: usize,
    out: &'a mut [W],
}

impl<W: Float> Task for Exchange<'_, W> {
    type Output = ();
    const BF16: bool = W::PER_WORD > 1;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (taps, word_len) = (TAPS * TAPS, TAPS * TAPS * self.c * W::PER_WORD);
        assert!(self.column + S::LANES <= self.c && self.filters.len().is_multiple_of(word_len));
        assert!(self.out.len() == self.filters.len() / self.c * S::LANES);
        let words = self.filters.chunks_exact(word_len).zip(self.out.chunks_exact_mut(taps * S::LANES * W::PER_WORD));
        for (filters, out) in words {
            for (tap, out) in out.chunks_exact_mut(S::LANES * W::PER_WORD).enumerate() {
                // SAFETY: as asserted, every tap of each of a word's filters has a vector from `column` on, and a vector of words goes to `out`.
                unsafe {
                    let first = filters.as_ptr().add((taps - 1 - tap) * self.c + self.column);
                    let last = first.add((W::PER_WORD - 1) * taps * self.c);
                    W::store_words(simd, out.as_mut_ptr(), simd.load(first), simd.load(last));
                }
            }
        }
    }
}

/// Some channels of a vector of filters, as a [`StripFilter`] has them.
struct Turn<'a, W> {
    /// `[lane, 3, 3, c]`
    filters: &'a [W],
    c: usize,
    channels: Range<usize>,
    out: &'a mut [W],
}

impl<W: Float> Task for Turn<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (taps, row) = (TAPS * TAPS, self.c / W::PER_WORD);
        let (first, words) = (self.channels.start / W::PER_WORD, self.channels.len() / W::PER_WORD);
        assert!(self.filters.len() == S::LANES * taps * row * W::PER_WORD && first + words <= row);
        assert!(self.out.len() == words * taps * S::LANES * W::PER_WORD);
        for tap in 0..taps {
            let whole = words / S::LANES * S::LANES;
            for word in (0..whole).step_by(S::LANES) {
                let (from, to) = (self.filters.as_ptr().cast::<f32>(), self.out.as_mut_ptr().cast::<f32>());
                // SAFETY: as asserted, each lane's filter has so many words of each tap, and so has what is written.
                unsafe {
                    let from = from.add(tap * row + first + word);
                    simd.transpose(from, taps * row, to.add((word * taps + tap) * S::LANES), taps * S::LANES);
                }
            }
            for (word, lane) in (whole..words).flat_map(|word| (0..S::LANES).map(move |lane| (word, lane))) {
                let from = &self.filters[((lane * taps + tap) * row + first + word) * W::PER_WORD..];
                let to = &mut self.out[((word * taps + tap) * S::LANES + lane) * W::PER_WORD..];
                to[..W::PER_WORD].copy_from_slice(&from[..W::PER_WORD]);
            }
        }
    }
}
