//! Random tensors, comparisons that reject NaN, and the gradient check.

use hone::{Result, Tensor};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Values in [-1, 1), decided by `seed`.
pub fn values(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

pub fn tensor(dims: &[usize], seed: u64) -> Tensor {
    Tensor::from_slice(&values(dims.iter().product(), seed), dims).unwrap()
}

/// Each element within `tolerance` of the reference, in units of the largest reference value (or 1).
pub fn assert_close(got: &[f32], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    let scale = want.iter().fold(1.0f64, |m, x| m.max(x.abs()));
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let difference = (f64::from(got) - want).abs();
        assert!(difference <= tolerance * scale, "{what}: element {i} is {got}, expected {want}");
    }
}

pub fn widen(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// Compares the gradients of `f` to all of `inputs` with central differences of `sum(f * r)`, `r` random.
pub fn check_gradients(inputs: &[Tensor], step: f32, tolerance: f64, f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let leaves: Vec<Tensor> = inputs.iter().map(|x| x.clone().leaf()).collect();
    let output = f(&leaves).unwrap();
    let seed = tensor(output.dims(), 99);
    let project = |y: &Tensor| -> f64 {
        y.as_slice::<f32>().iter().zip(seed.as_slice::<f32>()).map(|(&y, &r)| f64::from(y) * f64::from(r)).sum()
    };
    let gradients = output.backward_with(seed.clone()).unwrap();
    for (which, leaf) in leaves.iter().enumerate() {
        let gradient = gradients.get(leaf).unwrap_or_else(|| panic!("input {which} has a gradient"));
        assert_eq!(gradient.dims(), leaf.dims(), "gradient of input {which}: shape");
        let mut numeric = Vec::new();
        for i in 0..leaf.numel() {
            let at = |delta: f32| {
                let mut moved: Vec<Tensor> = inputs.to_vec();
                let mut values = moved[which].to_vec::<f32>();
                values[i] += delta;
                moved[which] = Tensor::from_slice(&values, leaf.shape().clone()).unwrap();
                project(&f(&moved).unwrap())
            };
            numeric.push((at(step) - at(-step)) / (2.0 * f64::from(step)));
        }
        assert_close(gradient.as_slice(), &numeric, tolerance, &format!("gradient of input {which}"));
    }
}
