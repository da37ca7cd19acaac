//! Transforms along both axes.

use super::points::Axis;
use super::transforms::{MAX, Room, Transform, unrolled, vectors, with_outputs};
use super::window::Window;
use crate::cpu::float::Float;
use crate::cpu::simd::Simd;
use std::marker::PhantomData;
use std::ops::Range;

/// Vectors by row and column. A trait and not a closure, as is [`Sink`]: a closure may be compiled on its own, and then without the
/// instruction set.
pub(super) trait Source<S: Simd> {
    /// The columns that have anything but zeros.
    #[inline(always)]
    fn columns(&self) -> Range<usize> {
        0..MAX
    }
    /// Asks for a part of what will be transformed next, with each column for another.
    #[inline(always)]
    fn prefetch(&self, _simd: S, _j: usize) {}
    /// # Safety
    /// As the source says; there is such a column.
    unsafe fn load(&self, simd: S, i: usize, j: usize) -> S::V;
}

/// Where vectors go by row and column, one of each of `N` sources.
pub(super) trait Sink<S: Simd, const N: usize> {
    /// # Safety
    /// As the sink says.
    unsafe fn store(&self, simd: S, i: usize, j: usize, values: [S::V; N]);
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
    fn columns(&self) -> Range<usize> {
        self.window.columns()
    }
    #[inline(always)]
    fn prefetch(&self, simd: S, j: usize) {
        if let Some((next, seen)) = self.next {
            next.prefetch(simd, seen, [j, self.channel]);
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

impl<W: Float, S: Simd> Sink<S, 1> for Plane<W> {
    #[inline(always)]
    unsafe fn store(&self, simd: S, i: usize, j: usize, [value]: [S::V; 1]) {
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

impl<K: Sink<S, N>, W: Float, S: Simd, const N: usize> Sink<S, N> for Asking<K, W> {
    #[inline(always)]
    unsafe fn store(&self, simd: S, i: usize, j: usize, values: [S::V; N]) {
        // SAFETY: the caller's; of what is asked for nothing is read.
        unsafe {
            self.to.store(simd, i, j, values);
            if let Some(next) = &self.next {
                simd.prefetch_near(next.at(i, j).cast_const().cast());
            }
        }
    }
}

/// Vectors of words in memory, each of the first and the last of its values.
struct Words<W>(Plane<W>);

impl<W: Float, S: Simd> Sink<S, 2> for Words<W> {
    #[inline(always)]
    unsafe fn store(&self, simd: S, i: usize, j: usize, [first, last]: [S::V; 2]) {
        // SAFETY: the caller's.
        unsafe { W::store_words(simd, self.0.at(i, j), first, last) };
    }
}

/// Which tile and which channel to ask for with a vector of `this` from `channel` on, one of those of `channels`: not the next vector's, whose lines would
/// not come in time, but that of the one after it, of the tile that follows if this has none.
#[inline(always)]
pub(super) fn vector_ahead<S: Simd>(
    [this, following]: [usize; 2],
    channel: usize,
    channels: &Range<usize>,
) -> [usize; 2] {
    let channel = channel + 2 * S::LANES;
    if channel < channels.end { [this, channel] } else { [following, channels.start + channel - channels.end] }
}

/// A transform along both axes. Mark its methods `#[inline(always)]`.
pub(super) trait AlongBoth {
    /// That along either axis of those whose vectors between the two may fit registers.
    type Small: Transform;

    /// Whether it is such.
    fn is_small(&self) -> bool;

    /// Along the columns, to the room.
    ///
    /// # Safety
    /// The source has a row for each value along the columns and a column for each along the rows.
    unsafe fn columns<S: Simd>(&self, simd: S, room: &mut Room, source: &impl Source<S>);

    /// Along the rows of what the columns have left in the rooms.
    ///
    /// # Safety
    /// They have left it; the sink has room for each result.
    unsafe fn rows<S: Simd, const N: usize>(&self, simd: S, rooms: &mut [Room; N], sink: impl Sink<S, N>);

    /// Along the columns of each source, and then along the rows of all.
    ///
    /// # Safety
    /// As for the two.
    #[inline(always)]
    unsafe fn apply<S: Simd, const N: usize>(
        &self,
        simd: S,
        rooms: &mut [Room; N],
        sources: [impl Source<S>; N],
        sink: impl Sink<S, N>,
    ) {
        // SAFETY: the contract.
        unsafe {
            if const { fits_registers::<Self::Small, S>() } && self.is_small() {
                return in_registers::<Self::Small, S, N>(simd, rooms, sources, sink);
            }
            for (room, source) in rooms.iter_mut().zip(&sources) {
                self.columns(simd, room, source);
            }
            self.rows(simd, rooms, sink);
        }
    }
}

/// `D` along the columns, and then `A` along the rows.
pub(super) struct Along<D, A>(PhantomData<(D, A)>);

impl<D, A> Along<D, A> {
    pub(super) fn new() -> Self {
        Along(PhantomData)
    }
}

impl<D: Transform, A: Transform> AlongBoth for Along<D, A> {
    type Small = D;

    #[inline(always)]
    fn is_small(&self) -> bool {
        false
    }

    #[inline(always)]
    unsafe fn columns<S: Simd>(&self, simd: S, room: &mut Room, source: &impl Source<S>) {
        // SAFETY: the contract.
        unsafe { along_columns::<D, S>(simd, room, source, A::VALUES) };
    }

    #[inline(always)]
    unsafe fn rows<S: Simd, const N: usize>(&self, simd: S, rooms: &mut [Room; N], sink: impl Sink<S, N>) {
        // SAFETY: the contract.
        unsafe { along_rows::<A, S, N>(simd, rooms, 0..D::RESULTS, sink) };
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
    type Small = X::Of<4>;

    #[inline(always)]
    fn is_small(&self) -> bool {
        X::AXIS.outputs == 4 && self.outputs == [4, 4]
    }

    #[inline(always)]
    unsafe fn columns<S: Simd>(&self, simd: S, room: &mut Room, source: &impl Source<S>) {
        let [down, across] = self.outputs;
        let columns = with_outputs!(X::AXIS, across, M => <X::Of<M> as Transform>::VALUES);
        // SAFETY: the contract.
        with_outputs!(X::AXIS, down, M => unsafe { along_columns::<X::Of<M>, S>(simd, room, source, columns) });
    }

    #[inline(always)]
    unsafe fn rows<S: Simd, const N: usize>(&self, simd: S, rooms: &mut [Room; N], sink: impl Sink<S, N>) {
        let [down, across] = self.outputs;
        let given = with_outputs!(X::AXIS, down, M => const { &<X::Of<M> as Transform>::GIVES });
        let rows = (0..MAX).filter(|&i| given[i]);
        // SAFETY: the contract.
        with_outputs!(X::AXIS, across, M => unsafe { along_rows::<X::Of<M>, S, N>(simd, rooms, rows, sink) });
    }
}

/// Values or results along an axis of a transform whose vectors between the axes registers hold, but for a few.
const FEW: usize = 6;

/// Whether a transform is such. With a stride, of five, it was no faster.
const fn fits_registers<A: Transform, S: Simd>() -> bool {
    let most = if A::VALUES > A::RESULTS { A::VALUES } else { A::RESULTS };
    S::REGISTERS >= 32 && most == FEW
}

/// `A` along the columns of each source, and then along the rows of all, the last source's vectors between the two in registers.
///
/// # Safety
/// As for [`AlongBoth::apply`].
#[inline(always)]
unsafe fn in_registers<A: Transform, S: Simd, const N: usize>(
    simd: S,
    rooms: &mut [Room; N],
    sources: [impl Source<S>; N],
    sink: impl Sink<S, N>,
) {
    debug_assert!(const { fits_registers::<A, S>() });
    let zero = simd.splat(0.0);
    for (room, source) in rooms.iter_mut().zip(&sources).take(N - 1) {
        // SAFETY: the contract.
        unsafe { along_columns::<A, S>(simd, room, source, A::VALUES) };
    }
    let (last, mut between) = (&sources[N - 1], [[zero; MAX]; FEW]);
    let inside = last.columns();
    unrolled!(J in 0 1 2 3 4 5 => {
        if const { J < A::VALUES } {
            last.prefetch(simd, J);
            let mut column = [zero; MAX];
            if inside.contains(&J) {
                // SAFETY: the contract.
                column = vectors!(simd, A::VALUES, I => unsafe { last.load(simd, I, J) });
            }
            let results = A::apply(simd, &column);
            unrolled!(I in 0 1 2 3 4 5 => { between[I][J] = results[I]; });
        }
    });
    unrolled!(I in 0 1 2 3 4 5 => {
        if const { A::GIVES[I] } {
            let mut rows = [between[I]; N];
            // SAFETY: the columns of all sources but the last have stored these rows; the contract.
            unsafe {
                for (row, room) in rows.iter_mut().zip(&mut *rooms).take(N - 1) {
                    *row = row_of::<A, S>(simd, room, I);
                }
                along_row::<A, S, N>(simd, I, rows, &sink);
            }
        }
    });
}

/// `D` along so many columns, to the room.
///
/// # Safety
/// The source has as many, with a row for each value of `D`.
#[inline(always)]
unsafe fn along_columns<D: Transform, S: Simd>(simd: S, room: &mut Room, source: &impl Source<S>, columns: usize) {
    let Range { start, end } = source.columns();
    let (start, end) = (start.min(columns), end.min(columns));
    for j in (0..start).chain(end..columns) {
        source.prefetch(simd, j);
        let room = room.at::<S>(0, j);
        for i in (0..MAX).filter(|&i| D::GIVES[i]) {
            // SAFETY: vectors `[i, j]` of the room.
            unsafe { simd.store(room.add(i * MAX * S::LANES), simd.splat(0.0)) };
        }
    }
    for j in start..end {
        source.prefetch(simd, j);
        // SAFETY: the contract.
        let column = vectors!(simd, D::VALUES, I => unsafe { source.load(simd, I, j) });
        let results = D::apply(simd, &column);
        let room = room.at::<S>(0, j);
        unrolled!(I => {
            if const { D::GIVES[I] } {
                // SAFETY: vectors `[i, j]` of the room.
                unsafe { simd.store(room.add(I * MAX * S::LANES), results[I]) };
            }
        });
    }
}

/// `A` along some rows of the rooms.
///
/// # Safety
/// Columns have stored a vector for each of these rows and each value of `A`; the sink has room for each of its results.
#[inline(always)]
unsafe fn along_rows<A: Transform, S: Simd, const N: usize>(
    simd: S,
    rooms: &mut [Room; N],
    rows: impl Iterator<Item = usize>,
    sink: impl Sink<S, N>,
) {
    for i in rows {
        let mut values = [[simd.splat(0.0); MAX]; N];
        // SAFETY: the contract.
        unsafe {
            for (values, room) in values.iter_mut().zip(&mut *rooms) {
                *values = row_of::<A, S>(simd, room, i);
            }
            along_row::<A, S, N>(simd, i, values, &sink);
        }
    }
}

/// What columns have left in row `i` of a room.
///
/// # Safety
/// They have stored a vector for each value of `A`.
#[inline(always)]
unsafe fn row_of<A: Transform, S: Simd>(simd: S, room: &mut Room, i: usize) -> [S::V; MAX] {
    let room = room.at::<S>(i, 0);
    // SAFETY: the contract.
    vectors!(simd, A::VALUES, J => unsafe { simd.load(room.add(J * S::LANES)) })
}

/// `A` along row `i` of each source, to the sink.
///
/// # Safety
/// The sink has room for each of its results.
#[inline(always)]
unsafe fn along_row<A: Transform, S: Simd, const N: usize>(
    simd: S,
    i: usize,
    mut rows: [[S::V; MAX]; N],
    sink: &impl Sink<S, N>,
) {
    for row in &mut rows {
        *row = A::apply(simd, row);
    }
    unrolled!(J => {
        if const { A::GIVES[J] } {
            let mut values = [rows[0][J]; N];
            for (value, row) in values.iter_mut().zip(&rows) {
                *value = row[J];
            }
            // SAFETY: the contract.
            unsafe { sink.store(simd, i, J, values) };
        }
    });
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
    rooms: &mut [Room; 2],
    words: Plane<W>,
    next: *mut W,
) {
    let next = Some(Plane { first: next, ..words });
    // SAFETY: the contract.
    unsafe {
        if W::PER_WORD > 1 {
            return transform.apply(simd, rooms, [first, last], Asking { to: Words(words), next });
        }
        let [room, _] = rooms;
        transform.apply(simd, std::array::from_mut(room), [first], Asking { to: words, next });
    }
}
