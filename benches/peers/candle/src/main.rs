//! ResNet-18 in candle on the CPU, f32: forward passes of candle-transformers' network, and steps that train the whole of it.
//!
//! usage: peer-candle forward|train BATCH SECONDS

use anyhow::{Result, bail, ensure};
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Module, ModuleT, Result as R, Shape, Storage, Tensor};
use candle_nn::{BatchNorm, Conv2d, Linear, Optimizer, VarBuilder, VarMap, batch_norm};
use rayon::prelude::*;
use std::time::Instant;

/// Max pooling of 3x3 pixels with a stride of two and padding. candle has no gradient for windows that overlap, so that
/// whoever trains this network with it writes one.
struct MaxPool;

/// The pixels of a window.
fn window(output: usize, extent: usize) -> std::ops::Range<usize> {
    (2 * output).saturating_sub(1)..(2 * output + 2).min(extent)
}

/// The values of a tensor in memory.
fn values<'a>(storage: &'a Storage, layout: &Layout) -> R<&'a [f32]> {
    match storage {
        Storage::Cpu(storage) => contiguous(storage, layout),
        _ => candle_core::bail!("not on the CPU"),
    }
}

fn contiguous<'a>(storage: &'a CpuStorage, layout: &Layout) -> R<&'a [f32]> {
    let (start, end) = layout.contiguous_offsets().ok_or_else(|| candle_core::Error::msg("not contiguous"))?;
    Ok(&storage.as_slice()?[start..end])
}

impl CustomOp1 for MaxPool {
    fn name(&self) -> &'static str {
        "max_pool"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> R<(CpuStorage, Shape)> {
        let (n, c, h, w) = layout.shape().dims4()?;
        let (oh, ow) = (h.div_ceil(2), w.div_ceil(2));
        let x = contiguous(storage, layout)?;
        let mut y = vec![0f32; n * c * oh * ow];
        y.par_chunks_mut(oh * ow).zip(x.par_chunks(h * w)).for_each(|(y, x)| {
            for (i, y) in y.iter_mut().enumerate() {
                let rows = window(i / ow, h).flat_map(|row| &x[row * w..][window(i % ow, w)]);
                *y = rows.fold(f32::NEG_INFINITY, |max, &x| max.max(x));
            }
        });
        Ok((CpuStorage::F32(y), (n, c, oh, ow).into()))
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, dy: &Tensor) -> R<Option<Tensor>> {
        let (n, c, h, w) = x.dims4()?;
        let (oh, ow) = (h.div_ceil(2), w.div_ceil(2));
        let (x, y, dy) = (x.contiguous()?, y.contiguous()?, dy.contiguous()?);
        let [(x, xl), (y, yl), (dy, dyl)] = [&x, &y, &dy].map(|tensor| tensor.storage_and_layout());
        let (x, y, dy) = (values(&x, xl)?, values(&y, yl)?, values(&dy, dyl)?);
        let mut dx = vec![0f32; n * c * h * w];
        let planes = dx.par_chunks_mut(h * w).zip(x.par_chunks(h * w));
        planes.zip(y.par_chunks(oh * ow).zip(dy.par_chunks(oh * ow))).for_each(|((dx, x), (y, dy))| {
            for (i, (y, dy)) in y.iter().zip(dy).enumerate() {
                let pixels = window(i / ow, h).flat_map(|row| window(i % ow, w).map(move |column| row * w + column));
                if let Some(first) = pixels.into_iter().find(|&pixel| x[pixel] == *y) {
                    dx[first] += dy;
                }
            }
        });
        Ok(Some(Tensor::from_vec(dx, (n, c, h, w), &Device::Cpu)?))
    }
}

fn conv(c: usize, o: usize, kernel: usize, stride: usize, vb: VarBuilder) -> R<Conv2d> {
    let config = candle_nn::Conv2dConfig { stride, padding: kernel / 2, ..Default::default() };
    candle_nn::conv2d_no_bias(c, o, kernel, config, vb)
}

/// candle-transformers' network, which always takes stored statistics, for training.
struct ResNet18 {
    stem: (Conv2d, BatchNorm),
    blocks: Vec<Block>,
    head: Linear,
}

struct Block {
    first: (Conv2d, BatchNorm),
    second: (Conv2d, BatchNorm),
    shortcut: Option<(Conv2d, BatchNorm)>,
}

impl Block {
    fn new(c: usize, o: usize, stride: usize, vb: VarBuilder) -> R<Self> {
        let layer = |c, kernel, stride, conv_name: &str, norm_name: &str| -> R<(Conv2d, BatchNorm)> {
            Ok((conv(c, o, kernel, stride, vb.pp(conv_name))?, batch_norm(o, 1e-5, vb.pp(norm_name))?))
        };
        let shortcut = (c != o).then(|| layer(c, 1, stride, "downsample.0", "downsample.1")).transpose()?;
        Ok(Block { first: layer(c, 3, stride, "conv1", "bn1")?, second: layer(o, 3, 1, "conv2", "bn2")?, shortcut })
    }

    fn forward(&self, x: &Tensor, train: bool) -> R<Tensor> {
        let y = x.apply(&self.first.0)?.apply_t(&self.first.1, train)?.relu()?;
        let y = y.apply(&self.second.0)?.apply_t(&self.second.1, train)?;
        match &self.shortcut {
            Some((conv, norm)) => (y + x.apply(conv)?.apply_t(norm, train)?)?.relu(),
            None => (y + x)?.relu(),
        }
    }
}

impl ResNet18 {
    fn new(vb: VarBuilder) -> R<Self> {
        let mut blocks = Vec::new();
        let mut c = 64;
        for (stage, o) in [64, 128, 256, 512].into_iter().enumerate() {
            for block in 0..2 {
                let stride = if c == o { 1 } else { 2 };
                blocks.push(Block::new(c, o, stride, vb.pp(format!("layer{}.{block}", stage + 1)))?);
                c = o;
            }
        }
        let stem = (conv(3, 64, 7, 2, vb.pp("conv1"))?, batch_norm(64, 1e-5, vb.pp("bn1"))?);
        Ok(ResNet18 { stem, blocks, head: candle_nn::linear(512, 1000, vb.pp("fc"))? })
    }
}

impl ModuleT for ResNet18 {
    fn forward_t(&self, x: &Tensor, train: bool) -> R<Tensor> {
        let y = x.apply(&self.stem.0)?.apply_t(&self.stem.1, train)?.relu()?;
        let y = y.contiguous()?.apply_op1(MaxPool)?;
        let y = self.blocks.iter().try_fold(y, |y, block| block.forward(&y, train))?;
        y.mean(3)?.mean(2)?.apply(&self.head)
    }
}

/// Prints the median time of `body`, whose result is read each time.
fn measure(what: &str, batch: usize, seconds: f64, mut body: impl FnMut() -> Result<f32>) -> Result<()> {
    (body()?, body()?);
    let (start, mut times) = (Instant::now(), Vec::new());
    while times.len() < 3 || start.elapsed().as_secs_f64() < seconds {
        let begin = Instant::now();
        let value = body()?;
        ensure!(value.is_finite(), "a result of {value}");
        times.push(begin.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    println!("candle {what} f32 b={batch} median {:.2} ms {:.1} img/s", median * 1e3, batch as f64 / median);
    Ok(())
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [what, batch, seconds] = arguments.as_slice() else { bail!("usage: peer-candle forward|train BATCH SECONDS") };
    let (batch, seconds) = (batch.parse()?, seconds.parse()?);
    let (variables, device) = (VarMap::new(), Device::Cpu);
    let network = ResNet18::new(VarBuilder::from_varmap(&variables, DType::F32, &device))?;
    let x = Tensor::randn(0f32, 1.0, (batch, 3, 224, 224), &device)?;
    let all: Vec<_> = variables.data().lock().expect("one thread").clone().into_iter().collect();
    if what == "forward" {
        // Plain tensors: nothing is kept for gradients.
        let tensors = all.into_iter().map(|(name, variable)| (name, variable.as_detached_tensor())).collect();
        let vb = VarBuilder::from_tensors(tensors, DType::F32, &device);
        let network = candle_transformers::models::resnet::resnet18(1000, vb)?;
        return measure(what, batch, seconds, || Ok(network.forward(&x)?.mean_all()?.to_scalar()?));
    }
    let trained = all.into_iter().filter(|(name, _)| !name.contains("running")).map(|(_, variable)| variable).collect();
    let adam = candle_nn::ParamsAdamW { lr: 1e-4, weight_decay: 0.0, ..Default::default() };
    let mut adam = candle_nn::AdamW::new(trained, adam)?;
    let labels: Vec<u32> = (0..batch as u32).map(|i| i % 1000).collect();
    let labels = Tensor::new(labels, &device)?;
    measure(what, batch, seconds, || {
        let loss = candle_nn::loss::cross_entropy(&network.forward_t(&x, true)?, &labels)?;
        adam.backward_step(&loss)?;
        Ok(loss.to_scalar()?)
    })
}
