//! AVX-512: 32 registers of 16 f32. A 6x64 tile takes 24 accumulators, 4 columns of B and one broadcast.

use super::simd::{Simd, Task};
use half::bf16;
use std::arch::x86_64::*;

/// Proof that AVX-512 F, BW, DQ, VL, AVX2 and FMA are there, and if `BF16` products of bf16 pairs.
#[derive(Clone, Copy)]
pub struct Avx512<const BF16: bool>(());

/// Runs `task` with AVX-512; the caller has checked that the machine has it.
#[inline]
pub(super) fn run<T: Task>(task: T) -> T::Output {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    fn inner<T: Task>(task: T) -> T::Output {
        task.run(Avx512::<false>(()))
    }
    debug_assert!(super::Isa::Avx512.is_supported());
    // SAFETY: `dispatch`, the only caller, has checked the features.
    unsafe { inner(task) }
}

/// Runs `task` with AVX-512 and its bf16 instructions; the caller has checked that the machine has them.
#[inline]
pub(super) fn run_bf16<T: Task>(task: T) -> T::Output {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
    fn inner<T: Task>(task: T) -> T::Output {
        task.run(Avx512::<true>(()))
    }
    debug_assert!(super::Isa::Avx512Bf16.is_supported());
    // SAFETY: `dispatch`, the only caller, has checked the features.
    unsafe { inner(task) }
}

// SAFETY: values are made in `run` and `run_bf16` alone, where the features have been checked.
unsafe impl<const BF16: bool> Simd for Avx512<BF16> {
    type V = __m512;
    const LANES: usize = 16;
    const VECTORS: usize = 4;
    const REGISTERS: usize = 32;

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
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the feature.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: `self` proves the feature.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn pair_rows(self, first: *const bf16, second: *const bf16) -> [__m512; 2] {
        // SAFETY: `self` proves the feature; the caller vouches for the rest.
        unsafe {
            let (a, b) = (_mm512_loadu_si512(first.cast()), _mm512_loadu_si512(second.cast()));
            // Where the mask is set the first operand, else the second.
            let lower = _mm512_set1_epi32(0xffff);
            let even = _mm512_ternarylogic_epi32::<0xca>(lower, a, _mm512_slli_epi32::<16>(b));
            let odd = _mm512_ternarylogic_epi32::<0xca>(lower, _mm512_srli_epi32::<16>(a), b);
            [_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd)]
        }
    }
    #[inline(always)]
    fn interleave(self, even: __m512, odd: __m512) -> [__m512; 2] {
        // SAFETY: `self` proves the feature.
        unsafe {
            // Lanes of the second vector count from 16.
            let first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            let second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
            [_mm512_permutex2var_ps(even, first, odd), _mm512_permutex2var_ps(even, second, odd)]
        }
    }
    #[inline(always)]
    unsafe fn load_fours(self, p: *const f32, apart: usize) -> __m512 {
        // SAFETY: `self` proves the feature; the caller vouches for the places.
        unsafe {
            let low = _mm256_set_m128(_mm_loadu_ps(p.add(apart)), _mm_loadu_ps(p));
            let high = _mm256_set_m128(_mm_loadu_ps(p.add(3 * apart)), _mm_loadu_ps(p.add(2 * apart)));
            _mm512_insertf32x8::<1>(_mm512_castps256_ps512(low), high)
        }
    }
    #[inline(always)]
    unsafe fn spread_pixels(self, from: *const bf16, to: *mut bf16) {
        // SAFETY: `self` proves the feature; the caller vouches for the rest.
        unsafe {
            let order = _mm512_loadu_si512(SPREAD.as_ptr().cast());
            // The fourth of every four is zero.
            let spread = _mm512_maskz_permutexvar_epi16(0x7777_7777, order, _mm512_loadu_si512(from.cast()));
            _mm512_storeu_si512(to.cast(), spread);
        }
    }
    #[inline(always)]
    unsafe fn transpose(self, from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
        // SAFETY: `self` proves the feature; the caller vouches for the rest.
        unsafe {
            let rows: [__m512i; 16] = std::array::from_fn(|i| _mm512_loadu_si512(from.add(i * from_stride).cast()));
            // Words of two rows side by side, then of four: in each quarter of row `4 i + k` word `k` of it of rows `4 i` to `4 i + 3`.
            let twos: [__m512i; 16] = std::array::from_fn(|i| {
                let (a, b) = (rows[i / 4 * 4 + i % 2 * 2], rows[i / 4 * 4 + i % 2 * 2 + 1]);
                if i % 4 < 2 { _mm512_unpacklo_epi32(a, b) } else { _mm512_unpackhi_epi32(a, b) }
            });
            let fours: [__m512i; 16] = std::array::from_fn(|i| {
                let (a, b) = (twos[i / 4 * 4 + i % 4 / 2 * 2], twos[i / 4 * 4 + i % 4 / 2 * 2 + 1]);
                if i % 2 == 0 { _mm512_unpacklo_epi64(a, b) } else { _mm512_unpackhi_epi64(a, b) }
            });
            // Quarters of 4 rows to one: first of pairs of groups of rows, then of all four.
            for k in 0..4 {
                let [a, b, c, d] = [fours[k], fours[4 + k], fours[8 + k], fours[12 + k]];
                let (even, odd) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
                let (even2, odd2) = (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
                let columns = [
                    _mm512_shuffle_i32x4::<0x88>(even, even2),
                    _mm512_shuffle_i32x4::<0x88>(odd, odd2),
                    _mm512_shuffle_i32x4::<0xdd>(even, even2),
                    _mm512_shuffle_i32x4::<0xdd>(odd, odd2),
                ];
                for (i, column) in columns.into_iter().enumerate() {
                    _mm512_storeu_si512(to.add((4 * i + k) * to_stride).cast(), column);
                }
            }
        }
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
    fn relu(self, v: __m512) -> __m512 {
        // The second operand is what the instruction returns when either is NaN.
        // SAFETY: `self` proves the feature.
        unsafe { _mm512_max_ps(_mm512_setzero_ps(), v) }
    }
    #[inline(always)]
    fn where_positive(self, y: __m512, v: __m512) -> __m512 {
        // SAFETY: `self` proves the feature.
        unsafe { _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLE_UQ>(y, _mm512_setzero_ps()), v) }
    }
    #[inline(always)]
    unsafe fn where_equal(self, p: *const u8, byte: u8, v: __m512) -> __m512 {
        // SAFETY: `self` proves the features; the caller vouches for `p`.
        unsafe {
            let equal = _mm_cmpeq_epi8_mask(_mm_loadu_si128(p.cast()), _mm_set1_epi8(byte as i8));
            _mm512_maskz_mov_ps(equal, v)
        }
    }
    #[inline(always)]
    fn dot_pairs(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: `self` proves the features; the vectors are taken for what they hold, pairs of bf16.
        unsafe {
            if BF16 {
                return _mm512_dpbf16_ps(
                    c,
                    std::mem::transmute::<__m512, __m512bh>(a),
                    std::mem::transmute::<__m512, __m512bh>(b),
                );
            }
            let high = |v| _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(-1 << 16)));
            let low = |v| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_castps_si512(v)));
            _mm512_fmadd_ps(high(a), high(b), _mm512_fmadd_ps(low(a), low(b), c))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> __m512 {
        // SAFETY: `self` proves the feature; the caller vouches for `p`.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut bf16, v: __m512) {
        // SAFETY: `self` proves the features; the caller vouches for `p`.
        unsafe {
            if BF16 {
                let rounded = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(v));
                return _mm256_storeu_si256(p.cast(), rounded);
            }
            _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded_bits(v))));
        }
    }
    #[inline(always)]
    unsafe fn store_two_bf16(self, p: *mut bf16, [first, second]: [__m512; 2]) {
        // SAFETY: `self` proves the features; the caller vouches for `p`.
        unsafe {
            if BF16 {
                let rounded = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(second, first));
                return _mm512_storeu_si512(p.cast(), rounded);
            }
            self.store_bf16(p, first);
            self.store_bf16(p.add(16), second);
        }
    }
    #[inline(always)]
    fn pairs(self, low: __m512, high: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe {
            if BF16 {
                // Lane `2 i` of the result is `i` of the lower half, lane `2 i + 1` is `i` of the upper half.
                let order = _mm512_loadu_si512(INTERLEAVED.as_ptr().cast());
                let halves = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
                return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, halves));
            }
            let upper = _mm512_and_si512(rounded_bits(high), _mm512_set1_epi32(-1 << 16));
            _mm512_castsi512_ps(_mm512_or_si512(upper, _mm512_srli_epi32::<16>(rounded_bits(low))))
        }
    }
    #[inline(always)]
    unsafe fn load_pairs(self, p: *const bf16) -> [__m512; 2] {
        // SAFETY: `self` proves the feature; the caller vouches for `p`.
        unsafe {
            let pairs = _mm512_loadu_si512(p.cast());
            let second = _mm512_and_si512(pairs, _mm512_set1_epi32(-1 << 16));
            [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)), _mm512_castsi512_ps(second)]
        }
    }
}

/// Indices that interleave the halves of 32 values of 16 bits.
static INTERLEAVED: [u16; 32] = {
    let mut order = [0; 32];
    let mut i = 0;
    while i < 32 {
        order[i] = (i / 2 + i % 2 * 16) as u16;
        i += 1;
    }
    order
};

/// Indices of the values of eight pixels of three among those of four.
static SPREAD: [u16; 32] = {
    let mut order = [0; 32];
    let mut i = 0;
    while i < 32 {
        order[i] = (i / 4 * 3 + i % 4) as u16;
        i += 1;
    }
    order
};

/// The bits of `v` rounded to the nearest bf16, in the upper half of each lane.
///
/// # Safety
/// The machine has AVX-512 F.
#[inline(always)]
unsafe fn rounded_bits(v: __m512) -> __m512i {
    // SAFETY: the contract.
    unsafe {
        let bits = _mm512_castps_si512(v);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(1 << 22));
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
        _mm512_mask_blend_epi32(nan, rounded, quiet)
    }
}
