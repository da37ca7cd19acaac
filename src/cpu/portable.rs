//! Plain Rust: arrays of 4 f32, which the compiler turns into whatever the target's baseline has.

use super::simd::{Simd, Task};
use half::bf16;

/// Needs nothing.
#[derive(Clone, Copy)]
pub struct Portable;

/// Runs `task` with the target's baseline.
#[inline]
pub(super) fn run<T: Task>(task: T) -> T::Output {
    task.run(Portable)
}

// SAFETY: plain Rust runs everywhere.
unsafe impl Simd for Portable {
    type V = [f32; 4];
    const LANES: usize = 4;
    const VECTORS: usize = 2;
    const REGISTERS: usize = 16;

    #[inline(always)]
    fn splat(self, x: f32) -> [f32; 4] {
        [x; 4]
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> [f32; 4] {
        // SAFETY: the caller vouches for `p`; an array of f32 has the alignment of f32.
        unsafe { p.cast::<[f32; 4]>().read() }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: [f32; 4]) {
        // SAFETY: the caller vouches for `p`; an array of f32 has the alignment of f32.
        unsafe { p.cast::<[f32; 4]>().write(v) }
    }
    #[inline(always)]
    fn add(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn mul_add(self, a: [f32; 4], b: [f32; 4], c: [f32; 4]) -> [f32; 4] {
        // Not f32::mul_add: without the instruction that is a call into the C library for every lane.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn relu(self, v: [f32; 4]) -> [f32; 4] {
        v.map(|x| if x < 0.0 { 0.0 } else { x })
    }
    #[inline(always)]
    fn where_positive(self, y: [f32; 4], v: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| if y[i] <= 0.0 { 0.0 } else { v[i] })
    }
    #[inline(always)]
    fn dot_pairs(self, a: [f32; 4], b: [f32; 4], c: [f32; 4]) -> [f32; 4] {
        let high = |x: f32| f32::from_bits(x.to_bits() & 0xffff_0000);
        let low = |x: f32| f32::from_bits(x.to_bits() << 16);
        std::array::from_fn(|i| c[i] + low(a[i]) * low(b[i]) + high(a[i]) * high(b[i]))
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> [f32; 4] {
        // SAFETY: the caller vouches for `p`; an array of bf16 has the alignment of bf16.
        unsafe { p.cast::<[bf16; 4]>().read() }.map(bf16::to_f32)
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut bf16, v: [f32; 4]) {
        // SAFETY: as above.
        unsafe { p.cast::<[bf16; 4]>().write(v.map(bf16::from_f32)) }
    }
}

/// Vectors of one f32, for the channels that are left over where vectors end.
#[derive(Clone, Copy)]
pub(super) struct Scalar;

// SAFETY: plain Rust runs everywhere.
unsafe impl Simd for Scalar {
    type V = f32;
    const LANES: usize = 1;
    const VECTORS: usize = 1;
    const REGISTERS: usize = 16;

    #[inline(always)]
    fn splat(self, x: f32) -> f32 {
        x
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> f32 {
        // SAFETY: the caller vouches for `p`.
        unsafe { p.read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: f32) {
        // SAFETY: the caller vouches for `p`.
        unsafe { p.write_unaligned(v) }
    }
    #[inline(always)]
    fn add(self, a: f32, b: f32) -> f32 {
        a + b
    }
    #[inline(always)]
    fn sub(self, a: f32, b: f32) -> f32 {
        a - b
    }
    #[inline(always)]
    fn mul(self, a: f32, b: f32) -> f32 {
        a * b
    }
    #[inline(always)]
    fn mul_add(self, a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }
    #[inline(always)]
    fn where_positive(self, y: f32, v: f32) -> f32 {
        if y <= 0.0 { 0.0 } else { v }
    }
    #[inline(always)]
    fn dot_pairs(self, a: f32, b: f32, c: f32) -> f32 {
        let high = |x: f32| f32::from_bits(x.to_bits() & 0xffff_0000);
        let low = |x: f32| f32::from_bits(x.to_bits() << 16);
        c + low(a) * low(b) + high(a) * high(b)
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> f32 {
        // SAFETY: the caller vouches for `p`.
        unsafe { *p }.to_f32()
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut bf16, v: f32) {
        // SAFETY: the caller vouches for `p`.
        unsafe { *p = bf16::from_f32(v) }
    }
    #[inline(always)]
    fn relu(self, v: f32) -> f32 {
        if v < 0.0 { 0.0 } else { v }
    }
}
