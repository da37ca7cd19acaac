//! The transforms of F(4x4, 3x3) along one axis, and along both.
//!
//! They are those of `points.rs` with points zero, plus and minus `a`, plus and minus `b`, and infinity, where `a` and `b`
//! are [`Float::POINTS`] of the type whose products are taken, and with what normalises them multiplied into the filter. Written
//! by hand, as opposite points share sums.

use super::points::OUTPUTS;
use super::transforms::{Room, unrolled};
use crate::cpu::float::Float;
use crate::cpu::simd::Simd;
use std::marker::PhantomData;

/// Inputs that the outputs of a tile see along one axis, and products there.
pub(super) const IN: usize = OUTPUTS + 2;
/// Products of a tile for a pair of channels.
pub(super) const POSITIONS: usize = IN * IN;

/// A transform along one axis, from `A` values to `B`. A trait and not a closure, as are [`Source`] and [`Sink`]: a closure may be
/// compiled on its own, and then without the instruction set.
pub(super) trait Axis<const A: usize, const B: usize> {
    /// Results two and two, each two of which need about the same values.
    const TOGETHER: &'static [[usize; 2]];
    /// Mark it `#[inline(always)]`.
    fn apply<S: Simd>(s: S, values: &[S::V; A]) -> [S::V; B];
}

/// Vectors by row and column.
pub(super) trait Source<S: Simd>: Copy {
    /// # Safety
    /// As the source says.
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
pub(super) struct Pixels<'a, T, const N: usize> {
    /// Valid for a vector from `channel` on.
    pub pixels: &'a [[&'a [T]; N]; N],
    pub channel: usize,
}

impl<T: Float, S: Simd, const N: usize> Source<S> for Pixels<'_, T, N> {
    #[inline(always)]
    unsafe fn load(&self, simd: S, i: usize, j: usize) -> S::V {
        // SAFETY: the caller's.
        unsafe { T::load(simd, self.pixels[i][j].as_ptr().add(self.channel)) }
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

/// Vectors `stride` values apart, in rows of `N`.
#[derive(Clone, Copy)]
pub(super) struct Plane<W, const N: usize> {
    /// Valid for a vector at every multiple of the stride that is asked for.
    pub first: *mut W,
    pub stride: usize,
}

impl<W: Float, S: Simd, const N: usize> Source<S> for Plane<W, N> {
    #[inline(always)]
    unsafe fn load(&self, simd: S, i: usize, j: usize) -> S::V {
        // SAFETY: the caller's.
        unsafe { W::load(simd, self.first.add((i * N + j) * self.stride)) }
    }
}

impl<W: Float, S: Simd, const N: usize> Sink<S> for Plane<W, N> {
    #[inline(always)]
    unsafe fn store(&self, simd: S, i: usize, j: usize, value: S::V) {
        // SAFETY: the caller's.
        unsafe { W::store(simd, self.first.add((i * N + j) * self.stride), value) };
    }
}

/// Vectors of words `stride` values apart, in rows of `N`, whose last values come from a plane.
struct Words<W, const N: usize> {
    first: *mut W,
    stride: usize,
    last: Plane<f32, N>,
}

impl<W: Float, S: Simd, const N: usize> Sink<S> for Words<W, N> {
    #[inline(always)]
    unsafe fn store(&self, simd: S, i: usize, j: usize, value: S::V) {
        // SAFETY: the caller's.
        unsafe {
            let last = if W::PER_WORD > 1 { self.last.load(simd, i, j) } else { value };
            W::store_words(simd, self.first.add((i * N + j) * self.stride), value, last);
        }
    }
}

/// The transform along the columns, then along the rows. Two rows at a time: all of them would not fit the registers, and passing
/// them through memory costs more than loading columns again.
///
/// # Safety
/// The source has `A` rows and columns, the sink room for `B`.
#[inline(always)]
pub(super) unsafe fn along_both<X: Axis<A, B>, S: Simd, const A: usize, const B: usize>(
    simd: S,
    source: impl Source<S>,
    sink: impl Sink<S>,
) {
    unrolled!(GROUP => {
        if GROUP < const { X::TOGETHER.len() } {
            let [first, second] = const { X::TOGETHER[GROUP % X::TOGETHER.len()] };
            let mut rows = [[simd.splat(0.0); A]; 2];
            unrolled!(J => {
                if J < A {
                    let mut column = [simd.splat(0.0); A];
                    unrolled!(I => {
                        if I < A {
                            // SAFETY: the contract.
                            column[I % A] = unsafe { source.load(simd, I, J) };
                        }
                    });
                    let values = X::apply(simd, &column);
                    rows[0][J % A] = values[first];
                    rows[1][J % A] = values[second];
                }
            });
            let (upper, lower) = (X::apply(simd, &rows[0]), X::apply(simd, &rows[1]));
            unrolled!(J => {
                if J < B {
                    // SAFETY: the contract.
                    unsafe { sink.store(simd, first, J, upper[J % B]) };
                }
            });
            unrolled!(J => {
                if J < B && first != second {
                    // SAFETY: the contract.
                    unsafe { sink.store(simd, second, J, lower[J % B]) };
                }
            });
        }
    });
}

/// [`along_both`] of the first and the last source of a word, to vectors of words, `stride` values apart from `out` on.
///
/// # Safety
/// As for [`along_both`], and `out` is valid for a vector of words at each multiple of the stride.
#[inline(always)]
pub(super) unsafe fn transform_words<X: Axis<A, B>, S: Simd, W: Float, const A: usize, const B: usize>(
    simd: S,
    [first, last]: [impl Source<S>; 2],
    room: &mut Room,
    out: *mut W,
    stride: usize,
) {
    let plane = Plane { first: room.at::<S>(0, 0), stride: S::LANES };
    // SAFETY: the room has as many vectors as a transform has results; the contract.
    unsafe {
        if W::PER_WORD > 1 {
            along_both::<X, S, A, B>(simd, last, plane);
        }
        along_both::<X, S, A, B>(simd, first, Words::<W, B> { first: out, stride, last: plane });
    }
}

/// `x` times a constant.
#[inline(always)]
fn times<S: Simd>(s: S, factor: f32, x: S::V) -> S::V {
    if factor == 1.0 { x } else { s.mul_add(s.splat(factor), x, s.splat(0.0)) }
}

/// `x` times a constant, and `y`.
#[inline(always)]
fn plus<S: Simd>(s: S, factor: f32, x: S::V, y: S::V) -> S::V {
    match factor {
        1.0 => s.add(y, x),
        -1.0 => s.sub(y, x),
        _ => s.mul_add(s.splat(factor), x, y),
    }
}

/// The product of a point and its distances from the other finite ones: of zero, `a` and `b`. Of `-a` and `-b` it is the same.
const fn normalisers([a, b]: [f32; 2]) -> [f32; 3] {
    [a * a * b * b, 2.0 * a * a * (a * a - b * b), 2.0 * b * b * (b * b - a * a)]
}

/// `G g`: the taps of a filter.
pub(super) struct FilterAxis<W>(PhantomData<W>);

impl<W: Float> Axis<3, 6> for FilterAxis<W> {
    const TOGETHER: &'static [[usize; 2]] = &[[0, 5], [1, 2], [3, 4]];

    #[inline(always)]
    fn apply<S: Simd>(s: S, &[g0, g1, g2]: &[S::V; 3]) -> [S::V; 6] {
        let ([a, b], [zero, near, far]) = const { (W::POINTS, normalisers(W::POINTS)) };
        let (even, odd) = (plus(s, a * a / near, g2, times(s, 1.0 / near, g0)), times(s, a / near, g1));
        let (far_even, far_odd) = (plus(s, b * b / far, g2, times(s, 1.0 / far, g0)), times(s, b / far, g1));
        [
            times(s, 1.0 / zero, g0),
            s.add(even, odd),
            s.sub(even, odd),
            s.add(far_even, far_odd),
            s.sub(far_even, far_odd),
            g2,
        ]
    }
}

/// `B^T d`: inputs.
pub(super) struct InputAxis<W>(PhantomData<W>);

impl<W: Float> Axis<6, 6> for InputAxis<W> {
    const TOGETHER: &'static [[usize; 2]] = &[[0, 5], [1, 2], [3, 4]];

    #[inline(always)]
    fn apply<S: Simd>(s: S, &[d0, d1, d2, d3, d4, d5]: &[S::V; 6]) -> [S::V; 6] {
        let [a, b] = W::POINTS;
        let (product, sum) = (a * a * b * b, a * a + b * b);
        let (even, odd) = (plus(s, -b * b, d2, d4), plus(s, -b * b, d1, d3));
        let (far_even, far_odd) = (plus(s, -a * a, d2, d4), plus(s, -a * a, d1, d3));
        [
            plus(s, product, d0, plus(s, -sum, d2, d4)),
            plus(s, a, odd, even),
            plus(s, -a, odd, even),
            plus(s, b, far_odd, far_even),
            plus(s, -b, far_odd, far_even),
            plus(s, product, d1, plus(s, -sum, d3, d5)),
        ]
    }
}

/// `A^T m`: sums of products to outputs.
pub(super) struct OutputAxis<W>(PhantomData<W>);

impl<W: Float> Axis<6, 4> for OutputAxis<W> {
    const TOGETHER: &'static [[usize; 2]] = &[[0, 2], [1, 3]];

    #[inline(always)]
    fn apply<S: Simd>(s: S, &[m0, m1, m2, m3, m4, m5]: &[S::V; 6]) -> [S::V; 4] {
        let [a, b] = W::POINTS;
        let (near, near_odd) = (s.add(m1, m2), s.sub(m1, m2));
        let (far, far_odd) = (s.add(m3, m4), s.sub(m3, m4));
        [
            s.add(s.add(m0, near), far),
            plus(s, b, far_odd, times(s, a, near_odd)),
            plus(s, b * b, far, times(s, a * a, near)),
            s.add(plus(s, b * b * b, far_odd, times(s, a * a * a, near_odd)), m5),
        ]
    }
}

/// `A g`, the transpose of [`OutputAxis`]: gradients of outputs.
pub(super) struct GradientAxis<W>(PhantomData<W>);

impl<W: Float> Axis<4, 6> for GradientAxis<W> {
    const TOGETHER: &'static [[usize; 2]] = &[[0, 5], [1, 2], [3, 4]];

    #[inline(always)]
    fn apply<S: Simd>(s: S, &[g0, g1, g2, g3]: &[S::V; 4]) -> [S::V; 6] {
        let [a, b] = W::POINTS;
        let (even, odd) = (plus(s, a * a, g2, g0), plus(s, a * a, g3, g1));
        let (far_even, far_odd) = (plus(s, b * b, g2, g0), plus(s, b * b, g3, g1));
        [
            g0,
            plus(s, a, odd, even),
            plus(s, -a, odd, even),
            plus(s, b, far_odd, far_even),
            plus(s, -b, far_odd, far_even),
            g3,
        ]
    }
}

/// `G^T m`, the transpose of [`FilterAxis`]: sums of products to the gradient of a filter.
pub(super) struct FilterGradientAxis<W>(PhantomData<W>);

impl<W: Float> Axis<6, 3> for FilterGradientAxis<W> {
    const TOGETHER: &'static [[usize; 2]] = &[[0, 2], [1, 1]];

    #[inline(always)]
    fn apply<S: Simd>(s: S, &[m0, m1, m2, m3, m4, m5]: &[S::V; 6]) -> [S::V; 3] {
        let ([a, b], [zero, near, far]) = const { (W::POINTS, normalisers(W::POINTS)) };
        let (even, odd) = (s.add(m1, m2), s.sub(m1, m2));
        let (far_even, far_odd) = (s.add(m3, m4), s.sub(m3, m4));
        [
            plus(s, 1.0 / zero, m0, plus(s, 1.0 / near, even, times(s, 1.0 / far, far_even))),
            plus(s, a / near, odd, times(s, b / far, far_odd)),
            s.add(m5, plus(s, a * a / near, even, times(s, b * b / far, far_even))),
        ]
    }
}
