use crate::support::*;
use hone::Tensor;
use hone::autograd::Gradients;
use hone::nn::Parameter;
use hone::ops::{add, matmul, reshape, sum};
use hone::optim::{Algorithm, Optimizer, ParamGroup, Schedule, ScheduleKind};
use hone::weights::WeightsFile;
use std::path::Path;
use std::sync::Arc;

fn golden() -> WeightsFile {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden/optim.safetensors");
    WeightsFile::open(&path).unwrap()
}

/// Gradients that are exactly `wanted`: d(sum(p * g))/dp = g.
fn gradients(parameters: &[Arc<Parameter>], wanted: &[&[f32]]) -> Gradients {
    let terms = parameters.iter().zip(wanted).map(|(parameter, g)| {
        let row = reshape(&parameter.tensor(), [1, g.len()]).unwrap();
        sum(&matmul(&row, &Tensor::from_slice(g, [g.len(), 1]).unwrap()).unwrap()).unwrap()
    });
    terms.reduce(|a, b| add(&a, &b).unwrap()).unwrap().backward().unwrap()
}

/// Twenty steps on PyTorch's gradients, compared with its parameters after each.
fn follow(name: &str, algorithm: Algorithm, weight_decay: f64, clip: Option<f64>) {
    let file = golden();
    let parameters = ["weight", "bias"].map(|k| {
        let key = format!("{name}.{k}.start");
        let value = Tensor::from_slice(&file.f32(&key).unwrap(), file.get(&key).unwrap().shape.as_slice()).unwrap();
        let parameter = Arc::new(Parameter::new(k, value));
        parameter.set_trainable(true);
        parameter
    });
    let [weight, bias] = parameters.clone();
    let decayed = ParamGroup { parameters: vec![weight], lr: 1e-2, weight_decay };
    let mut optimizer = Optimizer::new(vec![decayed, ParamGroup::new(vec![bias], 1e-2)], algorithm);
    let [grads, after] =
        ["grads", "after"].map(|what| ["weight", "bias"].map(|k| file.f32(&format!("{name}.{k}.{what}")).unwrap()));
    for step in 0..20 {
        let at = |all: &[Vec<f32>; 2], i: usize| {
            let len = parameters[i].shape().numel();
            all[i][step * len..][..len].to_vec()
        };
        let (w, b) = (at(&grads, 0), at(&grads, 1));
        let mut gradients = gradients(&parameters, &[&w, &b]);
        if let Some(max) = clip {
            let norm = f64::from(gradients.clip_norm(max).unwrap().item().unwrap());
            assert!(norm > max, "the gradients are long enough to be clipped");
        }
        optimizer.step(&gradients, 1.0).unwrap();
        for (i, parameter) in parameters.iter().enumerate() {
            let what = format!("{name} {} after step {step}", parameter.name());
            assert_close(parameter.tensor().as_slice(), &widen(&at(&after, i)), 1e-6, &what);
        }
    }
}

#[test]
fn optimisers_follow_pytorch() {
    let sgd = |momentum, nesterov| Algorithm::Sgd { momentum, nesterov };
    follow("adam", Algorithm::ADAM, 0.0, None);
    follow("adam_clipped", Algorithm::ADAM, 0.0, Some(1.0));
    follow("adamw", Algorithm::ADAM, 0.05, None);
    follow("sgd", sgd(0.0, false), 0.0, None);
    follow("sgd_momentum", sgd(0.9, false), 1e-2, None);
    follow("sgd_nesterov", sgd(0.9, true), 1e-2, None);
}

#[test]
fn schedules_follow_pytorch() {
    let file = golden();
    let step = ScheduleKind::Step { every: 6, gamma: 0.3 };
    for (name, kind) in [
        ("constant", ScheduleKind::Constant),
        ("step", step),
        ("cosine", ScheduleKind::Cosine),
        ("one_cycle", ScheduleKind::OneCycle),
    ] {
        for (suffix, warm_up) in [("", 0), ("_warm", 5)] {
            let schedule = Schedule { kind, warm_up, total: 20 };
            let got: Vec<f32> = (0..20).map(|step| schedule.factor(step) as f32).collect();
            let want = widen(&file.f32(&format!("schedule.{name}{suffix}")).unwrap());
            assert_close(&got, &want, 1e-6, &format!("{name}{suffix}"));
        }
    }
}

#[test]
fn short_runs_have_finite_rates() {
    for kind in [ScheduleKind::Constant, ScheduleKind::Cosine, ScheduleKind::OneCycle] {
        for (total, warm_up) in [(1, 0), (1, 1), (2, 0), (2, 2), (3, 1), (4, 10)] {
            let schedule = Schedule { kind, warm_up, total };
            for step in 0..total {
                let factor = schedule.factor(step);
                assert!((0.0..=1.0).contains(&factor), "{schedule:?} step {step}: {factor}");
            }
        }
    }
}

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
fn adam_follows_the_paper_at_any_length() {
    for len in [1, 15, 16, 17, 20_000] {
        let parameter = Arc::new(Parameter::new("p", tensor(&[1, len], 1)));
        parameter.set_trainable(true);
        let mut want = widen(parameter.tensor().as_slice());
        let mut adam = Optimizer::new(vec![ParamGroup::new(vec![parameter.clone()], 0.02)], Algorithm::ADAM);
        let mut all = Vec::new();
        for step in 0..20 {
            let g = values(len, 10 + step);
            adam.step(&gradients(std::slice::from_ref(&parameter), &[&g]), 0.5).unwrap();
            all.push(widen(&g));
        }
        reference(&mut want, &all, 0.01);
        assert_close(parameter.tensor().as_slice(), &want, 2e-6, "20 steps");
    }
}

#[test]
fn state_can_be_saved_and_put_back() {
    for algorithm in [Algorithm::ADAM, Algorithm::Sgd { momentum: 0.9, nesterov: true }] {
        let make = || {
            let parameter = Arc::new(Parameter::new("p", tensor(&[33], 1)));
            parameter.set_trainable(true);
            let group = ParamGroup::new(vec![parameter.clone()], 0.1);
            (parameter, Optimizer::new(vec![group], algorithm))
        };
        let step = |parameter: &Arc<Parameter>, optimizer: &mut Optimizer, seed: u64| {
            optimizer.step(&gradients(std::slice::from_ref(parameter), &[&values(33, seed)]), 1.0).unwrap();
        };
        let (whole, mut optimizer) = make();
        (0..6).for_each(|seed| step(&whole, &mut optimizer, seed));
        let (first, mut before) = make();
        (0..3).for_each(|seed| step(&first, &mut before, seed));
        let (second, mut after) = make();
        second.set(first.tensor()).unwrap();
        before.state().unwrap().iter().try_for_each(|saved| after.restore(saved)).unwrap();
        (3..6).for_each(|seed| step(&second, &mut after, seed));
        assert_eq!(second.tensor().to_vec::<f32>(), whole.tensor().to_vec::<f32>());
    }
}

#[test]
fn what_has_no_gradient_stays() {
    let [a, b] = [1, 2].map(|seed| Arc::new(Parameter::new("p", tensor(&[2, 2], seed))));
    a.set_trainable(true);
    let (old_a, old_b): (Vec<f32>, Vec<f32>) = (a.tensor().to_vec(), b.tensor().to_vec());
    let group = ParamGroup { parameters: vec![a.clone(), b.clone()], lr: 0.1, weight_decay: 0.1 };
    let mut adam = Optimizer::new(vec![group], Algorithm::ADAM);
    let loss = sum(&matmul(&a.tensor(), &b.tensor()).unwrap()).unwrap();
    adam.step(&loss.backward().unwrap(), 1.0).unwrap();
    assert_eq!(b.tensor().to_vec::<f32>(), old_b);
    assert_ne!(a.tensor().to_vec::<f32>(), old_a);
}
