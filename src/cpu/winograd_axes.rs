//! The transforms of Winograd's algorithm, along one axis and along both.

use super::simd::Simd;

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
    store: impl Fn(usize, S::V),
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

/// `G g`: the taps of a filter.
pub(super) struct FilterAxis;

impl Axis<3, 6> for FilterAxis {
    #[inline(always)]
    fn apply<S: Simd>(s: S, [a, b, c]: [S::V; 3]) -> [S::V; 6] {
        let zero = s.splat(0.0);
        let times = |factor: f32, v: S::V| s.mul_add(s.splat(factor), v, zero);
        let (even, odd) = (times(-1.0 / 6.0, s.add(a, c)), times(1.0 / 6.0, b));
        let wide_even = s.mul_add(s.splat(1.0 / 6.0), c, times(1.0 / 24.0, a));
        let wide_odd = times(1.0 / 12.0, b);
        [times(0.25, a), s.sub(even, odd), s.add(even, odd), s.add(wide_even, wide_odd), s.sub(wide_even, wide_odd), c]
    }
}

/// `B^T d`: inputs.
pub(super) struct InputAxis;

impl Axis<6, 6> for InputAxis {
    #[inline(always)]
    fn apply<S: Simd>(s: S, [d0, d1, d2, d3, d4, d5]: [S::V; 6]) -> [S::V; 6] {
        let [plus_two, minus_two, plus_four, minus_four, minus_five] = [2.0, -2.0, 4.0, -4.0, -5.0].map(|x| s.splat(x));
        let even = s.mul_add(minus_four, d2, d4);
        let odd = s.mul_add(minus_four, d1, d3);
        let step = s.sub(d4, d2);
        let slope = s.sub(d3, d1);
        [
            s.mul_add(plus_four, d0, s.mul_add(minus_five, d2, d4)),
            s.add(even, odd),
            s.sub(even, odd),
            s.mul_add(plus_two, slope, step),
            s.mul_add(minus_two, slope, step),
            s.mul_add(plus_four, d1, s.mul_add(minus_five, d3, d5)),
        ]
    }
}

/// `A^T m`: sums of products to outputs.
pub(super) struct OutputAxis;

impl Axis<6, 4> for OutputAxis {
    #[inline(always)]
    fn apply<S: Simd>(s: S, [m0, m1, m2, m3, m4, m5]: [S::V; 6]) -> [S::V; 4] {
        let (near, near_odd) = (s.add(m1, m2), s.sub(m1, m2));
        let (far, far_odd) = (s.add(m3, m4), s.sub(m3, m4));
        let [two, four, eight] = [2.0, 4.0, 8.0].map(|x| s.splat(x));
        [
            s.add(s.add(m0, near), far),
            s.mul_add(two, far_odd, near_odd),
            s.mul_add(four, far, near),
            s.add(s.mul_add(eight, far_odd, near_odd), m5),
        ]
    }
}

/// `A g`, the transpose of [`OutputAxis`]: gradients of outputs.
pub(super) struct GradientAxis;

impl Axis<4, 6> for GradientAxis {
    #[inline(always)]
    fn apply<S: Simd>(s: S, [g0, g1, g2, g3]: [S::V; 4]) -> [S::V; 6] {
        let [two, four] = [2.0, 4.0].map(|x| s.splat(x));
        let (even, odd) = (s.add(g0, g2), s.add(g1, g3));
        let far_even = s.mul_add(four, g2, g0);
        let half_odd = s.mul_add(four, g3, g1);
        let far_odd = s.mul_add(two, half_odd, s.splat(0.0));
        [g0, s.add(even, odd), s.sub(even, odd), s.add(far_even, far_odd), s.sub(far_even, far_odd), g3]
    }
}

/// `G^T m`, the transpose of [`FilterAxis`]: sums of products to the gradient of a filter.
pub(super) struct FilterGradientAxis;

impl Axis<6, 3> for FilterGradientAxis {
    #[inline(always)]
    fn apply<S: Simd>(s: S, [m0, m1, m2, m3, m4, m5]: [S::V; 6]) -> [S::V; 3] {
        let [quarter, sixth, minus_sixth, twelfth, twenty_fourth] =
            [1.0 / 4.0, 1.0 / 6.0, -1.0 / 6.0, 1.0 / 12.0, 1.0 / 24.0].map(|x| s.splat(x));
        let (near, near_odd) = (s.add(m1, m2), s.sub(m2, m1));
        let (far, far_odd) = (s.add(m3, m4), s.sub(m3, m4));
        let shared = s.mul_add(minus_sixth, near, s.splat(0.0));
        [
            s.mul_add(quarter, m0, s.mul_add(twenty_fourth, far, shared)),
            s.mul_add(twelfth, far_odd, s.mul_add(sixth, near_odd, s.splat(0.0))),
            s.add(m5, s.mul_add(sixth, far, shared)),
        ]
    }
}
