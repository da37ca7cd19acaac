//! The transforms of F(4x4, 3x3) along one axis, and along both.
//!
//! They are those of `winograd_points.rs` with points zero, plus and minus `a`, plus and minus `b`, and infinity, where `a` and `b`
//! are [`Float::POINTS`] of the type whose products are taken, and with what normalises them multiplied into the filter. Written
//! by hand, as opposite points share sums.

use super::float::Float;
use super::simd::Simd;
use std::marker::PhantomData;

/// A transform along one axis, from `A` values to `B`. A trait and not a closure: a closure may be compiled on its own, and
/// then without the instruction set.
pub(super) trait Axis<const A: usize, const B: usize> {
    /// Mark it `#[inline(always)]`.
    fn apply<S: Simd>(s: S, values: [S::V; A]) -> [S::V; B];
}

/// The transform along the columns, then along the rows. A column is loaded when it is needed, and a row stored when it is
/// done: all of them would not fit the registers.
#[inline(always)]
pub(super) fn along_both<X: Axis<A, B>, S: Simd, const A: usize, const B: usize>(
    simd: S,
    load: impl Fn(usize, usize) -> S::V,
    mut store: impl FnMut(usize, S::V),
) {
    let mut halves = [[simd.splat(0.0); A]; B];
    for j in 0..A {
        let column = std::array::from_fn(|i| load(i, j));
        for (half, value) in halves.iter_mut().zip(X::apply(simd, column)) {
            half[j] = value;
        }
    }
    for (i, half) in halves.iter().enumerate() {
        for (j, value) in X::apply(simd, *half).into_iter().enumerate() {
            store(i * B + j, value);
        }
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
    #[inline(always)]
    fn apply<S: Simd>(s: S, [g0, g1, g2]: [S::V; 3]) -> [S::V; 6] {
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
    #[inline(always)]
    fn apply<S: Simd>(s: S, [d0, d1, d2, d3, d4, d5]: [S::V; 6]) -> [S::V; 6] {
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
    #[inline(always)]
    fn apply<S: Simd>(s: S, [m0, m1, m2, m3, m4, m5]: [S::V; 6]) -> [S::V; 4] {
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
    #[inline(always)]
    fn apply<S: Simd>(s: S, [g0, g1, g2, g3]: [S::V; 4]) -> [S::V; 6] {
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
    #[inline(always)]
    fn apply<S: Simd>(s: S, [m0, m1, m2, m3, m4, m5]: [S::V; 6]) -> [S::V; 3] {
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
