use crate::support::{assert_close, random, require_device};
use hone::nn::Parameter;
use hone::optim::{Algorithm, Optimizer, ParamGroup};
use hone::{Device, ops};
use std::sync::Arc;

/// Parameters of many sizes in two groups, trained for a few steps on both devices.
fn check(algorithm: Algorithm, clip: Option<f64>) {
    let sizes = [1usize, 7, 4095, 4096, 4097, 9000];
    let run = |device: Device| {
        let parameters: Vec<Arc<Parameter>> = sizes
            .iter()
            .enumerate()
            .map(|(i, &n)| {
                let p = Parameter::new(format!("p{i}"), random(&[n], i as u64).to_device(device).unwrap());
                p.set_trainable(true);
                Arc::new(p)
            })
            .collect();
        let group = |range: std::ops::Range<usize>, lr: f64, weight_decay: f64| ParamGroup {
            weight_decay,
            ..ParamGroup::new(parameters[range].to_vec(), lr)
        };
        let mut optimizer = Optimizer::new(vec![group(0..3, 1e-2, 0.1), group(3..6, 1e-3, 0.0)], algorithm);
        for step in 0..4u64 {
            // sum(relu(p * r)): a gradient that depends on the parameter.
            let mut loss = None;
            for (i, p) in parameters.iter().enumerate() {
                let r = random(&[sizes[i]], 100 + step).to_device(device).unwrap();
                let value = ops::sum(&ops::relu(&ops::add(&p.tensor(), &r).unwrap()).unwrap()).unwrap();
                loss = Some(match loss {
                    None => value,
                    Some(sum) => ops::add(&sum, &value).unwrap(),
                });
            }
            let mut gradients = loss.unwrap().backward().unwrap();
            if let Some(max) = clip {
                assert!(gradients.clip_norm(max).unwrap().item().unwrap() > max as f32);
            }
            optimizer.step(&gradients, 1.0 / (1.0 + step as f64)).unwrap();
        }
        let saved: Vec<(u32, Vec<f32>)> =
            optimizer.state().unwrap().iter().map(|s| (s.step, [&s.first[..], &s.second[..]].concat())).collect();
        (parameters, saved)
    };
    let ((cpu, cpu_state), (cuda, cuda_state)) = (run(Device::Cpu), run(Device::Cuda));
    for (want, got) in cpu.iter().zip(&cuda) {
        assert_close(want.name(), &got.tensor(), &want.tensor(), 1e-6);
    }
    for ((want_step, want), (got_step, got)) in cpu_state.iter().zip(&cuda_state) {
        assert_eq!(want_step, got_step);
        assert!(crate::support::relative_l2(got, want) <= 1e-6);
    }
}

#[test]
fn adam() {
    require_device!();
    check(Algorithm::ADAM, None);
    check(Algorithm::ADAM, Some(0.5));
}

#[test]
fn sgd() {
    require_device!();
    check(Algorithm::Sgd { momentum: 0.9, nesterov: true }, None);
    check(Algorithm::Sgd { momentum: 0.0, nesterov: false }, Some(0.5));
}
