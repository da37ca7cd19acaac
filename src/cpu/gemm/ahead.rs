//! What a product asks for before its turn.
//!
//! A tile multiplies for some 800 cycles what it needs a few kilobytes for. Where these come in short pieces, or all at once after a pause, as
//! a panel of filters that several tiles then share, caches foresee little of it, and the products wait. So a tile asks for what a later one
//! needs, a little with each word: many requests at once would fill the few places that a core has for lines on their way.

use crate::cpu::simd::Simd;

/// Some bytes that a later tile needs, of which a tile asks for as many with each word as its words need to come to the end.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Stream {
    at: *const u8,
    step: usize,
}

impl Stream {
    /// Of `floats` floats, while `words` words are multiplied. They may lie anywhere: nothing is read. Where that is more than a line a
    /// word, some are left out, which caches that fetch pairs of lines bring nevertheless.
    #[inline(always)]
    pub(in crate::cpu) fn new(from: *const f32, floats: usize, words: usize) -> Self {
        Stream { at: from.cast(), step: (floats * size_of::<f32>()).div_ceil(words.max(1)) }
    }

    /// What is to be asked for next.
    #[inline(always)]
    fn next(&mut self) -> *const f32 {
        let at = self.at;
        self.at = at.wrapping_add(self.step);
        at.cast()
    }
}

/// What so many tiles ask for together, a share each.
pub(in crate::cpu) struct Shares {
    next: *const f32,
    each: usize,
}

impl Shares {
    /// Of `len` values from `from` on, which may lie anywhere. A tile may take more than one.
    #[inline(always)]
    pub(in crate::cpu) fn new<T>(from: *const T, len: usize, shares: usize) -> Self {
        Shares { next: from.cast(), each: (len * size_of::<T>()).div_ceil(size_of::<f32>() * shares.max(1)) }
    }

    /// The next, to be asked for while `words` words are multiplied.
    #[inline(always)]
    pub(in crate::cpu) fn next(&mut self, words: usize) -> Stream {
        let share = self.next;
        self.next = share.wrapping_add(self.each);
        Stream::new(share, self.each, words)
    }
}

/// What a tile asks for while it multiplies.
pub(in crate::cpu) trait Ahead: Copy {
    /// With each word. Mark it `#[inline(always)]`.
    #[inline(always)]
    fn ask<S: Simd>(&mut self, _simd: S) {}
}

/// Nothing.
impl Ahead for () {}

/// Both.
impl<A: Ahead, B: Ahead> Ahead for (A, B) {
    #[inline(always)]
    fn ask<S: Simd>(&mut self, simd: S) {
        self.0.ask(simd);
        self.1.ask(simd);
    }
}

/// What the next tile needs, into L1.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Near<const N: usize>(pub(in crate::cpu) [Stream; N]);

impl<const N: usize> Ahead for Near<N> {
    #[inline(always)]
    fn ask<S: Simd>(&mut self, simd: S) {
        for stream in &mut self.0 {
            simd.prefetch_near(stream.next());
        }
    }
}

/// What later tiles need, into L2.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Far<const N: usize>(pub(in crate::cpu) [Stream; N]);

impl<const N: usize> Ahead for Far<N> {
    #[inline(always)]
    fn ask<S: Simd>(&mut self, simd: S) {
        for stream in &mut self.0 {
            simd.prefetch(stream.next());
        }
    }
}
