//! The filters of [`super`], packed.

use super::super::transforms::TAPS;
use crate::cpu::float::{Float, copy};
use crate::cpu::gemm::Output;
use crate::cpu::parallel::for_each;
use crate::cpu::simd::{Isa, Simd, Task, dispatch};
use crate::tensor::pool::Scratch;
use rayon::prelude::*;

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
        let mut packed = Self::room(isa, filter, c, o);
        // A vector's filters are read from memory as they lie there, which is faster by more than it costs that what is written of them does
        // not fit L1.
        let vector = c * TAPS * TAPS * isa.lanes();
        packed.taps.par_chunks_exact_mut(vector).zip(filter.par_chunks_exact(vector)).for_each(|(out, filters)| {
            if W::PER_WORD == 1 {
                return dispatch(isa, Turn::<W> { filters: bytemuck::cast_slice(filters), c, out });
            }
            let mut rounded = Scratch::take(filters.len());
            copy(filters, &mut rounded);
            dispatch(isa, Turn { filters: &rounded, c, out });
        });
        packed
    }

    /// From filters `[o, 3, 3, c]`, for the gradient to the input: the convolution of the output's gradient with the filters
    /// turned by half a turn and their channels exchanged, which must be whole numbers of words and of vectors.
    pub fn for_backward_input(isa: Isa, filter: &[f32], o: usize, c: usize) -> Self {
        let mut packed = Self::room(isa, filter, o, c);
        let out = &Output::new(&mut packed.taps);
        let words = o / W::PER_WORD;
        for_each(words, |word| {
            let filters = &filter[word * W::PER_WORD * TAPS * TAPS * c..][..W::PER_WORD * TAPS * TAPS * c];
            dispatch(isa, Exchange { filters, c, words: [word, words], out });
        });
        packed
    }

    /// Room for filters from `c` to `o` channels.
    fn room(isa: Isa, filter: &[f32], c: usize, o: usize) -> Self {
        assert_eq!(filter.len(), o * TAPS * TAPS * c);
        assert!(c.is_multiple_of(W::PER_WORD) && o.is_multiple_of(isa.lanes()), "channels are whole words and vectors");
        StripFilter { isa, taps: Scratch::take(filter.len()), c, o }
    }

    /// Where the taps of a vector of output channels begin for a word of input channels.
    pub(in crate::cpu::winograd) fn start(&self, vector: usize, word: usize) -> usize {
        (vector * self.c + word * W::PER_WORD) * TAPS * TAPS * self.isa.lanes()
    }
}

/// A word of filters, with their taps in the opposite order, as a [`StripFilter`] has them whose input channels these filters are.
struct Exchange<'a, W> {
    /// `[channel of the word, 3, 3, c]`
    filters: &'a [f32],
    c: usize,
    /// Which of how many.
    words: [usize; 2],
    /// All taps; the word's are this task's alone.
    out: &'a Output<W>,
}

impl<W: Float> Task for Exchange<'_, W> {
    type Output = ();
    const BF16: bool = W::PER_WORD > 1;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (taps, [word, words], vector) = (TAPS * TAPS, self.words, S::LANES * W::PER_WORD);
        assert!(self.filters.len() == W::PER_WORD * taps * self.c && self.c.is_multiple_of(S::LANES) && word < words);
        for column in (0..self.c).step_by(S::LANES) {
            let out = self.out.pointer().wrapping_add((column / S::LANES * words + word) * taps * vector);
            for tap in 0..taps {
                // SAFETY: as asserted, every tap of each of the word's filters has a vector from `column` on; there is room for a vector of
                // each tap of each word and each vector of columns.
                unsafe {
                    let first = self.filters.as_ptr().add((taps - 1 - tap) * self.c + column);
                    let last = first.add((W::PER_WORD - 1) * taps * self.c);
                    W::store_words(simd, out.add(tap * vector), simd.load(first), simd.load(last));
                }
            }
        }
    }
}

/// A vector of filters, as a [`StripFilter`] has them.
struct Turn<'a, W> {
    /// `[lane, 3, 3, c]`
    filters: &'a [W],
    c: usize,
    out: &'a mut [W],
}

impl<W: Float> Task for Turn<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (taps, words) = (TAPS * TAPS, self.c / W::PER_WORD);
        let len = S::LANES * taps * words * W::PER_WORD;
        assert!(self.filters.len() == len && self.out.len() == len);
        for tap in 0..taps {
            let whole = words / S::LANES * S::LANES;
            for word in (0..whole).step_by(S::LANES) {
                let (from, to) = (self.filters.as_ptr().cast::<f32>(), self.out.as_mut_ptr().cast::<f32>());
                // SAFETY: as asserted, each lane's filter has so many words of each tap, and so has what is written.
                unsafe {
                    let from = from.add(tap * words + word);
                    simd.transpose(from, taps * words, to.add((word * taps + tap) * S::LANES), taps * S::LANES);
                }
            }
            for (word, lane) in (whole..words).flat_map(|word| (0..S::LANES).map(move |lane| (word, lane))) {
                let from = &self.filters[((lane * taps + tap) * words + word) * W::PER_WORD..];
                let to = &mut self.out[((word * taps + tap) * S::LANES + lane) * W::PER_WORD..];
                to[..W::PER_WORD].copy_from_slice(&from[..W::PER_WORD]);
            }
        }
    }
}
