//! The transforms along an axis, for tiles of any number of outputs: matrices of `points.rs` times vectors.

use super::matrices::{Square, from_points, not_zero, to_points, transposed};
pub(super) use super::matrices::{at_opposite_points, at_point, opposite_points};
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
