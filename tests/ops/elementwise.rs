use crate::support::*;
use hone::Tensor;
use hone::ops::{add, mean, relu, reshape, scale, sum};
use proptest::prelude::*;

proptest! {
    #[test]
    fn forward(len in 1usize..70_000) {
        let (a, b) = (tensor(&[len], 1), tensor(&[len], 2));
        let (av, bv) = (a.to_vec::<f32>(), b.to_vec::<f32>());
        let zip = |f: fn(f32, f32) -> f32| av.iter().zip(&bv).map(|(&a, &b)| f(a, b)).collect::<Vec<_>>();
        prop_assert_eq!(add(&a, &b).unwrap().to_vec::<f32>(), zip(|a, b| a + b));
        prop_assert_eq!(relu(&a).unwrap().to_vec::<f32>(), zip(|a, _| a.max(0.0)));
        prop_assert_eq!(scale(&a, 3.0).unwrap().to_vec::<f32>(), zip(|a, _| a * 3.0));
        let total: f64 = widen(&av).iter().sum();
        assert_close(&[sum(&a).unwrap().item().unwrap()], &[total], 1e-6, "sum");
        assert_close(&[mean(&a).unwrap().item().unwrap()], &[total / len as f64], 1e-6, "mean");
    }
}

#[test]
fn gradients() {
    let x = [tensor(&[2, 3], 1), tensor(&[2, 3], 2)];
    check_gradients(&x, 0.5, 1e-4, |x| add(&x[0], &x[1]));
    check_gradients(&x[..1], 1e-3, 1e-3, |x| relu(&x[0]));
    check_gradients(&x[..1], 0.5, 1e-4, |x| sum(&x[0]));
    check_gradients(&x[..1], 0.5, 1e-4, |x| mean(&x[0]));
    check_gradients(&x[..1], 0.5, 1e-4, |x| scale(&x[0], -2.5));
    check_gradients(&x[..1], 0.5, 1e-4, |x| reshape(&x[0], [3, 2]));
    check_gradients(&x[..1], 0.5, 1e-4, |x| add(&x[0], &x[0]));
}

#[test]
fn nan_survives_relu() {
    let x = Tensor::from_slice(&[f32::NAN, -1.0, 2.0], [3]).unwrap();
    let y = relu(&x).unwrap().to_vec::<f32>();
    assert!(y[0].is_nan() && y[1] == 0.0 && y[2] == 2.0);
}

#[test]
fn wrong_shapes() {
    assert!(add(&tensor(&[2, 3], 1), &tensor(&[3, 2], 1)).is_err());
    assert!(reshape(&tensor(&[2, 3], 1), [4]).is_err());
    assert!(mean(&Tensor::zeros([0])).is_err());
    let labels = Tensor::from_slice(&[1i64, 2], [2]).unwrap();
    assert!(relu(&labels).unwrap_err().to_string().contains("I64"));
}
