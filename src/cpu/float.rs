//! The types of activations: f32 and bf16.
//!
//! Products read both as 32-bit words: one f32, or a pair of bf16 that one instruction multiplies with another pair. So the
//! kernels of [`super::gemm`] are the same for both but for that instruction, and depth is counted in words. Everything else
//! computes in f32: a piece of bf16 is widened on the way in and rounded on the way out, within the nearest cache.

use super::simd::{Isa, Simd, Task, dispatch};
use crate::tensor::Element;
use crate::tensor::pool::Scratch;
use half::bf16;
use rayon::prelude::*;

/// A type of activations.
pub trait Float: Element + Default {
    /// Values in a word.
    const PER_WORD: usize;
    /// Elements that a task works on where operations are bound by memory: a few such pieces fit L2, the widened ones L1.
    const CHUNK: usize;

    /// Rounded to the nearest.
    fn from_f32(x: f32) -> Self;
    /// Exactly.
    fn to_f32(self) -> f32;
    /// `c` plus the products of the values in the words of `a` and `b`.
    fn multiply_words<S: Simd>(simd: S, a: S::V, b: S::V, c: S::V) -> S::V;
    /// A vector of values from `p`.
    ///
    /// # Safety
    /// `p` is valid for reading `S::LANES` values.
    unsafe fn load<S: Simd>(simd: S, p: *const Self) -> S::V;
    /// A vector of values to `p`, rounded.
    ///
    /// # Safety
    /// `p` is valid for writing `S::LANES` values.
    unsafe fn store<S: Simd>(simd: S, p: *mut Self, v: S::V);
    /// [`Float::store`] of two vectors, one after the other.
    ///
    /// # Safety
    /// `p` is valid for writing `2 * S::LANES` values.
    unsafe fn store_two<S: Simd>(simd: S, p: *mut Self, vectors: [S::V; 2]);

    /// The first and the last values of a vector of words from `p`; where a word is one value, both are that.
    ///
    /// # Safety
    /// `p` is valid for reading `S::LANES` words.
    unsafe fn load_words<S: Simd>(simd: S, p: *const Self) -> [S::V; 2];
    /// A vector of words, the first of whose values come from `first` and the last from `last`, rounded; where a word is one value,
    /// that is `first`.
    fn words<S: Simd>(simd: S, first: S::V, last: S::V) -> S::V;
    /// [`Float::words`] to `p`.
    ///
    /// # Safety
    /// `p` is valid for writing `S::LANES` words.
    #[inline(always)]
    unsafe fn store_words<S: Simd>(simd: S, p: *mut Self, first: S::V, last: S::V) {
        // SAFETY: the caller vouches for `p`, where a word has 32 bits.
        unsafe { simd.store(p.cast(), Self::words(simd, first, last)) }
    }

    /// The words that hold one value of each of `PER_WORD` rows.
    fn interleave(rows: &[&[Self]], out: &mut [Self]);
    /// Calls `f` with the values as f32.
    fn read<R>(x: &[Self], f: impl FnOnce(&[f32]) -> R) -> R;
    /// Calls `f` with f32 that it must fill, and stores them.
    fn write<R>(y: &mut [Self], f: impl FnOnce(&mut [f32]) -> R) -> R;
    /// Calls `f` with the values as f32 to change, and stores them.
    fn update<R>(y: &mut [Self], f: impl FnOnce(&mut [f32]) -> R) -> R;
}

impl Float for f32 {
    const PER_WORD: usize = 1;
    const CHUNK: usize = 1 << 15;

    #[inline(always)]
    fn from_f32(x: f32) -> f32 {
        x
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn multiply_words<S: Simd>(simd: S, a: S::V, b: S::V, c: S::V) -> S::V {
        simd.mul_add(a, b, c)
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, p: *const f32) -> S::V {
        // SAFETY: the caller vouches for `p`.
        unsafe { simd.load(p) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(simd: S, p: *mut f32, v: S::V) {
        // SAFETY: the caller vouches for `p`.
        unsafe { simd.store(p, v) }
    }
    #[inline(always)]
    unsafe fn store_two<S: Simd>(simd: S, p: *mut f32, [first, second]: [S::V; 2]) {
        // SAFETY: the caller vouches for `p`.
        unsafe {
            simd.store(p, first);
            simd.store(p.add(S::LANES), second);
        }
    }
    #[inline(always)]
    fn words<S: Simd>(_simd: S, first: S::V, _last: S::V) -> S::V {
        first
    }
    #[inline(always)]
    unsafe fn load_words<S: Simd>(simd: S, p: *const f32) -> [S::V; 2] {
        // SAFETY: the caller vouches for `p`.
        [unsafe { simd.load(p) }; 2]
    }
    #[inline(always)]
    fn interleave(rows: &[&[f32]], out: &mut [f32]) {
        out.copy_from_slice(rows[0]);
    }
    fn read<R>(x: &[f32], f: impl FnOnce(&[f32]) -> R) -> R {
        f(x)
    }
    fn write<R>(y: &mut [f32], f: impl FnOnce(&mut [f32]) -> R) -> R {
        f(y)
    }
    fn update<R>(y: &mut [f32], f: impl FnOnce(&mut [f32]) -> R) -> R {
        f(y)
    }
}

impl Float for bf16 {
    const PER_WORD: usize = 2;
    const CHUNK: usize = 1 << 13;

    #[inline(always)]
    fn from_f32(x: f32) -> bf16 {
        bf16::from_f32(x)
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    #[inline(always)]
    fn multiply_words<S: Simd>(simd: S, a: S::V, b: S::V, c: S::V) -> S::V {
        simd.dot_pairs(a, b, c)
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, p: *const bf16) -> S::V {
        // SAFETY: the caller vouches for `p`.
        unsafe { simd.load_bf16(p) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(simd: S, p: *mut bf16, v: S::V) {
        // SAFETY: the caller vouches for `p`.
        unsafe { simd.store_bf16(p, v) }
    }
    #[inline(always)]
    unsafe fn store_two<S: Simd>(simd: S, p: *mut bf16, vectors: [S::V; 2]) {
        // SAFETY: the caller vouches for `p`.
        unsafe { simd.store_two_bf16(p, vectors) }
    }
    #[inline(always)]
    fn words<S: Simd>(simd: S, first: S::V, last: S::V) -> S::V {
        simd.pairs(first, last)
    }
    #[inline(always)]
    unsafe fn load_words<S: Simd>(simd: S, p: *const bf16) -> [S::V; 2] {
        // SAFETY: the caller vouches for `p`.
        unsafe { simd.load_pairs(p) }
    }
    #[inline(always)]
    fn interleave(rows: &[&[bf16]], out: &mut [bf16]) {
        let words: &mut [u32] = bytemuck::cast_slice_mut(out);
        let (low, high): (&[u16], &[u16]) = (bytemuck::cast_slice(rows[0]), bytemuck::cast_slice(rows[1]));
        for ((word, &low), &high) in words.iter_mut().zip(low).zip(high) {
            *word = u32::from(low) | u32::from(high) << 16;
        }
    }
    fn read<R>(x: &[bf16], f: impl FnOnce(&[f32]) -> R) -> R {
        let mut wide = Scratch::<f32>::take(x.len());
        copy(x, &mut wide);
        f(&wide)
    }
    fn write<R>(y: &mut [bf16], f: impl FnOnce(&mut [f32]) -> R) -> R {
        let mut wide = Scratch::<f32>::take(y.len());
        let result = f(&mut wide);
        copy(&wide, y);
        result
    }
    fn update<R>(y: &mut [bf16], f: impl FnOnce(&mut [f32]) -> R) -> R {
        let mut wide = Scratch::<f32>::take(y.len());
        copy(y, &mut wide);
        let result = f(&mut wide);
        copy(&wide, y);
        result
    }
}

/// `y = x`, rounded where `B` is less precise, on one thread.
pub fn copy<A: Float, B: Float>(x: &[A], y: &mut [B]) {
    struct Copy<'a, A, B>(&'a [A], &'a mut [B]);
    impl<A: Float, B: Float> Task for Copy<'_, A, B> {
        type Output = ();
        const BF16: bool = A::PER_WORD * B::PER_WORD > 1;
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            copy_with(simd, self.0, self.1);
        }
    }
    assert_eq!(x.len(), y.len());
    dispatch(Isa::current(), Copy(x, y));
}

/// [`copy`] within a task.
#[inline(always)]
pub(super) fn copy_with<S: Simd, A: Float, B: Float>(simd: S, x: &[A], y: &mut [B]) {
    let (x, mut y) = (x.chunks_exact(S::LANES), y.chunks_exact_mut(S::LANES));
    let rest = x.remainder();
    for (x, y) in x.zip(&mut y) {
        // SAFETY: both pieces have `LANES` values.
        unsafe { B::store(simd, y.as_mut_ptr(), A::load(simd, x.as_ptr())) };
    }
    y.into_remainder().iter_mut().zip(rest).for_each(|(y, x)| *y = B::from_f32(x.to_f32()));
}

/// `x` to `parts[..][at..]`: the nearest bf16, then the nearest of what is left, and so on.
#[inline(always)]
pub(super) fn split<S: Simd, T: Float>(simd: S, x: &[T], at: usize, parts: &mut [&mut [bf16]]) {
    let whole = x.len() / S::LANES * S::LANES;
    assert!(parts.iter().all(|part| part.len() >= at + x.len()));
    for i in (0..whole).step_by(S::LANES) {
        // SAFETY: whole vectors from `i` on are inside `x`, and from `at + i` on inside the parts.
        unsafe {
            let mut left = T::load(simd, x.as_ptr().add(i));
            for part in parts.iter_mut() {
                let part = part.as_mut_ptr().add(at + i);
                simd.store_bf16(part, left);
                left = simd.sub(left, simd.load_bf16(part));
            }
        }
    }
    for (i, x) in x.iter().enumerate().skip(whole) {
        let mut left = x.to_f32();
        for part in parts.iter_mut() {
            part[at + i] = bf16::from_f32(left);
            left -= part[at + i].to_f32();
        }
    }
}

/// `y = x`, on all threads.
pub fn convert<A: Float, B: Float>(x: &[A], y: &mut [B]) {
    y.par_chunks_mut(B::CHUNK).zip(x.par_chunks(B::CHUNK)).for_each(|(y, x)| copy(x, y));
}
