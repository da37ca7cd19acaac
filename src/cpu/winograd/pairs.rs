//! The transform of inputs to two or four pairs of opposite points, infinity, and maybe zero.
//!
//! The polynomial for `+-a` is `(x +- a)` times `x^2 - b^2` for the other pairs, and times `x` if zero is a point. So of the even powers, and
//! of the odd ones, what the pairs of a half have in common is the product of the other half, computed once. Row by row the matrix of four
//! pairs takes 35 multiplications of a vector by 33 factors, which do not fit the registers; this takes 36 by 16, which do. That of two pairs
//! takes 18 operations, and this 15.

use super::points::Point;
use super::transforms::{MAX, Transform, unrolled};
use crate::cpu::simd::Simd;
use std::marker::PhantomData;

/// Registers that hold the factors and what they are multiplied by.
pub(super) const REGISTERS: usize = 32;

/// Two or four pairs, infinity, and maybe zero.
#[derive(Clone, Copy)]
struct Pairs {
    count: usize,
    /// Rows of either point of each pair.
    rows: [[usize; 2]; 4],
    /// The first points of the pairs.
    points: [f64; 4],
    infinity: usize,
    zero: Option<usize>,
}

impl Pairs {
    const NONE: Pairs = Pairs { count: 0, rows: [[0; 2]; 4], points: [0.0; 4], infinity: 0, zero: None };

    /// What these points are, if they are such.
    const fn of(points: &[Point]) -> Option<Pairs> {
        let mut pairs = Pairs::NONE;
        let mut i = 0;
        while i < points.len() {
            match points[i] {
                None => pairs.infinity = i,
                Some(0.0) => pairs.zero = Some(i),
                Some(point) => {
                    let mut pair = 0;
                    while pair < pairs.count && pairs.points[pair] != -point {
                        pair += 1;
                    }
                    match pair {
                        4 => return None,
                        _ if pair == pairs.count => {
                            (pairs.rows[pair][0], pairs.points[pair]) = (i, point);
                            pairs.count += 1;
                        }
                        _ => pairs.rows[pair][1] = i,
                    }
                }
            }
            i += 1;
        }
        let whole = points.len() == 2 * pairs.count + 1 + pairs.zero.is_some() as usize;
        if whole && matches!(pairs.count, 2 | 4) { Some(pairs) } else { None }
    }

    /// The last factor of `x - a^2` of a pair.
    const fn factor(&self, pair: usize) -> f32 {
        -(self.points[pair] * self.points[pair]) as f32
    }

    /// The last two factors of `x^2 - (a^2 + b^2) x + a^2 b^2`, of two pairs, the halves of four.
    const fn product(&self, half: usize) -> [f32; 2] {
        let [a, b] = [self.points[2 * half], self.points[2 * half + 1]];
        [-(a * a + b * b) as f32, (a * a * b * b) as f32]
    }
}

/// The pairs of a transform that has them, and what each row is multiplied by.
struct PairsOf<X>(PhantomData<X>);

impl<X: Transform> PairsOf<X> {
    /// Where there are none nothing comes of them.
    const PAIRS: Pairs = match Pairs::of(X::POINTS) {
        Some(pairs) => pairs,
        None => Pairs::NONE,
    };
    /// One if zero is a point.
    const SHIFT: usize = Self::PAIRS.zero.is_some() as usize;
    /// The highest power of the rows of pairs; where there are none, any.
    const LAST: usize = (2 * Self::PAIRS.count + Self::SHIFT).saturating_sub(1);
    /// Factors of the first row of each pair: of what goes with its point, and of the rest.
    const SCALES: [[f32; 2]; 4] = {
        let (mut scales, mut i) = ([[0.0; 2]; 4], 0);
        while i < Self::PAIRS.count {
            let leading = X::MATRIX[Self::PAIRS.rows[i][0]][Self::LAST];
            scales[i] = [(leading as f64 * Self::PAIRS.points[i]) as f32, leading];
            i += 1;
        }
        scales
    };
    /// The row of zero, and what it is multiplied by.
    const ZERO: Option<(usize, f32)> = match Self::PAIRS.zero {
        Some(row) => Some((row, X::MATRIX[row][Self::LAST])),
        None => None,
    };
    /// Whether the second row of a pair is what goes with the point less the rest, and not the other way round.
    const fn turned(pair: usize) -> bool {
        let [first, second] = Self::PAIRS.rows[pair];
        (X::MATRIX[first][Self::LAST] > 0.0) != (X::MATRIX[second][Self::LAST] > 0.0)
    }
}

/// Whether points are such.
pub(super) const fn exist(points: &[Point]) -> bool {
    Pairs::of(points).is_some()
}

/// A transform to such points.
#[inline(always)]
pub(super) fn apply<X: Transform, S: Simd>(simd: S, values: &[S::V; MAX]) -> [S::V; MAX] {
    match const { PairsOf::<X>::PAIRS.count } {
        2 => apply_two::<X, S>(simd, values),
        _ => apply_four::<X, S>(simd, values),
    }
}

/// The polynomial of two pairs, the only ones or those of a half.
#[inline(always)]
fn product<X: Transform, S: Simd, const HALF: usize>(simd: S, [first, second, third]: [S::V; 3]) -> S::V {
    let [sum, product] = const { PairsOf::<X>::PAIRS.product(HALF) };
    simd.mul_add(simd.splat(sum), second, simd.mul_add(simd.splat(product), first, third))
}

/// [`product`] of values two apart, from one on.
#[inline(always)]
fn product_from<X: Transform, S: Simd, const HALF: usize>(simd: S, values: &[S::V; MAX], at: usize) -> S::V {
    product::<X, S, HALF>(simd, [values[at], values[at + 2], values[at + 4]])
}

/// Two pairs: each has the other's polynomial, of the one power and of the other.
#[inline(always)]
fn apply_two<X: Transform, S: Simd>(simd: S, values: &[S::V; MAX]) -> [S::V; MAX] {
    let mut out = [simd.splat(0.0); MAX];
    let shift = const { PairsOf::<X>::SHIFT };
    out[const { PairsOf::<X>::PAIRS.infinity }] = product_from::<X, S, 0>(simd, values, shift);
    if let Some((zero, scale)) = const { PairsOf::<X>::ZERO } {
        out[zero] = simd.mul(simd.splat(scale), product_from::<X, S, 0>(simd, values, 0));
    }
    unrolled!(PAIR in 0 1 => {
        let other = simd.splat(const { PairsOf::<X>::PAIRS.factor(PAIR ^ 1) });
        let [with_point, rest] = const { PairsOf::<X>::SCALES[PAIR] };
        let even = simd.mul_add(other, values[shift], values[shift + 2]);
        let odd = simd.mul_add(other, values[shift + 1], values[shift + 3]);
        // What is added in one and subtracted in the other row, and by how much of it.
        let (same, opposite, factor) = match const { PairsOf::<X>::turned(PAIR) } {
            true => (simd.mul(simd.splat(with_point), even), odd, rest),
            false => (simd.mul(simd.splat(rest), odd), even, with_point),
        };
        let [first, second] = const { PairsOf::<X>::PAIRS.rows[PAIR] };
        out[first] = simd.mul_add(simd.splat(factor), opposite, same);
        out[second] = simd.mul_add(simd.splat(-factor), opposite, same);
    });
    out
}

/// Four pairs, in halves.
#[inline(always)]
fn apply_four<X: Transform, S: Simd>(simd: S, values: &[S::V; MAX]) -> [S::V; MAX] {
    let mut out = [simd.splat(0.0); MAX];
    let shift = const { PairsOf::<X>::SHIFT };
    unrolled!(HALF in 0 1 => {
        const OTHER: usize = 1 - HALF;
        // What the pairs of this half have in common, with the one power and with the other.
        let mut common = [simd.splat(0.0); 4];
        unrolled!(AT in 0 1 2 3 => { common[AT] = product_from::<X, S, OTHER>(simd, values, shift + AT) });
        let (even, odd) = ([common[0], common[2]], [common[1], common[3]]);
        if HALF == 0 {
            let last = product_from::<X, S, 1>(simd, values, shift + 4);
            out[const { PairsOf::<X>::PAIRS.infinity }] = product::<X, S, 0>(simd, [even[0], even[1], last]);
            if let Some((zero, scale)) = const { PairsOf::<X>::ZERO } {
                let sum = product::<X, S, 0>(simd, [product_from::<X, S, 1>(simd, values, 0), odd[0], odd[1]]);
                out[zero] = simd.mul(simd.splat(scale), sum);
            }
        }
        unrolled!(OF_HALF in 0 1 => {
            const PAIR: usize = 2 * HALF + OF_HALF;
            let other = simd.splat(const { PairsOf::<X>::PAIRS.factor(PAIR ^ 1) });
            let [with_point, rest] = const { PairsOf::<X>::SCALES[PAIR] };
            let even = simd.mul(simd.splat(with_point), simd.mul_add(other, even[0], even[1]));
            let odd = simd.mul(simd.splat(rest), simd.mul_add(other, odd[0], odd[1]));
            let [first, second] = const { PairsOf::<X>::PAIRS.rows[PAIR] };
            out[first] = simd.add(even, odd);
            out[second] = if const { PairsOf::<X>::turned(PAIR) } { simd.sub(even, odd) } else { simd.sub(odd, even) };
        });
    });
    out
}

#[cfg(test)]
mod tests {
    use super::super::transforms::{Input, RowInput};
    use super::*;
    use crate::cpu::portable::Scalar;

    /// Against the matrix.
    fn check<X: Transform>() {
        assert!(exist(X::POINTS) && X::VALUES == X::POINTS.len());
        let values: [f32; MAX] = std::array::from_fn(|i| ((i * 37 + 11) % 23) as f32 / 11.0 - 1.0);
        let got = apply::<X, Scalar>(Scalar, &values);
        for (row, got) in X::MATRIX.iter().zip(got).take(X::RESULTS) {
            let products =
                row.iter().zip(values).take(X::VALUES).map(|(factor, value)| f64::from(*factor) * f64::from(value));
            let (want, size) = products.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()));
            let error = (f64::from(got) - want).abs();
            assert!(error <= 1e-6 * size, "{got}, not {want}");
        }
    }

    #[test]
    fn pairs_are_the_matrix() {
        check::<Input<f32, 1, 7>>();
        check::<RowInput<f32, 0>>();
        check::<RowInput<f32, 1>>();
        check::<Input<half::bf16, 1, 4>>();
        assert!(!exist(Input::<f32, 1, 6>::POINTS) && !exist(Input::<half::bf16, 1, 3>::POINTS));
    }
}
