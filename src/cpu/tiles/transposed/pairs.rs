//! Words of two positions, for the right side of a product whose depth is positions.

use super::super::super::simd::Simd;
use super::super::amx::{STEP, TILE};
use half::bf16;

/// What padding holds.
pub(super) static ZEROS: [bf16; STEP] = [bf16::ZERO; STEP];

/// Pairs of neighbouring positions of planes, of so many each; the 32 values of one are at `pixel(plane, position)`. `[plane][beginning
/// with an even or an odd position][even or odd channels][pair][channel][position of the pair]`; of the pairs of a plane those are made
/// that are `wanted`, beginning with an even or with an odd one.
#[inline(always)]
pub(super) fn pair<S: Simd>(
    simd: S,
    (positions, ahead): (usize, usize),
    pixel: impl Fn(usize, usize) -> *const bf16,
    paired: &mut [bf16],
    wanted: &[[bool; 2]],
) {
    let pairs = positions.div_ceil(2);
    let version = 2 * pairs * TILE;
    assert!(positions > 0 && paired.len() >= wanted.len() * 2 * version);
    for (plane, (wanted, paired)) in wanted.iter().zip(paired.chunks_exact_mut(2 * version)).enumerate() {
        for j in 0..pairs {
            for at in [2 * j + ahead, 2 * j + ahead + 1].into_iter().filter(|_| ahead > 0) {
                simd.prefetch_near(pixel(plane, at.min(positions - 1)).cast());
            }
            // Past the end there is nothing that meets a gradient.
            let [first, second, third] =
                [2 * j, 2 * j + 1, 2 * j + 2].map(|position| pixel(plane, position.min(positions - 1)));
            // SAFETY: positions' values are there; a pair is inside its version.
            unsafe {
                let out = paired.as_mut_ptr().add(j * TILE);
                if wanted[0] {
                    pair_two(simd, first, second, out, pairs * TILE);
                }
                if wanted[1] {
                    pair_two(simd, second, third, out.add(version), pairs * TILE);
                }
            }
        }
    }
}

/// The words of two positions' values, of the even ones to `out` and of the odd ones `half` values further.
///
/// # Safety
/// So many values are there.
#[inline(always)]
unsafe fn pair_two<S: Simd>(simd: S, first: *const bf16, second: *const bf16, out: *mut bf16, half: usize) {
    for channel in (0..STEP).step_by(2 * S::LANES) {
        // SAFETY: the contract.
        unsafe {
            let words = simd.pair_rows(first.add(channel), second.add(channel));
            simd.store(out.add(channel).cast(), words[0]);
            simd.store(out.add(half + channel).cast(), words[1]);
        }
    }
}
