//! Running the same computation on both devices.

use hone::{DType, Device, Result, Tensor, cuda};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::{Mutex, MutexGuard};

/// Held by every test: there is one device, and its switches are global.
static DEVICE: Mutex<()> = Mutex::new(());

/// The device, or `None` where there is none.
pub fn device() -> Option<MutexGuard<'static, ()>> {
    #[cfg(feature = "emulator")]
    cuda::emulate();
    let guard = DEVICE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    match cuda::context() {
        Ok(context) => {
            context.allow_tf32(false);
            Some(guard)
        }
        Err(_) if !cfg!(feature = "emulator") => {
            println!("skipped: {}", cuda::probe().unwrap_or_default());
            None
        }
        Err(e) => panic!("{e}"),
    }
}

/// Leaves the test where there is no device.
macro_rules! require_device {
    () => {
        require_device!(())
    };
    ($nothing:expr) => {
        let Some(_device) = crate::support::device() else { return $nothing };
    };
}
pub(crate) use require_device;

/// Values in [-1, 1), decided by `seed`.
pub fn random(dims: &[usize], seed: u64) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f32> = (0..dims.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_slice(&values, dims).unwrap()
}

/// ||got - want|| / ||want||, where a norm of less than 0.05 an element counts as that much. NaN if anything is.
pub fn relative_l2(got: &[f32], want: &[f32]) -> f64 {
    let (difference, norm) = difference_and_norm(got, want);
    difference / norm.max(0.05 * (want.len() as f64).sqrt())
}

/// ||got - want|| and ||want||.
fn difference_and_norm(got: &[f32], want: &[f32]) -> (f64, f64) {
    assert_eq!(got.len(), want.len(), "lengths");
    let square = |x: f64| x * x;
    let difference: f64 = got.iter().zip(want).map(|(&g, &w)| square(f64::from(g) - f64::from(w))).sum();
    let norm: f64 = want.iter().map(|&w| square(f64::from(w))).sum();
    (difference.sqrt(), norm.sqrt())
}

/// What results may differ by.
#[derive(Clone, Copy)]
pub struct Tolerance {
    /// In units of their norm, one of less than 0.05 an element counting as that much, and as more by the root of the number of terms
    /// that make an element: sums of numbers near 1 that cancel are not wrong in their own size.
    relative: f64,
    /// The same for what each product of a sum is wrong by itself. Sums of products of numbers in [-1, 1) are a third of the root of
    /// their number large on average, and count as a fifth of it at least.
    of_products: f64,
}

impl From<f64> for Tolerance {
    fn from(relative: f64) -> Self {
        Tolerance { relative, of_products: 0.0 }
    }
}

pub fn assert_close(what: &str, got: &Tensor, want: &Tensor, tolerance: impl Into<Tolerance>) {
    assert_close_sums(what, got, want, 1, tolerance.into());
}

fn assert_close_sums(what: &str, got: &Tensor, want: &Tensor, terms: usize, tolerance: Tolerance) {
    assert_eq!(got.dims(), want.dims(), "{what}: extents");
    let (difference, norm) = difference_and_norm(&got.to_f32_vec().unwrap(), &want.to_f32_vec().unwrap());
    let root = ((terms * want.numel()) as f64).sqrt();
    let least = if terms > 1 { 0.2 } else { 0.05 };
    let allowed = tolerance.relative * norm.max(0.05 * root) + tolerance.of_products * norm.max(least * root);
    assert!(difference <= allowed, "{what}: an error of {difference:e}, at most {allowed:e}, of {norm:e}");
}

/// Rounded to bf16, as f32.
pub fn rounded(x: &Tensor) -> Tensor {
    x.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap()
}

/// `tolerance`, plus what the CPU's own f32 convolutions may be wrong by: Winograd's tiles of seven lose up to 1e-5 of a sum, and
/// where a value is the sum of two bf16 the smallest of a product's four parts is left out, and each of the three errors is at
/// most 2^-18 of the product. Which of them a shape meets depends on the machine.
pub fn with_error_of_cpu(tolerance: f64) -> Tolerance {
    Tolerance { relative: tolerance, of_products: 3.0 / f64::from(1 << 18) }
}

/// Runs `f` on both devices, in f32, and compares results and the gradients to all inputs.
pub fn compare(inputs: &[Tensor], tolerance: impl Into<Tolerance>, f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    compare_as(DType::F32, inputs, tolerance, |x| f(x));
}

/// As [`compare`], but on CUDA inputs of four extents are of the type `dtype`; the CPU is given their rounded values.
pub fn compare_as(
    dtype: DType,
    inputs: &[Tensor],
    tolerance: impl Into<Tolerance>,
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    let tolerance = tolerance.into();
    let narrow = |x: &Tensor| dtype == DType::BF16 && x.dims().len() == 4;
    let on_cpu: Vec<Tensor> = inputs.iter().map(|x| if narrow(x) { rounded(x) } else { x.clone() }.leaf()).collect();
    let on_cuda: Vec<Tensor> = on_cpu
        .iter()
        .map(|x| {
            let moved = x.detach().to_device(Device::Cuda).unwrap();
            if narrow(x) { moved.to_dtype(dtype).unwrap().leaf() } else { moved.leaf() }
        })
        .collect();
    let want = f(&on_cpu).unwrap();
    let got = f(&on_cuda).unwrap();
    assert_eq!(got.device(), Device::Cuda);
    assert_close("result", &got, &want, tolerance);
    if !want.requires_grad() {
        return;
    }
    let seed = random(want.dims(), 99);
    // Where there are more results than inputs, an input's gradient sums at least that many terms.
    let results = want.numel();
    let terms = |input: &Tensor| (results / input.numel()).max(1);
    let seed = if got.dtype() == DType::BF16 { rounded(&seed) } else { seed };
    let want = want.backward_with(seed.clone()).unwrap();
    let seed = seed.to_device(Device::Cuda).unwrap().to_dtype(got.dtype()).unwrap();
    let got = got.backward_with(seed).unwrap();
    for (i, (cpu, cuda)) in on_cpu.iter().zip(&on_cuda).enumerate() {
        match (want.get(cpu), got.get(cuda)) {
            (Some(want), Some(got)) => {
                assert_close_sums(&format!("gradient {i}"), got, want, terms(cpu), tolerance);
            }
            (want, got) => assert_eq!(want.is_some(), got.is_some(), "gradient {i}"),
        }
    }
}
