//! One vector interface, four instruction sets.
//!
//! A kernel is written once, generic over [`Simd`], as a [`Task`]; [`dispatch`] runs it inside a function compiled for the
//! chosen instruction set. Everything between the two is `#[inline(always)]`, so the compiler sees plain intrinsics.
//! Loops that the compiler vectorises by itself need no vector type: [`vectorised!`] compiles them once per instruction
//! set. Plain arithmetic is never contracted to fused multiply-adds by the compiler, so such loops give the same bits on
//! every instruction set; only kernels that call [`Simd::mul_add`] differ in the last place between them.

pub use super::isa::Isa;
use half::bf16;

/// A vector of `LANES` f32 and the few operations the micro-kernels need.
///
/// # Safety
/// A value of an implementing type may exist only where its instruction set does: [`dispatch`] makes them.
pub unsafe trait Simd: Copy + Send + Sync + 'static {
    /// The vector register.
    type V: Copy;
    /// f32 in a register.
    const LANES: usize;
    /// Registers in a row of the micro-kernel's tile, so that the tile fills the register file.
    const VECTORS: usize;
    /// Vector registers there are.
    const REGISTERS: usize;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::V;
    /// `LANES` values from `p`, any alignment.
    ///
    /// # Safety
    /// `p` is valid for reading `LANES` f32.
    unsafe fn load(self, p: *const f32) -> Self::V;
    /// `LANES` values to `p`, any alignment.
    ///
    /// # Safety
    /// `p` is valid for writing `LANES` f32.
    unsafe fn store(self, p: *mut f32, v: Self::V);
    /// `a + b`.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`.
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once where the instruction set can.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `c + a.low * b.low + a.high * b.high` in every lane, where `a` and `b` hold pairs of bf16. On hardware that does it
    /// subnormal numbers count as zero.
    fn dot_pairs(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `LANES` bf16 from `p`, widened.
    ///
    /// # Safety
    /// `p` is valid for reading `LANES` bf16.
    unsafe fn load_bf16(self, p: *const bf16) -> Self::V;
    /// `LANES` values to `p`, rounded to the nearest bf16, halves to even; NaN stays NaN.
    ///
    /// # Safety
    /// `p` is valid for writing `LANES` bf16.
    unsafe fn store_bf16(self, p: *mut bf16, v: Self::V);
    /// [`Simd::store_bf16`] of two vectors, one after the other.
    ///
    /// # Safety
    /// `p` is valid for writing `2 * LANES` bf16.
    #[inline(always)]
    unsafe fn store_two_bf16(self, p: *mut bf16, [first, second]: [Self::V; 2]) {
        // SAFETY: the contract.
        unsafe {
            self.store_bf16(p, first);
            self.store_bf16(p.add(Self::LANES), second);
        }
    }
    /// The first and the second values of `LANES` pairs from `p`, widened.
    ///
    /// # Safety
    /// `p` is valid for reading `2 * LANES` bf16.
    #[inline(always)]
    unsafe fn load_pairs(self, p: *const bf16) -> [Self::V; 2] {
        const { assert!(Self::LANES <= 16) };
        let [mut first, mut second] = [[0.0; 16]; 2];
        // SAFETY: there is room for 16 lanes; the caller vouches for `p`.
        unsafe {
            for (lane, (first, second)) in first.iter_mut().zip(&mut second).enumerate().take(Self::LANES) {
                *first = p.add(2 * lane).read().to_f32();
                *second = p.add(2 * lane + 1).read().to_f32();
            }
            [self.load(first.as_ptr()), self.load(second.as_ptr())]
        }
    }
    /// Pairs of bf16, each of a value of `low` and one of `high`, rounded as by [`Simd::store_bf16`].
    #[inline(always)]
    fn pairs(self, low: Self::V, high: Self::V) -> Self::V {
        const { assert!(Self::LANES <= 16) };
        let (mut rows, mut pairs) = ([[bf16::ZERO; 16]; 2], [0.0; 16]);
        // SAFETY: there is room for 16 lanes.
        unsafe {
            self.store_bf16(rows[0].as_mut_ptr(), low);
            self.store_bf16(rows[1].as_mut_ptr(), high);
            for (lane, pair) in pairs.iter_mut().enumerate().take(Self::LANES) {
                let [low, high] = rows.map(|row| u32::from(row[lane].to_bits()));
                *pair = f32::from_bits(low | high << 16);
            }
            self.load(pairs.as_ptr())
        }
    }
    /// Of two rows of bf16 the words of their even and of their odd values: `2 * LANES` values of each row.
    ///
    /// # Safety
    /// `first` and `second` are valid for reading `2 * LANES` values.
    #[inline(always)]
    unsafe fn pair_rows(self, first: *const bf16, second: *const bf16) -> [Self::V; 2] {
        // SAFETY: the contract.
        unsafe {
            let ([even, odd], [even2, odd2]) = (self.load_pairs(first), self.load_pairs(second));
            [self.pairs(even, even2), self.pairs(odd, odd2)]
        }
    }
    /// The lanes of two vectors in turn.
    #[inline(always)]
    fn interleave(self, even: Self::V, odd: Self::V) -> [Self::V; 2] {
        const { assert!(Self::LANES <= 16) };
        let mut lanes = [0.0; 32];
        // SAFETY: there is room for 16 lanes of either.
        unsafe {
            let (first, second) = (lanes.as_mut_ptr(), lanes.as_mut_ptr().add(Self::LANES));
            let [mut evens, mut odds] = [[0.0; 16]; 2];
            self.store(evens.as_mut_ptr(), even);
            self.store(odds.as_mut_ptr(), odd);
            for lane in 0..Self::LANES {
                first.add(2 * lane).write(evens[lane]);
                first.add(2 * lane + 1).write(odds[lane]);
            }
            [self.load(first), self.load(second)]
        }
    }
    /// Four values from each of `LANES / 4` places, `apart` values from each other.
    ///
    /// # Safety
    /// `p` is valid for reading from there to the last place's four values.
    #[inline(always)]
    unsafe fn load_fours(self, p: *const f32, apart: usize) -> Self::V {
        const { assert!(Self::LANES <= 16) };
        let mut lanes = [0.0; 16];
        // SAFETY: the contract; there are 16 lanes.
        unsafe {
            for (i, four) in lanes.as_chunks_mut().0.iter_mut().enumerate().take(Self::LANES / 4) {
                *four = p.add(i * apart).cast::<[f32; 4]>().read_unaligned();
            }
            self.load(lanes.as_ptr())
        }
    }
    /// `LANES / 2` pixels of three bf16, one after the other, to as many of four, the last of which is zero.
    ///
    /// # Safety
    /// `from` is valid for reading, `to` for writing `2 * LANES` values.
    #[inline(always)]
    unsafe fn spread_pixels(self, from: *const bf16, to: *mut bf16) {
        for pixel in 0..Self::LANES / 2 {
            // SAFETY: the contract.
            unsafe {
                let [a, b, c] = from.add(3 * pixel).cast::<[bf16; 3]>().read();
                to.add(4 * pixel).cast::<[bf16; 4]>().write([a, b, c, bf16::ZERO]);
            }
        }
    }
    /// As many rows as lanes of as many words, `from_stride` apart, to their columns, `to_stride` apart.
    ///
    /// # Safety
    /// `from` is valid for reading the rows, `to` for writing the columns.
    #[inline(always)]
    unsafe fn transpose(self, from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
        for (row, column) in (0..Self::LANES).flat_map(|row| (0..Self::LANES).map(move |column| (row, column))) {
            // SAFETY: the contract. Words are moved as integers, so that no bit of them changes; pairs may lie anywhere.
            unsafe {
                let word = from.cast::<u32>().add(row * from_stride + column).read_unaligned();
                to.cast::<u32>().add(column * to_stride + row).write_unaligned(word)
            };
        }
    }
    /// `v`, but zero where `y` is zero or less.
    fn where_positive(self, y: Self::V, v: Self::V) -> Self::V;
    /// `v`, but zero in every lane whose byte, of those from `p` on, is not `byte`.
    ///
    /// # Safety
    /// `p` is valid for reading `LANES` bytes.
    #[inline(always)]
    unsafe fn where_equal(self, p: *const u8, byte: u8, v: Self::V) -> Self::V {
        const { assert!(Self::LANES <= 16) };
        let mut lanes = [0.0; 16];
        // SAFETY: there is room for 16 lanes; the caller vouches for `p`.
        unsafe {
            self.store(lanes.as_mut_ptr(), v);
            for (i, lane) in lanes.iter_mut().enumerate().take(Self::LANES) {
                *lane = if p.add(i).read() == byte { *lane } else { 0.0 };
            }
            self.load(lanes.as_ptr())
        }
    }
    /// Asks for the cache line at `p`, which may be anywhere, to be brought into L2.
    #[inline(always)]
    fn prefetch(self, _p: *const f32) {}
    /// The same, into L1.
    #[inline(always)]
    fn prefetch_near(self, _p: *const f32) {}
    /// Zero where `v` is below it, else `v`; NaN stays NaN, as in PyTorch.
    fn relu(self, v: Self::V) -> Self::V;
}

/// A piece of work that runs on one thread with one instruction set. Mark `run` `#[inline(always)]`.
pub trait Task {
    /// What it gives back.
    type Output;
    /// Whether it multiplies pairs of bf16, or rounds to them. What does not is compiled once for AVX-512 with and without bf16.
    const BF16: bool = true;
    /// Does the work.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Runs `task` compiled for `isa`; `isa` must be supported here (the portable code runs if it is not).
#[inline]
pub fn dispatch<T: Task>(isa: Isa, task: T) -> T::Output {
    let isa = isa.vectors();
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16 if T::BF16 && isa.is_supported() => super::avx512::run_bf16(task),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 if isa.is_supported() => super::avx512::run(task),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 if isa.is_supported() => super::avx2::run(task),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => super::neon::run(task),
        _ => super::portable::run(task),
    }
}

/// Defines functions whose loops the compiler vectorises by itself, compiled once per instruction set; a call takes the
/// version for [`Isa::current`]. Meant for the inner loop over one contiguous piece, not for a whole parallel operation.
macro_rules! vectorised {
    ($($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block)*) => {$(
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            fn avx512($($arg: $ty),*) $(-> $ret)? {
                body($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $ty),*) $(-> $ret)? {
                body($($arg),*)
            }
            match $crate::cpu::Isa::current().vectors() {
                // SAFETY: `Isa::current` gives what the machine has.
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::Isa::Avx512 | $crate::cpu::Isa::Avx512Bf16 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::Isa::Avx2 => unsafe { avx2($($arg),*) },
                _ => body($($arg),*),
            }
        }
    )*};
}
pub(crate) use vectorised;
