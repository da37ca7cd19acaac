//! The transforms of 3x3 filters with a stride of one or two, along an axis, for tiles of any number of outputs.

use super::points::*;
use crate::cpu::float::Float;
use crate::cpu::simd::Simd;
use std::mem::MaybeUninit;

/// Taps of a filter along an axis.
pub(super) const TAPS: usize = 3;
/// Slots along an axis, and inputs of a tile, at most.
pub(super) const MAX: usize = 9;
/// Values that a filter has along an axis: one for each slot, but a phase of one tap has the same at every point.
pub(super) const VALUES: usize = 6;
/// What a vector has at most.
pub(super) const LANES: usize = 16;

/// The filter along an axis.
pub(super) const fn axis(stride: usize) -> Axis {
    Axis { taps: TAPS, stride }
}

/// The value of a slot.
pub(super) const fn value_of(slot: usize) -> usize {
    if slot < VALUES { slot } else { VALUES - 1 }
}

/// Runs `$body` with `$I` the constants 0 to 8: what a loop over them would compute at run time is then known to the compiler.
macro_rules! unrolled {
    ($I:ident => $body:block) => { unrolled!(@ $I $body 0 1 2 3 4 5 6 7 8) };
    (@ $I:ident $body:block $($i:literal)*) => {
        $({
            const $I: usize = $i;
            $body
        })*
    };
}

pub(super) use unrolled;

/// Sum of the values times a row of a matrix that is known when this is compiled.
#[inline(always)]
fn combine<S: Simd, const N: usize>(simd: S, row: &[f32; N], values: &[S::V; N]) -> S::V {
    let mut sum = None;
    unrolled!(I => {
        if I < N && row[I] != 0.0 {
            sum = Some(match (sum, row[I]) {
                (None, 1.0) => values[I],
                (Some(sum), 1.0) => simd.add(sum, values[I]),
                (Some(sum), -1.0) => simd.sub(sum, values[I]),
                (sum, factor) => simd.mul_add(simd.splat(factor), values[I], sum.unwrap_or(simd.splat(0.0))),
            });
        }
    });
    sum.unwrap_or(simd.splat(0.0))
}

/// `G g` along an axis: the values of a filter at the points.
#[inline(always)]
pub(super) fn filter_values<S: Simd, W: Float, const STRIDE: usize>(
    simd: S,
    [a, b, c]: [S::V; TAPS],
) -> [S::V; VALUES] {
    let [near, far] = W::POINTS;
    let times = |factor: f32, x: S::V, y: S::V| simd.mul_add(simd.splat(factor), x, y);
    if STRIDE == 1 {
        let (near_even, far_even) = (times(near * near, c, a), times(far * far, c, a));
        let (near_plus, near_minus) = (times(near, b, near_even), times(-near, b, near_even));
        return [a, c, near_plus, near_minus, times(far, b, far_even), times(-far, b, far_even)];
    }
    [a, c, times(near, c, a), times(-near, c, a), times(far, c, a), b]
}

/// `G g G^T` of a vector of filters, whose taps `load` gives: value `[i, j]` to `store(i * VALUES + j, ..)`.
#[inline(always)]
pub(super) fn transform_filter<S: Simd, W: Float, const STRIDE: usize>(
    simd: S,
    load: impl Fn(usize) -> S::V,
    mut store: impl FnMut(usize, S::V),
) {
    let left = filter_values::<S, W, STRIDE>(simd, [load(0), load(3), load(6)]);
    let middle = filter_values::<S, W, STRIDE>(simd, [load(1), load(4), load(7)]);
    let right = filter_values::<S, W, STRIDE>(simd, [load(2), load(5), load(8)]);
    unrolled!(DOWN => {
        if DOWN < VALUES {
            let taps = [left[DOWN % VALUES], middle[DOWN % VALUES], right[DOWN % VALUES]];
            let row = filter_values::<S, W, STRIDE>(simd, taps);
            for (across, vector) in row.iter().enumerate() {
                store(DOWN * VALUES + across, *vector);
            }
        }
    });
}

/// Runs `$body` with `$M` the constant that `$m` is.
macro_rules! with_outputs {
    ($m:expr, $M:ident => $body:expr) => {
        match $m {
            1 => {
                const $M: usize = 1;
                $body
            }
            2 => {
                const $M: usize = 2;
                $body
            }
            3 => {
                const $M: usize = 3;
                $body
            }
            _ => {
                const $M: usize = OUTPUTS;
                $body
            }
        }
    };
}

pub(super) use with_outputs;

/// The vectors that `$load` gives for `$I` from 0 to `$n`, a constant, as an array of `MAX`. Not by a closure: the compiler may leave
/// one that is used so often a function of its own, without the instruction set.
macro_rules! vectors {
    ($simd:expr, $n:expr, $I:ident => $load:expr) => {{
        let mut values = [$simd.splat(0.0); MAX];
        unrolled!($I => {
            if $I < const { $n } {
                values[$I] = $load;
            }
        });
        values
    }};
}

pub(super) use vectors;

/// `B^T d` along an axis of a tile of `M` outputs, at its slots.
#[inline(always)]
pub(super) fn transform_input<S: Simd, W: Float, const STRIDE: usize, const M: usize>(
    simd: S,
    inputs: &[S::V; MAX],
) -> [S::V; MAX] {
    vectors!(simd, MAX, SLOT => match const { SLOT < slots(axis(STRIDE)) && has_slot(axis(STRIDE), M, SLOT) } {
        true => combine(simd, &const { input_matrix::<MAX>(axis(STRIDE), W::POINTS, M)[SLOT] }, inputs),
        false => simd.splat(0.0),
    })
}

/// `A^T m` along an axis of a tile of `M` outputs.
#[inline(always)]
pub(super) fn transform_output<S: Simd, W: Float, const STRIDE: usize, const M: usize>(
    simd: S,
    sums: &[S::V; MAX],
) -> [S::V; MAX] {
    vectors!(simd, M, I => {
        combine(simd, &const { output_matrix::<MAX>(axis(STRIDE), W::POINTS, M) }[I % OUTPUTS], sums)
    })
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
