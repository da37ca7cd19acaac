//! NEON: 32 registers of 4 f32. A 6x16 tile takes 24 accumulators, 4 columns of B and one broadcast.

use super::simd::{Simd, Task};
use half::bf16;
use std::arch::aarch64::*;

/// Proof of NEON, which every 64-bit Arm target of Rust's standard library has.
#[derive(Clone, Copy)]
pub struct Neon(());

/// Runs `task` with NEON.
#[inline]
pub(super) fn run<T: Task>(task: T) -> T::Output {
    task.run(Neon(()))
}

// SAFETY: NEON is part of the target's baseline.
unsafe impl Simd for Neon {
    type V = float32x4_t;
    const LANES: usize = 4;
    const VECTORS: usize = 4;
    const REGISTERS: usize = 32;

    #[inline(always)]
    fn splat(self, x: f32) -> float32x4_t {
        // SAFETY: NEON is part of the target's baseline.
        unsafe { vdupq_n_f32(x) }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> float32x4_t {
        // SAFETY: the caller vouches for `p`.
        unsafe { vld1q_f32(p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: float32x4_t) {
        // SAFETY: the caller vouches for `p`.
        unsafe { vst1q_f32(p, v) }
    }
    #[inline(always)]
    fn add(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: NEON is part of the target's baseline.
        unsafe { vaddq_f32(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: NEON is part of the target's baseline.
        unsafe { vsubq_f32(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: NEON is part of the target's baseline.
        unsafe { vmulq_f32(a, b) }
    }
    #[inline(always)]
    fn mul_add(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        // SAFETY: NEON is part of the target's baseline.
        unsafe { vfmaq_f32(c, a, b) }
    }
    #[inline(always)]
    fn relu(self, v: float32x4_t) -> float32x4_t {
        // FMAX returns NaN when either operand is NaN.
        // SAFETY: NEON is part of the target's baseline.
        unsafe { vmaxq_f32(vdupq_n_f32(0.0), v) }
    }
    #[inline(always)]
    fn where_positive(self, y: float32x4_t, v: float32x4_t) -> float32x4_t {
        // SAFETY: NEON is part of the target's baseline.
        unsafe { vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(v), vcleq_f32(y, vdupq_n_f32(0.0)))) }
    }
    #[inline(always)]
    fn dot_pairs(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        // SAFETY: NEON is part of the target's baseline.
        unsafe {
            let high = |v| vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), vdupq_n_u32(0xffff_0000)));
            let low = |v| vreinterpretq_f32_u32(vshlq_n_u32::<16>(vreinterpretq_u32_f32(v)));
            vfmaq_f32(vfmaq_f32(c, low(a), low(b)), high(a), high(b))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> float32x4_t {
        // SAFETY: the caller vouches for `p`.
        unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut bf16, v: float32x4_t) {
        let mut values = [0.0; 4];
        // SAFETY: an array of four; the caller vouches for `p`.
        unsafe {
            vst1q_f32(values.as_mut_ptr(), v);
            p.cast::<[bf16; 4]>().write(values.map(bf16::from_f32));
        }
    }
}
