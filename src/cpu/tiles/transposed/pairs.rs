//! Words of two positions, for the right side of a product whose depth is positions.

use super::super::super::float::Float;
use super::super::super::simd::Simd;
use super::super::amx::{STEP, TILE};
use super::super::{HALF, split_pairs};
use half::bf16;

/// What padding holds.
static ZEROS: [f32; STEP] = [0.0; STEP];

/// The values of padding.
pub(super) fn zeros<T: Float>() -> *const T {
    const { assert!(size_of::<T>() <= size_of::<f32>()) };
    ZEROS.as_ptr().cast()
}

/// Whether channels stay in their order where pixels of such values are paired; else the even ones come first.
pub(super) fn in_order<T: Float>() -> bool {
    T::PER_WORD == 1
}

/// Pairs of neighbouring positions of planes, of so many each; the 32 values of one are at `pixel(plane, position)`. `[plane][beginning
/// with an even or an odd position][half of the channels][pair][channel][position of the pair]`, of each part; of the pairs of a plane those
/// are made that are `wanted`, beginning with an even or with an odd one.
#[inline(always)]
pub(super) fn pair<S: Simd, T: Float>(
    simd: S,
    (positions, ahead): (usize, usize),
    pixel: impl Fn(usize, usize) -> *const T,
    paired: &mut [&mut [bf16]],
    wanted: &[[bool; 2]],
) {
    let pairs = positions.div_ceil(2);
    let version = 2 * pairs * TILE;
    assert!(positions > 0 && paired.iter().all(|paired| paired.len() >= wanted.len() * 2 * version));
    for (plane, wanted) in wanted.iter().enumerate() {
        for j in 0..pairs {
            for at in [2 * j + ahead, 2 * j + ahead + 1].into_iter().filter(|_| ahead > 0) {
                let pixel = pixel(plane, at.min(positions - 1));
                for line in (0..STEP).step_by(64 / size_of::<T>()) {
                    simd.prefetch_near(pixel.wrapping_add(line).cast());
                }
            }
            // Past the end there is nothing that meets a gradient.
            let [first, second, third] =
                [2 * j, 2 * j + 1, 2 * j + 2].map(|position| pixel(plane, position.min(positions - 1)));
            let at = plane * 2 * version + j * TILE;
            // SAFETY: positions' values are there; a pair is inside its version.
            unsafe {
                if wanted[0] {
                    pair_two(simd, [first, second], paired, at, pairs * TILE);
                }
                if wanted[1] {
                    pair_two(simd, [second, third], paired, at + version, pairs * TILE);
                }
            }
        }
    }
}

/// The words of two positions' values, of one half of the channels to `paired[..][at..]` and of the other `half` values further.
///
/// # Safety
/// So many values are there.
#[inline(always)]
unsafe fn pair_two<S: Simd, T: Float>(
    simd: S,
    [first, second]: [*const T; 2],
    paired: &mut [&mut [bf16]],
    at: usize,
    half: usize,
) {
    if T::PER_WORD == 2 {
        let (first, second, out) =
            (first.cast::<bf16>(), second.cast::<bf16>(), paired[0].as_mut_ptr().wrapping_add(at));
        for channel in (0..STEP).step_by(2 * S::LANES) {
            // SAFETY: the contract.
            unsafe {
                let words = simd.pair_rows(first.add(channel), second.add(channel));
                simd.store(out.add(channel).cast(), words[0]);
                simd.store(out.add(half + channel).cast(), words[1]);
            }
        }
    } else {
        for channel in (0..STEP).step_by(S::LANES) {
            let at = at + channel / HALF * half + channel % HALF * 2;
            // SAFETY: the contract.
            unsafe {
                let values = [T::load(simd, first.add(channel)), T::load(simd, second.add(channel))];
                split_pairs(simd, values, paired.len(), |part| paired[part].as_mut_ptr().add(at));
            }
        }
    }
}
