//! The whole network: inference and training steps against the CPU, and runs from pictures to a model.

use crate::support::{assert_close, random, relative_l2, require_device};
use hone::data::demo::write_pictures;
use hone::nn::{ResNet18, Stage};
use hone::ops::{CrossEntropy, cross_entropy};
use hone::optim::{Algorithm, Optimizer, ParamGroup};
use hone::train::{Control, Depth, Outcome, Placement, Precision, TrainConfig, Weights, fit};
use hone::weights::{WeightsFile, locate_default};
use hone::{Device, Tensor, autograd, cuda};
use std::path::Path;

fn pretrained() -> ResNet18 {
    ResNet18::load(&WeightsFile::open(&locate_default(std::env::var_os("HONE_WEIGHTS")).unwrap()).unwrap()).unwrap()
}

#[test]
fn inference_in_every_precision() {
    require_device!();
    let images = random(&[2, 40, 36, 3], 1);
    let forward = |network: &ResNet18, x: &Tensor| autograd::no_grad(|| network.forward(x, false)).unwrap();
    let want = forward(&pretrained(), &images);
    for (precision, tolerance) in [(Precision::F32, 1e-5), (Precision::Tf32, 4e-3), (Precision::Bf16, 4e-2)] {
        let placement = Placement::new(Device::Cuda, precision).unwrap();
        let network = pretrained();
        placement.move_network(&network).unwrap();
        let got = forward(&network, &placement.place(&images).unwrap());
        assert_close(&format!("{precision:?}"), &got, &want, tolerance);
    }
}

/// Losses of a few steps of Adam, and the network after them.
fn steps(placement: Placement, batch_statistics: bool, count: usize) -> (Vec<f32>, ResNet18) {
    let network = pretrained();
    placement.move_network(&network).unwrap();
    network.set_trainable(|_| true);
    network.use_batch_statistics(|_| batch_statistics);
    let parameters = Stage::ALL.into_iter().flat_map(|stage| network.parameters(stage)).collect();
    let mut adam = Optimizer::new(vec![ParamGroup::new(parameters, 1e-5)], Algorithm::ADAM);
    let x = placement.place(&random(&[4, 33, 38, 3], 2)).unwrap();
    let labels = Tensor::from_slice(&[3i64, 1, 4, 1], [4]).unwrap();
    let losses = (0..count).map(|_| {
        let loss = cross_entropy(&network.forward(&x, true).unwrap(), &labels, &CrossEntropy::default()).unwrap();
        adam.step(&loss.backward().unwrap(), 1.0).unwrap();
        loss.item().unwrap()
    });
    (losses.collect(), network)
}

#[test]
fn training_steps_follow_the_cpu() {
    require_device!();
    for (precision, batch_statistics, tolerance) in
        [(Precision::F32, true, 1e-3), (Precision::F32, false, 1e-4), (Precision::Bf16, true, 6e-2)]
    {
        let (want, cpu) = steps(Placement::default(), batch_statistics, 2);
        let (got, cuda) = steps(Placement::new(Device::Cuda, precision).unwrap(), batch_statistics, 2);
        for (got, want) in got.iter().zip(&want) {
            let error = (f64::from(*got) - f64::from(*want)).abs() / f64::from(*want);
            assert!(error <= tolerance, "{precision:?}: loss {got}, expected {want}");
        }
        for stage in Stage::ALL {
            for (want, got) in cpu.parameters(stage).iter().zip(cuda.parameters(stage)) {
                let (want, got) = (want.tensor().to_f32_vec().unwrap(), got.tensor().to_f32_vec().unwrap());
                assert!(relative_l2(&got, &want) <= 1e-3, "{stage:?}");
            }
            for (want, got) in cpu.batch_norms(stage).zip(cuda.batch_norms(stage)) {
                assert_close("running mean", &got.running_mean.tensor(), &want.running_mean.tensor(), tolerance);
                assert_close("running variance", &got.running_var.tensor(), &want.running_var.tensor(), tolerance);
            }
        }
    }
}

#[test]
fn a_step_after_the_first_allocates_nothing() {
    require_device!();
    let placement = Placement::new(Device::Cuda, Precision::F32).unwrap();
    let network = pretrained();
    placement.move_network(&network).unwrap();
    network.set_trainable(|stage| stage >= Stage::Layer4);
    network.use_batch_statistics(|stage| stage >= Stage::Layer4);
    let parameters = [Stage::Layer4, Stage::Head].into_iter().flat_map(|stage| network.parameters(stage)).collect();
    let mut adam = Optimizer::new(vec![ParamGroup::new(parameters, 1e-5)], Algorithm::ADAM);
    let labels = Tensor::from_slice(&[3i64, 1], [2]).unwrap();
    let mut allocations = Vec::new();
    for step in 0..4 {
        let x = placement.place(&random(&[2, 4, 4, 256], step)).unwrap();
        let logits = network.suffix(&x, Stage::Layer4, true).unwrap();
        let loss = cross_entropy(&logits, &labels, &CrossEntropy::default()).unwrap();
        adam.step(&loss.backward().unwrap(), 1.0).unwrap();
        allocations.push(cuda::context().unwrap().allocations());
    }
    assert_eq!(allocations[1..], [allocations[1]; 3], "{allocations:?}");
}

/// A run on drawn pictures.
fn run(folder: &Path, device: Device, change: impl Fn(&mut TrainConfig)) -> Outcome {
    let pictures = folder.join("pictures");
    if !pictures.exists() {
        write_pictures(&pictures, 9, 3, 48, 0).unwrap();
    }
    let weights = Weights::File(locate_default(std::env::var_os("HONE_WEIGHTS")).unwrap());
    let mut config = TrainConfig { epochs: 2, batch_size: 8, image_size: 32, ..TrainConfig::new(pictures, weights) };
    change(&mut config);
    let out = tempfile::tempdir().unwrap();
    fit(&config, &out.path().join("run"), Control { device, ..Control::default() }, &mut ()).unwrap()
}

fn same_losses(want: &Outcome, got: &Outcome, tolerance: f64) {
    for (want, got) in want.epochs.iter().zip(&got.epochs) {
        let error = (want.train_loss - got.train_loss).abs();
        assert!(error <= tolerance, "epoch {}: {} and {}", want.epoch, want.train_loss, got.train_loss);
        let (want, got) = (want.val_loss.unwrap(), got.val_loss.unwrap());
        assert!((want - got).abs() <= tolerance, "{want} and {got}");
    }
}

/// 36 pictures in batches of 8: steps before the capture, captured ones, and a smaller last batch.
#[test]
fn runs_end_as_on_the_cpu() {
    require_device!();
    let folder = tempfile::tempdir().unwrap();
    let head = |_: &mut TrainConfig| {};
    same_losses(&run(folder.path(), Device::Cpu, head), &run(folder.path(), Device::Cuda, head), 1e-4);
    let layer4 = |c: &mut TrainConfig| {
        c.train = Depth::Layer4;
        c.lr = 1e-4;
        c.accumulate = 2;
        c.ema = Some(0.9);
        c.clip_norm = Some(1.0);
        c.class_weights = hone::train::Balance::Balanced;
    };
    same_losses(&run(folder.path(), Device::Cpu, layer4), &run(folder.path(), Device::Cuda, layer4), 5e-3);
}

/// The loss of no number is told, and the network is as it was before the step that gave it.
#[test]
fn a_diverging_run_says_so() {
    require_device!();
    let folder = tempfile::tempdir().unwrap();
    let pictures = folder.path().join("pictures");
    write_pictures(&pictures, 6, 2, 48, 0).unwrap();
    let weights = Weights::File(locate_default(std::env::var_os("HONE_WEIGHTS")).unwrap());
    let config =
        TrainConfig { epochs: 4, batch_size: 4, image_size: 32, lr: 1e38, ..TrainConfig::new(pictures, weights) };
    let control = Control { device: Device::Cuda, ..Control::default() };
    let error = fit(&config, &folder.path().join("run"), control, &mut ()).unwrap_err();
    assert!(error.to_string().contains("the loss is"), "{error}");
}
