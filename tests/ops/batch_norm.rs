use crate::support::*;
use hone::ops::{Norm, Statistics, batch_norm, batch_norm_stored, max_pool2d, norm_act, relu};
use hone::{DType, Tensor};
use proptest::prelude::*;

const EPS: f32 = 1e-5;

/// 400 additions near 14.8 would drift by 1e-6 of it.
#[test]
fn the_mean_of_many_rows_far_from_zero_is_right_to_the_last_bits() {
    let x: Vec<f32> = (0..400 * 3).map(|i| 14.8 + (i % 7) as f32 * 1e-3).collect();
    let input = Tensor::from_slice(&x, [400, 3]).unwrap();
    let (_, statistics) = batch_norm(&input, &Tensor::full([3], 1.0f32), &Tensor::zeros([3]), EPS).unwrap();
    let want: Vec<f64> = (0..3).map(|c| moments(&x, 3, c).0).collect();
    assert_close(statistics.mean.as_slice(), &want, 1e-7, "mean");
}

/// Mean and biased variance of channel `c` of `[rows, channels]`.
fn moments(x: &[f32], channels: usize, c: usize) -> (f64, f64) {
    let column = || x.iter().skip(c).step_by(channels).map(|&x| f64::from(x));
    let count = column().count() as f64;
    let mean = column().sum::<f64>() / count;
    (mean, column().map(|x| (x - mean).powi(2)).sum::<f64>() / count)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn normalises_by_the_batch(rows in 2usize..400, channels in 1usize..130, offset in -100.0f32..100.0) {
        // An offset far larger than the deviation: a variance from E[x^2] - E[x]^2 would be off.
        let x: Vec<f32> = values(rows * channels, 1).iter().map(|x| x + offset).collect();
        let (gamma, beta) = (values(channels, 2), values(channels, 3));
        let as_tensor = |v: &[f32]| Tensor::from_slice(v, [v.len()]).unwrap();
        let input = Tensor::from_slice(&x, [1, rows, 1, channels]).unwrap();
        let (y, statistics) = batch_norm(&input, &as_tensor(&gamma), &as_tensor(&beta), EPS).unwrap();
        let moments: Vec<_> = (0..channels).map(|c| moments(&x, channels, c)).collect();
        let want: Vec<f64> = x.iter().enumerate().map(|(i, &x)| {
            let (mean, variance) = moments[i % channels];
            (f64::from(x) - mean) / (variance + f64::from(EPS)).sqrt() * f64::from(gamma[i % channels])
                + f64::from(beta[i % channels])
        }).collect();
        assert_close(statistics.mean.as_slice(), &moments.iter().map(|m| m.0).collect::<Vec<_>>(), 1e-6, "mean");
        assert_close(statistics.variance.as_slice(), &moments.iter().map(|m| m.1).collect::<Vec<_>>(), 1e-4, "variance");
        assert_close(y.as_slice(), &want, 1e-3, "output");
    }

    /// Pooled before the norm: the same bits as after it, and the same gradients.
    #[test]
    fn pooled_before_the_norm(
        n in 1usize..3, h in 2usize..24, w in 2usize..12, channels in prop::sample::select(vec![1, 3, 16, 64, 70]),
        k in 2usize..5, s in 1usize..4, relu in any::<bool>(), by_batch in any::<bool>(), bf16 in any::<bool>(),
    ) {
        let dtype = if bf16 { DType::BF16 } else { DType::F32 };
        // Few values, so that windows have ties, but none that rounding makes; scales of either sign.
        let coarse: Vec<f32> = values(n * h * w * channels, 1).iter().map(|x| (x * 8.0).round() / 8.0).collect();
        let x = Tensor::from_slice(&coarse, [n, h, w, channels]).unwrap().to_dtype(dtype).unwrap().leaf();
        let (gamma, beta) = (tensor(&[channels], 2).leaf(), tensor(&[channels], 3).leaf());
        let (mean, variance) = (tensor(&[channels], 5), Tensor::full([channels], 0.7f32));
        let run = |pooling: Option<[usize; 3]>| {
            let by = if by_batch { Statistics::Batch(None) } else { Statistics::Stored(&mean, &variance) };
            norm_act(&x, by, Norm { gamma: &gamma, beta: &beta, eps: EPS, residual: None, relu, pooling }).unwrap().0
        };
        let (got, want) = (run(Some([k, s, k / 2])), max_pool2d(&run(None), k, s, k / 2).unwrap());
        prop_assert_eq!(got.dims(), want.dims());
        prop_assert_eq!(got.to_f32_vec().unwrap(), want.to_f32_vec().unwrap());
        let dy = tensor(got.dims(), 6).to_dtype(dtype).unwrap();
        let [got, want] = [got, want].map(|y| y.backward_with(dy.clone()).unwrap());
        // In bf16 rounding makes results equal whose inputs are not, and then another may be the first of them.
        // And a pixel's gradient is rounded after the norm, not before it: a sum of many loses what a random walk of roundings does.
        let windows = (dy.numel() / channels) as f64;
        // In f32 terms as large as one may cancel: half a last bit of each of them.
        let tolerance = if bf16 { 2e-2f64.max(windows.sqrt() / 256.0) } else { 1e-5f64.max(windows / f64::from(1 << 24)) };
        let leaves = [("dbeta", &beta), ("dgamma", &gamma), ("dx", &x)];
        for (what, leaf) in leaves.into_iter().take(if bf16 { 1 } else { 3 }) {
            let [got, want] = [&got, &want].map(|gradients| gradients.get(leaf).unwrap().to_vec::<f32>());
            assert_close(&got, &widen(&want), tolerance, what);
        }
    }

    /// A ReLU within is a ReLU after, whichever gradients are asked for.
    #[test]
    fn the_gate_is_the_relu_s(
        rows in 2usize..300, channels in prop::sample::select(vec![1, 5, 16, 64, 70]), by_batch in any::<bool>(),
        with_residual in any::<bool>(), trained in any::<bool>(), input in any::<bool>(), bf16 in any::<bool>(),
    ) {
        let dtype = if bf16 { DType::BF16 } else { DType::F32 };
        let leaf = |x: Tensor, is: bool| if is { x.leaf() } else { x };
        let of_rows = |seed: u64| tensor(&[1, rows, 1, channels], seed).to_dtype(dtype).unwrap();
        let (x, residual) = (leaf(of_rows(1), input || !trained), with_residual.then(|| leaf(of_rows(4), true)));
        let (gamma, beta) = (leaf(tensor(&[channels], 2), trained), leaf(tensor(&[channels], 3), trained));
        let (mean, variance) = (tensor(&[channels], 5), Tensor::full([channels], 0.7f32));
        let run = |relu: bool| {
            let by = if by_batch { Statistics::Batch(None) } else { Statistics::Stored(&mean, &variance) };
            let how = Norm { gamma: &gamma, beta: &beta, eps: EPS, residual: residual.as_ref(), relu, pooling: None };
            norm_act(&x, by, how).unwrap().0
        };
        let (got, want) = (run(true), relu(&run(false)).unwrap());
        prop_assert_eq!(got.to_f32_vec().unwrap(), want.to_f32_vec().unwrap());
        let dy = of_rows(6);
        let [got, want] = [got, want].map(|y| y.backward_with(dy.clone()).unwrap());
        for leaf in [Some(&x), Some(&gamma), Some(&beta), residual.as_ref()].into_iter().flatten() {
            let [got, want] = [&got, &want].map(|gradients| gradients.get(leaf).map(|g| g.to_f32_vec().unwrap()));
            prop_assert_eq!(got.is_some(), leaf.requires_grad());
            prop_assert_eq!(got, want);
        }
    }
}

/// Pooling after a residual, and where scales are zero or values no numbers.
#[test]
fn pooling_at_the_edges() {
    let (x, residual) = (tensor(&[2, 6, 5, 3], 1), tensor(&[2, 6, 5, 3], 2));
    let (gamma, beta) = (Tensor::from_slice(&[0.0f32, -0.0, 1.0], [3]).unwrap(), tensor(&[3], 3));
    let run = |x: &Tensor, residual: Option<&Tensor>, pooling: Option<[usize; 3]>| {
        let how = Norm { gamma: &gamma, beta: &beta, eps: EPS, residual, relu: true, pooling };
        norm_act(x, Statistics::Batch(None), how).unwrap().0
    };
    for residual in [None, Some(&residual)] {
        let want = max_pool2d(&run(&x, residual, None), 3, 2, 1).unwrap();
        assert_eq!(run(&x, residual, Some([3, 2, 1])).to_vec::<f32>(), want.to_vec::<f32>());
    }
    let mut values = x.to_vec::<f32>();
    values[2] = f32::NAN;
    let y = run(&Tensor::from_slice(&values, [2, 6, 5, 3]).unwrap(), None, Some([3, 2, 1]));
    assert!(y.as_slice::<f32>()[2].is_nan());
}

#[test]
fn many_chunks_combine_exactly() {
    let (rows, channels) = (9000, 64);
    let x = values(rows * channels, 5);
    let input = Tensor::from_slice(&x, [rows, channels]).unwrap();
    let one = Tensor::full([channels], 1.0f32);
    let (_, statistics) = batch_norm(&input, &one, &Tensor::zeros([channels]), EPS).unwrap();
    let want: Vec<_> = (0..channels).map(|c| moments(&x, channels, c)).collect();
    assert_close(statistics.mean.as_slice(), &want.iter().map(|m| m.0).collect::<Vec<_>>(), 1e-7, "mean");
    assert_close(statistics.variance.as_slice(), &want.iter().map(|m| m.1).collect::<Vec<_>>(), 1e-6, "variance");
}

#[test]
fn gradients() {
    let inputs = [tensor(&[2, 3, 2, 3], 1), tensor(&[3], 2), tensor(&[3], 3)];
    check_gradients(&inputs, 1e-2, 2e-3, |x| Ok(batch_norm(&x[0], &x[1], &x[2], EPS)?.0));
    let (mean, variance) = (tensor(&[3], 4), Tensor::from_slice(&[0.5f32, 1.5, 0.1], [3]).unwrap());
    check_gradients(&inputs, 0.25, 1e-4, |x| batch_norm_stored(&x[0], &x[1], &x[2], &mean, &variance, EPS));
    // Small steps, so that each window keeps its maximum.
    let inputs = [tensor(&[2, 5, 4, 3], 1), tensor(&[3], 2), tensor(&[3], 3)];
    check_gradients(&inputs, 1e-3, 1e-2, |x| {
        let how = Norm { gamma: &x[1], beta: &x[2], eps: EPS, residual: None, relu: false, pooling: Some([3, 2, 1]) };
        Ok(norm_act(&x[0], Statistics::Batch(None), how)?.0)
    });
}

#[test]
fn one_row_has_no_variance() {
    let v = tensor(&[3], 2);
    let error = batch_norm(&tensor(&[1, 1, 1, 3], 1), &v, &v, EPS).err().unwrap();
    assert!(error.to_string().contains("two values"), "{error}");
    assert!(batch_norm(&tensor(&[2, 2], 1), &v, &v, EPS).is_err(), "three scales for two channels");
}
