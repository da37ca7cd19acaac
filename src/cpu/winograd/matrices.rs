//! How a matrix that is known when the code is compiled is applied to vectors: what is zero is left out, ones are added, and rows or columns that
//! differ in signs alone, as those of opposite points do, share what they have in common.

use super::pairs;
use super::transforms::{MAX, Transform, unrolled, vectors};
use crate::cpu::simd::Simd;
use std::marker::PhantomData;

/// A matrix, filled up with zeros.
pub(super) type Square = [[f32; MAX]; MAX];

/// Which rows have anything but zeros.
pub(super) const fn not_zero(matrix: &Square) -> [bool; MAX] {
    let (mut out, mut i) = ([false; MAX], 0);
    while i < MAX * MAX {
        out[i / MAX] |= matrix[i / MAX][i % MAX] != 0.0;
        i += 1;
    }
    out
}

/// Which other row is the same but for signs.
const fn partner(matrix: &Square, row: usize) -> Option<usize> {
    let mut other = 0;
    while other < MAX {
        let (mut same, mut opposite, mut differ, mut i) = (false, false, false, 0);
        while i < MAX {
            let (a, b) = (matrix[row][i], matrix[other][i]);
            same |= a == b && a != 0.0;
            opposite |= a == -b && a != 0.0;
            differ |= a != b && a != -b;
            i += 1;
        }
        if other != row && same && opposite && !differ {
            return Some(other);
        }
        other += 1;
    }
    None
}

/// What two rows agree in, or what they do not, as the first of them has it.
const fn common(matrix: &Square, [row, other]: [usize; 2], agree: bool) -> [f32; MAX] {
    let (mut part, mut i) = ([0.0; MAX], 0);
    while i < MAX {
        if (matrix[row][i] == matrix[other][i]) == agree {
            part[i] = matrix[row][i];
        }
        i += 1;
    }
    part
}

pub(super) const fn transposed(matrix: &Square) -> Square {
    let (mut out, mut i) = ([[0.0; MAX]; MAX], 0);
    while i < MAX * MAX {
        out[i % MAX][i / MAX] = matrix[i / MAX][i % MAX];
        i += 1;
    }
    out
}

/// The matrix for the sum of two columns that are the same but for signs in place of the first, and their difference in place of the
/// second.
const fn folded(matrix: &Square) -> Square {
    let columns = transposed(matrix);
    let (mut out, mut i) = (columns, 0);
    while i < MAX {
        if let Some(other) = partner(&columns, i)
            && other > i
        {
            out[i] = common(&columns, [i, other], true);
            out[other] = common(&columns, [i, other], false);
        }
        i += 1;
    }
    transposed(&out)
}

/// Index of the first factor that is not zero.
const fn first_of(row: &[f32; MAX]) -> usize {
    let mut i = 0;
    while i + 1 < MAX && row[i] == 0.0 {
        i += 1;
    }
    i
}

/// How a value is added to the sum of those before it. A number, as the arms of a `match` on a constant of it are left out before the
/// compiler sees them, and those on an `enum` are not.
type How = u8;
const NOT: How = 0;
const FIRST: How = 1;
const ADDED: How = 2;
const SUBTRACTED: How = 3;
const DOUBLED: How = 4;
const SCALED: How = 5;
const MULTIPLIED: How = 6;

/// How each of the values is added that are multiplied by a row.
const fn hows(row: &[f32; MAX]) -> [How; MAX] {
    let (mut hows, mut i) = ([NOT; MAX], 0);
    while i < MAX {
        hows[i] = match (row[i], first_of(row) == i) {
            (0.0, _) => NOT,
            (1.0, true) => FIRST,
            (1.0, false) => ADDED,
            (2.0, true) => DOUBLED,
            (_, true) => SCALED,
            (-1.0, false) => SUBTRACTED,
            _ => MULTIPLIED,
        };
        i += 1;
    }
    hows
}

/// Sum of the values times a row, a constant, `$hows` being [`hows`] of it. What is zero is left out before the compiler sees it.
macro_rules! combine {
    ($simd:expr, $row:expr, $hows:expr, $values:expr) => {{
        let (row, mut sum): (&'static [f32; MAX], _) = (&$row, $simd.splat(0.0));
        unrolled!(I => {
            match const { $hows[I] } {
                NOT => {}
                FIRST => sum = $values[I],
                ADDED => sum = $simd.add(sum, $values[I]),
                SUBTRACTED => sum = $simd.sub(sum, $values[I]),
                DOUBLED => sum = $simd.add($values[I], $values[I]),
                SCALED => sum = $simd.mul($simd.splat(row[I]), $values[I]),
                _ => sum = $simd.mul_add($simd.splat(row[I]), $values[I], sum),
            }
        });
        sum
    }};
}

/// The only factor that is not zero, and of which value, if it is a power of two.
const fn only_power(row: &[f32; MAX]) -> Option<(usize, f32)> {
    let (at, mut others, mut i) = (first_of(row), 0, 0);
    while i < MAX {
        others += (i != at && row[i] != 0.0) as usize;
        i += 1;
    }
    let mantissa = row[at].to_bits() & ((1 << (f32::MANTISSA_DIGITS - 1)) - 1);
    if others == 0 && mantissa == 0 && row[at] != 0.0 { Some((at, row[at])) } else { None }
}

/// A row of a transform, and the one that is the same but for signs. What they agree in and what they do not is computed in the same way
/// for both, so that the compiler computes it once.
struct Row<X, const ROW: usize>(PhantomData<X>);

impl<X: Transform, const ROW: usize> Row<X, ROW> {
    /// The rows in their order; where there is one alone, it is both.
    const PAIR: [usize; 2] = match partner(&X::MATRIX, ROW) {
        Some(other) if other < ROW => [other, ROW],
        Some(other) => [ROW, other],
        None => [ROW; 2],
    };
    const SAME: [f32; MAX] = common(&X::MATRIX, Self::PAIR, true);
    const DIFFERENT: [f32; MAX] = common(&X::MATRIX, Self::PAIR, false);
    const HOWS: [[How; MAX]; 2] = [hows(&Self::SAME), hows(&Self::DIFFERENT)];
    /// What they do not agree in, as this row has it, where that is a power of two of one value: a multiple is not rounded, and so it can
    /// be added as it is multiplied.
    const POWER: Option<(usize, f32)> = match only_power(&Self::DIFFERENT) {
        Some((_, 1.0 | -1.0)) | None => None,
        Some((at, factor)) => Some((at, if Self::PAIR[0] == ROW { factor } else { -factor })),
    };

    /// Of this row and of the other.
    #[inline(always)]
    fn of_both<S: Simd>(simd: S, values: &[S::V; MAX]) -> [S::V; 2] {
        let same = combine!(simd, Self::SAME, Self::HOWS[0], values);
        if const { Self::PAIR[0] == Self::PAIR[1] } {
            return [same; 2];
        }
        if let Some((at, factor)) = const { Self::POWER } {
            let [this, other] = [simd.splat(factor), simd.splat(-factor)];
            return [simd.mul_add(this, values[at], same), simd.mul_add(other, values[at], same)];
        }
        let different = combine!(simd, Self::DIFFERENT, Self::HOWS[1], values);
        let [first, second] = [simd.add(same, different), simd.sub(same, different)];
        if const { Self::PAIR[0] == ROW } { [first, second] } else { [second, first] }
    }
}

/// Result `ROW` of a transform from values to points: the compiler leaves the other out.
#[inline(always)]
pub(super) fn at_point<X: Transform, S: Simd, const ROW: usize>(simd: S, values: &[S::V; MAX]) -> S::V {
    at_opposite_points::<X, S, ROW>(simd, values)[0]
}

/// [`at_point`], and the result at the opposite point, which has the same bits as if it were computed alone.
#[inline(always)]
pub(super) fn at_opposite_points<X: Transform, S: Simd, const ROW: usize>(simd: S, values: &[S::V; MAX]) -> [S::V; 2] {
    Row::<X, ROW>::of_both(simd, values)
}

/// Result `ROW` and the one at the opposite point, in their order, or twice the same where there is none.
pub(super) const fn opposite_points<X: Transform, const ROW: usize>() -> [usize; 2] {
    Row::<X, ROW>::PAIR
}

/// A transform from values to points.
#[inline(always)]
pub(super) fn to_points<X: Transform, S: Simd>(simd: S, values: &[S::V; MAX]) -> [S::V; MAX] {
    if const { S::REGISTERS >= pairs::REGISTERS && pairs::exist(X::POINTS) } {
        return pairs::apply::<X, S>(simd, values);
    }
    vectors!(simd, X::RESULTS, ROW => at_point::<X, S, ROW>(simd, values))
}

/// A column of a transform, and the one that is the same but for signs.
struct Column<X, const COLUMN: usize>(PhantomData<X>);

impl<X: Transform, const COLUMN: usize> Column<X, COLUMN> {
    /// The column itself where it is alone.
    const OTHER: usize = match partner(&transposed(&X::MATRIX), COLUMN) {
        Some(other) => other,
        None => COLUMN,
    };
    /// The matrix for sums and differences.
    const FOLDED: Square = folded(&X::MATRIX);
    const HOWS: [[How; MAX]; MAX] = {
        let (mut out, mut i) = ([[NOT; MAX]; MAX], 0);
        while i < MAX {
            out[i] = hows(&Self::FOLDED[i]);
            i += 1;
        }
        out
    };
}

/// A transform from points to values, by sums and differences of what belongs to opposite ones.
#[inline(always)]
pub(super) fn from_points<X: Transform, S: Simd>(simd: S, values: &[S::V; MAX]) -> [S::V; MAX] {
    let folds = vectors!(simd, MAX, I => match const { (Column::<X, I>::OTHER, I) } {
        (other, this) if other > this => simd.add(values[this], values[other]),
        (other, this) if other < this => simd.sub(values[other], values[this]),
        _ => values[I],
    });
    vectors!(simd, X::RESULTS, ROW => combine!(simd, Column::<X, 0>::FOLDED[ROW], Column::<X, 0>::HOWS[ROW], folds))
}
