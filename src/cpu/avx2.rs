//! AVX2 with FMA: 16 registers of 8 f32. A 6x16 tile takes 12 accumulators, 2 columns of B and one broadcast.

use super::simd::{Simd, Task};
use std::arch::x86_64::*;

/// Proof that AVX2 and FMA are there.
#[derive(Clone, Copy)]
pub struct Avx2(());

/// Runs `task` with AVX2; the caller has checked that the machine has it.
#[inline]
pub(super) fn run<T: Task>(task: T) -> T::Output {
    #[target_feature(enable = "avx2,fma")]
    fn inner<T: Task>(task: T) -> T::Output {
        task.run(Avx2(()))
    }
    debug_assert!(super::Isa::Avx2.is_supported());
    // SAFETY: `dispatch`, the only caller, has checked the features.
    unsafe { inner(task) }
}

// SAFETY: values are made in `run` alone, where the features have been checked.
unsafe impl Simd for Avx2 {
    type V = __m256;
    const LANES: usize = 8;
    const VECTORS: usize = 2;

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        // SAFETY: `self` proves the feature.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m256 {
        // SAFETY: `self` proves the feature; the caller vouches for `p`.
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m256) {
        // SAFETY: `self` proves the feature; the caller vouches for `p`.
        unsafe { _mm256_storeu_ps(p, v) }
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves the feature.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves the feature.
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: `self` proves the feature.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn relu(self, v: __m256) -> __m256 {
        // The second operand is what the instruction returns when either is NaN.
        // SAFETY: `self` proves the feature.
        unsafe { _mm256_max_ps(_mm256_setzero_ps(), v) }
    }
}
