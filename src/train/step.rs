//! One training step: forward, loss, backward, update.
//!
//! On the CPU a step is over when [`Trainer::step`] returns. On CUDA it is then under way: its loss and logits are read
//! later, by [`Trainer::settle`], so that the card never waits for the host; from the third step of a kind on, all its
//! launches are one captured graph.

use super::config::TrainConfig;
use super::ema::Ema;
use super::inputs::Input;
use super::metrics::Tally;
use super::mix::mix;
use super::placement::Placement;
use crate::autograd::{Gradients, on_a_worker};
use crate::cuda::optim::Tables;
use crate::cuda::{Arena, Graph, context};
use crate::data::{Augment, generator};
use crate::error::{Error, Result};
use crate::nn::{ResNet18, Stage};
use crate::ops::{self, CrossEntropy, cross_entropy};
use crate::optim::Optimizer;
use crate::tensor::{Device, Tensor};
use std::sync::Arc;

/// Index that sets the generators of batches apart from those of pictures.
const BATCHES: usize = 1 << 31;
/// Steps on a card whose outcome may be unread.
const UNREAD_STEPS: usize = 16;
/// Steps of a kind before it is captured: they load the kernels and make the optimiser's state.
const STEPS_BEFORE_CAPTURE: usize = 2;

/// What a step needs to know about its place in the run.
#[derive(Clone, Copy)]
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
    pub placement: Placement,
    unread: Vec<Unread>,
    graph: Option<StepGraph>,
    /// The last step's kind, and how many of it have come in a row.
    recent: (StepKind, usize),
}

/// Steps with the same launches: extents of the input, stage, and accumulation.
type StepKind = (Vec<usize>, Option<Stage>, usize);

/// The outcome of a step that has not been read.
struct Unread {
    place: Place,
    loss: Tensor,
    logits: Vec<Tensor>,
    labels: Tensor,
}

/// What a step gives: the mean loss, and the logits of each part.
struct Learnt {
    loss: Tensor,
    logits: Vec<Tensor>,
}

/// A captured step.
struct StepGraph {
    kind: StepKind,
    graph: Graph,
    /// Where a replay reads its batch and leaves its results.
    x: Tensor,
    labels: Tensor,
    learnt: Learnt,
    /// Where the network's values were: elsewhere, the graph is of no use.
    addresses: Vec<u64>,
    _tables: Option<Arc<Tables>>,
    /// Last, so that what lies in it is dropped before it.
    _arena: Arena,
}

/// A step whose loss is no number.
pub struct Diverged {
    pub place: Place,
    pub loss: f32,
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
    pub fn new(
        network: ResNet18,
        optimizer: Optimizer,
        ema: Option<Ema>,
        criterion: CrossEntropy,
        placement: Placement,
    ) -> Self {
        Trainer {
            network,
            optimizer,
            ema,
            criterion,
            placement,
            unread: Vec::new(),
            graph: None,
            recent: ((Vec::new(), None, 0), 0),
        }
    }

    /// Learns from a batch. If its loss is not finite, nothing is changed; [`Trainer::settle`] tells.
    pub fn step(&mut self, config: &TrainConfig, input: Input, labels: &Tensor, place: Place) -> Result<()> {
        let pictures = labels.numel();
        self.run(config, input, labels, place).map_err(|e| e.with_batch(pictures))
    }

    fn run(&mut self, config: &TrainConfig, input: Input, labels: &Tensor, place: Place) -> Result<()> {
        let (mut x, stage) = (input.tensor, input.stage);
        let mut other = None;
        if config.augment == Augment::Strong && stage == Stage::Stem && labels.numel() > 1 {
            let mixed = mix(&x, labels, &mut generator(config.seed, place.epoch, BATCHES + place.batch))?;
            x = mixed.images;
            other = Some((mixed.labels, mixed.share));
        }
        let x = self.placement.place(&x)?;
        let learnt = match self.placement.device {
            Device::Cpu => on_a_worker(|| self.learn(config, &x, stage, labels, other, place.factor))?,
            Device::Cuda => self.learn_on_cuda(config, x, stage, labels, other, place.factor)?,
        };
        if let Some(ema) = &mut self.ema {
            ema.update(place.step + 1)?;
        }
        self.unread.push(Unread { place, loss: learnt.loss, logits: learnt.logits, labels: labels.clone() });
        Ok(())
    }

    /// Adds the outcomes of steps to `tally`: of all of them if `all`, or if there are many. Stops at a loss that is no
    /// number.
    pub fn settle(&mut self, tally: &mut Tally, all: bool) -> Result<Option<Diverged>> {
        if !all && self.placement.device == Device::Cuda && self.unread.len() < UNREAD_STEPS {
            return Ok(None);
        }
        for Unread { place, loss, logits, labels } in self.unread.drain(..) {
            let loss = loss.item()?;
            if !loss.is_finite() {
                return Ok(Some(Diverged { place, loss }));
            }
            let logits: Vec<Vec<f32>> = logits.iter().map(Tensor::to_f32_vec).collect::<Result<_>>()?;
            tally.add(loss, &logits.concat(), labels.as_slice());
        }
        Ok(None)
    }

    /// Forward, backward, update. On CUDA the rates have been set, and the update looks at the loss itself.
    fn learn(
        &mut self,
        config: &TrainConfig,
        x: &Tensor,
        stage: Stage,
        labels: &Tensor,
        other: Option<(Tensor, f32)>,
        factor: f64,
    ) -> Result<Learnt> {
        let total = labels.numel();
        let mut gradients = Gradients::default();
        let mut loss_sum: Option<Tensor> = None;
        let mut all_logits = Vec::new();
        for rows in config.parts(total) {
            let share = rows.len() as f32 / total as f32;
            let (x, labels) = (x.rows(rows.clone())?, labels.rows(rows.clone())?);
            let second = other.as_ref().map(|(l, s)| Ok::<_, Error>((l.rows(rows.clone())?, *s))).transpose()?;
            let logits = self.network.suffix(&x, stage, true)?;
            let loss = mixed_loss(&logits, &labels, second.as_ref().map(|(l, s)| (l, *s)), &self.criterion)?;
            let loss = if rows.len() == total { loss } else { ops::scale(&loss, share)? };
            loss_sum = Some(match loss_sum {
                Some(sum) => ops::add(&sum, &loss.detach())?,
                None => loss.detach(),
            });
            gradients.accumulate(loss.backward()?)?;
            all_logits.push(logits.detach());
        }
        let loss = loss_sum.ok_or_else(|| Error::config("an empty batch", "report this"))?;
        let on_cuda = loss.device() == Device::Cuda;
        if on_cuda || loss.item()?.is_finite() {
            if let Some(max) = config.clip_norm {
                gradients.clip_norm(max)?;
            }
            match on_cuda {
                true => self.optimizer.update_on_cuda(&gradients, Some(&loss))?,
                false => self.optimizer.step(&gradients, factor)?,
            }
        }
        Ok(Learnt { loss, logits: all_logits })
    }

    fn learn_on_cuda(
        &mut self,
        config: &TrainConfig,
        x: Tensor,
        stage: Stage,
        labels: &Tensor,
        other: Option<(Tensor, f32)>,
        factor: f64,
    ) -> Result<Learnt> {
        let labels = labels.to_device(Device::Cuda)?;
        let other = other.map(|(l, s)| Ok::<_, Error>((l.to_device(Device::Cuda)?, s))).transpose()?;
        self.optimizer.prepare(|parameter| parameter.is_trainable())?;
        self.optimizer.count_step();
        self.optimizer.set_rates(factor)?;
        let kind = (x.dims().to_vec(), Some(stage), config.accumulate);
        self.recent.1 = if self.recent.0 == kind { self.recent.1 + 1 } else { 1 };
        self.recent.0 = kind.clone();
        // A mixture's share differs from batch to batch, and a graph's numbers do not.
        let as_before = self.graph.as_ref().is_some_and(|graph| graph.kind == kind);
        if other.is_some() || (!as_before && self.recent.1 <= STEPS_BEFORE_CAPTURE) {
            return self.learn(config, &x, stage, &labels, other, factor);
        }
        let addresses = self.network.addresses_for_update(stage)?;
        let captured = match self.graph.take() {
            Some(graph) if as_before && graph.addresses == addresses => {
                graph.x.copy_on_cuda(&x)?;
                graph.labels.copy_on_cuda(&labels)?;
                self.network.count_captured_step(stage);
                graph
            }
            stale => {
                drop(stale);
                let (graph, arena, learnt) =
                    context()?.capture(|| self.learn(config, &x, stage, &labels, None, factor))?;
                let _tables = self.optimizer.tables();
                StepGraph { kind, graph, x, labels, learnt, addresses, _tables, _arena: arena }
            }
        };
        context()?.backend().replay(&captured.graph)?;
        let copy = |tensor: &Tensor| tensor.duplicate_on_cuda();
        let logits = captured.learnt.logits.iter().map(copy).collect::<Result<_>>()?;
        let learnt = Learnt { loss: copy(&captured.learnt.loss)?, logits };
        self.graph = Some(captured);
        Ok(learnt)
    }
}
