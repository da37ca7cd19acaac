//! Cross-entropy on the device.

use super::backend::Extents;
use super::launch::{Kernel, address, address_or_null, device, empty};
use super::source::LOSS;
use crate::error::Result;
use crate::tensor::{DType, Tensor};
use bytemuck::{Pod, Zeroable};

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct LossParams {
    logits: u64,
    labels: u64,
    class_weights: u64,
    log_p: u64,
    losses: u64,
    weights: u64,
    rows: i32,
    classes: i32,
    smoothing: f32,
    unused: i32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct LossSumParams {
    losses: u64,
    weights: u64,
    loss: u64,
    factor: u64,
    rows: i32,
    mean: i32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct LossBackwardParams {
    log_p: u64,
    labels: u64,
    class_weights: u64,
    factor: u64,
    dloss: u64,
    dlogits: u64,
    rows: i32,
    classes: i32,
    smoothing: f32,
    unused: i32,
}

/// Labels and what is made of them, on the device.
pub struct Targets {
    /// `[N]`, I64.
    pub labels: Tensor,
    /// `[classes]`.
    pub class_weights: Option<Tensor>,
    /// Share of each target spread over all classes.
    pub smoothing: f32,
}

/// The outcome of [`forward`].
pub struct Loss {
    /// The mean or the sum, `[]`.
    pub value: Tensor,
    /// `[N, classes]`.
    pub log_p: Tensor,
    /// What each row's loss was multiplied with, `[1]`.
    pub factor: Tensor,
}

/// The loss of `logits` `[N, classes]`: the mean weighted by the labels' classes, or the sum.
pub fn forward(logits: &Tensor, targets: &Targets, mean: bool) -> Result<Loss> {
    let (context, &[rows, classes]) = (device(), logits.dims()) else { unreachable!("logits are a matrix") };
    let log_p = empty(&[rows, classes], DType::F32)?;
    let (losses, weights) = (empty(&[rows], DType::F32)?, empty(&[rows], DType::F32)?);
    let params = LossParams {
        logits: address(logits),
        labels: address(&targets.labels),
        class_weights: address_or_null(targets.class_weights.as_ref()),
        log_p: address(&log_p),
        losses: address(&losses),
        weights: address(&weights),
        rows: rows as i32,
        classes: classes as i32,
        smoothing: targets.smoothing,
        unused: 0,
    };
    context.launch(Kernel(LOSS, "cross_entropy"), [rows.div_ceil(8) as u32, 1, 1], &params)?;
    let (value, factor) = (empty(&[], DType::F32)?, empty(&[1], DType::F32)?);
    let params = LossSumParams {
        losses: address(&losses),
        weights: address(&weights),
        loss: address(&value),
        factor: address(&factor),
        rows: rows as i32,
        mean: mean.into(),
    };
    let extents = Extents { grid: [1, 1, 1], threads: 32, shared: 0 };
    context.launch_with(Kernel(LOSS, "cross_entropy_sum"), extents, &params)?;
    Ok(Loss { value, log_p, factor })
}

/// Gradient to the logits, times `dloss` `[]`.
pub fn backward(log_p: &Tensor, factor: &Tensor, targets: &Targets, dloss: &Tensor) -> Result<Tensor> {
    let dlogits = empty(log_p.dims(), DType::F32)?;
    let (rows, classes) = (log_p.dims()[0], log_p.dims()[1]);
    let params = LossBackwardParams {
        log_p: address(log_p),
        labels: address(&targets.labels),
        class_weights: address_or_null(targets.class_weights.as_ref()),
        factor: address(factor),
        dloss: address(dloss),
        dlogits: address(&dlogits),
        rows: rows as i32,
        classes: classes as i32,
        smoothing: targets.smoothing,
        unused: 0,
    };
    device().launch(Kernel(LOSS, "cross_entropy_backward"), [rows.div_ceil(8) as u32, 1, 1], &params)?;
    Ok(dlogits)
}
