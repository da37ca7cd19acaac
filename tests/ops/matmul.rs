use crate::support::*;
use hone::nn::Linear;
use hone::ops::{linear, matmul};
use proptest::prelude::*;

/// `a` `[m, k]` times `b` `[k, n]`, by index functions so that transposes need no copy.
fn product(m: usize, k: usize, n: usize, a: impl Fn(usize, usize) -> f32, b: impl Fn(usize, usize) -> f32) -> Vec<f64> {
    let dot = |i: usize, j: usize| (0..k).map(|p| f64::from(a(i, p)) * f64::from(b(p, j))).sum();
    (0..m * n).map(|i| dot(i / n, i % n)).collect()
}

fn check(m: usize, k: usize, n: usize) {
    let what = format!("{m}x{k}x{n}");
    let (a, b, dc) = (tensor(&[m, k], 1), tensor(&[k, n], 2), tensor(&[m, n], 3));
    let (av, bv, dcv) = (a.to_vec::<f32>(), b.to_vec::<f32>(), dc.to_vec::<f32>());
    let (a, b) = (a.leaf(), b.leaf());
    let c = matmul(&a, &b).unwrap();
    assert_close(c.as_slice(), &product(m, k, n, |i, p| av[i * k + p], |p, j| bv[p * n + j]), 1e-5, &what);
    let gradients = c.backward_with(dc).unwrap();
    let da = product(m, n, k, |i, p| dcv[i * n + p], |p, j| bv[j * n + p]);
    assert_close(gradients.get(&a).unwrap().as_slice(), &da, 1e-5, &format!("da {what}"));
    let db = product(k, m, n, |i, p| av[p * k + i], |p, j| dcv[p * n + j]);
    assert_close(gradients.get(&b).unwrap().as_slice(), &db, 1e-5, &format!("db {what}"));
}

#[test]
fn around_block_edges() {
    for (m, k, n) in [(1, 1, 1), (6, 128, 64), (7, 129, 65), (5, 127, 63), (193, 257, 130), (400, 33, 17)] {
        check(m, k, n);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn any_shape(m in 1usize..40, k in 1usize..150, n in 1usize..140) {
        check(m, k, n);
    }

    #[test]
    fn linear_is_a_product_with_bias(n in 1usize..20, inputs in 1usize..140, outputs in 1usize..70) {
        let (x, w, b) = (tensor(&[n, inputs], 1), tensor(&[outputs, inputs], 2), tensor(&[outputs], 3));
        let (xv, wv, bv) = (x.to_vec::<f32>(), w.to_vec::<f32>(), b.to_vec::<f32>());
        let mut want = product(n, inputs, outputs, |i, p| xv[i * inputs + p], |p, j| wv[j * inputs + p]);
        want.iter_mut().enumerate().for_each(|(i, y)| *y += f64::from(bv[i % outputs]));
        assert_close(linear(&x, &w, Some(&b)).unwrap().as_slice(), &want, 1e-5, "linear");
    }
}

#[test]
fn a_packed_layer_follows_its_parameters() {
    let layer = Linear::new("fc", 33, 70, 1);
    let x = tensor(&[3, 33], 1);
    for factor in [2.0, -1.0] {
        let want = linear(&x, &layer.weight.tensor(), Some(&layer.bias.tensor())).unwrap();
        assert_eq!(layer.forward(&x).unwrap().to_vec::<f32>(), want.to_vec::<f32>());
        layer.weight.update(|values| values.iter_mut().for_each(|value| *value *= factor));
        layer.bias.update(|values| values.iter_mut().for_each(|value| *value += factor));
    }
    layer.weight.set_trainable(true);
    assert!(layer.forward(&x).unwrap().requires_grad());
    assert!(layer.forward(&tensor(&[3, 32], 1)).is_err());
}

#[test]
fn gradients() {
    let inputs = [tensor(&[3, 5], 1), tensor(&[4, 5], 2), tensor(&[4], 3)];
    check_gradients(&inputs, 0.5, 1e-4, |x| linear(&x[0], &x[1], Some(&x[2])));
    check_gradients(&inputs[..2], 0.5, 1e-4, |x| linear(&x[0], &x[1], None));
    check_gradients(&[tensor(&[3, 4], 1), tensor(&[4, 2], 2)], 0.5, 1e-4, |x| matmul(&x[0], &x[1]));
}

#[test]
fn wrong_shapes() {
    assert!(matmul(&tensor(&[2, 3], 1), &tensor(&[4, 2], 2)).is_err());
    assert!(linear(&tensor(&[2, 3], 1), &tensor(&[4, 2], 2), None).is_err());
    assert!(linear(&tensor(&[2, 3], 1), &tensor(&[4, 3], 2), Some(&tensor(&[3], 3))).is_err());
}
