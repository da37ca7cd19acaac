//! The library against PyTorch: reference values made by tests/fixtures/make_golden.py on the bundled weights.
//!
//! `$HONE_GOLDEN_DIR` names another folder of such values, for any number of classes and image size, and `$HONE_WEIGHTS`
//! the weights they were made on. `$HONE_TEST_DEVICE=cuda` runs all of it on the card.

use hone::nn::{Parameter, ResNet18, Stage};
use hone::ops::{CrossEntropy, cross_entropy};
use hone::optim::{Algorithm, Optimizer, ParamGroup};
use hone::tensor::layout::{from_channels_first, to_channels_first};
use hone::weights::{WeightsFile, locate_default};
use hone::{DType, Device, Tensor, ops};
use std::path::{Path, PathBuf};
use std::sync::Arc;

fn golden(name: &str) -> WeightsFile {
    let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden");
    let folder = std::env::var_os("HONE_GOLDEN_DIR").map_or(bundled, PathBuf::from);
    WeightsFile::open(&folder.join(name)).unwrap()
}

fn weights() -> WeightsFile {
    WeightsFile::open(&locate_default(std::env::var_os("HONE_WEIGHTS")).unwrap()).unwrap()
}

fn device() -> Device {
    match std::env::var("HONE_TEST_DEVICE").as_deref() {
        Ok("cuda") => Device::Cuda,
        _ => Device::Cpu,
    }
}

/// A network on the device.
fn placed(network: ResNet18) -> ResNet18 {
    network.to_device(device()).unwrap();
    network
}

/// The tensor of that name, `NCHW` turned to `NHWC`.
fn tensor(file: &WeightsFile, name: &str) -> Tensor {
    let shape = &file.get(name).unwrap_or_else(|| panic!("{name} in {}", file.path().display())).shape;
    let values = file.f32(name).unwrap();
    match shape.len() {
        4 => from_channels_first(&values, shape).unwrap(),
        _ => Tensor::from_slice(&values, shape.as_slice()).unwrap(),
    }
}

fn labels(file: &WeightsFile) -> Vec<i64> {
    file.i64("labels").unwrap()
}

/// ||got - want|| / ||want||; NaN if anything is.
fn relative_l2(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |x: f64| x * x;
    let difference: f64 = got.iter().zip(want).map(|(&g, &w)| square(f64::from(g) - f64::from(w))).sum();
    let norm: f64 = want.iter().map(|&w| square(f64::from(w))).sum();
    (difference / norm.max(1e-30)).sqrt()
}

/// Fails unless `error <= tolerance`; NaN fails.
fn require(what: &str, error: f64, tolerance: f64) {
    println!("{what}: {error:.2e} (at most {tolerance:.0e})");
    assert!(error <= tolerance, "{what}: error {error:e} is more than {tolerance:e}");
}

fn require_close(what: &str, got: &Tensor, want: &[f32], tolerance: f64) {
    require(what, relative_l2(&got.to_f32_vec().unwrap(), want), tolerance);
}

/// A tensor's values in PyTorch's order.
fn torch_order(tensor: &Tensor) -> Vec<f32> {
    let tensor = tensor.to_device(Device::Cpu).unwrap();
    if tensor.dims().len() == 4 { to_channels_first(&tensor).unwrap().0 } else { tensor.to_vec() }
}

/// Compares with the summary the generator makes: norm, sum, and 256 evenly strided entries.
fn require_summary(file: &WeightsFile, name: &str, tensor: &Tensor, tolerance: f64) {
    let values = torch_order(tensor);
    let count = 256.min(values.len());
    let sample: Vec<f32> = (0..count).map(|i| values[i * values.len() / count]).collect();
    let want = file.f32(&format!("{name}.sample")).unwrap();
    require(&format!("{name} sample"), relative_l2(&sample, &want), tolerance);
    let l2 = values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let want = f64::from(file.f32(&format!("{name}.l2")).unwrap()[0]);
    require(&format!("{name} norm"), (l2 - want).abs() / want.max(1e-30), tolerance);
    // A sum may cancel; its error is in proportion to the norm.
    let sum: f64 = values.iter().map(|&x| f64::from(x)).sum();
    let difference = (sum - f64::from(file.f32(&format!("{name}.sum")).unwrap()[0])).abs();
    require(&format!("{name} sum"), difference / (want * (values.len() as f64).sqrt()).max(1e-30), tolerance);
}

fn forward_case(name: &str) {
    let file = golden(name);
    let network = placed(ResNet18::load(&weights()).unwrap());
    let input = tensor(&file, "input").to_device(device()).unwrap();
    let mut x = input.clone();
    for (stage, label) in
        Stage::ALL.into_iter().zip(["stem.out", "layer1.out", "layer2.out", "layer3.out", "layer4.out"])
    {
        x = network.stage(stage, &x, false).unwrap();
        require_summary(&file, label, &x, 1e-3);
    }
    let features = network.features(&input, false).unwrap();
    require_close("features", &features, &file.f32("features").unwrap(), 1e-4);
    let logits = network.forward(&input, false).unwrap();
    require_close("logits", &logits, &file.f32("logits").unwrap(), 1e-4);

    let narrow = network.forward(&input.to_dtype(DType::BF16).unwrap(), false).unwrap();
    require_close("logits in bf16", &narrow, &file.f32("logits").unwrap(), 3e-2);

    // The unfused path, which is taken as soon as something is trained, must agree with the fused one.
    network.set_trainable(|stage| stage == Stage::Stem);
    let unfused = network.forward(&input, false).unwrap();
    assert!(unfused.requires_grad() && !logits.requires_grad());
    require_close("unfused against fused", &unfused, &logits.to_f32_vec().unwrap(), 1e-5);
}

#[test]
fn forward_224() {
    forward_case("forward_224.safetensors");
}

#[test]
fn forward_odd_size() {
    forward_case("forward_odd.safetensors");
}

/// The network with the head of the golden file.
fn network_with_head(file: &WeightsFile) -> ResNet18 {
    let head = tensor(file, "fc.weight");
    let network = placed(ResNet18::load_backbone(&weights(), head.dims()[0], 0).unwrap());
    network.head().weight.set(head).unwrap();
    network.head().bias.set(tensor(file, "fc.bias")).unwrap();
    network
}

fn all_parameters(network: &ResNet18) -> Vec<Arc<Parameter>> {
    Stage::ALL.into_iter().flat_map(|stage| network.parameters(stage)).collect()
}

#[test]
fn one_training_step() {
    let file = golden("train_step.safetensors");
    let network = network_with_head(&file);
    network.set_trainable(|_| true);
    network.use_batch_statistics(|_| true);
    let y = labels(&file);
    let y = Tensor::from_slice(&y, [y.len()]).unwrap();
    let logits = network.forward(&tensor(&file, "input").to_device(device()).unwrap(), true).unwrap();
    let loss = cross_entropy(&logits, &y, &CrossEntropy::default()).unwrap();
    let want = f64::from(file.f32("loss").unwrap()[0]);
    require("loss", (f64::from(loss.item().unwrap()) - want).abs(), 1e-5);
    let gradients = loss.backward().unwrap();
    for parameter in all_parameters(&network) {
        let gradient = gradients.by_id(parameter.id()).expect("every parameter has a gradient");
        require_summary(&file, &format!("grad.{}", parameter.name()), gradient, 2e-3);
    }
    for bn in Stage::ALL.iter().flat_map(|&stage| network.batch_norms(stage)) {
        for (suffix, value) in [("running_mean", &bn.running_mean), ("running_var", &bn.running_var)] {
            let name = format!("after.{}.{suffix}", bn.name());
            require_close(&name, &value.tensor(), &file.f32(&name).unwrap(), 1e-5);
        }
    }
}

/// A stage and its rate.
type Rates = fn(Stage) -> Option<f64>;

/// Runs the generator's trace: the same pictures in the same order, and compares losses.
fn losses(name: &str, batch_statistics: bool, rate: Rates, dtype: DType, tolerance: f64) -> ResNet18 {
    let (file, pool) = (golden(&format!("{name}.safetensors")), golden("pool.safetensors"));
    let network = network_with_head(&pool);
    network.set_trainable(|stage| rate(stage).is_some());
    network.use_batch_statistics(|_| batch_statistics);
    let groups =
        Stage::ALL.into_iter().filter_map(|stage| Some(ParamGroup::new(network.parameters(stage), rate(stage)?)));
    let mut adam = Optimizer::new(groups.collect(), Algorithm::ADAM);
    let images = tensor(&pool, "images");
    let labels = labels(&pool);
    let order = pool.i64("order").unwrap();
    let batch = pool.get("order").unwrap().shape[1];
    let picture = images.numel() / images.dims()[0];
    for (step, (&want, order)) in file.f32("losses").unwrap().iter().zip(order.chunks(batch)).enumerate() {
        let pixels: Vec<f32> =
            order.iter().flat_map(|&i| &images.as_slice::<f32>()[i as usize * picture..][..picture]).copied().collect();
        let dims = [&[batch], &images.dims()[1..]].concat();
        let x = Tensor::from_slice(&pixels, dims).unwrap().to_device(device()).unwrap().to_dtype(dtype).unwrap();
        let y: Vec<i64> = order.iter().map(|&i| labels[i as usize]).collect();
        let y = Tensor::from_slice(&y, [batch]).unwrap();
        let loss = cross_entropy(&network.forward(&x, true).unwrap(), &y, &CrossEntropy::default()).unwrap();
        let difference = (f64::from(loss.item().unwrap()) - f64::from(want)).abs();
        require(&format!("{name} {dtype:?} loss of step {step}"), difference, tolerance);
        adam.step(&loss.backward().unwrap(), 1.0).unwrap();
    }
    network
}

/// A trace in bf16, by its losses, and in f32, where what was trained is compared as well.
fn trace(name: &str, batch_statistics: bool, rate: Rates, loss_tolerance: f64, parameter_tolerance: f64) {
    losses(name, batch_statistics, rate, DType::BF16, 2e-2);
    let network = losses(name, batch_statistics, rate, DType::F32, loss_tolerance);
    let file = golden(&format!("{name}.safetensors"));
    let head = network.head();
    require_close("fc.weight", &head.weight.tensor(), &file.f32("fc.weight").unwrap(), 1e-3);
    require_close("fc.bias", &head.bias.tensor(), &file.f32("fc.bias").unwrap(), 1e-3);
    for parameter in all_parameters(&network) {
        let name = format!("param.{}", parameter.name());
        require_summary(&file, &name, &parameter.tensor(), parameter_tolerance);
    }
    for bn in Stage::ALL.iter().flat_map(|&stage| network.batch_norms(stage)) {
        for (suffix, value) in [("running_mean", &bn.running_mean), ("running_var", &bn.running_var)] {
            let name = format!("buffer.{}.{suffix}", bn.name());
            require_summary(&file, &name, &value.tensor(), parameter_tolerance);
        }
    }
}

#[test]
fn head_with_batch_statistics() {
    trace("head_bn_train", true, |stage| (stage == Stage::Head).then_some(1e-3), 1e-4, 1e-3);
}

#[test]
fn head_with_stored_statistics() {
    trace("head_bn_frozen", false, |stage| (stage == Stage::Head).then_some(1e-3), 1e-4, 1e-3);
}

#[test]
fn whole_network_with_batch_statistics() {
    trace("full_bn_train", true, |_| Some(1e-4), 5e-4, 1e-2);
}

#[test]
fn whole_network_with_stored_statistics() {
    trace("full_bn_frozen", false, |_| Some(1e-4), 5e-4, 1e-2);
}

#[test]
fn upper_layers_with_stored_statistics() {
    trace("layer4_bn_frozen", false, |stage| (stage >= Stage::Layer4).then_some(1e-4), 5e-4, 1e-2);
}

#[test]
fn discriminative_rates() {
    trace("discriminative", true, |stage| Some(if stage == Stage::Head { 1e-3 } else { 1e-5 }), 5e-4, 1e-2);
}

/// The features that training on a cache sees are those that the whole network computes.
#[test]
fn features_and_head_make_the_logits() {
    let network = placed(ResNet18::load(&weights()).unwrap());
    let x = tensor(&golden("forward_odd.safetensors"), "input").to_device(device()).unwrap();
    let features = network.features(&x, false).unwrap();
    let head = network.head();
    let logits = ops::linear(&features, &head.weight.tensor(), Some(&head.bias.tensor())).unwrap();
    assert_eq!(logits.to_f32_vec().unwrap(), network.forward(&x, false).unwrap().to_f32_vec().unwrap());
}
