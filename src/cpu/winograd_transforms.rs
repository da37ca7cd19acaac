//! The transforms of 3x3 filters with a stride of one or two, along an axis, for tiles of any number of outputs.

use super::simd::Simd;
use super::winograd_points::*;
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
pub(super) fn filter_values<S: Simd, const STRIDE: usize>(simd: S, [a, b, c]: [S::V; TAPS]) -> [S::V; VALUES] {
    let two = simd.splat(2.0);
    if STRIDE == 1 {
        let (near, far) = (simd.add(a, c), simd.mul_add(simd.splat(4.0), c, a));
        let (plus, minus) = (simd.mul_add(two, b, far), simd.mul_add(simd.splat(-2.0), b, far));
        return [a, c, simd.add(near, b), simd.sub(near, b), plus, minus];
    }
    [a, c, simd.add(a, c), simd.sub(a, c), simd.mul_add(two, c, a), b]
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

/// `B^T d` along an axis of a tile of `M` outputs.
#[inline(always)]
pub(super) fn transform_input<S: Simd, const STRIDE: usize, const M: usize>(
    simd: S,
    load: impl Fn(usize) -> S::V,
    store: impl Fn(usize, S::V),
) {
    let mut values = [simd.splat(0.0); MAX];
    unrolled!(I => {
        if I < const { inputs(axis(STRIDE), M) } {
            values[I] = load(I);
        }
    });
    unrolled!(SLOT => {
        if const { SLOT < slots(axis(STRIDE)) && has_slot(axis(STRIDE), M, SLOT) } {
            store(SLOT, combine(simd, &const { input_matrix::<MAX>(axis(STRIDE), M)[SLOT] }, &values));
        }
    });
}

/// `A^T m` along an axis of a tile of `M` outputs.
#[inline(always)]
pub(super) fn transform_output<S: Simd, const STRIDE: usize, const M: usize>(
    simd: S,
    load: impl Fn(usize) -> S::V,
    store: impl Fn(usize, S::V),
) {
    let mut values = [simd.splat(0.0); MAX];
    unrolled!(I => {
        if I < const { positions(axis(STRIDE), M) } {
            values[I] = load(I);
        }
    });
    unrolled!(I => {
        if I < M {
            store(I, combine(simd, &const { output_matrix::<MAX>(axis(STRIDE), M) }[I % OUTPUTS], &values));
        }
    });
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
