//! What becomes of a block's sums.
//!
//! Finishing the 32 rows of a block's sums takes as long as two steps or three. They are finished between the steps of the next block,
//! for the tiles multiply on their own while vectors do that.

use super::super::float::Float;
use super::super::gemm::Epilogue;
use super::super::portable::Scalar;
use super::super::simd::Simd;
use super::amx::TILE;
use super::planes::NONE;

/// What becomes of sums: a copy, which no result that is stored can have changed.
#[derive(Clone, Copy)]
pub(super) struct Results<'a, T> {
    pub(super) epilogue: Epilogue<'a, T>,
    pub(super) c: *mut T,
    pub(super) columns: usize,
}

/// Rows of a block's sums that are not finished.
pub(super) struct Unfinished<'a, V> {
    /// Of each row.
    targets: std::slice::Iter<'a, usize>,
    sums: *const f32,
    column: usize,
    /// That of the columns, in as many vectors as they take.
    bias: [V; TILE / 4],
}

impl<'a, V: Copy> Unfinished<'a, V> {
    /// None at all.
    #[inline(always)]
    pub(super) fn none<S: Simd<V = V>>(simd: S) -> Self {
        Unfinished { targets: [].iter(), sums: std::ptr::null(), column: 0, bias: [simd.splat(0.0); TILE / 4] }
    }

    /// The sums of some positions from `column` on.
    #[inline(always)]
    pub(super) fn new<S: Simd<V = V>, T>(
        simd: S,
        results: Results<T>,
        sums: *const f32,
        targets: &'a [usize],
        column: usize,
    ) -> Self {
        const { assert!(S::LANES >= 4) };
        let mut unfinished = Unfinished { targets: targets.iter(), column, sums, ..Self::none(simd) };
        // Fewer columns are finished one by one.
        if let Some(bias) = results.epilogue.bias.and_then(|bias| bias.get(column..column + TILE)) {
            for (vector, bias) in unfinished.bias.iter_mut().zip(bias.chunks_exact(S::LANES)) {
                // SAFETY: so many values.
                *vector = unsafe { simd.load(bias.as_ptr()) };
            }
        }
        unfinished
    }

    /// Finishes some rows, as far as there are.
    ///
    /// # Safety
    /// The sums are still there; rows of the target are this task's alone and lie inside the result.
    #[inline(always)]
    pub(super) unsafe fn finish<S: Simd<V = V>, T: Float>(&mut self, simd: S, results: Results<T>, rows: usize) {
        const { assert!(TILE.is_multiple_of(2 * S::LANES)) };
        let Results { epilogue, c, columns } = results;
        for _ in 0..rows {
            let Some(&target) = self.targets.next() else { return };
            let sums = self.sums;
            self.sums = sums.wrapping_add(TILE);
            if target == NONE {
                continue;
            }
            let at = target * columns + self.column;
            // SAFETY: the contract; of the columns those are taken that there are.
            unsafe {
                if self.column + TILE <= columns {
                    for i in 0..TILE / (2 * S::LANES) {
                        let (first, bias) = (2 * i * S::LANES, [self.bias[2 * i], self.bias[2 * i + 1]]);
                        let sums = [simd.load(sums.add(first)), simd.load(sums.add(first + S::LANES))];
                        epilogue.store_two(simd, sums, bias, c, at + first);
                    }
                } else {
                    for i in 0..columns - self.column {
                        let bias = epilogue.bias.map(|bias| bias[self.column + i]);
                        epilogue.store(Scalar, *sums.add(i), bias, c, at + i);
                    }
                }
            }
        }
    }
}
