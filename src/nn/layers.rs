//! Layers: parameters together with the operation that uses them.

use super::init;
use super::parameter::Parameter;
use crate::autograd;
use crate::cpu::conv::ConvShape;
use crate::error::Result;
use crate::ops::{self, BatchStatistics, Conv2dParams, FusedConv2d, Norm, NormBy};
use crate::tensor::{CpuBuffer, DType, Device, Tensor};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};

/// PyTorch's defaults.
const EPS: f32 = 1e-5;
const MOMENTUM: f32 = 0.1;

/// A fully connected layer.
pub struct Linear {
    /// `[out, in]`.
    pub weight: Arc<Parameter>,
    /// `[out]`.
    pub bias: Arc<Parameter>,
    packed: Made<ops::PackedLinear>,
}

impl Linear {
    /// Initialised as `torch.nn.Linear`: uniform within `1 / sqrt(in)`. `name` is the prefix of the parameters' names.
    pub fn new(name: &str, inputs: usize, outputs: usize, seed: u64) -> Self {
        let bound = 1.0 / (inputs as f32).sqrt();
        let uniform = |suffix: &str, shape: &[usize]| {
            let name = format!("{name}.{suffix}");
            let value = init::uniform(shape, bound, seed, &name);
            Arc::new(Parameter::new(name, value))
        };
        Linear {
            weight: uniform("weight", &[outputs, inputs]),
            bias: uniform("bias", &[outputs]),
            packed: Made::default(),
        }
    }

    /// `[N, in]` to `[N, out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (weight, bias) = (self.weight.tensor(), self.bias.tensor());
        let trained = autograd::is_enabled() && (weight.requires_grad() || bias.requires_grad());
        if trained || x.requires_grad() || x.device() != Device::Cpu {
            return ops::linear(x, &weight, Some(&bias));
        }
        let made_from = (version(&[&self.weight, &self.bias]), DType::F32);
        ops::packed_linear(x, &*self.packed.get(made_from, || ops::PackedLinear::new(&weight, &bias))?)
    }
}

/// What has been made of parameters, and from what.
struct Made<K>(Mutex<Option<(Origin, Arc<K>)>>);

/// The parameters' [`version`], and the type of activations.
type Origin = (u64, DType);

impl<K> Default for Made<K> {
    fn default() -> Self {
        Made(Mutex::new(None))
    }
}

impl<K> Made<K> {
    /// It, made again if it was made from something else.
    fn get(&self, from: Origin, make: impl FnOnce() -> Result<K>) -> Result<Arc<K>> {
        let mut made = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match &*made {
            Some((made_from, kernel)) if *made_from == from => Ok(kernel.clone()),
            _ => {
                let kernel = Arc::new(make()?);
                *made = Some((from, kernel.clone()));
                Ok(kernel)
            }
        }
    }
}

/// Changes whenever a parameter does: versions only grow, and so does their sum.
fn version(parameters: &[&Parameter]) -> u64 {
    parameters.iter().map(|p| p.version()).sum()
}

/// Batch normalisation with running statistics.
pub struct BatchNorm2d {
    /// Scale, `[C]`.
    pub weight: Arc<Parameter>,
    /// Shift, `[C]`.
    pub bias: Arc<Parameter>,
    /// Running mean, `[C]`.
    pub running_mean: Arc<Parameter>,
    /// Running unbiased variance, `[C]`.
    pub running_var: Arc<Parameter>,
    /// Batches that went into the running statistics.
    pub num_batches_tracked: AtomicI64,
    name: String,
    batch_statistics: AtomicBool,
}

impl BatchNorm2d {
    fn new(name: String, channels: usize) -> Self {
        let vector = |suffix: &str, value: f32| {
            Arc::new(Parameter::new(format!("{name}.{suffix}"), Tensor::full([channels], value)))
        };
        BatchNorm2d {
            weight: vector("weight", 1.0),
            bias: vector("bias", 0.0),
            running_mean: vector("running_mean", 0.0),
            running_var: vector("running_var", 1.0),
            num_batches_tracked: AtomicI64::new(0),
            batch_statistics: AtomicBool::new(false),
            name,
        }
    }

    /// Prefix of its tensors' names.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether training normalises by the batch and updates the running statistics, or uses the stored ones.
    pub fn use_batch_statistics(&self, batch: bool) {
        self.batch_statistics.store(batch, Ordering::Relaxed);
    }

    pub(super) fn takes_batch_statistics(&self, training: bool) -> bool {
        training && self.batch_statistics.load(Ordering::Relaxed)
    }

    /// Follows a batch's statistics, if they have been taken.
    fn follow(&self, statistics: Option<BatchStatistics>) -> Result<()> {
        if let Some(BatchStatistics { mean, variance, count }) = statistics {
            let unbiased = count as f32 / (count - 1) as f32;
            self.running_mean.blend(&mean, 1.0 - MOMENTUM, MOMENTUM)?;
            self.running_var.blend(&variance, 1.0 - MOMENTUM, MOMENTUM * unbiased)?;
            self.count_batch(true);
        }
        Ok(())
    }

    /// Counts a batch, if it changes the running statistics.
    pub(super) fn count_batch(&self, training: bool) {
        if self.takes_batch_statistics(training) {
            self.num_batches_tracked.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The affine map that stored statistics amount to.
    fn scale_and_shift(&self) -> Result<(Vec<f32>, Vec<f32>)> {
        let values = |p: &Parameter| p.tensor().to_f32_vec();
        let rstd = ops::reciprocal_deviation(&values(&self.running_var)?, EPS);
        let (gamma, beta, mean) = (values(&self.weight)?, values(&self.bias)?, values(&self.running_mean)?);
        Ok(ops::scale_and_shift(&gamma, &beta, &mean, &rstd))
    }
}

/// A convolution without bias and the batch norm after it, the unit that residual networks are made of.
pub struct ConvBn {
    /// Filters, `[O, KH, KW, I]`.
    pub weight: Arc<Parameter>,
    /// The norm after it.
    pub bn: BatchNorm2d,
    params: Conv2dParams,
    /// The two folded into one.
    fused: Made<FusedConv2d>,
}

impl ConvBn {
    /// Filters drawn as torchvision does (He et al., 2015, by fan-out), or, without a seed, of any value, for a file to set.
    /// `conv` and `bn` are prefixes of names; `shape` is `[O, KH, KW, I]`.
    pub fn new(conv: &str, bn: &str, shape: [usize; 4], params: Conv2dParams, seed: Option<u64>) -> Self {
        let name = format!("{conv}.weight");
        let std = (2.0 / (shape[0] * shape[1] * shape[2]) as f32).sqrt();
        let weight = match seed {
            Some(seed) => init::normal(&shape, std, seed, &name),
            None => Tensor::build(shape, |_: &mut [f32]| {}),
        };
        ConvBn {
            weight: Arc::new(Parameter::new(name, weight)),
            bn: BatchNorm2d::new(bn.to_string(), shape[0]),
            params,
            fused: Made::default(),
        }
    }

    /// Extents of the convolution of `n` images of `h` by `w`.
    pub fn shape(&self, n: usize, h: usize, w: usize) -> ConvShape {
        let [o, kh, kw, c] = self.weight.shape()[..] else { unreachable!("filters have four extents") };
        ConvShape { n, h, w, c, o, kh, kw, stride: self.params.stride, padding: self.params.padding }
    }

    /// The trained parameters.
    pub fn parameters(&self) -> [&Arc<Parameter>; 3] {
        [&self.weight, &self.bn.weight, &self.bn.bias]
    }

    /// `relu(bn(conv(x)) + residual)`, the last two if asked for: one kernel where nothing needs a gradient and the
    /// statistics are stored, else one operation with the norm apart.
    pub fn forward(&self, x: &Tensor, residual: Option<&Tensor>, relu: bool, training: bool) -> Result<Tensor> {
        let inputs_need = x.requires_grad() || residual.is_some_and(Tensor::requires_grad);
        if !inputs_need && self.is_fixed(training) {
            return ops::fused_conv2d(x, &*self.fused(x.dtype())?, residual, relu);
        }
        self.forward_apart(x, residual, relu, None, training)
    }

    /// With the norm apart from the filters, by the batch's statistics if it is told so, and pooled if asked for.
    fn forward_apart(
        &self,
        x: &Tensor,
        residual: Option<&Tensor>,
        relu: bool,
        pooling: Option<[usize; 3]>,
        training: bool,
    ) -> Result<Tensor> {
        let (bn, weight) = (&self.bn, self.weight.tensor());
        let (gamma, beta) = (&bn.weight.tensor(), &bn.bias.tensor());
        // Not taken where they are to change: they would be copied then.
        let stored = || [bn.running_mean.tensor(), bn.running_var.tensor()];
        let stored = (!bn.takes_batch_statistics(training)).then(stored);
        let by = stored.as_ref().map_or(NormBy::Batch, |[mean, variance]| NormBy::Stored(mean, variance));
        let how = Norm { gamma, beta, eps: EPS, residual, relu, pooling };
        let (y, statistics) = ops::conv2d_norm_act(x, &weight, self.params, by, how)?;
        bn.follow(statistics)?;
        Ok(y)
    }

    /// [`ConvBn::forward`] of a fixed layer on the CPU with residual and ReLU, to the elements of `y` from `first` on.
    pub(super) fn forward_into(&self, x: &Tensor, residual: &Tensor, y: &mut CpuBuffer, first: usize) -> Result<()> {
        ops::fused_conv2d_into(x, &*self.fused(x.dtype())?, Some(residual), true, y, first)
    }

    /// `max_pool2d(relu(bn(conv(x))))`, in one pass where [`ConvBn::forward`] is one kernel; `pooling` is the windows' extent, stride and
    /// padding.
    pub fn forward_max_pool(&self, x: &Tensor, pooling: [usize; 3], training: bool) -> Result<Tensor> {
        if !x.requires_grad() && self.is_fixed(training) {
            return ops::fused_conv2d_max_pool(x, &*self.fused(x.dtype())?, true, pooling);
        }
        self.forward_apart(x, None, true, Some(pooling), training)
    }

    /// Whether it is the same map for every picture, and nothing of it is trained.
    pub(super) fn is_fixed(&self, training: bool) -> bool {
        let trained = autograd::is_enabled() && self.parameters().iter().any(|p| p.is_trainable());
        !trained && !self.bn.takes_batch_statistics(training)
    }

    /// Makes what [`ConvBn::forward`] uses where the layer is fixed, for activations of a type.
    pub(super) fn prepare(&self, dtype: DType) -> Result<()> {
        self.fused(dtype).map(drop)
    }

    fn fused(&self, dtype: DType) -> Result<Arc<FusedConv2d>> {
        let bn = &self.bn;
        let version = version(&[&self.weight, &bn.weight, &bn.bias, &bn.running_mean, &bn.running_var]);
        self.fused.get((version, dtype), || {
            let (scale, shift) = bn.scale_and_shift()?;
            FusedConv2d::new(&self.weight.tensor(), &scale, &shift, self.params, dtype)
        })
    }
}
