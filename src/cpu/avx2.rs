//! AVX2 with FMA: 16 registers of 8 f32. A 6x16 tile takes 12 accumulators, 2 columns of B and one broadcast.

use super::simd::{Simd, Task};
use half::bf16;
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
    const REGISTERS: usize = 16;

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
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves the feature.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: `self` proves the feature.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn prefetch(self, p: *const f32) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) };
    }
    #[inline(always)]
    fn prefetch_near(self, p: *const f32) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) };
    }
    #[inline(always)]
    fn relu(self, v: __m256) -> __m256 {
        // The second operand is what the instruction returns when either is NaN.
        // SAFETY: `self` proves the feature.
        unsafe { _mm256_max_ps(_mm256_setzero_ps(), v) }
    }
    #[inline(always)]
    fn where_positive(self, y: __m256, v: __m256) -> __m256 {
        // SAFETY: `self` proves the feature.
        unsafe { _mm256_and_ps(_mm256_cmp_ps::<_CMP_NLE_UQ>(y, _mm256_setzero_ps()), v) }
    }
    #[inline(always)]
    unsafe fn where_equal(self, p: *const u8, byte: u8, v: __m256) -> __m256 {
        // SAFETY: `self` proves the feature; the caller vouches for `p`.
        unsafe {
            let equal = _mm_cmpeq_epi8(_mm_loadl_epi64(p.cast()), _mm_set1_epi8(byte as i8));
            _mm256_and_ps(_mm256_castsi256_ps(_mm256_cvtepi8_epi32(equal)), v)
        }
    }
    #[inline(always)]
    fn dot_pairs(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: `self` proves the feature.
        unsafe {
            let high = |v| _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(-1 << 16)));
            let low = |v| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_castps_si256(v)));
            _mm256_fmadd_ps(high(a), high(b), _mm256_fmadd_ps(low(a), low(b), c))
        }
    }
    #[inline(always)]
    unsafe fn load_fours(self, p: *const f32, apart: usize) -> __m256 {
        // SAFETY: `self` proves the feature; the caller vouches for the places.
        unsafe { _mm256_set_m128(_mm_loadu_ps(p.add(apart)), _mm_loadu_ps(p)) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> __m256 {
        // SAFETY: `self` proves the feature; the caller vouches for `p`.
        unsafe {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut bf16, v: __m256) {
        // SAFETY: `self` proves the feature; the caller vouches for `p`.
        unsafe {
            let bits = _mm256_castps_si256(v);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(1 << 22));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
            let chosen = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan));
            // Packs within halves of 128 bits; the low quarters of both halves belong together.
            let packed = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(chosen, chosen));
            _mm_storeu_si128(p.cast(), _mm256_castsi256_si128(packed));
        }
    }
}
