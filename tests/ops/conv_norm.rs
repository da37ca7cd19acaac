use crate::support::*;
use hone::ops::{Conv2dParams, Norm, NormBy, Statistics, add, conv2d, conv2d_norm_act, norm_act, scale};
use hone::{DType, Tensor};
use proptest::prelude::*;

const EPS: f32 = 1e-5;

/// Filter's side, stride, channels of input and output.
type Layer = (usize, usize, usize, usize);

/// The network's layers in small: the first, those that go picture by picture, others of each algorithm.
const LAYERS: [Layer; 8] = [
    (7, 2, 3, 16),
    (7, 2, 3, 64),
    (3, 1, 16, 16),
    (3, 1, 16, 32),
    (3, 1, 64, 64),
    (3, 2, 16, 32),
    (1, 2, 16, 32),
    (3, 1, 5, 7),
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    /// One operation and two: the same results, and the same gradients whichever are asked for.
    #[test]
    fn the_two_after_one_another(
        layer in prop::sample::select(LAYERS.to_vec()), n in 1usize..11, h in 14usize..31, w in 14usize..31,
        (by_batch, with_residual, pooled) in any::<(bool, bool, bool)>(), bf16 in any::<bool>(),
        (of_input, of_filter, of_norm) in any::<(bool, bool, bool)>(),
    ) {
        let ((k, s, c, o), dtype) = (layer, if bf16 { DType::BF16 } else { DType::F32 });
        let leaf = |x: Tensor, is: bool| if is { x.leaf() } else { x };
        let of_type = |x: Tensor| x.to_dtype(dtype).unwrap();
        let x = leaf(of_type(tensor(&[n, h, w, c], 1)), of_input);
        let (weight, params) = (leaf(tensor(&[o, k, k, c], 2), of_filter), Conv2dParams::new(s, k / 2));
        let (gamma, beta) = (leaf(tensor(&[o], 3), of_norm), leaf(tensor(&[o], 4), of_norm));
        let (mean, variance) = (tensor(&[o], 5), Tensor::full([o], 0.7f32));
        let z = conv2d(&x, &weight, None, params).unwrap();
        let residual = with_residual.then(|| leaf(of_type(tensor(z.dims(), 6)), of_norm));
        // A ReLU would let pass what another order of sums has made positive; stored statistics are no sums.
        let (relu, pooling) = (!by_batch, pooled.then_some([3, 2, 1]));
        let how = Norm { gamma: &gamma, beta: &beta, eps: EPS, residual: residual.as_ref(), relu, pooling };
        let (want, statistics) = match by_batch {
            true => norm_act(&z, Statistics::Batch(None), how).unwrap(),
            false => norm_act(&z, Statistics::Stored(&mean, &variance), how).unwrap(),
        };
        let by = if by_batch { NormBy::Batch } else { NormBy::Stored(&mean, &variance) };
        let (got, taken) = conv2d_norm_act(&x, &weight, params, by, how).unwrap();
        prop_assert_eq!(got.dims(), want.dims());
        prop_assert_eq!(taken.is_some(), by_batch);
        if let (Some(got), Some(want)) = (taken, statistics) {
            prop_assert_eq!(got.count, want.count);
            for (got, want) in [(&got.mean, &want.mean), (&got.variance, &want.variance)] {
                assert_close(got.as_slice(), &widen(want.as_slice()), 1e-5, "statistics");
            }
        }
        let values = |x: &Tensor| x.to_f32_vec().unwrap();
        match by_batch {
            true => assert_close(&values(&got), &widen(&values(&want)), if bf16 { 2e-2 } else { 1e-4 }, "results"),
            false => prop_assert_eq!(values(&got), values(&want)),
        }
        let trained = [of_input, of_filter, of_norm].contains(&true);
        prop_assert_eq!(got.requires_grad(), trained);
        if !trained {
            return Ok(());
        }
        let dy = of_type(tensor(got.dims(), 7));
        let [got, want] = [got, want].map(|y| y.backward_with(dy.clone()).unwrap());
        let leaves = [("dx", Some(&x)), ("dw", Some(&weight)), ("dgamma", Some(&gamma)), ("dbeta", Some(&beta)), ("dresidual", residual.as_ref())];
        for (what, leaf) in leaves {
            let Some(leaf) = leaf.filter(|leaf| leaf.requires_grad()) else { continue };
            let [got, want] = [&got, &want].map(|gradients| values(gradients.get(leaf).unwrap()));
            assert_close(&got, &widen(&want), if bf16 { 3e-2 } else { 1e-4 }, what);
        }
    }
}

/// Pictures of so many tiles that they are transformed in parts, and a batch that groups do not divide: the gradients of the two
/// operations, by the batch and with a ReLU, whose inputs are far from zero.
#[test]
fn large_pictures() {
    for (n, side, c) in [(1, 80, 64), (9, 24, 16), (2, 150, 16)] {
        let (x, weight) = (tensor(&[n, side, side, c], 1).leaf(), tensor(&[c, 3, 3, c], 2).leaf());
        let (gamma, beta) = (Tensor::full([c], 0.5f32).leaf(), Tensor::full([c], 3.0f32).leaf());
        let how = Norm { gamma: &gamma, beta: &beta, eps: EPS, residual: None, relu: true, pooling: None };
        let params = Conv2dParams::new(1, 1);
        let want = norm_act(&conv2d(&x, &weight, None, params).unwrap(), Statistics::Batch(None), how).unwrap().0;
        let got = conv2d_norm_act(&x, &weight, params, NormBy::Batch, how).unwrap().0;
        let dy = tensor(got.dims(), 7);
        let [got, want] = [got, want].map(|y| y.backward_with(dy.clone()).unwrap());
        for (what, leaf) in [("dx", &x), ("dw", &weight), ("dgamma", &gamma), ("dbeta", &beta)] {
            let [got, want] = [&got, &want].map(|gradients| gradients.get(leaf).unwrap().to_vec::<f32>());
            assert_close(&got, &widen(&want), 1e-4, &format!("{n} of {side}: {what}"));
        }
    }
}

#[test]
fn gradients() {
    let inputs = [tensor(&[2, 5, 4, 3], 1), tensor(&[4, 3, 3, 3], 2), tensor(&[4], 3), tensor(&[4], 4)];
    check_gradients(&inputs, 1e-2, 5e-3, |x| {
        let how = Norm { gamma: &x[2], beta: &x[3], eps: EPS, residual: None, relu: false, pooling: None };
        Ok(conv2d_norm_act(&x[0], &x[1], Conv2dParams::new(1, 1), NormBy::Batch, how)?.0)
    });
}

#[test]
fn what_does_not_fit() {
    let (x, weight) = (tensor(&[1, 1, 1, 3], 1), tensor(&[2, 1, 1, 3], 2));
    let (two, three) = (tensor(&[2], 3), tensor(&[3], 4));
    let run = |gamma: &Tensor, by: NormBy| {
        let how = Norm { gamma, beta: &two, eps: EPS, residual: None, relu: true, pooling: None };
        conv2d_norm_act(&x, &weight, Conv2dParams::new(1, 0), by, how).map(drop)
    };
    let error = run(&two, NormBy::Batch).unwrap_err();
    assert!(error.to_string().contains("two values"), "{error}");
    assert!(run(&two, NormBy::Stored(&two, &three)).is_err(), "three variances for two channels");
    assert!(run(&three, NormBy::Stored(&two, &two)).is_err(), "three scales for two channels");
    assert!(run(&two, NormBy::Stored(&two, &two)).is_ok());
}

/// A convolution adds the gradient of its input to those of others, here of two more and of what stands for a shortcut.
#[test]
fn gradients_of_one_input_add_up() {
    for ((k, s, c, o), dtype, [h, w]) in
        LAYERS.into_iter().flat_map(|layer| [(layer, DType::F32, [15, 22]), (layer, DType::BF16, [14, 9])])
    {
        let x = tensor(&[3, h, w, c], 1).to_dtype(dtype).unwrap().leaf();
        let [first, second] = [2, 3].map(|seed| tensor(&[o, k, k, c], seed).leaf());
        let [gamma, beta, mean] = [4, 5, 6].map(|seed| tensor(&[o], seed));
        let (params, variance) = (Conv2dParams::new(s, k / 2), Tensor::full([o], 0.7f32));
        let how = Norm { gamma: &gamma, beta: &beta, eps: EPS, residual: None, relu: true, pooling: None };
        let one = |x: &Tensor| conv2d_norm_act(x, &first, params, NormBy::Stored(&mean, &variance), how).unwrap().0;
        let other = |x: &Tensor| conv2d(x, &second, None, params).unwrap();
        let gradient = |of: &dyn Fn(&Tensor) -> Tensor| {
            // Of a node, as gradients of leaves are collected elsewhere.
            let y = of(&scale(&x, 1.0).unwrap());
            let seed = tensor(y.dims(), 7).to_dtype(dtype).unwrap();
            y.backward_with(seed).unwrap().get(&x).unwrap().to_f32_vec().unwrap()
        };
        let got = gradient(&|x| add(&add(&one(x), &other(x)).unwrap(), &one(x)).unwrap());
        let (one, other) = (gradient(&one), gradient(&other));
        let want: Vec<f64> = one.iter().zip(&other).map(|(a, b)| 2.0 * f64::from(*a) + f64::from(*b)).collect();
        let tolerance = if dtype == DType::BF16 { 1e-2 } else { 1e-6 };
        assert_close(&got, &want, tolerance, &format!("{k}x{k}, stride {s}, {c} to {o}, {dtype:?}"));
    }
}
