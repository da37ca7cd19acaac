use crate::support::{
    Tolerance, assert_close, compare, compare_as, random, require_device, rounded, with_error_of_cpu,
};
use hone::cuda::image::{Crop, normalise};
use hone::ops::{self, Conv2dParams, CrossEntropy, FusedConv2d, Norm, Reduction, Statistics};
use hone::{DType, Device, Tensor, cuda};
use proptest::prelude::*;

/// A convolution by its extents.
#[derive(Clone, Copy, Debug)]
struct Case {
    n: usize,
    h: usize,
    w: usize,
    c: usize,
    o: usize,
    k: usize,
    stride: usize,
    padding: usize,
}

impl Case {
    fn x(&self) -> Tensor {
        random(&[self.n, self.h, self.w, self.c], 1)
    }
    fn weight(&self) -> Tensor {
        random(&[self.o, self.k, self.k, self.c], 2)
    }
    fn params(&self) -> Conv2dParams {
        Conv2dParams::new(self.stride, self.padding)
    }
}

fn near(tile: usize) -> impl Strategy<Value = usize> {
    prop_oneof![Just(1), Just(tile - 1), Just(tile), Just(tile + 1)]
}

fn cases() -> impl Strategy<Value = Case> {
    let kernel = prop_oneof![Just((1, 0)), Just((3, 1)), Just((5, 2)), Just((3, 0))];
    // From two pictures up: a single result may cancel, and would then be held to its own size.
    (2usize..4, 3usize..11, 3usize..11, near(16), near(16), kernel, 1usize..4).prop_filter_map(
        "the filter fits",
        |(n, h, w, c, o, (k, padding), stride)| {
            (h + 2 * padding >= k && w + 2 * padding >= k).then_some(Case { n, h, w, c, o, k, stride, padding })
        },
    )
}

fn convolve(case: Case) -> impl Fn(&[Tensor]) -> hone::Result<Tensor> {
    move |x| ops::conv2d(&x[0], &x[1], Some(&x[2]), case.params())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn conv2d_f32(case in cases()) {
        require_device!(Ok(()));
        compare(&[case.x(), case.weight(), random(&[case.o], 3)], with_error_of_cpu(2e-6), convolve(case));
    }

    #[test]
    fn conv2d_bf16(case in cases()) {
        require_device!(Ok(()));
        // Filters are rounded for the products but are f32 parameters: given rounded, so that the CPU sees the same.
        let inputs = [case.x(), rounded(&case.weight())];
        compare_as_filters(case, &inputs, DType::BF16, 6e-3);
    }

    #[test]
    fn conv2d_tf32(case in cases()) {
        require_device!(Ok(()));
        cuda::context().unwrap().allow_tf32(true);
        // Channels in whole packs, or the CUDA cores would do it.
        let case = Case { c: case.c.next_multiple_of(4), o: case.o.next_multiple_of(4), ..case };
        compare_as_filters(case, &[case.x(), case.weight()], DType::F32, 2e-3);
    }

    /// From eight rows up: two or three leave almost nothing of a gradient, and may lie so close together that the mean's
    /// last bit decides. Those are in [`norm_by_a_batch_of_few_rows`].
    #[test]
    fn norm_by_the_batch(rows in 8usize..300, channels in near(32), residual in any::<bool>(), relu in any::<bool>(),
                         narrow in any::<bool>(), offset in -30.0f32..30.0) {
        require_device!(Ok(()));
        let dims = [1, rows, 1, channels];
        let x = ops::add(&random(&dims, 1), &Tensor::full(dims, offset)).unwrap();
        let mut inputs = vec![x, random(&[channels], 2), random(&[channels], 3)];
        inputs.extend(residual.then(|| random(&dims, 4)));
        let (dtype, tolerance) = if narrow { (DType::BF16, 3e-2) } else { (DType::F32, 3e-4) };
        // Rounded to 8 bits, a large mean would leave little of the deviations.
        prop_assume!(!narrow || offset.abs() < 1.0);
        compare_as(dtype, &inputs, tolerance, |x| {
            let how = Norm { gamma: &x[1], beta: &x[2], eps: 1e-5, residual: x.get(3), relu, pooling: None };
            Ok(ops::norm_act(&x[0], Statistics::Batch(None), how)?.0)
        });
    }

    #[test]
    fn norm_by_a_batch_of_few_rows(rows in 2usize..8, channels in near(32), relu in any::<bool>()) {
        require_device!(Ok(()));
        let apart: Vec<f32> = (0..rows * channels).map(|i| (i / channels) as f32 * 0.8).collect();
        let dims = [1, rows, 1, channels];
        let apart = Tensor::from_slice(&apart, dims).unwrap();
        let x = ops::add(&ops::scale(&random(&dims, 1), 0.3).unwrap(), &apart).unwrap();
        compare(&[x, random(&[channels], 2), random(&[channels], 3)], 3e-5, |x| {
            let how = Norm { gamma: &x[1], beta: &x[2], eps: 1e-5, residual: None, relu, pooling: None };
            Ok(ops::norm_act(&x[0], Statistics::Batch(None), how)?.0)
        });
    }

    #[test]
    fn norm_by_stored_statistics(rows in 1usize..300, channels in near(32), residual in any::<bool>(), relu in any::<bool>()) {
        require_device!(Ok(()));
        let dims = [1, rows, 1, channels];
        let variance: Vec<f32> = random(&[channels], 5).as_slice::<f32>().iter().map(|x| x + 1.01).collect();
        let mut inputs = vec![random(&dims, 1), random(&[channels], 2), random(&[channels], 3), random(&[channels], 4)];
        inputs.push(Tensor::from_slice(&variance, [channels]).unwrap());
        inputs.extend(residual.then(|| random(&dims, 6)));
        compare(&inputs, 1e-5, |x| {
            let how = Norm { gamma: &x[1], beta: &x[2], eps: 1e-5, residual: x.get(5), relu, pooling: None };
            Ok(ops::norm_act(&x[0], Statistics::Stored(&x[3].detach(), &x[4].detach()), how)?.0)
        });
    }

    #[test]
    fn max_pool(n in 1usize..3, h in 2usize..9, w in 2usize..9, c in near(8), narrow in any::<bool>()) {
        require_device!(Ok(()));
        let dtype = if narrow { DType::BF16 } else { DType::F32 };
        let tolerance = if narrow { 4e-3 } else { 1e-7 };
        compare_as(dtype, &[random(&[n, h, w, c], 1)], tolerance, |x| ops::max_pool2d(&x[0], 3, 2, 1));
        compare_as(dtype, &[random(&[n, h, w, c], 1)], tolerance, |x| ops::max_pool2d(&x[0], 2, 1, 0));
    }

    #[test]
    fn average_pool(n in 1usize..4, h in 1usize..8, w in 1usize..8, c in near(32), narrow in any::<bool>()) {
        require_device!(Ok(()));
        let (dtype, tolerance) = if narrow { (DType::BF16, 4e-3) } else { (DType::F32, 1e-6) };
        compare_as(dtype, &[random(&[n, h, w, c], 1)], tolerance, |x| ops::global_avg_pool(&x[0]));
    }

    #[test]
    fn linear(n in near(64), inputs in near(32), outputs in near(64)) {
        require_device!(Ok(()));
        let inputs = [random(&[n, inputs], 1), random(&[outputs, inputs], 2), random(&[outputs], 3)];
        compare(&inputs, 3e-6, |x| ops::linear(&x[0], &x[1], Some(&x[2])));
    }

    #[test]
    fn matmul(m in near(32), k in near(32), n in near(32)) {
        require_device!(Ok(()));
        compare(&[random(&[m, k], 1), random(&[k, n], 2)], 3e-6, |x| ops::matmul(&x[0], &x[1]));
    }

    #[test]
    fn cross_entropy(rows in 1usize..40, classes in near(32), smoothing in prop_oneof![Just(0.0f32), Just(0.1)],
                     weighted in any::<bool>(), sum in any::<bool>()) {
        require_device!(Ok(()));
        let labels: Vec<i64> = (0..rows).map(|i| (i * 7 % classes) as i64).collect();
        let labels = Tensor::from_slice(&labels, [rows]).unwrap();
        let weights: Vec<f32> = (0..classes).map(|c| 0.5 + c as f32 % 3.0).collect();
        let options = CrossEntropy {
            reduction: if sum { Reduction::Sum } else { Reduction::Mean },
            label_smoothing: smoothing,
            class_weights: weighted.then(|| Tensor::from_slice(&weights, [classes]).unwrap()),
        };
        let logits = ops::scale(&random(&[rows, classes], 1), 8.0).unwrap();
        compare(&[logits], 2e-6, |x| ops::cross_entropy(&x[0], &labels, &options));
    }

    #[test]
    fn maps(n in near(256), narrow in any::<bool>()) {
        require_device!(Ok(()));
        let (dtype, tolerance) = if narrow { (DType::BF16, 4e-3) } else { (DType::F32, 1e-6) };
        let (a, b) = (random(&[1, 1, 1, n], 1), random(&[1, 1, 1, n], 2));
        compare_as(dtype, &[a.clone(), b], tolerance, |x| ops::relu(&ops::add(&x[0], &x[1])?));
        compare_as(dtype, std::slice::from_ref(&a), tolerance, |x| ops::scale(&x[0], -0.5));
        compare(std::slice::from_ref(&a), 1e-5, |x| ops::sum(&x[0]));
        compare(&[a], 1e-5, |x| ops::mean(&ops::add(&x[0], &x[0])?));
    }
}

/// [`compare_as`] for a convolution whose filters stay f32.
fn compare_as_filters(case: Case, inputs: &[Tensor; 2], dtype: DType, tolerance: impl Into<Tolerance>) {
    let tolerance = tolerance.into();
    let narrow = dtype == DType::BF16;
    let x = if narrow { rounded(&inputs[0]) } else { inputs[0].clone() };
    let to_cuda = |x: &Tensor, dtype| x.detach().to_device(Device::Cuda).unwrap().to_dtype(dtype).unwrap();
    let (cpu_x, cpu_w) = (x.clone().leaf(), inputs[1].clone().leaf());
    let (cuda_x, cuda_w) = (to_cuda(&x, dtype).leaf(), to_cuda(&inputs[1], DType::F32).leaf());
    let want = ops::conv2d(&cpu_x, &cpu_w, None, case.params()).unwrap();
    let got = ops::conv2d(&cuda_x, &cuda_w, None, case.params()).unwrap();
    assert_close("result", &got, &want, tolerance);
    let seed = rounded(&random(want.dims(), 99));
    let want = want.backward_with(seed.clone()).unwrap();
    let got = got.backward_with(to_cuda(&seed, dtype)).unwrap();
    assert_close("dx", got.get(&cuda_x).unwrap(), want.get(&cpu_x).unwrap(), tolerance);
    assert_close("dw", got.get(&cuda_w).unwrap(), want.get(&cpu_w).unwrap(), tolerance);
}

/// Large enough for every tile, with a residual, a ReLU, and the statistics of the batch from the epilogue.
#[test]
fn every_tile_with_every_epilogue() {
    require_device!();
    let cases = [
        // 128 x 128, 128 x 64, 64 x 64; the first layer.
        Case { n: 1, h: 96, w: 90, c: 8, o: 256, k: 1, stride: 1, padding: 0 },
        Case { n: 1, h: 130, w: 127, c: 8, o: 64, k: 1, stride: 1, padding: 0 },
        Case { n: 2, h: 9, w: 7, c: 24, o: 72, k: 3, stride: 2, padding: 1 },
        Case { n: 2, h: 19, w: 22, c: 3, o: 64, k: 7, stride: 2, padding: 3 },
    ];
    for (precision, dtype) in [("f32", DType::F32), ("tf32", DType::F32), ("bf16", DType::BF16)] {
        cuda::context().unwrap().allow_tf32(precision == "tf32");
        let tolerance = match precision {
            "f32" => with_error_of_cpu(2e-6),
            "tf32" => Tolerance::from(2e-3),
            _ => Tolerance::from(6e-3),
        };
        for case in cases {
            let (x, weight) = (rounded(&case.x()), rounded(&case.weight()));
            let to_cuda = |x: &Tensor, dtype| x.to_device(Device::Cuda).unwrap().to_dtype(dtype).unwrap();
            // The bf16 kernels are given folded filters, which they round: scales are powers of two.
            let scale: Vec<f32> = (0..case.o).map(|i| [0.5, 1.0, 2.0][i % 3]).collect();
            let shift = random(&[case.o], 4).to_vec::<f32>();
            let fused = FusedConv2d::new(&weight, &scale, &shift, case.params(), DType::F32).unwrap();
            let plain = ops::fused_conv2d(&x, &fused, None, false).unwrap();
            let residual = rounded(&random(plain.dims(), 5));
            let want = ops::fused_conv2d(&x, &fused, Some(&residual), true).unwrap();
            let on_cuda = to_cuda(&weight, DType::F32);
            let fused = FusedConv2d::new(&on_cuda, &scale, &shift, case.params(), dtype).unwrap();
            let (x_cuda, residual) = (to_cuda(&x, dtype), to_cuda(&residual, dtype));
            let got = ops::fused_conv2d(&x_cuda, &fused, Some(&residual), true).unwrap();
            assert_close(&format!("{precision} {case:?}"), &got, &want, tolerance);

            let (y, statistics) = ops::conv2d_with_statistics(&x_cuda, &on_cuda, case.params()).unwrap();
            let statistics = statistics.expect("the epilogue takes them");
            let y = y.to_f32_vec().unwrap();
            let y = Tensor::from_slice(&y, [y.len() / case.o, case.o]).unwrap();
            let ones = Tensor::full([case.o], 1.0f32);
            let (_, want) = ops::batch_norm(&y, &ones, &ones, 1e-5).unwrap();
            assert_close("mean", &statistics.mean, &want.mean, 2e-5);
            assert_close("variance", &statistics.variance, &want.variance, 2e-5);
        }
    }
}

/// Filter gradients split into many parts, and the first layer's, which goes through padded copies.
#[test]
fn gradients_of_large_layers() {
    require_device!();
    let cases = [
        Case { n: 2, h: 20, w: 21, c: 3, o: 64, k: 7, stride: 2, padding: 3 },
        Case { n: 1, h: 40, w: 37, c: 16, o: 136, k: 3, stride: 1, padding: 1 },
    ];
    for case in cases {
        compare_as_filters(case, &[case.x(), case.weight()], DType::F32, with_error_of_cpu(3e-6));
        compare_as_filters(case, &[case.x(), rounded(&case.weight())], DType::BF16, 6e-3);
        cuda::context().unwrap().allow_tf32(true);
        compare_as_filters(case, &[case.x(), case.weight()], DType::F32, 2e-3);
        cuda::context().unwrap().allow_tf32(false);
    }
}

#[test]
fn the_same_bits_each_time() {
    require_device!();
    let case = Case { n: 2, h: 20, w: 20, c: 16, o: 24, k: 3, stride: 1, padding: 1 };
    let run = || {
        let (x, w) = (case.x().to_device(Device::Cuda).unwrap(), case.weight().to_device(Device::Cuda).unwrap().leaf());
        let (y, _) = ops::conv2d_with_statistics(&x, &w, case.params()).unwrap();
        let gradients = ops::sum(&ops::relu(&y).unwrap()).unwrap().backward().unwrap();
        gradients.get(&w).unwrap().to_f32_vec().unwrap()
    };
    assert_eq!(run(), run());
}

#[test]
fn pictures_are_cropped_mirrored_and_normalised() {
    require_device!();
    let (h, w) = (9, 11);
    let bytes: Vec<u8> = (0..2 * h * w * 3).map(|i| (i * 37 % 256) as u8).collect();
    let pictures = Tensor::from_slice(&bytes, [2, h, w, 3]).unwrap().to_device(Device::Cuda).unwrap();
    let (mean, deviation) = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);
    let crops = [Crop { top: 1, left: 2, mirrored: false }, Crop { top: 3, left: 0, mirrored: true }];
    let got = normalise(&pictures, Some(&crops), [6, 8], mean, deviation, DType::F32).unwrap();
    let mut want = Vec::new();
    for (i, crop) in crops.iter().enumerate() {
        for y in 0..6 {
            for x in 0..8 {
                let column = crop.left + if crop.mirrored { 7 - x } else { x };
                for c in 0..3 {
                    let byte = bytes[((i * h + crop.top + y) * w + column) * 3 + c];
                    want.push((f32::from(byte) / 255.0 - mean[c]) / deviation[c]);
                }
            }
        }
    }
    assert_eq!(got.to_f32_vec().unwrap(), want);
    let narrow = normalise(&pictures, Some(&crops), [6, 8], mean, deviation, DType::BF16).unwrap();
    assert_close("bf16", &narrow, &Tensor::from_slice(&want, [2, 6, 8, 3]).unwrap(), 4e-3);
    assert!(normalise(&pictures, Some(&crops), [7, 8], mean, deviation, DType::F32).is_err(), "a crop beyond the edge");
}

#[test]
fn wrong_operands_are_errors() {
    require_device!();
    let x = random(&[1, 4, 4, 8], 1);
    let w = random(&[8, 3, 3, 8], 2);
    let error = ops::conv2d(&x.to_device(Device::Cuda).unwrap(), &w, None, Conv2dParams::new(1, 1)).unwrap_err();
    assert!(error.to_string().contains("one device"), "{error}");
    let error = ops::add(&x, &x.to_device(Device::Cuda).unwrap()).unwrap_err();
    assert!(error.to_string().contains("one device"), "{error}");
    let labels = Tensor::from_slice(&[0i64, 9], [2]).unwrap();
    let logits = random(&[2, 3], 1).to_device(Device::Cuda).unwrap();
    assert!(ops::cross_entropy(&logits, &labels, &CrossEntropy::default()).is_err());
    // Labels that are on the card already cannot be checked without waiting for it; the loss says so.
    let labels = labels.to_device(Device::Cuda).unwrap();
    let loss = ops::cross_entropy(&logits, &labels, &CrossEntropy::default()).unwrap();
    assert!(loss.item().unwrap().is_nan());
}
