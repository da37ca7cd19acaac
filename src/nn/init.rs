//! Random initial values, decided by a seed and the parameter's name: a parameter's values do not depend on which others
//! are drawn before it.

use crate::tensor::Tensor;
use fnv::FnvHasher;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal, Uniform};
use std::hash::Hasher;

fn generator(seed: u64, name: &str) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    // FNV-1a of the name chooses one of the generator's independent streams.
    let mut hash = FnvHasher::default();
    hash.write(name.as_bytes());
    rng.set_stream(hash.finish());
    rng
}

fn draw(shape: &[usize], seed: u64, name: &str, distribution: impl Distribution<f32>) -> Tensor {
    let mut rng = generator(seed, name);
    Tensor::build(shape, |out: &mut [f32]| out.iter_mut().for_each(|x| *x = distribution.sample(&mut rng)))
}

/// Normal with mean zero.
pub(super) fn normal(shape: &[usize], std: f32, seed: u64, name: &str) -> Tensor {
    draw(shape, seed, name, Normal::new(0.0, std).expect("a finite deviation"))
}

/// Uniform in `[-bound, bound)`.
pub(super) fn uniform(shape: &[usize], bound: f32, seed: u64, name: &str) -> Tensor {
    draw(shape, seed, name, Uniform::new(-bound, bound).expect("a positive bound"))
}
