//! Whether the kernels compute rightly on the machine at hand: the CPU's convolutions against sums written out in f64, all of the card's
//! against the CPU's.

use crate::cuda::gemm::{Layout, Rung, run as gemm};
use crate::error::{Error, Result};
use crate::ops::{self, Conv2dParams, CrossEntropy, FusedConv2d, Norm, Statistics};
use crate::optim::{Algorithm, Optimizer, ParamGroup};
use crate::tensor::{DType, Device, Tensor};
use crate::{autograd, cuda, nn};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

/// A comparison.
pub struct Check {
    /// What was compared.
    pub name: String,
    /// Norm of the difference over the norm of the reference.
    pub error: f64,
    /// What is expected of rounding alone.
    pub tolerance: f64,
}

impl Check {
    /// NaN does not pass.
    pub fn passes(&self) -> bool {
        self.error <= self.tolerance
    }
}

fn random(dims: &[usize], seed: u64) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    Tensor::build(dims, |x: &mut [f32]| x.iter_mut().for_each(|x| *x = rng.random_range(-1.0..1.0)))
}

fn relative(got: &[f32], want: impl Iterator<Item = f64>) -> f64 {
    let (mut difference, mut norm) = (0.0, 0.0);
    for (&got, want) in got.iter().zip(want) {
        difference += (f64::from(got) - want).powi(2);
        norm += want * want;
    }
    (difference / norm.max(1e-30)).sqrt()
}

/// The convolution's definition: calls `body` for each of its products with the places of the output it adds to, of the input and of
/// the filter's value. Gradients are sums of the same products.
fn for_each_product(
    [n, h, width, c, o, kernel, stride, padding]: [usize; 8],
    mut body: impl FnMut(usize, usize, usize),
) {
    let output = |extent: usize| (extent + 2 * padding - kernel) / stride + 1;
    let (oh, ow) = (output(h), output(width));
    for position in 0..n * oh * ow * o {
        let (i, p, q, out) = (position / (oh * ow * o), position / (ow * o) % oh, position / o % ow, position % o);
        for (r, s) in (0..kernel).flat_map(|r| (0..kernel).map(move |s| (r, s))) {
            let (row, column) = ((p * stride + r).wrapping_sub(padding), (q * stride + s).wrapping_sub(padding));
            if row < h && column < width {
                for k in 0..c {
                    body(position, ((i * h + row) * width + column) * c + k, ((out * kernel + r) * kernel + s) * c + k);
                }
            }
        }
    }
}

/// `[name, n, h, w, c, o, kernel, stride, padding]` of convolutions: the first layer, both strides, a 1x1, and one whose channels no
/// vector divides.
const CASES: [(&str, [usize; 8]); 5] = [
    ("7x7 of 3 channels", [2, 19, 22, 3, 64, 7, 2, 3]),
    ("3x3", [2, 14, 13, 64, 64, 3, 1, 1]),
    ("3x3, stride 2", [2, 15, 14, 64, 128, 3, 2, 1]),
    ("1x1, stride 2", [2, 14, 14, 64, 128, 1, 2, 0]),
    ("3x3 of 5 channels", [1, 9, 8, 5, 7, 3, 1, 1]),
];

/// More that the CPU has other ways for: many tiles of few channels, and of many.
const MANY_TILES: [(&str, [usize; 8]); 2] =
    [("3x3 of many tiles", [2, 28, 28, 32, 48, 3, 1, 1]), ("3x3 of 160 channels", [3, 14, 14, 32, 160, 3, 1, 1])];

/// The CPU's convolutions and their gradients, for which each instruction set has kernels of its own.
pub fn check_cpu(tell: &mut dyn FnMut(Check)) -> Result<()> {
    // Winograd's algorithm rounds transformed values to bf16 too, and its sums amplify that.
    for (precision, dtype, tolerance) in [("f32", DType::F32, 1e-5), ("bf16", DType::BF16, 2e-2)] {
        let rounded = |x: Tensor| x.to_dtype(dtype)?.to_dtype(DType::F32);
        for (name, case @ [n, h, w, c, o, k, stride, padding]) in CASES.into_iter().chain(MANY_TILES) {
            let params = Conv2dParams::new(stride, padding);
            let (x, filter) = (rounded(random(&[n, h, w, c], 1))?, rounded(random(&[o, k, k, c], 2))?.leaf());
            let input = x.to_dtype(dtype)?.leaf();
            let y = ops::conv2d(&input, &filter, None, params)?;
            let dy = rounded(random(y.dims(), 3))?;
            let sums = |len: usize| vec![0.0f64; len];
            let (mut want, mut to_input, mut to_filter) = (sums(y.numel()), sums(x.numel()), sums(filter.numel()));
            let [xs, filters, dys] = [&x, &filter, &dy].map(|tensor| tensor.as_slice::<f32>());
            for_each_product(case, |y, x, w| {
                want[y] += f64::from(xs[x]) * f64::from(filters[w]);
                to_input[x] += f64::from(dys[y]) * f64::from(filters[w]);
                to_filter[w] += f64::from(dys[y]) * f64::from(xs[x]);
            });
            let mut compare = |what: &str, tolerance: f64, got: &Tensor, want: &[f64]| -> Result<()> {
                let error = relative(&got.to_f32_vec()?, want.iter().copied());
                tell(Check { name: format!("cpu {precision} {what} {name}"), error, tolerance });
                Ok(())
            };
            compare("conv", tolerance, &y, &want)?;
            let gradients = y.backward_with(dy.to_dtype(dtype)?)?;
            let missing = || Error::config("a convolution gave no gradient", "report this");
            // They may be sums of more.
            let wider = 2.0 * tolerance;
            compare("gradient to the input,", wider, gradients.get(&input).ok_or_else(missing)?, &to_input)?;
            compare("gradient to the filter,", wider, gradients.get(&filter).ok_or_else(missing)?, &to_filter)?;
            let fused = FusedConv2d::new(&filter, &vec![1.0; o], &vec![0.0; o], params, dtype)?;
            compare("fused conv", tolerance, &ops::fused_conv2d(&input.detach(), &fused, None, false)?, &want)?;
        }
    }
    Ok(())
}

/// A comparison of an operation and its gradients on both devices.
struct Comparison {
    name: String,
    /// Inputs of four extents, filters apart, are of this type on the card.
    dtype: DType,
    tolerance: f64,
}

impl Comparison {
    /// Filters, if there are any, come second.
    fn run(self, inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) -> Result<Check> {
        let rounded = |x: &Tensor| x.to_dtype(DType::BF16)?.to_dtype(DType::F32);
        let narrow = self.dtype == DType::BF16;
        let cpu: Vec<Tensor> =
            inputs.iter().map(|x| Ok(if narrow { rounded(x)? } else { x.clone() }.leaf())).collect::<Result<_>>()?;
        let place = |(i, x): (usize, &Tensor)| -> Result<Tensor> {
            let moved = x.detach().to_device(Device::Cuda)?;
            let moved = if x.dims().len() == 4 && i != 1 { moved.to_dtype(self.dtype)? } else { moved };
            Ok(moved.leaf())
        };
        let card: Vec<Tensor> = cpu.iter().enumerate().map(place).collect::<Result<_>>()?;
        let (want, got) = (f(&cpu)?, f(&card)?);
        let seed = random(want.dims(), 9);
        let seed = if got.dtype() == DType::BF16 { rounded(&seed)? } else { seed };
        let compare = |got: &Tensor, want: &Tensor| -> Result<f64> {
            Ok(relative(&got.to_f32_vec()?, want.as_slice::<f32>().iter().map(|&x| f64::from(x))))
        };
        let mut error = compare(&got, &want)?;
        let seed_on_card = seed.to_device(Device::Cuda)?.to_dtype(got.dtype())?;
        let (want, got) = (want.backward_with(seed)?, got.backward_with(seed_on_card)?);
        for (cpu, card) in cpu.iter().zip(&card) {
            if let (Some(want), Some(got)) = (want.get(cpu), got.get(card)) {
                let this = compare(got, want)?;
                // `max` would drop a NaN.
                error = if this <= error { error } else { this };
            }
        }
        Ok(Check { name: self.name, error, tolerance: self.tolerance })
    }
}

/// The card's kernels, in every precision it has.
pub fn check_cuda(tell: &mut dyn FnMut(Check)) -> Result<()> {
    let context = cuda::context()?;
    let tensor_cores = context.backend().architecture().0 >= 8;
    let precisions: &[(&str, DType, f64)] = match tensor_cores {
        true => &[("f32", DType::F32, 1e-5), ("tf32", DType::F32, 2e-3), ("bf16", DType::BF16, 8e-3)],
        false => &[("f32", DType::F32, 1e-5), ("bf16", DType::BF16, 8e-3)],
    };
    for &(precision, dtype, tolerance) in precisions {
        context.allow_tf32(precision == "tf32");
        for (name, [n, h, w, c, o, k, stride, padding]) in CASES {
            let inputs = [random(&[n, h, w, c], 1), random(&[o, k, k, c], 2)];
            let comparison = Comparison { name: format!("{precision} conv {name}"), dtype, tolerance };
            let params = Conv2dParams::new(stride, padding);
            tell(comparison.run(&inputs, |x| ops::conv2d(&x[0], &x[1], None, params))?);
        }
    }
    context.allow_tf32(false);
    for (precision, dtype, tolerance) in [("f32", DType::F32, 3e-5), ("bf16", DType::BF16, 3e-2)] {
        let compare = |name: &str| Comparison { name: format!("{precision} {name}"), dtype, tolerance };
        let x = [random(&[3, 9, 8, 64], 1), random(&[64], 2), random(&[64], 3), random(&[3, 9, 8, 64], 4)];
        tell(compare("batch norm, residual, ReLU").run(&x, |x| {
            let how = Norm { gamma: &x[1], beta: &x[2], eps: 1e-5, residual: Some(&x[3]), relu: true, pooling: None };
            Ok(ops::norm_act(&x[0], Statistics::Batch(None), how)?.0)
        })?);
        tell(compare("max pool").run(&x[..1], |x| ops::max_pool2d(&x[0], 3, 2, 1))?);
        tell(compare("average pool").run(&x[..1], |x| ops::global_avg_pool(&x[0]))?);
        tell(compare("ReLU and scale").run(&x[..1], |x| ops::scale(&ops::relu(&x[0])?, 0.5))?);
    }
    let f32 = |name: &str| Comparison { name: format!("f32 {name}"), dtype: DType::F32, tolerance: 1e-5 };
    let logits = ops::scale(&random(&[33, 10], 5), 4.0)?;
    let labels: Vec<i64> = (0..33).map(|i| i % 10).collect();
    let labels = Tensor::from_slice(&labels, [33])?;
    let how = CrossEntropy::default();
    tell(f32("cross-entropy").run(&[logits], |x| ops::cross_entropy(&x[0], &labels, &how))?);
    let inputs = [random(&[33, 64], 1), random(&[10, 64], 2), random(&[10], 3)];
    tell(f32("linear").run(&inputs, |x| ops::linear(&x[0], &x[1], Some(&x[2])))?);
    tell(f32("matmul, sum, mean").run(&[random(&[17, 33], 1), random(&[33, 9], 2)], |x| {
        let y = ops::matmul(&x[0], &x[1])?;
        ops::add(&ops::sum(&y)?, &ops::mean(&y)?)
    })?);
    check_gemm(tensor_cores, tell)?;
    check_optimizers(tell)?;
    check_pictures(tell)
}

fn check_gemm(tensor_cores: bool, tell: &mut dyn FnMut(Check)) -> Result<()> {
    let (a, b) = (random(&[136, 72], 1), random(&[72, 144], 2));
    let want = autograd::no_grad(|| ops::matmul(&a, &b))?;
    let rungs = [
        ("plain", Rung::Plain, DType::F32, 1e-6),
        ("tiled", Rung::Tiled, DType::F32, 1e-6),
        ("4x4 registers", Rung::Registers4, DType::F32, 1e-6),
        ("8x8 registers", Rung::Registers8, DType::F32, 1e-6),
        ("tensor cores, tf32", Rung::TensorCores, DType::F32, 2e-3),
        ("tensor cores, bf16", Rung::TensorCores, DType::BF16, 8e-3),
    ];
    for (name, rung, dtype, tolerance) in rungs {
        if rung == Rung::TensorCores && !tensor_cores {
            continue;
        }
        let place = |x: &Tensor| x.to_device(Device::Cuda)?.to_dtype(dtype);
        let got = gemm(rung, &place(&a)?, &place(&b)?, Layout::Nn, None)?.to_f32_vec()?;
        let error = relative(&got, want.as_slice::<f32>().iter().map(|&x| f64::from(x)));
        tell(Check { name: format!("gemm {name}"), error, tolerance });
    }
    Ok(())
}

fn check_optimizers(tell: &mut dyn FnMut(Check)) -> Result<()> {
    for (name, algorithm) in [("adam", Algorithm::ADAM), ("sgd", Algorithm::Sgd { momentum: 0.9, nesterov: true })] {
        let run = |device: Device| -> Result<Vec<f32>> {
            let parameter = Arc::new(nn::Parameter::new("p", random(&[5000], 1).to_device(device)?));
            parameter.set_trainable(true);
            let mut optimizer = Optimizer::new(vec![ParamGroup::new(vec![parameter.clone()], 1e-2)], algorithm);
            for step in 0..3 {
                let shift = random(&[5000], 2 + step).to_device(device)?;
                let gradients = ops::sum(&ops::relu(&ops::add(&parameter.tensor(), &shift)?)?)?.backward()?;
                optimizer.step(&gradients, 1.0)?;
            }
            parameter.tensor().to_f32_vec()
        };
        let (want, got) = (run(Device::Cpu)?, run(Device::Cuda)?);
        let error = relative(&got, want.iter().map(|&x| f64::from(x)));
        tell(Check { name: format!("f32 {name}"), error, tolerance: 1e-6 });
    }
    Ok(())
}

fn check_pictures(tell: &mut dyn FnMut(Check)) -> Result<()> {
    let bytes: Vec<u8> = (0..2 * 7 * 9 * 3).map(|i| (i * 37 % 256) as u8).collect();
    let pictures = Tensor::from_slice(&bytes, [2, 7, 9, 3])?.to_device(Device::Cuda)?;
    let got = cuda::image::normalise(&pictures, None, [7, 9], [0.5; 3], [0.25; 3], DType::F32)?.to_f32_vec()?;
    let want = bytes.iter().map(|&b| f64::from((f32::from(b) / 255.0 - 0.5) / 0.25));
    tell(Check { name: "pictures to f32".into(), error: relative(&got, want), tolerance: 1e-6 });
    Ok(())
}
