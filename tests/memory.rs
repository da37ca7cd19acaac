//! Steps after the first take no more memory. A test of its own, so that nothing else in the process does.

#![cfg(target_os = "linux")]

use hone::Tensor;
use hone::nn::{ResNet18, Stage};
use hone::ops::{CrossEntropy, cross_entropy};
use hone::optim::{Algorithm, Optimizer, ParamGroup};

/// Resident size of this process in KiB.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn training_steps_leave_the_resident_size_flat() {
    let network = ResNet18::new(10, 0);
    network.set_trainable(|_| true);
    network.use_batch_statistics(|_| true);
    let parameters = Stage::ALL.into_iter().flat_map(|stage| network.parameters(stage)).collect();
    let mut optimizer = Optimizer::new(vec![ParamGroup::new(parameters, 1e-4)], Algorithm::ADAM);
    let x = Tensor::full([4, 64, 64, 3], 0.5f32);
    let y = Tensor::full([4], 3i64);
    let steps: usize = std::env::var("HONE_MEMORY_STEPS").ok().and_then(|s| s.parse().ok()).unwrap_or(60);
    let mut settled = 0;
    for step in 0..steps {
        let loss = cross_entropy(&network.forward(&x, true).unwrap(), &y, &CrossEntropy::default()).unwrap();
        optimizer.step(&loss.backward().unwrap(), 1.0).unwrap();
        if step == 10 {
            settled = resident();
        }
    }
    let grown = resident().saturating_sub(settled);
    println!("{settled} KiB after 10 steps, {grown} KiB more after {steps}");
    assert!(grown <= 4096, "{grown} KiB more after {steps} steps than after 10");
}
