//! ResNet-18 in burn on the CPU (burn-flex), f32: forward passes, and steps that train the whole network.
//!
//! usage: peer-burn forward|train BATCH SECONDS

use burn::module::Module;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::pool::{AdaptiveAvgPool2d, AdaptiveAvgPool2dConfig, MaxPool2d, MaxPool2dConfig};
use burn::nn::{BatchNorm, BatchNormConfig, Linear, LinearConfig, PaddingConfig2d, Relu};
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{Device, Distribution, Int, Tensor};
use std::time::Instant;

/// A convolution and the norm after it.
#[derive(Module, Debug)]
struct Layer {
    conv: Conv2d,
    norm: BatchNorm,
}

impl Layer {
    fn new(c: usize, o: usize, kernel: usize, stride: usize, device: &Device) -> Self {
        let padding = kernel / 2;
        let conv = Conv2dConfig::new([c, o], [kernel; 2])
            .with_stride([stride; 2])
            .with_padding(PaddingConfig2d::Explicit(padding, padding, padding, padding))
            .with_bias(false);
        Layer { conv: conv.init(device), norm: BatchNormConfig::new(o).init(device) }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        self.norm.forward(self.conv.forward(x))
    }
}

#[derive(Module, Debug)]
struct Block {
    first: Layer,
    second: Layer,
    shortcut: Option<Layer>,
    relu: Relu,
}

impl Block {
    fn new(c: usize, o: usize, stride: usize, device: &Device) -> Self {
        Block {
            first: Layer::new(c, o, 3, stride, device),
            second: Layer::new(o, o, 3, 1, device),
            shortcut: (c != o).then(|| Layer::new(c, o, 1, stride, device)),
            relu: Relu::new(),
        }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let y = self.second.forward(self.relu.forward(self.first.forward(x.clone())));
        let shortcut = match &self.shortcut {
            Some(layer) => layer.forward(x),
            None => x,
        };
        self.relu.forward(y + shortcut)
    }
}

#[derive(Module, Debug)]
struct ResNet18 {
    stem: Layer,
    relu: Relu,
    max_pool: MaxPool2d,
    blocks: Vec<Block>,
    mean: AdaptiveAvgPool2d,
    head: Linear,
}

impl ResNet18 {
    fn new(device: &Device) -> Self {
        let mut blocks = Vec::new();
        let mut c = 64;
        for o in [64, 64, 128, 128, 256, 256, 512, 512] {
            blocks.push(Block::new(c, o, if c == o { 1 } else { 2 }, device));
            c = o;
        }
        let max_pool = MaxPool2dConfig::new([3; 2]).with_strides([2; 2]);
        ResNet18 {
            stem: Layer::new(3, 64, 7, 2, device),
            relu: Relu::new(),
            max_pool: max_pool.with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1)).init(),
            blocks,
            mean: AdaptiveAvgPool2dConfig::new([1; 2]).init(),
            head: LinearConfig::new(512, 1000).init(device),
        }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<2> {
        let y = self.max_pool.forward(self.relu.forward(self.stem.forward(x)));
        let y = self.blocks.iter().fold(y, |y, block| block.forward(y));
        self.head.forward(self.mean.forward(y).flatten(1, 3))
    }
}

/// Prints the median time of `body`, whose result is read each time.
fn measure(what: &str, batch: usize, seconds: f64, mut body: impl FnMut() -> f32) {
    (body(), body());
    let (start, mut times) = (Instant::now(), Vec::new());
    while times.len() < 3 || start.elapsed().as_secs_f64() < seconds {
        let begin = Instant::now();
        let value = body();
        assert!(value.is_finite(), "a result of {value}");
        times.push(begin.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    println!("burn {what} f32 b={batch} median {:.2} ms {:.1} img/s", median * 1e3, batch as f64 / median);
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [what, batch, seconds] = arguments.as_slice() else { panic!("usage: peer-burn forward|train BATCH SECONDS") };
    let (batch, seconds): (usize, f64) = (batch.parse().expect("a batch"), seconds.parse().expect("seconds"));
    let images = |device: &Device| Tensor::<4>::random([batch, 3, 224, 224], Distribution::Normal(0.0, 1.0), device);
    if what == "forward" {
        let device = Device::flex();
        let (network, x) = (ResNet18::new(&device), images(&device));
        return measure(what, batch, seconds, || network.forward(x.clone()).mean().into_scalar::<f32>());
    }
    let device = Device::flex().autodiff();
    let (mut network, x) = (Some(ResNet18::new(&device)), images(&device));
    let labels: Vec<i32> = (0..batch as i32).map(|i| i % 1000).collect();
    let labels = Tensor::<1, Int>::from_ints(labels.as_slice(), &device);
    let cross_entropy = CrossEntropyLossConfig::new().init(&device);
    let mut adam = AdamConfig::new().with_epsilon(1e-8).init();
    measure(what, batch, seconds, || {
        let before = network.take().expect("put back below");
        let loss = cross_entropy.forward(before.forward(x.clone()), labels.clone());
        let gradients = GradientsParams::from_grads(loss.backward(), &before);
        network = Some(adam.step(1e-4, before, gradients));
        let loss = loss.into_scalar::<f32>();
        device.sync().expect("the step ends");
        loss
    });
}
