//! What this machine can do at most, measured on it: the roof under which `hone bench kernels` sees the kernels.

use super::float::Float;
use super::simd::{Isa, Simd, Task, dispatch};
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use super::tiles::amx::{Again, Amx, STEP, TILE, Tiles};
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use half::bf16;
use rayon::prelude::*;
use std::hint::black_box;
use std::marker::PhantomData;
use std::time::Instant;

/// Chains of multiply-adds that are under way together: more than latency times ports of any core there is. Twelve are too few for products of pairs of
/// bf16 on AMD's cores with AVX-512.
const fn chains(registers: usize) -> usize {
    registers * 3 / 4
}
const ROUNDS: usize = 2_000_000;
/// Products of 2x2 tiles.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
const TILE_ROUNDS: usize = 500_000;
const REPEATS: usize = 5;
/// Floats copied, well beyond every cache.
const COPY: usize = 32 << 20;

struct Chains<T>(PhantomData<T>);

impl<T: Float> Task for Chains<T> {
    type Output = ();
    const BF16: bool = T::PER_WORD > 1;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        if const { S::REGISTERS >= 32 } {
            multiply_add::<T, S, { chains(32) }>(simd);
        } else {
            multiply_add::<T, S, { chains(16) }>(simd);
        }
    }
}

#[inline(always)]
fn multiply_add<T: Float, S: Simd, const CHAINS: usize>(simd: S) {
    let (a, b) = (black_box(simd.splat(1e-3)), black_box(simd.splat(1e-3)));
    let mut sums = [simd.splat(0.0); CHAINS];
    for _ in 0..ROUNDS {
        for sum in &mut sums {
            *sum = T::multiply_words(simd, a, b, *sum);
        }
    }
    black_box(sums);
}

fn best(run: impl Fn()) -> f64 {
    run();
    let time = || {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    (0..REPEATS).map(|_| time()).fold(f64::INFINITY, f64::min)
}

/// Operations a second of all threads on values of type `T`, multiply-adds counted as two; the best of a few runs. Of bf16 those
/// of tiles, where there are any.
pub fn operations_per_second<T: Float>(isa: Isa) -> f64 {
    let threads = rayon::current_num_threads();
    let time = |run: &(dyn Fn() + Sync)| {
        best(|| (0..threads).into_par_iter().with_max_len(1).for_each(|_| run())) / (2 * threads) as f64
    };
    let vectors = chains(isa.registers()) * ROUNDS * isa.lanes() * T::PER_WORD;
    let vectors = vectors as f64 / time(&|| dispatch(isa, Chains::<T>(PhantomData)));
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if isa == Isa::Amx && isa.is_supported() && T::PER_WORD == 2 {
        return vectors.max((TILE_ROUNDS * TILE * TILE * STEP) as f64 / time(&multiply_tiles::<Amx>));
    }
    vectors
}

/// Products of tiles that stay in L1.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn multiply_tiles<U: Tiles>() {
    let values = [bf16::ZERO; TILE * STEP];
    let halves = [values.as_ptr(), values[TILE * STEP / 2..].as_ptr()];
    let mut tiles = U::new();
    // SAFETY: either half holds 16 rows of 32 values.
    unsafe {
        tiles.start(std::ptr::null(), 0);
        (0..TILE_ROUNDS).for_each(|_| tiles.multiply(halves, STEP, halves, Again::Both));
    }
}

/// Bytes a second of a copy by all threads, read and written ones counted; the best of a few.
pub fn bytes_per_second() -> f64 {
    let source = vec![1.0f32; COPY];
    let target = std::sync::Mutex::new(vec![0.0f32; COPY]);
    let seconds = best(|| {
        let mut target = target.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        target.par_chunks_mut(1 << 20).zip(source.par_chunks(1 << 20)).for_each(|(t, s)| t.copy_from_slice(s));
    });
    (2 * COPY * size_of::<f32>()) as f64 / seconds
}
