//! One training step: forward, loss, backward, update.

use super::config::TrainConfig;
use super::ema::Ema;
use super::inputs::Input;
use super::metrics::Tally;
use super::mix::mix;
use crate::autograd::Gradients;
use crate::data::{Augment, generator};
use crate::error::Result;
use crate::nn::{ResNet18, Stage};
use crate::ops::{self, CrossEntropy, cross_entropy};
use crate::optim::Optimizer;
use crate::tensor::Tensor;

/// Index that sets the generators of batches apart from those of pictures.
const BATCHES: usize = 1 << 31;

/// What a step needs to know about its place in the run.
pub struct Place {
    /// From 1.
    pub epoch: usize,
    /// Batch within the epoch, from 0.
    pub batch: usize,
    /// Step within the run, from 0.
    pub step: usize,
    /// What the schedule makes of the rates.
    pub factor: f64,
}

/// What training changes.
pub struct Trainer {
    pub network: ResNet18,
    pub optimizer: Optimizer,
    pub ema: Option<Ema>,
    pub criterion: CrossEntropy,
}

/// The loss of a batch for two sets of labels, `share` of the first.
fn mixed_loss(logits: &Tensor, labels: &Tensor, other: Option<(&Tensor, f32)>, how: &CrossEntropy) -> Result<Tensor> {
    let loss = cross_entropy(logits, labels, how)?;
    match other {
        None => Ok(loss),
        Some((other, share)) => {
            let second = cross_entropy(logits, other, how)?;
            ops::add(&ops::scale(&loss, share)?, &ops::scale(&second, 1.0 - share)?)
        }
    }
}

impl Trainer {
    /// Learns from a batch. Returns its mean loss; if that is not finite, nothing has been changed.
    pub fn step(
        &mut self,
        config: &TrainConfig,
        input: Input,
        labels: &Tensor,
        place: &Place,
        tally: &mut Tally,
    ) -> Result<f32> {
        let mut x = input.tensor;
        let mut other = None;
        if config.augment == Augment::Strong && input.stage == Stage::Stem && labels.numel() > 1 {
            let mixed = mix(&x, labels, &mut generator(config.seed, place.epoch, BATCHES + place.batch))?;
            x = mixed.images;
            other = Some((mixed.labels, mixed.share));
        }
        let total = labels.numel();
        let part = total.div_ceil(config.accumulate);
        let mut gradients = Gradients::default();
        let mut loss_sum = 0.0;
        let mut all_logits = Vec::new();
        for start in (0..total).step_by(part) {
            let rows = start..total.min(start + part);
            let share = rows.len() as f32 / total as f32;
            let (x, labels) = (slice(&x, &rows)?, slice_labels(labels, &rows)?);
            let second =
                other.as_ref().map(|(l, s)| Ok::<_, crate::Error>((slice_labels(l, &rows)?, *s))).transpose()?;
            let logits = self.network.suffix(&x, input.stage, true)?;
            let loss = mixed_loss(&logits, &labels, second.as_ref().map(|(l, s)| (l, *s)), &self.criterion)?;
            loss_sum += loss.item()? * share;
            let loss = if rows.len() == total { loss } else { ops::scale(&loss, share)? };
            gradients.accumulate(loss.backward()?);
            all_logits.extend_from_slice(logits.as_slice::<f32>());
        }
        if !loss_sum.is_finite() {
            return Ok(loss_sum);
        }
        if let Some(max) = config.clip_norm {
            gradients.clip_norm(max);
        }
        self.optimizer.step(&gradients, place.factor);
        if let Some(ema) = &mut self.ema {
            ema.update(place.step + 1);
        }
        tally.add(loss_sum, &all_logits, labels.as_slice());
        Ok(loss_sum)
    }
}

/// Rows of a tensor along its first extent; the tensor itself if they are all of them.
fn slice(x: &Tensor, rows: &std::ops::Range<usize>) -> Result<Tensor> {
    if rows.len() == x.dims()[0] {
        return Ok(x.clone());
    }
    let row = x.numel() / x.dims()[0];
    let dims = [&[rows.len()], &x.dims()[1..]].concat();
    Tensor::from_slice(&x.as_slice::<f32>()[rows.start * row..rows.end * row], dims)
}

fn slice_labels(labels: &Tensor, rows: &std::ops::Range<usize>) -> Result<Tensor> {
    Tensor::from_slice(&labels.as_slice::<i64>()[rows.clone()], [rows.len()])
}
