//! `hone bench`.

use super::args::{Bench, BenchKind};
use super::report;
use crate::autograd::no_grad;
use crate::cuda;
use crate::error::Result;
use crate::nn::{ResNet18, Stage};
use crate::ops::CrossEntropy;
use crate::optim::Optimizer;
use crate::tensor::{Device, Tensor};
use crate::train::{Depth, Input, Place, Placement, Tally, TrainConfig, Trainer, Weights};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use std::path::PathBuf;
use std::time::Instant;

/// Steps before the clock starts: they fill the pool and pack the filters.
const WARM_UP: usize = 2;
/// Steps that are timed however long they take.
const AT_LEAST: usize = 3;
/// Steps that a card is given before it is waited for.
const GROUP: usize = 4;
/// The head of a benchmark's network, torchvision's.
pub const CLASSES: usize = 1000;

pub fn run(args: Bench) -> Result<()> {
    let placement = args.common.placement()?;
    match args.what {
        BenchKind::Kernels => return super::bench_kernels::run(&args, placement),
        BenchKind::Sweep => return super::bench_sweep::run(&args, placement),
        BenchKind::Forward | BenchKind::Train => {}
    }
    measure(&args, placement).map_err(|e| e.with_batch(args.batch as usize))
}

fn measure(args: &Bench, placement: Placement) -> Result<()> {
    let (batch, size) = (args.batch as usize, args.size as usize);
    let network = ResNet18::new(CLASSES, 0);
    placement.move_network(&network)?;
    let images = random_images(batch, size, placement)?;
    let forward = 2.0 * network.multiply_adds(batch, size, size) as f64;
    let (name, operations, seconds) = match args.what {
        BenchKind::Forward => ("forward", forward, forward_seconds(&network, &images, placement.device, args.seconds)?),
        BenchKind::Kernels | BenchKind::Sweep => unreachable!("measured elsewhere"),
        BenchKind::Train => {
            let labels: Vec<i64> = (0..batch as i64).map(|i| i % CLASSES as i64).collect();
            let labels = Tensor::from_slice(&labels, [batch])?;
            network.set_trainable(|_| true);
            network.use_batch_statistics(|_| true);
            // What a user would run, captured step and all on a card.
            let config =
                TrainConfig { lr: 1e-4, train: Depth::All, ..TrainConfig::new(PathBuf::new(), Weights::Random) };
            let adam = Optimizer::new(config.groups(&network), config.algorithm());
            let mut trainer = Trainer::new(network, adam, None, CrossEntropy::default(), placement);
            let mut place = Place { epoch: 1, batch: 0, step: 0, factor: 1.0 };
            let mut tally = Tally::default();
            let seconds = median(placement.device, args.seconds, || {
                let input = Input { stage: Stage::Stem, tensor: images.clone() };
                trainer.step(&config, input, &labels, place)?;
                place.step += 1;
                trainer.settle(&mut tally, false).map(drop)
            })?;
            let network = &trainer.network;
            // The two gradients of a convolution cost what its forward pass does; no gradient reaches the images.
            ("train", 3.0 * forward - 2.0 * network.stem_multiply_adds(batch, size, size) as f64, seconds)
        }
    };
    let threads = rayon::current_num_threads();
    let precision = placement.precision.to_string();
    let (rate, gflops) = (batch as f64 / seconds, operations / seconds / 1e9);
    if args.common.json {
        report::json_line(&json!({
            "bench": name, "device": placement.device.to_string(), "precision": precision, "batch": batch, "size": size, "threads": threads,
            "median_ms": seconds * 1e3, "images_per_second": rate, "gflops": gflops,
        }));
    } else {
        report::line(&format!(
            "{name} {precision} on {}, batch {batch}, {size} px, {threads} threads: {:.2} ms, {rate:.1} images/s, {gflops:.0} GFLOP/s",
            placement.device,
            seconds * 1e3
        ));
    }
    Ok(())
}

/// Noise, as large as normalised pictures.
pub fn random_images(batch: usize, size: usize, placement: Placement) -> Result<Tensor> {
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let images = Tensor::build([batch, size, size, 3], |x: &mut [f32]| {
        x.iter_mut().for_each(|x| *x = rng.random_range(-2.0..2.0));
    });
    placement.place(&images)
}

/// Median of the time of a forward pass, in seconds.
pub fn forward_seconds(network: &ResNet18, images: &Tensor, device: Device, seconds: f64) -> Result<f64> {
    median(device, seconds, || no_grad(|| network.forward(images, false)).map(drop))
}

/// Median of the time of `step` over `seconds`, in seconds. On a card steps are given ahead of their execution, as in training,
/// and timed in groups that end with a wait.
fn median(device: Device, seconds: f64, mut step: impl FnMut() -> Result<()>) -> Result<f64> {
    let group = if device == Device::Cuda { GROUP } else { 1 };
    let mut run = || -> Result<f64> {
        let start = Instant::now();
        (0..group).try_for_each(|_| step())?;
        if device == Device::Cuda {
            cuda::context()?.synchronize()?;
        }
        Ok(start.elapsed().as_secs_f64() / group as f64)
    };
    for _ in 0..WARM_UP {
        run()?;
    }
    let mut times = Vec::new();
    let start = Instant::now();
    while times.len() < AT_LEAST || start.elapsed().as_secs_f64() < seconds {
        times.push(run()?);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}
