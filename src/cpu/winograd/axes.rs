//! Transforms along both axes.

use super::transforms::{MAX, Room, Transform, unrolled, vectors};
use super::window::Window;
use crate::cpu::float::Float;
use crate::cpu::simd::Simd;

/// Vectors by row and column. A trait and not a closure, as is [`Sink`]: a closure may be compiled on its own, and then without the
/// instruction set.
pub(super) trait Source<S: Simd>: Copy {
    /// Whether a column has anything but zeros.
    #[inline(always)]
    fn has_column(&self, _j: usize) -> bool {
        true
    }
    /// Asks for a column of what will be transformed next.
    #[inline(always)]
    fn prefetch(&self, _simd: S, _j: usize) {}
    /// # Safety
    /// As the source says; there is such a column.
    unsafe fn load(&self, simd: S, i: usize, j: usize) -> S::V;
}

/// Where vectors go by row and column.
pub(super) trait Sink<S: Simd> {
    /// # Safety
    /// As the sink says.
    unsafe fn store(&self, simd: S, i: usize, j: usize, value: S::V);
}

/// A vector of channels of each pixel.
#[derive(Clone, Copy)]
pub(super) struct Pixels<'a, T> {
    /// Has a vector from `channel` on.
    pub window: &'a Window<'a, T>,
    /// What will be transformed next, of as many rows and columns.
    pub next: (&'a Window<'a, T>, usize),
    pub channel: usize,
}

impl<T: Float, S: Simd> Source<S> for Pixels<'_, T> {
    #[inline(always)]
    fn has_column(&self, j: usize) -> bool {
        self.window.has_column(j)
    }
    #[inline(always)]
    fn prefetch(&self, simd: S, j: usize) {
        let (next, seen) = self.next;
        next.prefetch(simd, seen, self.channel / S::LANES * seen + j);
    }
    #[inline(always)]
    unsafe fn load(&self, simd: S, i: usize, j: usize) -> S::V {
        // SAFETY: the caller's.
        unsafe { self.window.load(simd, i, j, self.channel) }
    }
}

/// A vector of columns of each tap of 3x3 filters.
#[derive(Clone, Copy)]
pub(super) struct Taps<'a> {
    /// Valid for a vector from `column` on.
    pub taps: &'a [&'a [f32]; 9],
    pub column: usize,
}

impl<S: Simd> Source<S> for Taps<'_> {
    #[inline(always)]
    unsafe fn load(&self, simd: S, i: usize, j: usize) -> S::V {
        // SAFETY: the caller's.
        unsafe { simd.load(self.taps[i * 3 + j].as_ptr().add(self.column)) }
    }
}

/// Vectors in memory.
#[derive(Clone, Copy)]
pub(super) struct Plane<W> {
    /// Valid for a vector wherever one is asked for.
    pub first: *mut W,
    /// Values from one to the next, down and across.
    pub steps: [usize; 2],
}

impl<W> Plane<W> {
    /// # Safety
    /// Within what `first` is valid for.
    #[inline(always)]
    unsafe fn at(&self, i: usize, j: usize) -> *mut W {
        // SAFETY: the contract.
        unsafe { self.first.add(i * self.steps[0] + j * self.steps[1]) }
    }
}

impl<W: Float, S: Simd> Source<S> for Plane<W> {
    #[inline(always)]
    unsafe fn load(&self, simd: S, i: usize, j: usize) -> S::V {
        // SAFETY: the caller's.
        unsafe { W::load(simd, self.at(i, j)) }
    }
}

impl<W: Float, S: Simd> Sink<S> for Plane<W> {
    #[inline(always)]
    unsafe fn store(&self, simd: S, i: usize, j: usize, value: S::V) {
        // SAFETY: the caller's.
        unsafe { W::store(simd, self.at(i, j), value) };
    }
}

/// Vectors of words in memory, whose last values come from another plane.
struct Words<W> {
    words: Plane<W>,
    last: Plane<f32>,
    /// What will be stored after these is asked for meanwhile: so many places, far apart, do not come by themselves.
    next: Plane<W>,
}

impl<W: Float, S: Simd> Sink<S> for Words<W> {
    #[inline(always)]
    unsafe fn store(&self, simd: S, i: usize, j: usize, value: S::V) {
        // SAFETY: the caller's.
        unsafe {
            let last = if W::PER_WORD > 1 { self.last.load(simd, i, j) } else { value };
            W::store_words(simd, self.words.at(i, j), value, last);
            simd.prefetch_near(self.next.at(i, j).cast_const().cast());
        }
    }
}

/// The transforms along the columns, `D`, and then along the rows, `A`.
///
/// # Safety
/// The source has a row for each value of `D` and a column for each of `A`, the sink room for each of their results.
#[inline(always)]
pub(super) unsafe fn along_both<D: Transform, A: Transform, S: Simd>(
    simd: S,
    room: &mut Room,
    source: impl Source<S>,
    sink: impl Sink<S>,
) {
    for j in 0..A::VALUES {
        source.prefetch(simd, j);
        let results = match source.has_column(j) {
            true => {
                // SAFETY: the contract.
                let column = vectors!(simd, D::VALUES, I => unsafe { source.load(simd, I, j) });
                D::apply(simd, &column)
            }
            false => [simd.splat(0.0); MAX],
        };
        let room = room.at::<S>(0, j);
        unrolled!(I => {
            if I < D::RESULTS {
                // SAFETY: vectors `[i, j]` of the room.
                unsafe { simd.store(room.add(I * MAX * S::LANES), results[I]) };
            }
        });
    }
    for i in 0..D::RESULTS {
        let room = room.at::<S>(i, 0);
        // SAFETY: the columns have stored a vector for each result and each value.
        let row = vectors!(simd, A::VALUES, J => unsafe { simd.load(room.add(J * S::LANES)) });
        let results = A::apply(simd, &row);
        unrolled!(J => {
            if J < A::RESULTS {
                // SAFETY: the contract.
                unsafe { sink.store(simd, i, J, results[J]) };
            }
        });
    }
}

/// [`along_both`] of the first and the last source of a word, to vectors of words; those from `next` on are to be stored next.
///
/// # Safety
/// As for [`along_both`], and `next` as `words`.
#[inline(always)]
pub(super) unsafe fn transform_words<D: Transform, A: Transform, S: Simd, W: Float>(
    simd: S,
    [first, last]: [impl Source<S>; 2],
    [room, plane]: &mut [Room; 2],
    words: Plane<W>,
    next: *mut W,
) {
    let plane = Plane { first: plane.at::<S>(0, 0), steps: [MAX * S::LANES, S::LANES] };
    let next = Plane { first: next, ..words };
    // SAFETY: the room has as many vectors as a transform has results; the contract.
    unsafe {
        if W::PER_WORD > 1 {
            along_both::<D, A, S>(simd, room, last, plane);
        }
        along_both::<D, A, S>(simd, room, first, Words { words, last: plane, next });
    }
}
