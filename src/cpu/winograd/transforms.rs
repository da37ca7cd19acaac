//! The transforms along an axis, for tiles of any number of outputs: matrices of `points.rs` times vectors.

use super::pairs;
use super::points::*;
pub(super) use super::tilings::*;
use crate::cpu::float::Float;
use crate::cpu::simd::Simd;
use std::marker::PhantomData;
use std::mem::MaybeUninit;

/// Runs `$body` with `$I` the constants 0 to 9, or those given: what a loop over them would compute at run time is then known to the
/// compiler. It evaluates each `const` of each copy for each instance: a loop in a loop is many thousands.
macro_rules! unrolled {
    ($I:ident => $body:block) => { unrolled!($I in 0 1 2 3 4 5 6 7 8 9 => $body) };
    ($I:ident in $($i:literal)* => $body:block) => {
        $({
            const $I: usize = $i;
            $body
        })*
    };
}

pub(super) use unrolled;

/// The vectors that `$load` gives for `$I` from 0 to `$n`, a constant, as an array of `MAX`. Not by a closure: the compiler may leave
/// one that is used so often a function of its own, without the instruction set.
macro_rules! vectors {
    ($simd:expr, $n:expr, $I:ident => $load:expr) => {{
        let mut values = [$simd.splat(0.0); MAX];
        let count = const { $n };
        unrolled!($I => {
            if $I < count {
                values[$I] = $load;
            }
        });
        values
    }};
}

pub(super) use vectors;

/// Runs `$body` with `$M` the constant that `$m` is, the outputs of a tile of `$axis`.
macro_rules! with_outputs {
    ($axis:expr, $m:expr, $M:ident => $body:expr) => { with_outputs!(@ $axis, $m, $M $body, 1 2 3 5 6 7 8) };
    (@ $axis:expr, $m:expr, $M:ident $body:expr, $($i:literal)*) => {
        match $m {
            $($i if const { $axis.outputs >= $i } => {
                const $M: usize = $i;
                $body
            })*
            _ => {
                const $M: usize = 4;
                $body
            }
        }
    };
}

pub(super) use with_outputs;

/// A matrix, filled up with zeros, that is known when the code is compiled.
type Square = [[f32; MAX]; MAX];

/// A transform along an axis.
pub(super) trait Transform {
    /// What each result takes of each value.
    const MATRIX: Square;
    const VALUES: usize;
    const RESULTS: usize;
    /// Which results there are: smaller tiles lack some between others.
    const GIVES: [bool; MAX] = not_zero(&Self::MATRIX);
    /// Where the rows of the matrix are the polynomials of [`input_matrix`]: the points of all of them.
    const POINTS: &'static [Point] = &[];
    /// Mark it `#[inline(always)]`.
    fn apply<S: Simd>(simd: S, values: &[S::V; MAX]) -> [S::V; MAX];
}

/// Declares a transform of products of type `W`, and how it is applied.
macro_rules! transform {
    ($(#[$doc:meta])* $name:ident<$($n:ident),*>: $values:expr => $results:expr, $matrix:expr, $apply:ident $(, $points:expr)?) => {
        $(#[$doc])*
        pub(super) struct $name<W, $(const $n: usize),*>(PhantomData<W>);

        impl<W: Float, $(const $n: usize),*> Transform for $name<W, $($n),*> {
            const MATRIX: Square = $matrix;
            const VALUES: usize = $values;
            const RESULTS: usize = $results;
            $(const POINTS: &'static [Point] = $points;)?

            #[inline(always)]
            fn apply<S: Simd>(simd: S, values: &[S::V; MAX]) -> [S::V; MAX] {
                $apply::<Self, S>(simd, values)
            }
        }
    };
}

transform!(
    /// `G`: the taps of a filter to its values at the slots, but one for a phase of one tap, which has the same at every point.
    Filter<STRIDE>: TAPS => values::<W>(STRIDE), value_matrix::<W>(STRIDE), to_points
);
transform!(
    /// `B^T`: the inputs of a tile of `M` outputs to its slots.
    Input<STRIDE, M>: inputs(axis::<W>(STRIDE), clamped::<W>(STRIDE, M)) => slots_of::<W>(STRIDE, clamped::<W>(STRIDE, M)),
    input_matrix(axis::<W>(STRIDE), clamped::<W>(STRIDE, M)), to_points,
    if STRIDE == 1 { axis::<W>(1).points.split_at(Self::VALUES).0 } else { &[] }
);
transform!(
    /// `A^T`: the sums at the positions of a tile of `M` outputs to these.
    Sums<STRIDE, M>: positions(axis::<W>(STRIDE), clamped::<W>(STRIDE, M)) => clamped::<W>(STRIDE, M),
    output_matrix(axis::<W>(STRIDE), clamped::<W>(STRIDE, M)), from_points
);
transform!(
    /// `A`: the gradients of a tile's `M` outputs to the positions.
    Gradient<STRIDE, M>: clamped::<W>(STRIDE, M) => positions(axis::<W>(STRIDE), clamped::<W>(STRIDE, M)),
    transposed(&Sums::<W, STRIDE, M>::MATRIX), to_points
);
transform!(
    /// `G^T`: sums at the values of a filter to its gradient.
    FilterGradient<STRIDE>: values::<W>(STRIDE) => TAPS, transposed(&Filter::<W, STRIDE>::MATRIX), from_points
);

transform!(
    /// `B^T` of a phase of a whole tile along a row.
    RowInput<PHASE>: phase_slots(row_axis::<W>(), PHASE) => phase_slots(row_axis::<W>(), PHASE),
    phase_matrix(row_axis::<W>(), PHASE), to_points,
    row_axis::<W>().points.split_at(Self::VALUES).0
);
transform!(
    /// `A^T` of a whole tile along a row.
    RowSums<>: all_positions::<W>() => row_axis::<W>().outputs,
    output_matrix(row_axis::<W>(), row_axis::<W>().outputs), from_points
);
transform!(
    /// `A`: the gradients of a whole tile's outputs along a row to the positions.
    RowGradient<>: row_axis::<W>().outputs => all_positions::<W>(),
    transposed(&RowSums::<W>::MATRIX), to_points
);

/// What the slots of a phase of a whole tile take of its inputs.
const fn phase_matrix(axis: Axis, phase: usize) -> Square {
    let matrix = input_matrix::<ROW_SLOTS>(axis, axis.outputs);
    let (mut out, mut i) = ([[0.0; MAX]; MAX], 0);
    while i < phase_slots(axis, phase) * MAX {
        let (slot, input) = (i / MAX, i % MAX);
        if input < phase_slots(axis, phase) {
            out[slot][input] = matrix[first_slot(axis, phase) + slot][axis.stride * input + phase];
        }
        i += 1;
    }
    out
}

/// Slots before and including the last that a tile of `m` outputs has.
const fn slots_of<W: Float>(stride: usize, m: usize) -> usize {
    let mut count = slots(axis::<W>(stride));
    while count > 0 && !has_slot(axis::<W>(stride), m, count - 1) {
        count -= 1;
    }
    count
}

/// `M` outputs, or as many as a whole tile has.
const fn clamped<W: Float>(stride: usize, m: usize) -> usize {
    let whole = axis::<W>(stride).outputs;
    if m < whole { m } else { whole }
}

/// `G` with a row for each value.
const fn value_matrix<W: Float>(stride: usize) -> Square {
    let (slots_of, mut out, mut slot) = (filter_matrix::<MAX>(axis::<W>(stride)), [[0.0; MAX]; MAX], 0);
    while slot < slots(axis::<W>(stride)) {
        out[value_of::<W>(stride, slot)] = slots_of[slot];
        slot += 1;
    }
    out
}

/// Which rows have anything but zeros.
const fn not_zero(matrix: &Square) -> [bool; MAX] {
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

const fn transposed(matrix: &Square) -> Square {
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
fn to_points<X: Transform, S: Simd>(simd: S, values: &[S::V; MAX]) -> [S::V; MAX] {
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
fn from_points<X: Transform, S: Simd>(simd: S, values: &[S::V; MAX]) -> [S::V; MAX] {
    let folds = vectors!(simd, MAX, I => match const { (Column::<X, I>::OTHER, I) } {
        (other, this) if other > this => simd.add(values[this], values[other]),
        (other, this) if other < this => simd.sub(values[other], values[this]),
        _ => values[I],
    });
    vectors!(simd, X::RESULTS, ROW => combine!(simd, Column::<X, 0>::FOLDED[ROW], Column::<X, 0>::HOWS[ROW], folds))
}

/// Vectors between the transforms along the two axes.
#[repr(align(64))]
pub(super) struct Room(MaybeUninit<[f32; MAX * MAX * LANES]>);

impl Room {
    pub(super) fn new() -> Self {
        Room(MaybeUninit::uninit())
    }

    /// Where vector `[i, j]` is.
    #[inline(always)]
    pub(super) fn at<S: Simd>(&mut self, i: usize, j: usize) -> *mut f32 {
        debug_assert!(S::LANES <= LANES && i < MAX && j < MAX);
        self.0.as_mut_ptr().cast::<f32>().wrapping_add((i * MAX + j) * S::LANES)
    }
}
