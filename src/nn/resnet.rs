//! ResNet-18 (He, Zhang, Ren and Sun, "Deep residual learning", 2015) with torchvision's names and layout.

use super::layers::{BatchNorm2d, ConvBn, Linear};
use super::parameter::Parameter;
use crate::autograd::{self, on_a_worker, recording_if};
use crate::cpu::Isa;
use crate::cpu::conv::ConvShape;
use crate::error::{Error, Result};
use crate::ops::{self, Conv2dParams};
use crate::tensor::{CpuBuffer, DType, Device, Tensor, with_float};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

/// Width of the features that the head sees.
pub const FEATURES: usize = 512;
/// The smallest image side: the network halves it five times.
pub const MIN_IMAGE_SIZE: usize = 32;
/// The largest image side that anybody means: a picture of 4096 pixels takes 2 GB.
pub const MAX_IMAGE_SIZE: usize = 4096;

/// Pictures that go through frozen stages together on the CPU, at most, on a thread of their own: many, so that many tiles share a
/// transformed filter, but their activations and their transforms should stay in a thread's share of the last cache.
const TOGETHER: usize = 16;

/// Parts of the network, from the picture to the classes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// conv1, bn1, ReLU, max pooling: `[N, H, W, 3]` to `[N, H/4, W/4, 64]`.
    Stem,
    /// Two blocks of 64 channels.
    Layer1,
    /// Two blocks of 128 channels at half the resolution.
    Layer2,
    /// Two blocks of 256 channels at half of that.
    Layer3,
    /// Two blocks of 512 channels at half of that.
    Layer4,
    /// Global average pooling, `[N, 512]`, and the fully connected layer, `[N, classes]`.
    Head,
}

impl Stage {
    /// All of them, in order.
    pub const ALL: [Stage; 6] = [Stage::Stem, Stage::Layer1, Stage::Layer2, Stage::Layer3, Stage::Layer4, Stage::Head];
}

struct BasicBlock {
    conv1: ConvBn,
    conv2: ConvBn,
    downsample: Option<ConvBn>,
}

impl BasicBlock {
    fn new(name: &str, inputs: usize, channels: usize, stride: usize, seed: Option<u64>) -> Self {
        let conv = |i: usize, inputs: usize, stride: usize| {
            let (conv, bn) = (format!("{name}.conv{i}"), format!("{name}.bn{i}"));
            ConvBn::new(&conv, &bn, [channels, 3, 3, inputs], Conv2dParams::new(stride, 1), seed)
        };
        let downsample = (stride != 1 || inputs != channels).then(|| {
            let (conv, bn) = (format!("{name}.downsample.0"), format!("{name}.downsample.1"));
            ConvBn::new(&conv, &bn, [channels, 1, 1, inputs], Conv2dParams::new(stride, 0), seed)
        });
        BasicBlock { conv1: conv(1, inputs, stride), conv2: conv(2, channels, 1), downsample }
    }

    fn forward(&self, x: &Tensor, training: bool) -> Result<Tensor> {
        let [y, shortcut] = self.halfway(x, training)?;
        self.conv2.forward(&y, Some(&shortcut), true, training)
    }

    /// [`BasicBlock::forward`] of a fixed block on the CPU, to the elements of `y` from `first` on.
    fn forward_into(&self, x: &Tensor, y: &mut CpuBuffer, first: usize) -> Result<()> {
        let [inner, shortcut] = self.halfway(x, false)?;
        self.conv2.forward_into(&inner, &shortcut, y, first)
    }

    /// What the second convolution takes, and what is added to it.
    fn halfway(&self, x: &Tensor, training: bool) -> Result<[Tensor; 2]> {
        // The gradient of what is recorded first comes last: that of a strided shortcut, zero but for every fourth pixel, is then added to
        // the other.
        let shortcut = match &self.downsample {
            Some(downsample) => downsample.forward(x, None, false, training)?,
            None => x.clone(),
        };
        let y = self.conv1.forward(x, None, true, training)?;
        Ok([y, shortcut])
    }
}

/// The network.
pub struct ResNet18 {
    stem: ConvBn,
    layers: [[BasicBlock; 2]; 4],
    head: Linear,
}

impl ResNet18 {
    /// With random values as torchvision draws them; `seed` decides. Everything is frozen at first.
    pub fn new(classes: usize, seed: u64) -> Self {
        Self::with_backbone(classes, seed, Some(seed))
    }

    /// With a head as [`ResNet18::new`] draws it, but a backbone whose values are to come from a file: drawing eleven million
    /// takes longer than reading them.
    pub(crate) fn without_values(classes: usize, seed: u64) -> Self {
        Self::with_backbone(classes, seed, None)
    }

    fn with_backbone(classes: usize, head_seed: u64, seed: Option<u64>) -> Self {
        let layers = [(1, 64, 64, 1), (2, 64, 128, 2), (3, 128, 256, 2), (4, 256, 512, 2)];
        ResNet18 {
            stem: ConvBn::new("conv1", "bn1", [64, 7, 7, 3], Conv2dParams::new(2, 3), seed),
            layers: layers.map(|(i, inputs, channels, stride)| {
                [
                    BasicBlock::new(&format!("layer{i}.0"), inputs, channels, stride, seed),
                    BasicBlock::new(&format!("layer{i}.1"), channels, channels, 1, seed),
                ]
            }),
            head: Linear::new("fc", FEATURES, classes, head_seed),
        }
    }

    /// Number of classes of the head.
    pub fn classes(&self) -> usize {
        self.head.bias.shape()[0]
    }

    /// The fully connected layer.
    pub fn head(&self) -> &Linear {
        &self.head
    }

    /// One stage. `training` makes norms that were told so use batch statistics.
    pub fn stage(&self, stage: Stage, x: &Tensor, training: bool) -> Result<Tensor> {
        let layer = |i: usize| {
            let x = self.layers[i][0].forward(x, training)?;
            self.layers[i][1].forward(&x, training)
        };
        match stage {
            Stage::Stem => {
                check_images(x)?;
                self.stem.forward_max_pool(x, [3, 2, 1], training)
            }
            Stage::Layer1 => layer(0),
            Stage::Layer2 => layer(1),
            Stage::Layer3 => layer(2),
            Stage::Layer4 => layer(3),
            Stage::Head => self.head.forward(&ops::global_avg_pool(x)?),
        }
    }

    /// What `cut` is given for images `[N, H, W, 3]`: the stages before it, and the pooling before the head, `[N, 512]`.
    pub fn prefix(&self, images: &Tensor, cut: Stage, training: bool) -> Result<Tensor> {
        computing(images, || {
            let x = self.backbone(images, Stage::Stem, cut, training)?;
            if cut == Stage::Head { ops::global_avg_pool(&x) } else { Ok(x) }
        })
    }

    /// Logits `[N, classes]` of what [`ResNet18::prefix`] gave for the same `cut`.
    pub fn suffix(&self, x: &Tensor, cut: Stage, training: bool) -> Result<Tensor> {
        computing(x, || match cut {
            Stage::Head => self.head.forward(x),
            _ => self.stage(Stage::Head, &self.backbone(x, cut, Stage::Head, training)?, training),
        })
    }

    /// The stages from `first` on and before `end`, of images or of what the stage before gave: feature maps, `[N, H, W, C]`. On the
    /// CPU threads take some pictures each where these do not depend on one another; no bit depends on how they are divided.
    ///
    /// Errors: as [`ResNet18::stage`].
    pub fn backbone(&self, x: &Tensor, first: Stage, end: Stage, training: bool) -> Result<Tensor> {
        computing(x, || match x.device() {
            Device::Cpu => self.backbone_on_cpu(x, first..end, training),
            Device::Cuda => self.stages(x.clone(), first..end, training),
        })
    }

    fn stages(&self, x: Tensor, stages: Range<Stage>, training: bool) -> Result<Tensor> {
        of(stages).try_fold(x, |x, stage| self.stage(stage, &x, training))
    }

    /// Where pictures do not depend on one another, each thread takes some all the way: what one has computed another need not
    /// fetch from its caches, and nobody waits.
    fn backbone_on_cpu(&self, x: &Tensor, stages: Range<Stage>, training: bool) -> Result<Tensor> {
        let pictures = pictures_of(x);
        let convolutions = || of(stages.clone()).flat_map(|stage| self.convolutions(stage));
        let fixed = !x.requires_grad() && convolutions().all(|conv| conv.is_fixed(training));
        if stages.is_empty() || pictures < 2 || !fixed {
            return self.stages(x.clone(), stages, training);
        }
        // A thread that waits for a part of its pictures may begin others: it must not meet a filter that it is packing itself.
        convolutions().try_for_each(|conv| conv.prepare(x.dtype()))?;
        let groups = pictures.div_ceil(TOGETHER).next_multiple_of(rayon::current_num_threads()).min(pictures);
        let recording = autograd::is_enabled();
        let run = |group: usize| {
            let pictures = group * pictures / groups..(group + 1) * pictures / groups;
            recording_if(recording, || self.group(x, pictures, stages.clone(), training))
        };
        let results = (0..groups).into_par_iter().with_max_len(1).map(run);
        Ok(Tensor::concatenate(&results.collect::<Result<Vec<_>>>()?))
    }

    /// Some stages of some pictures of `x`, which are fixed.
    fn group(&self, x: &Tensor, pictures: Range<usize>, stages: Range<Stage>, training: bool) -> Result<Tensor> {
        let together = first_together(x.dtype());
        if stages.start >= together || stages.end < together {
            return self.stages(x.rows(pictures)?, stages, training);
        }
        let x = self.one_by_one(x, pictures, stages.start..together, training)?;
        self.stages(x, together..stages.end, training)
    }

    /// Some stages, the last of them one of blocks, of some pictures of `x`, one after the other.
    fn one_by_one(&self, x: &Tensor, pictures: Range<usize>, stages: Range<Stage>, training: bool) -> Result<Tensor> {
        let layer = of(stages.clone()).last().expect("a stage at least");
        let [block, last] = &self.layers[layer as usize - Stage::Layer1 as usize];
        let (mut together, mut dims, count) = (None, Vec::new(), pictures.len());
        for (i, picture) in pictures.enumerate() {
            let x =
                block.forward(&self.stages(x.rows(picture..picture + 1)?, stages.start..layer, training)?, training)?;
            // The last block keeps the extents of its layer. Its results go where those of all pictures are.
            dims = x.dims().to_vec();
            let buffer = || with_float!(x.dtype(), T => CpuBuffer::take::<T>(count * x.numel()));
            last.forward_into(&x, together.get_or_insert_with(buffer), i * x.numel())?;
        }
        dims[0] = count;
        Ok(Tensor::from_buffer(dims, together.expect("a picture at least")))
    }

    /// Images `[N, H, W, 3]`, normalised, to features `[N, 512]`: everything but the fully connected layer.
    pub fn features(&self, images: &Tensor, training: bool) -> Result<Tensor> {
        self.prefix(images, Stage::Head, training)
    }

    /// Images `[N, H, W, 3]`, normalised, to logits `[N, classes]`.
    pub fn forward(&self, images: &Tensor, training: bool) -> Result<Tensor> {
        self.suffix(images, Stage::Stem, training)
    }

    /// Moves everything to a device, where it stays.
    pub fn to_device(&self, device: Device) -> Result<()> {
        for stage in Stage::ALL {
            self.parameters(stage).iter().try_for_each(|p| p.to_device(device))?;
            for bn in self.batch_norms(stage) {
                bn.running_mean.to_device(device)?;
                bn.running_var.to_device(device)?;
            }
        }
        Ok(())
    }

    /// The device it is on.
    pub fn device(&self) -> Device {
        self.head.weight.tensor().device()
    }

    /// Everything that a training step from `cut` on changes: trained parameters, and statistics that follow the batch.
    fn changed_by_training(&self, cut: Stage) -> Vec<&Arc<Parameter>> {
        let mut changed = Vec::new();
        for stage in Stage::ALL.into_iter().filter(|stage| *stage >= cut) {
            for conv in self.convolutions(stage) {
                changed.extend(conv.parameters().into_iter().filter(|p| p.is_trainable()));
                if conv.bn.takes_batch_statistics(true) {
                    changed.extend([&conv.bn.running_mean, &conv.bn.running_var]);
                }
            }
        }
        changed.extend([&self.head.weight, &self.head.bias].into_iter().filter(|p| p.is_trainable()));
        changed
    }

    /// Where the values on the card are that a training step from `cut` on reads or changes; those that it changes are made
    /// the network's own first.
    pub(crate) fn addresses_for_update(&self, cut: Stage) -> Result<Vec<u64>> {
        for parameter in self.changed_by_training(cut) {
            parameter.for_update_on_cuda()?;
        }
        let mut addresses = Vec::new();
        for stage in Stage::ALL.into_iter().filter(|stage| *stage >= cut) {
            addresses.extend(self.parameters(stage).iter().map(|p| p.address_on_cuda()));
            for bn in self.batch_norms(stage) {
                addresses.extend([&bn.running_mean, &bn.running_var].map(|p| p.address_on_cuda()));
            }
        }
        Ok(addresses)
    }

    /// Notes what a replayed training step from `cut` on has changed without the host's doing.
    pub(crate) fn count_captured_step(&self, cut: Stage) {
        self.changed_by_training(cut).into_iter().for_each(|p| p.touch());
        for bn in Stage::ALL.into_iter().filter(|stage| *stage >= cut).flat_map(|stage| self.batch_norms(stage)) {
            bn.count_batch(true);
        }
    }

    /// The shapes of all convolutions for `n` images of `h` by `w`, in the order they run.
    pub fn conv_shapes(&self, n: usize, h: usize, w: usize) -> Vec<ConvShape> {
        let stem = self.stem.shape(n, h, w);
        let mut shapes = vec![stem];
        // Max pooling halves, rounding up, as every stride of two does.
        let mut size = stem.output().map(|extent| extent.div_ceil(2));
        for block in self.layers.iter().flatten() {
            shapes.extend(block.downsample.iter().map(|conv| conv.shape(n, size[0], size[1])));
            for conv in [&block.conv1, &block.conv2] {
                let shape = conv.shape(n, size[0], size[1]);
                size = shape.output();
                shapes.push(shape);
            }
        }
        shapes
    }

    /// Multiply-adds of a forward pass over `n` images of `h` by `w`.
    pub fn multiply_adds(&self, n: usize, h: usize, w: usize) -> usize {
        let convolutions: usize = self.conv_shapes(n, h, w).iter().map(ConvShape::multiply_adds).sum();
        convolutions + n * FEATURES * self.classes()
    }

    /// Those of the first convolution alone.
    pub fn stem_multiply_adds(&self, n: usize, h: usize, w: usize) -> usize {
        self.stem.shape(n, h, w).multiply_adds()
    }

    pub(super) fn convolutions(&self, stage: Stage) -> Vec<&ConvBn> {
        match stage {
            Stage::Stem => vec![&self.stem],
            Stage::Head => Vec::new(),
            layer => {
                let blocks = &self.layers[layer as usize - Stage::Layer1 as usize];
                blocks.iter().flat_map(|b| [&b.conv1, &b.conv2].into_iter().chain(&b.downsample)).collect()
            }
        }
    }

    /// The parameters of a stage, in torchvision's order.
    pub fn parameters(&self, stage: Stage) -> Vec<Arc<Parameter>> {
        match stage {
            Stage::Head => vec![self.head.weight.clone(), self.head.bias.clone()],
            _ => self.convolutions(stage).into_iter().flat_map(|c| c.parameters().map(Arc::clone)).collect(),
        }
    }

    /// The batch norms of a stage.
    pub fn batch_norms(&self, stage: Stage) -> impl Iterator<Item = &BatchNorm2d> {
        self.convolutions(stage).into_iter().map(|conv| &conv.bn)
    }

    /// Whether all parameters are finite.
    pub fn is_finite(&self) -> Result<bool> {
        let parameters = || Stage::ALL.into_iter().flat_map(|stage| self.parameters(stage));
        let is_finite = |p: Arc<Parameter>| Ok(p.tensor().to_f32_vec()?.iter().all(|value| value.is_finite()));
        parameters().try_fold(true, |all, p| Ok(all && is_finite(p)?))
    }

    /// Trains the stages that `trained` accepts and freezes the others.
    pub fn set_trainable(&self, trained: impl Fn(Stage) -> bool) {
        for stage in Stage::ALL {
            self.parameters(stage).iter().for_each(|p| p.set_trainable(trained(stage)));
        }
    }

    /// In training, batch statistics for the norms of the stages that `batch` accepts, stored ones for the others.
    pub fn use_batch_statistics(&self, batch: impl Fn(Stage) -> bool) {
        for stage in Stage::ALL {
            self.batch_norms(stage).for_each(|bn| bn.use_batch_statistics(batch(stage)));
        }
    }
}

/// The first stage that pictures go through together: before it activations are large and filters small, and with tiles, whose filters are not
/// transformed, those of layer2 are small too.
fn first_together(dtype: DType) -> Stage {
    match dtype == DType::BF16 && Isa::current().has_tiles() {
        true => Stage::Layer3,
        false => Stage::Layer2,
    }
}

/// The stages of a range, in order.
fn of(stages: Range<Stage>) -> impl Iterator<Item = Stage> {
    Stage::ALL.into_iter().filter(move |stage| stages.contains(stage))
}

/// Runs `body`, which computes with `x`, where its device is best used from.
fn computing<R: Send>(x: &Tensor, body: impl FnOnce() -> R + Send) -> R {
    match x.device() {
        Device::Cpu => on_a_worker(body),
        Device::Cuda => body(),
    }
}

/// Pictures of a batch.
fn pictures_of(x: &Tensor) -> usize {
    x.dims().first().copied().unwrap_or_default()
}

fn check_images(images: &Tensor) -> Result<()> {
    match *images.dims() {
        [_, h, w, 3] if h >= MIN_IMAGE_SIZE && w >= MIN_IMAGE_SIZE => Ok(()),
        _ => {
            let expected = format!("images [N, H, W, 3] of {MIN_IMAGE_SIZE} pixels a side at least");
            Err(Error::shape("resnet18", expected, &[images.dims()]))
        }
    }
}
