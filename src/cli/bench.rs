//! `hone bench`.

use super::args::{Bench, BenchKind};
use super::report;
use crate::autograd::no_grad;
use crate::error::Result;
use crate::nn::{ResNet18, Stage};
use crate::ops::{CrossEntropy, cross_entropy};
use crate::optim::{Algorithm, Optimizer, ParamGroup};
use crate::tensor::Tensor;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use std::time::Instant;

/// Steps before the clock starts: they fill the pool and pack the filters.
const WARM_UP: usize = 2;
/// Steps that are timed however long they take.
const AT_LEAST: usize = 3;
/// The head of a benchmark's network, torchvision's.
const CLASSES: usize = 1000;

pub fn run(args: Bench) -> Result<()> {
    let (batch, size) = (args.batch as usize, args.size as usize);
    let placement = args.common.placement()?;
    let network = ResNet18::new(CLASSES, 0);
    placement.move_network(&network)?;
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let images = Tensor::build([batch, size, size, 3], |x: &mut [f32]| {
        x.iter_mut().for_each(|x| *x = rng.random_range(-2.0..2.0));
    });
    let images = placement.place(&images)?;
    let forward = 2.0 * network.multiply_adds(batch, size, size) as f64;
    let (name, operations, seconds) = match args.what {
        BenchKind::Forward => {
            let seconds = median(args.seconds, || no_grad(|| network.forward(&images, false)).map(drop))?;
            ("forward", forward, seconds)
        }
        BenchKind::Train => {
            let labels: Vec<i64> = (0..batch as i64).map(|i| i % CLASSES as i64).collect();
            let labels = Tensor::from_slice(&labels, [batch])?;
            network.set_trainable(|_| true);
            network.use_batch_statistics(|_| true);
            let parameters = Stage::ALL.into_iter().flat_map(|stage| network.parameters(stage)).collect();
            let mut adam = Optimizer::new(vec![ParamGroup::new(parameters, 1e-4)], Algorithm::ADAM);
            let seconds = median(args.seconds, || {
                let loss = cross_entropy(&network.forward(&images, true)?, &labels, &CrossEntropy::default())?;
                adam.step(&loss.backward()?, 1.0)?;
                Ok(())
            })?;
            // The two gradients of a convolution cost what its forward pass does; no gradient reaches the images.
            ("train", 3.0 * forward - 2.0 * network.stem_multiply_adds(batch, size, size) as f64, seconds)
        }
    };
    let threads = rayon::current_num_threads();
    let (rate, gflops) = (batch as f64 / seconds, operations / seconds / 1e9);
    if args.common.json {
        report::json_line(&json!({
            "bench": name, "device": "cpu", "precision": "f32", "batch": batch, "size": size, "threads": threads,
            "median_ms": seconds * 1e3, "images_per_second": rate, "gflops": gflops,
        }));
    } else {
        report::line(&format!(
            "{name} f32, batch {batch}, {size} px, {threads} threads: {:.2} ms, {rate:.1} images/s, {gflops:.0} GFLOP/s",
            seconds * 1e3
        ));
    }
    Ok(())
}

/// Median of the time of `step` over `seconds`, in seconds.
fn median(seconds: f64, mut step: impl FnMut() -> Result<()>) -> Result<f64> {
    for _ in 0..WARM_UP {
        step()?;
    }
    let mut times = Vec::new();
    let start = Instant::now();
    while times.len() < AT_LEAST || start.elapsed().as_secs_f64() < seconds {
        let step_start = Instant::now();
        step()?;
        times.push(step_start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}
