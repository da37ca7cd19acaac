//! Transforms along both axes.

use super::points::Axis;
use super::transforms::{MAX, Room, Transform, unrolled, vectors, with_outputs};
use super::window::Window;
use crate::cpu::float::Float;
use crate::cpu::simd::Simd;
use std::marker::PhantomData;

/// Vectors by row and column. A trait and not a closure, as is [`Sink`]: a closure may be compiled on its own, and then without the
/// instruction set.
pub(super) trait Source<S: Simd> {
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
pub(super) struct Pixels<'a, T> {
    /// Has a vector from `channel` on.
    pub window: &'a Window<'a, T>,
    /// What will be transformed next, of as many rows and columns, if it is to be asked for.
    pub next: Option<(&'a Window<'a, T>, usize)>,
    pub channel: usize,
}

impl<T: Float, S: Simd> Source<S> for Pixels<'_, T> {
    #[inline(always)]
    fn has_column(&self, j: usize) -> bool {
        self.window.has_column(j)
    }
    #[inline(always)]
    fn prefetch(&self, simd: S, j: usize) {
        if let Some((next, seen)) = self.next {
            next.prefetch(simd, seen, self.channel / S::LANES * seen + j);
        }
    }
    #[inline(always)]
    unsafe fn load(&self, simd: S, i: usize, j: usize) -> S::V {
        // SAFETY: the caller's.
        unsafe { self.window.load(simd, i, j, self.channel) }
    }
}

/// A vector of columns of each tap of 3x3 filters.
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

/// Where vectors go, and where others will after them, if that is to be asked for meanwhile: so many places, far apart, do not come by
/// themselves.
pub(super) struct Asking<K, W> {
    pub to: K,
    pub next: Option<Plane<W>>,
}

impl<K: Sink<S>, W: Float, S: Simd> Sink<S> for Asking<K, W> {
    #[inline(always)]
    unsafe fn store(&self, simd: S, i: usize, j: usize, value: S::V) {
        // SAFETY: the caller's; of what is asked for nothing is read.
        unsafe {
            self.to.store(simd, i, j, value);
            if let Some(next) = &self.next {
                simd.prefetch_near(next.at(i, j).cast_const().cast());
            }
        }
    }
}

/// Vectors of words in memory, whose last values come from another plane.
struct Words<W> {
    words: Plane<W>,
    last: Plane<f32>,
}

impl<W: Float, S: Simd> Sink<S> for Words<W> {
    #[inline(always)]
    unsafe fn store(&self, simd: S, i: usize, j: usize, value: S::V) {
        // SAFETY: the caller's.
        unsafe {
            let last = if W::PER_WORD > 1 { self.last.load(simd, i, j) } else { value };
            W::store_words(simd, self.words.at(i, j), value, last);
        }
    }
}

/// A transform along both axes.
pub(super) trait AlongBoth {
    /// Mark it `#[inline(always)]`.
    ///
    /// # Safety
    /// The source has a row for each value along the columns and a column for each along the rows, the sink room for each of their
    /// results.
    unsafe fn apply<S: Simd>(&self, simd: S, room: &mut Room, source: impl Source<S>, sink: impl Sink<S>);
}

/// `D` along the columns, and then `A` along the rows.
pub(super) struct Along<D, A>(PhantomData<(D, A)>);

impl<D, A> Along<D, A> {
    pub(super) fn new() -> Self {
        Along(PhantomData)
    }
}

impl<D: Transform, A: Transform> AlongBoth for Along<D, A> {
    #[inline(always)]
    unsafe fn apply<S: Simd>(&self, simd: S, room: &mut Room, source: impl Source<S>, sink: impl Sink<S>) {
        // SAFETY: the contract.
        unsafe {
            along_columns::<D, S>(simd, room, source, A::VALUES);
            along_rows::<A, S>(simd, room, 0..D::RESULTS, sink);
        }
    }
}

/// A transform of tiles, by their outputs along an axis.
pub(super) trait OfTiles {
    /// That of a tile of `M` outputs.
    type Of<const M: usize>: Transform;
    const AXIS: Axis;
}

/// That of a tile of so many outputs down and across.
pub(super) struct OfTile<X> {
    outputs: [usize; 2],
    of: PhantomData<X>,
}

impl<X> OfTile<X> {
    pub(super) fn new(outputs: [usize; 2]) -> Self {
        OfTile { outputs, of: PhantomData }
    }
}

impl<X: OfTiles> AlongBoth for OfTile<X> {
    #[inline(always)]
    unsafe fn apply<S: Simd>(&self, simd: S, room: &mut Room, source: impl Source<S>, sink: impl Sink<S>) {
        let [down, across] = self.outputs;
        let columns = with_outputs!(X::AXIS, across, M => <X::Of<M> as Transform>::VALUES);
        // SAFETY: the contract.
        unsafe {
            let rows = with_outputs!(X::AXIS, down, M => {
                along_columns::<X::Of<M>, S>(simd, room, source, columns);
                const { &<X::Of<M> as Transform>::GIVES }
            });
            let rows = (0..MAX).filter(|&i| rows[i]);
            with_outputs!(X::AXIS, across, M => along_rows::<X::Of<M>, S>(simd, room, rows, sink));
        }
    }
}

/// `D` along so many columns, to the room.
///
/// # Safety
/// The source has as many, with a row for each value of `D`.
#[inline(always)]
unsafe fn along_columns<D: Transform, S: Simd>(simd: S, room: &mut Room, source: impl Source<S>, columns: usize) {
    for j in 0..columns {
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
            if const { D::GIVES[I] } {
                // SAFETY: vectors `[i, j]` of the room.
                unsafe { simd.store(room.add(I * MAX * S::LANES), results[I]) };
            }
        });
    }
}

/// `A` along some rows of the room.
///
/// # Safety
/// Columns have stored a vector for each of these rows and each value of `A`; the sink has room for each of its results.
#[inline(always)]
unsafe fn along_rows<A: Transform, S: Simd>(
    simd: S,
    room: &mut Room,
    rows: impl Iterator<Item = usize>,
    sink: impl Sink<S>,
) {
    for i in rows {
        let room = room.at::<S>(i, 0);
        // SAFETY: the contract.
        let row = vectors!(simd, A::VALUES, J => unsafe { simd.load(room.add(J * S::LANES)) });
        let results = A::apply(simd, &row);
        unrolled!(J => {
            if const { A::GIVES[J] } {
                // SAFETY: the contract.
                unsafe { sink.store(simd, i, J, results[J]) };
            }
        });
    }
}

/// A transform of the first and the last source of a word, to vectors of words; those from `next` on are to be stored next.
///
/// # Safety
/// As for [`AlongBoth::apply`], and `next` as `words`.
#[inline(always)]
pub(super) unsafe fn transform_words<S: Simd, W: Float>(
    simd: S,
    transform: &impl AlongBoth,
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
            transform.apply(simd, room, last, plane);
        }
        transform.apply(simd, room, first, Asking { to: Words { words, last: plane }, next: Some(next) });
    }
}
