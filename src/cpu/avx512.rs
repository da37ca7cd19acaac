//! AVX-512: 32 registers of 16 f32. A 6x64 tile takes 24 accumulators, 4 columns of B and one broadcast.

use super::simd::{Simd, Task};
use std::arch::x86_64::*;

/// Proof that AVX-512 F, BW, DQ, VL, AVX2 and FMA are there.
#[derive(Clone, Copy)]
pub struct Avx512(());

/// Runs `task` with AVX-512; the caller has checked that the machine has it.
#[inline]
pub(super) fn run<T: Task>(task: T) -> T::Output {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    fn inner<T: Task>(task: T) -> T::Output {
        task.run(Avx512(()))
    }
    debug_assert!(super::Isa::Avx512.is_supported());
    // SAFETY: `dispatch`, the only caller, has checked the features.
    unsafe { inner(task) }
}

// SAFETY: values are made in `run` alone, where the features have been checked.
unsafe impl Simd for Avx512 {
    type V = __m512;
    const LANES: usize = 16;
    const VECTORS: usize = 4;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: `self` proves the feature.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m512 {
        // SAFETY: `self` proves the feature; the caller vouches for `p`.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m512) {
        // SAFETY: `self` proves the feature; the caller vouches for `p`.
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the feature.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the feature.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: `self` proves the feature.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn relu(self, v: __m512) -> __m512 {
        // The second operand is what the instruction returns when either is NaN.
        // SAFETY: `self` proves the feature.
        unsafe { _mm512_max_ps(_mm512_setzero_ps(), v) }
    }
}
