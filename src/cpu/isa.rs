//! Instruction sets, which of them a machine has, and what its processor does fast.

use std::sync::OnceLock;

/// An instruction set hone has kernels for, slowest first (but for products of pairs, which some processors take long for).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// What [`Isa::Amx`] does, with tiles in plain Rust: to test it elsewhere. Never chosen unless it is named.
    AmxEmulated,
    /// What every machine of the target has.
    Portable,
    /// 128-bit vectors of 64-bit Arm.
    Neon,
    /// 256-bit vectors with fused multiply-add.
    Avx2,
    /// 512-bit vectors (F, BW, DQ and VL).
    Avx512,
    /// The same with products of bf16 pairs.
    Avx512Bf16,
    /// That, and products of bf16 tiles.
    Amx,
}

impl Isa {
    /// The names `$HONE_ISA` takes.
    pub const NAMES: [(&'static str, Isa); 7] = [
        ("amx-emulated", Isa::AmxEmulated),
        ("portable", Isa::Portable),
        ("neon", Isa::Neon),
        ("avx2", Isa::Avx2),
        ("avx512", Isa::Avx512),
        ("avx512bf16", Isa::Avx512Bf16),
        ("amx", Isa::Amx),
    ];

    /// Whether this machine can run it.
    pub fn is_supported(self) -> bool {
        match self {
            Isa::Portable | Isa::AmxEmulated => true,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.is_supported()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => Isa::Avx512.is_supported() && is_x86_feature_detected!("avx512bf16"),
            Isa::Amx => Isa::Avx512Bf16.is_supported() && super::tiles::amx::is_available(),
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }

    /// Every instruction set of this machine.
    pub fn supported() -> impl Iterator<Item = Isa> {
        Self::NAMES.into_iter().map(|(_, isa)| isa).filter(|isa| isa.is_supported())
    }

    /// The fastest of this machine.
    fn fastest() -> Isa {
        let pairs_pay = multiplies_pairs_fast();
        Self::supported().filter(|&isa| isa != Isa::Avx512Bf16 || pairs_pay).last().unwrap_or(Isa::Portable)
    }

    /// The one in use: `$HONE_ISA` if it names one that this machine has, else the fastest.
    pub fn current() -> Isa {
        static CURRENT: OnceLock<Isa> = OnceLock::new();
        *CURRENT.get_or_init(|| {
            let wanted = std::env::var("HONE_ISA").ok();
            let named = Self::NAMES.into_iter().find(|(name, _)| Some(*name) == wanted.as_deref());
            match named.filter(|(_, isa)| isa.is_supported()) {
                Some((_, isa)) => isa,
                None => Self::fastest(),
            }
        })
    }

    /// The instruction set of everything but tiles.
    pub(super) fn vectors(self) -> Isa {
        match self {
            Isa::Amx => Isa::Avx512Bf16,
            Isa::AmxEmulated => {
                let real = Self::NAMES.into_iter().map(|(_, isa)| isa).filter(|isa| !isa.has_tiles());
                real.rev().find(|isa| isa.is_supported()).unwrap_or(Isa::Portable)
            }
            other => other,
        }
    }

    /// Whether convolutions run on tiles.
    pub fn has_tiles(self) -> bool {
        matches!(self, Isa::Amx | Isa::AmxEmulated)
    }

    /// Whether an instruction multiplies pairs of bf16, and is used.
    pub fn multiplies_pairs(self) -> bool {
        self.vectors() == Isa::Avx512Bf16
    }

    /// f32 in a vector.
    pub fn lanes(self) -> usize {
        match self.vectors() {
            Isa::Portable | Isa::Neon => 4,
            Isa::Avx2 => 8,
            _ => 16,
        }
    }

    /// Vector registers.
    pub(super) fn registers(self) -> usize {
        match self.vectors() {
            Isa::Portable | Isa::Avx2 => 16,
            _ => 32,
        }
    }

    /// Columns of a micro-kernel's tile: the vectors of a row times the lanes of a vector.
    pub fn tile_columns(self) -> usize {
        match self.vectors() {
            Isa::Portable => 8,
            Isa::Neon | Isa::Avx2 => 16,
            _ => 64,
        }
    }
}

impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = Self::NAMES.iter().find(|(_, isa)| isa == self).map_or("?", |(name, _)| name);
        f.write_str(name)
    }
}

/// Whether the processor is one of Intel's.
fn is_intel() -> bool {
    // A virtual machine asks its host each time.
    static INTEL: OnceLock<bool> = OnceLock::new();
    *INTEL.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        return std::arch::x86_64::__cpuid(0).ebx == u32::from_le_bytes(*b"Genu");
        #[cfg(not(target_arch = "x86_64"))]
        return false;
    })
}

/// Whether a product of a pair of bf16 takes as long as one of f32, as on AMD's processors, and not four times as long, as on
/// Intel's: with those bf16 is widened, and products are of f32.
fn multiplies_pairs_fast() -> bool {
    !is_intel()
}

/// Whether products should ask for lines that are not theirs. On AMD's processors that shortens what comes after them by more than it takes; on Intel's
/// products wait longer than they save.
pub(super) fn products_ask_for_others() -> bool {
    !is_intel()
}
