use crate::support::*;
use hone::Tensor;
use hone::nn::Parameter;
use hone::ops::{matmul, sum};
use hone::optim::{Adam, AdamConfig, ParamGroup};
use std::sync::Arc;

/// Adam in f64, as the paper has it.
fn reference(p: &mut [f64], gradients: &[Vec<f64>], lr: f64) {
    let (mut m, mut v) = (vec![0.0; p.len()], vec![0.0; p.len()]);
    for (t, g) in gradients.iter().enumerate() {
        for i in 0..p.len() {
            m[i] = 0.9 * m[i] + 0.1 * g[i];
            v[i] = 0.999 * v[i] + 0.001 * g[i] * g[i];
            let m_hat = m[i] / (1.0 - 0.9f64.powi(t as i32 + 1));
            let v_hat = v[i] / (1.0 - 0.999f64.powi(t as i32 + 1));
            p[i] -= lr * m_hat / (v_hat.sqrt() + 1e-8);
        }
    }
}

#[test]
fn adam_follows_the_paper() {
    for len in [1, 15, 16, 17, 20_000] {
        let parameter = Arc::new(Parameter::new("p", tensor(&[1, len], 1)));
        parameter.set_trainable(true);
        let mut want = widen(parameter.tensor().as_slice());
        let mut adam =
            Adam::new(vec![ParamGroup { parameters: vec![parameter.clone()], lr: 0.01 }], AdamConfig::default());
        let mut gradients = Vec::new();
        for step in 0..20 {
            // d(p g)/dp = g.
            let g = tensor(&[len, 1], 10 + step);
            let loss = sum(&matmul(&parameter.tensor(), &g).unwrap()).unwrap();
            adam.step(&loss.backward().unwrap());
            gradients.push(widen(g.as_slice()));
        }
        reference(&mut want, &gradients, 0.01);
        assert_close(parameter.tensor().as_slice(), &want, 2e-6, "20 steps");
    }
}

#[test]
fn what_has_no_gradient_stays() {
    let [a, b] = [1, 2].map(|seed| Arc::new(Parameter::new("p", tensor(&[2, 2], seed))));
    a.set_trainable(true);
    let before = b.tensor().to_vec::<f32>();
    let group = ParamGroup { parameters: vec![a.clone(), b.clone()], lr: 0.1 };
    let mut adam = Adam::new(vec![group], AdamConfig::default());
    let loss = sum(&matmul(&a.tensor(), &b.tensor()).unwrap()).unwrap();
    let old_a: Vec<f32> = a.tensor().to_vec();
    adam.step(&loss.backward().unwrap());
    assert_eq!(b.tensor().to_vec::<f32>(), before);
    assert_ne!(a.tensor().to_vec::<f32>(), old_a);
    let _: Tensor = a.tensor();
}
