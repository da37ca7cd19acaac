//! AMX: eight registers of 16 rows of 64 bytes, and an instruction that multiplies two of them.
//!
//! `tdpbf16ps` takes 16 rows of 32 bf16 and 32 rows of 16 bf16, the latter as 16 rows of 16 pairs, and adds their product to 16
//! rows of 16 f32: 8192 multiply-adds in 16 cycles. Four accumulators of 2x2 tiles, two tiles of A and two of B use all eight
//! registers, and every tile that is loaded is used twice. `tileloaddt1` loads a tile as `tileloadd` does, but hints that L1 need not keep it.
//!
//! Rust has no stable intrinsics for it, so the instructions stand in `asm!`. They are the whole of [`Amx`]; everything around
//! them is written for [`Tiles`], which plain Rust implements as well, so that packing, blocking and edges are tested on
//! machines without AMX (`HONE_ISA=amx-emulated`).

use half::bf16;

/// Rows and columns of the accumulators together.
pub const TILE: usize = 32;
/// Values of the depth that one step multiplies.
pub const STEP: usize = 32;

/// What is loaded again before L1 has taken as much as it holds. The rest is loaded past it as far as the processor can, so that it does not
/// drive out what stays there: the sums, the results, and the other side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Again {
    /// Either side.
    Both,
    /// A.
    Left,
    /// None of them.
    Neither,
}

/// 2x2 accumulators.
pub trait Tiles {
    /// Makes the registers usable on this thread, until the value is dropped.
    fn new() -> Self;
    /// Sets the sums to `[TILE, TILE]` f32 at `sums`, or to zero.
    ///
    /// # Safety
    /// If not null, `sums` is valid for `TILE` rows, `stride` f32 apart.
    unsafe fn start(&mut self, sums: *const f32, stride: usize);
    /// Adds the product of twice `TILE / 2` rows of `STEP` values from `a`, `a_stride` values apart, and of twice `STEP / 2` rows of
    /// `TILE / 2` pairs from `b`, one after the other. The result does not depend on `again`.
    ///
    /// # Safety
    /// `a` and `b` are valid for that.
    unsafe fn multiply(&mut self, a: [*const bf16; 2], a_stride: usize, b: [*const bf16; 2], again: Again);
    /// The same for values in one part, or in two, the more significant one first, whose three products are added that matter.
    ///
    /// # Safety
    /// As of [`Tiles::multiply`], for each part.
    #[inline(always)]
    unsafe fn multiply_parts<const PARTS: usize>(
        &mut self,
        a: [[*const bf16; 2]; PARTS],
        a_stride: usize,
        b: [[*const bf16; 2]; PARTS],
        again: Again,
    ) {
        const { assert!(PARTS == 1 || PARTS == 2) };
        // SAFETY: the contract.
        unsafe {
            self.multiply(a[PARTS - 1], a_stride, b[0], again);
            if PARTS == 2 {
                self.multiply(a[0], a_stride, b[0], again);
                self.multiply(a[0], a_stride, b[1], again);
            }
        }
    }
    /// Stores the sums.
    ///
    /// # Safety
    /// `sums` is valid for `TILE` rows, `stride` f32 apart.
    unsafe fn finish(&mut self, sums: *mut f32, stride: usize);
}

/// What the instructions do, in plain Rust, to the same bits but for numbers that are not normal, which they take for zero.
pub struct Emulated([[f32; TILE]; TILE]);

impl Tiles for Emulated {
    fn new() -> Self {
        Emulated([[0.0; TILE]; TILE])
    }

    unsafe fn start(&mut self, sums: *const f32, stride: usize) {
        for (i, row) in self.0.iter_mut().enumerate() {
            // SAFETY: the contract.
            *row =
                if sums.is_null() { [0.0; TILE] } else { unsafe { sums.add(i * stride).cast::<[f32; TILE]>().read() } };
        }
    }

    unsafe fn multiply(&mut self, a: [*const bf16; 2], a_stride: usize, b: [*const bf16; 2], _: Again) {
        for (half, b) in b.into_iter().enumerate() {
            // Of a row of pairs the first values, and the second.
            let b: [[[f32; TILE / 2]; 2]; STEP / 2] = std::array::from_fn(|k| {
                // SAFETY: the contract.
                let pairs = unsafe { b.add(k * TILE).cast::<[[bf16; 2]; TILE / 2]>().read() };
                [pairs.map(|[first, _]| first.to_f32()), pairs.map(|[_, second]| second.to_f32())]
            });
            for (i, row) in self.0.iter_mut().enumerate() {
                // Either has sums of its own, which are added to what is there in the end. Products of two bf16 are exact in f32.
                let mut sums = [[0.0; TILE / 2]; 2];
                for (k, b) in b.iter().enumerate() {
                    let at = i % (TILE / 2) * a_stride + 2 * k;
                    // SAFETY: the contract.
                    let pair = unsafe { a[i / (TILE / 2)].add(at).cast::<[bf16; 2]>().read_unaligned() };
                    for ((sums, a), b) in sums.iter_mut().zip(pair.map(bf16::to_f32)).zip(b) {
                        sums.iter_mut().zip(b).for_each(|(sum, b)| *sum += a * b);
                    }
                }
                for (column, sum) in row[half * (TILE / 2)..].iter_mut().take(TILE / 2).enumerate() {
                    *sum += sums[0][column] + sums[1][column];
                }
            }
        }
    }

    unsafe fn finish(&mut self, sums: *mut f32, stride: usize) {
        for (i, row) in self.0.iter().enumerate() {
            // SAFETY: the contract.
            unsafe { sums.add(i * stride).cast::<[f32; TILE]>().write(*row) };
        }
    }
}

/// Whether the processor and the system let this process use AMX, which they are asked for once; and whether what it
/// computes is right.
pub fn is_available() -> bool {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    return hardware::is_available();
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    false
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub use hardware::Amx;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod hardware {
    use super::{Again, Emulated, STEP, TILE, Tiles};
    use half::bf16;
    use std::arch::asm;
    use std::sync::OnceLock;

    /// The registers themselves. tmm0 to tmm3 are the sums, row by row; tmm4 and 5 hold A, tmm6 and 7 B. Nothing else in the
    /// process uses them, so that they keep their values from one `asm!` to the next.
    pub struct Amx(());

    /// What `ldtilecfg` reads: palette 1, eight tiles of 16 rows of 64 bytes.
    #[repr(C, align(64))]
    struct Configuration {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        bytes: [u16; 16],
        rows: [u8; 16],
    }

    static CONFIGURATION: Configuration = {
        let (mut bytes, mut rows) = ([0; 16], [0; 16]);
        let mut i = 0;
        while i < 8 {
            (bytes[i], rows[i]) = (64, 16);
            i += 1;
        }
        Configuration { palette: 1, start_row: 0, reserved: [0; 14], bytes, rows }
    };

    /// Four products, for which either side is loaded with the instruction given, or is there from those before.
    macro_rules! products {
        ($(a: $load_a:literal $a:ident $a_stride:ident)? $(b: $load_b:literal $b:ident)?) => {
            asm!($(concat!($load_a, " tmm4, [{upper} + {a_stride}*1]"),)?
                 $(concat!($load_b, " tmm6, [{left} + {b_stride}*1]"),)?
                 "tdpbf16ps tmm0, tmm4, tmm6",
                 $(concat!($load_b, " tmm7, [{right} + {b_stride}*1]"),)?
                 "tdpbf16ps tmm1, tmm4, tmm7",
                 $(concat!($load_a, " tmm5, [{lower} + {a_stride}*1]"),)?
                 "tdpbf16ps tmm2, tmm5, tmm6",
                 "tdpbf16ps tmm3, tmm5, tmm7",
                 $(upper = in(reg) $a[0], lower = in(reg) $a[1], a_stride = in(reg) $a_stride * 2,)?
                 $(left = in(reg) $b[0], right = in(reg) $b[1], b_stride = in(reg) 2 * TILE,)?
                 options(nostack, readonly, preserves_flags))
        };
    }

    impl Tiles for Amx {
        fn new() -> Self {
            assert!(may_be_used(), "there is no AMX here");
            // SAFETY: the machine has the instructions, and the process its permission.
            unsafe {
                asm!("ldtilecfg [{}]", in(reg) &CONFIGURATION, options(nostack, readonly, preserves_flags));
            }
            Amx(())
        }

        #[inline(always)]
        unsafe fn start(&mut self, sums: *const f32, stride: usize) {
            // SAFETY: the contract; `new` has configured the tiles.
            unsafe {
                if sums.is_null() {
                    asm!(
                        "tilezero tmm0",
                        "tilezero tmm1",
                        "tilezero tmm2",
                        "tilezero tmm3",
                        options(nostack, nomem, preserves_flags)
                    );
                } else {
                    asm!("tileloadd tmm0, [{upper} + {stride}*1]", "tileloadd tmm1, [{upper} + {stride}*1 + 64]",
                         "tileloadd tmm2, [{lower} + {stride}*1]", "tileloadd tmm3, [{lower} + {stride}*1 + 64]",
                         upper = in(reg) sums, lower = in(reg) sums.add(16 * stride), stride = in(reg) stride * 4,
                         options(nostack, readonly, preserves_flags));
                }
            }
        }

        #[inline(always)]
        unsafe fn multiply(&mut self, a: [*const bf16; 2], a_stride: usize, b: [*const bf16; 2], again: Again) {
            // SAFETY: the contract; `new` has configured the tiles.
            unsafe {
                match again {
                    Again::Both => products!(a: "tileloadd" a a_stride b: "tileloadd" b),
                    Again::Left => products!(a: "tileloadd" a a_stride b: "tileloaddt1" b),
                    Again::Neither => products!(a: "tileloaddt1" a a_stride b: "tileloaddt1" b),
                }
            }
        }

        #[inline(always)]
        unsafe fn multiply_parts<const PARTS: usize>(
            &mut self,
            a: [[*const bf16; 2]; PARTS],
            a_stride: usize,
            b: [[*const bf16; 2]; PARTS],
            again: Again,
        ) {
            const { assert!(PARTS == 1 || PARTS == 2) };
            // SAFETY: the contract; `new` has configured the tiles, and nothing but these products loads them.
            unsafe {
                self.multiply(a[PARTS - 1], a_stride, b[0], again);
                if PARTS == 2 {
                    // One side is there from the product before, and is not loaded again.
                    let (a, b) = (a[0], b[1]);
                    match again {
                        Again::Both | Again::Left => products!(a: "tileloadd" a a_stride),
                        Again::Neither => products!(a: "tileloaddt1" a a_stride),
                    }
                    match again {
                        Again::Both => products!(b: "tileloadd" b),
                        Again::Left | Again::Neither => products!(b: "tileloaddt1" b),
                    }
                }
            }
        }

        #[inline(always)]
        unsafe fn finish(&mut self, sums: *mut f32, stride: usize) {
            // SAFETY: the contract; `new` has configured the tiles.
            unsafe {
                asm!("tilestored [{upper} + {stride}*1], tmm0", "tilestored [{upper} + {stride}*1 + 64], tmm1",
                     "tilestored [{lower} + {stride}*1], tmm2", "tilestored [{lower} + {stride}*1 + 64], tmm3",
                     upper = in(reg) sums, lower = in(reg) sums.add(16 * stride), stride = in(reg) stride * 4,
                     options(nostack, preserves_flags));
            }
        }
    }

    impl Drop for Amx {
        fn drop(&mut self) {
            // SAFETY: AMX is there, as in `new`. Idle tiles would cost every switch of threads.
            unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
        }
    }

    /// Leaf 7 of CPUID, EDX: AMX-BF16 and AMX-TILE.
    const FEATURES: u32 = 1 << 22 | 1 << 24;
    /// `arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`.
    const ARCH_PRCTL: usize = 158;
    const REQUEST_PERMISSION: usize = 0x1023;
    const TILE_DATA: usize = 18;

    pub fn is_available() -> bool {
        static AVAILABLE: OnceLock<bool> = OnceLock::new();
        *AVAILABLE.get_or_init(|| may_be_used() && computes_rightly())
    }

    fn may_be_used() -> bool {
        static MAY_BE: OnceLock<bool> = OnceLock::new();
        *MAY_BE.get_or_init(|| has_instructions() && is_permitted())
    }

    fn has_instructions() -> bool {
        use std::arch::x86_64::{__cpuid, __cpuid_count};
        __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & FEATURES == FEATURES
    }

    /// Linux gives the large state to processes that ask for it.
    fn is_permitted() -> bool {
        let result: isize;
        // SAFETY: a system call that changes nothing but this permission; the kernel clobbers rcx and r11.
        unsafe {
            asm!("syscall", inlateout("rax") ARCH_PRCTL => result, in("rdi") REQUEST_PERMISSION, in("rsi") TILE_DATA,
                 lateout("rcx") _, lateout("r11") _, options(nostack));
        }
        result == 0
    }

    /// A product of small integers, which both must give exactly.
    fn computes_rightly() -> bool {
        let a: Vec<bf16> = (0..TILE * STEP).map(|i| bf16::from_f32((i * 7 % 15) as f32 - 7.0)).collect();
        let b: Vec<bf16> = (0..STEP * TILE).map(|i| bf16::from_f32((i * 5 % 13) as f32 - 6.0)).collect();
        fn product<T: Tiles>(a: &[bf16], b: &[bf16], again: Again) -> Vec<f32> {
            let mut sums = vec![1.0; TILE * TILE];
            let mut tiles = T::new();
            // SAFETY: the slices are as large as the tiles.
            unsafe {
                tiles.start(sums.as_ptr(), TILE);
                let (a, b) = (a.as_ptr(), b.as_ptr());
                tiles.multiply([a, a.add(16 * STEP)], STEP, [b, b.add(16 * TILE)], again);
                tiles.finish(sums.as_mut_ptr(), TILE);
            }
            sums
        }
        let right = product::<Emulated>(&a, &b, Again::Both);
        [Again::Both, Again::Left, Again::Neither].into_iter().all(|again| product::<Amx>(&a, &b, again) == right)
    }
}

#[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    /// What two steps in two parts add to sums.
    fn sums_of<U: Tiles>(values: &[bf16], sums: &[f32], again: Again) -> Vec<u32> {
        let mut out = vec![0.0; TILE * TILE];
        let mut tiles = U::new();
        let part = |i: usize| &values[i * TILE * STEP..][..TILE * STEP];
        // SAFETY: each part is two tiles, and sums are four.
        unsafe {
            tiles.start(sums.as_ptr(), TILE);
            for step in 0..2 {
                let a = [0, 1].map(|i| [0, 1].map(|half| part(4 * step + i)[half * TILE / 2 * STEP..].as_ptr()));
                let b = [2, 3].map(|i| [0, 1].map(|half| part(4 * step + i)[half * STEP / 2 * TILE..].as_ptr()));
                tiles.multiply_parts(a, STEP, b, again);
            }
            tiles.finish(out.as_mut_ptr(), TILE);
        }
        out.into_iter().map(f32::to_bits).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]

        #[test]
        fn the_instructions_give_the_bits_of_plain_rust(
            values in vec((-4.0f32..4.0).prop_map(bf16::from_f32), 8 * TILE * STEP),
            sums in vec(-4.0f32..4.0, TILE * TILE),
        ) {
            if !is_available() {
                eprintln!("skipped: there is no AMX here");
                return Ok(());
            }
            let want = sums_of::<Emulated>(&values, &sums, Again::Both);
            for again in [Again::Both, Again::Left, Again::Neither] {
                prop_assert!(sums_of::<Amx>(&values, &sums, again) == want, "{again:?}");
            }
        }
    }
}
