//! A run: data, network, optimiser, epochs, files; from the start or from a checkpoint.

use super::checkpoint::{self, Checkpoint, Partial, Progress};
use super::config::{Balance, BnMode, TrainConfig};
use super::ema::Ema;
use super::inputs::{Part, Split};
use super::metrics::{Confusion, Tally};
use super::placement::Placement;
use super::record::{Record, is_better};
use super::run_folder::{RunFolder, read_config};
use super::start::{balanced_weights, fingerprint, load};
use super::step::{Diverged, Place, Trainer};
use super::stop::Stop;
use super::{Epoch, Observer, Outcome};
use crate::autograd::no_grad;
use crate::data::{Augment, Dataset, Preprocess, Sample, generator};
use crate::error::{Error, Result};
use crate::nn::{ResNet18, Stage};
use crate::ops::{CrossEntropy, cross_entropy};
use crate::optim::{Optimizer, Schedule};
use crate::tensor::Device;
use rand::RngExt;
use rand::seq::SliceRandom;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// How a run is steered from outside.
#[derive(Clone, Copy)]
pub struct Control<'a> {
    /// Once true, the run saves itself and ends with [`Error::Interrupted`].
    pub stop: Option<&'a AtomicBool>,
    /// How long a run goes on before it writes its models and a checkpoint again. A head on cached features takes
    /// milliseconds an epoch, and a model takes longer than that to write.
    pub write_every: Duration,
    /// Where to compute.
    pub device: Device,
}

impl Default for Control<'_> {
    fn default() -> Self {
        Control { stop: None, write_every: Duration::from_secs(10), device: Device::Cpu }
    }
}

/// Trains as `config` says and leaves everything in `out`.
pub fn fit(config: &TrainConfig, out: &Path, control: Control, observer: &mut dyn Observer) -> Result<Outcome> {
    let start = Instant::now();
    let stop = Stop::new(control.stop, out);
    let (mut run, preprocess) = Run::new(config, control.device, stop, observer, load)?;
    // It may go on from elsewhere.
    run.record.config = config.with_absolute_paths();
    let folder = RunFolder::create(out, &run.record.config, &run.record.data.classes, &preprocess)?;
    run.train(folder, start, control, observer)
}

/// Goes on with the run in `folder` where its last checkpoint left it, and ends as if it had never stopped.
pub fn resume(folder: &Path, control: Control, observer: &mut dyn Observer) -> Result<Outcome> {
    let start = Instant::now();
    let path = folder.join(checkpoint::FILE);
    let saved = match path.exists() {
        true => Some(Checkpoint::open(&path)?),
        false => None,
    };
    if let Some(saved) = saved.as_ref().filter(|saved| saved.progress.finished) {
        observer.note(&format!("{}: the run is complete", folder.display()));
        return saved.progress.outcome(&saved.data.classes, folder.join("model.safetensors"), start);
    }
    let (settings, preprocess) = read_config(folder)?;
    let config = saved.as_ref().map_or(&settings, |saved| &saved.config);
    let stop = Stop::new(control.stop, folder);
    if saved.is_none() {
        observer.note("no checkpoint yet, the run begins anew");
    }
    let network = |config: &TrainConfig, names: &[String], observer: &mut dyn Observer| match saved {
        // All values come from the checkpoint: the file of weights that the run began with is not needed any more.
        Some(_) => Ok((ResNet18::without_values(names.len(), config.seed), preprocess)),
        None => load(config, names, observer),
    };
    let (mut run, preprocess) = Run::new(config, control.device, stop, observer, network)?;
    if let Some(saved) = saved {
        if saved.data != run.record.data {
            let problem = "the pictures are not those that the run began with";
            return Err(Error::data(&saved.config.data, problem, "restore them, or start a new run"));
        }
        saved.restore(&run.trainer.network, &mut run.trainer.optimizer, run.trainer.ema.as_mut())?;
        let batch = saved.progress.batch;
        observer.note(&format!("goes on at epoch {}, batch {}", saved.progress.history.len() + 1, batch + 1));
        run.record.progress = saved.progress;
    }
    let folder = RunFolder::reopen(folder, &run.record.data.classes, &preprocess);
    run.train(folder, start, control, observer)
}

struct Run<'a> {
    record: Record,
    trainer: Trainer,
    train: Split<'a>,
    val: Split<'a>,
    stop: Stop<'a>,
    schedule: Schedule,
    /// The stage from which the caches are made; none before the first.
    cut: Option<Stage>,
}

impl<'a> Run<'a> {
    /// `load` gives the network for classes of these names, and the preprocessing.
    fn new(
        config: &TrainConfig,
        device: Device,
        stop: Stop<'a>,
        observer: &mut dyn Observer,
        load: impl FnOnce(&TrainConfig, &[String], &mut dyn Observer) -> Result<(ResNet18, Preprocess)>,
    ) -> Result<(Self, Preprocess)> {
        config.check()?;
        let placement = Placement::new(device, config.precision)?;
        let dataset = Dataset::open(&config.data, config.val_split, config.seed)?;
        dataset.warnings.iter().for_each(|line| observer.note(line));
        let (classes, train, val) = (dataset.classes.len(), dataset.train.len(), dataset.val.len());
        observer.note(&format!("{classes} classes, {train} training and {val} validation pictures"));
        config.check_parts(train)?;
        let (network, preprocess) = load(config, &dataset.classes, observer)?;
        placement.move_network(&network)?;
        let steps_per_epoch = train.div_ceil(config.batch_size);
        let data = fingerprint(&dataset);
        let split = |part: Part, samples: Vec<Sample>, augment: Augment| {
            Split::new(part, samples, &preprocess, augment, config.seed, placement, stop.clone())
        };
        let train = split(Part::Training, dataset.train, config.augment);
        let val = split(Part::Validation, dataset.val, Augment::None);
        let criterion = CrossEntropy {
            label_smoothing: config.label_smoothing,
            class_weights: match config.class_weights {
                Balance::None => None,
                Balance::Balanced => Some(balanced_weights(train.labels(), classes)?),
            },
            ..CrossEntropy::default()
        };
        let optimizer = Optimizer::new(config.groups(&network), config.algorithm());
        let ema = config.ema.map(|decay| Ema::new(&network, decay));
        let run = Run {
            trainer: Trainer::new(network, optimizer, ema, criterion, placement),
            train,
            val,
            stop,
            schedule: Schedule {
                kind: config.schedule_kind(steps_per_epoch),
                warm_up: (config.warmup_epochs * steps_per_epoch as f64).round() as usize,
                total: config.epochs * steps_per_epoch,
            },
            record: Record { config: config.clone(), data, progress: Progress::default() },
            cut: None,
        };
        Ok((run, preprocess))
    }

    fn train(
        mut self,
        mut folder: RunFolder,
        start: Instant,
        control: Control,
        observer: &mut dyn Observer,
    ) -> Result<Outcome> {
        let ended = self.train_epochs(&mut folder, control, observer);
        if let Err(Error::Interrupted { .. }) = ended {
            self.record.write(&mut folder, &self.trainer)?;
        }
        ended?;
        self.record.progress.finished = true;
        self.record.write(&mut folder, &self.trainer)?;
        self.record.progress.outcome(&self.record.data.classes, folder.model(), start)
    }

    fn train_epochs(&mut self, folder: &mut RunFolder, control: Control, observer: &mut dyn Observer) -> Result<()> {
        while !self.record.is_over(observer) {
            let number = self.record.progress.history.len() + 1;
            self.set_cut(number, observer)?;
            let began = Instant::now();
            let earlier = self.record.progress.partial.seconds;
            let tally = self.train_epoch(folder, number, began, control, observer)?;
            let trained = began.elapsed().as_secs_f64() + earlier;
            let (val, confusion) = self.validate(observer)?;
            self.check_finite(folder, number, &val)?;
            let epoch = Epoch {
                epoch: number,
                epochs: self.record.config.epochs,
                train_loss: tally.mean_loss().unwrap_or(f64::NAN),
                train_accuracy: tally.accuracy().unwrap_or(f64::NAN),
                val_loss: val.mean_loss(),
                val_accuracy: val.accuracy(),
                images_per_second: tally.count as f64 / trained,
                seconds: began.elapsed().as_secs_f64() + earlier,
            };
            self.finish_epoch(folder, epoch, confusion, control)?;
            observer.epoch(&epoch);
        }
        Ok(())
    }

    /// An error if the last update has left a network that is of no use: no later step would tell.
    fn check_finite(&self, folder: &mut RunFolder, number: usize, val: &Tally) -> Result<()> {
        let problem = match val.mean_loss() {
            Some(loss) if !loss.is_finite() => format!("the validation loss is {loss} after epoch {number}"),
            None if !self.trainer.network.is_finite()? => format!("the network is not finite after epoch {number}"),
            _ => return Ok(()),
        };
        Err(self.record.diverged(folder, format!("{problem} with a rate of {:e}", self.record.config.lr)))
    }

    /// Freezes and caches for an epoch, if that is not as it was.
    fn set_cut(&mut self, number: usize, observer: &mut dyn Observer) -> Result<()> {
        let cut = self.record.config.cut(number);
        if self.cut == Some(cut) {
            return Ok(());
        }
        self.cut = Some(cut);
        let (config, network) = (&self.record.config, &self.trainer.network);
        network.set_trainable(|stage| stage >= cut);
        network.use_batch_statistics(|stage| stage >= cut || config.bn == BnMode::Batch);
        let mut budget = config.cache_mb << 20;
        let train = self.train.prepare(network, cut, config, &mut budget, observer)?;
        let val = self.val.prepare(network, cut, config, &mut budget, observer)?;
        let kept = if train == val || self.val.len() == 0 { train.to_string() } else { format!("{train} and {val}") };
        let trained = match cut {
            Stage::Head => "the head".to_string(),
            Stage::Stem => "the whole network".to_string(),
            layer => format!("{layer:?} and above").to_lowercase(),
        };
        observer.note(&format!("training {trained}, keeping {kept} in memory"));
        Ok(())
    }

    /// Pictures of an epoch in their order: shuffled, or drawn so that every class is as likely.
    fn order(&self, number: usize) -> Vec<usize> {
        let config = &self.record.config;
        let mut rng = generator(config.seed, 0, number);
        let mut order: Vec<usize> = (0..self.train.len()).collect();
        if config.sampling == Balance::None {
            order.shuffle(&mut rng);
            return order;
        }
        let mut by_class = std::collections::BTreeMap::<usize, Vec<usize>>::new();
        self.train.labels().enumerate().for_each(|(i, label)| by_class.entry(label).or_default().push(i));
        let classes: Vec<Vec<usize>> = by_class.into_values().collect();
        order.iter_mut().for_each(|i| {
            let class = &classes[rng.random_range(0..classes.len())];
            *i = class[rng.random_range(0..class.len())];
        });
        order
    }

    fn train_epoch(
        &mut self,
        folder: &mut RunFolder,
        number: usize,
        began: Instant,
        control: Control,
        observer: &mut dyn Observer,
    ) -> Result<Tally> {
        let order = self.order(number);
        let Run { record, trainer, train, schedule, stop, .. } = self;
        let batch_size = record.config.batch_size;
        let steps = order.len().div_ceil(batch_size);
        let earlier = record.progress.partial;
        let mut tally = earlier.tally();
        let rest = &order[(record.progress.batch * batch_size).min(order.len())..];
        train.for_each_batch(rest, batch_size, number, observer, "training", |given| {
            let batch = record.progress.batch;
            let step = (number - 1) * steps + batch;
            if let Some((input, labels)) = given {
                let place = Place { epoch: number, batch, step, factor: schedule.factor(step) };
                trainer.step(&record.config, input, &labels, place)?;
            }
            record.progress.batch += 1;
            let go_on = stop.check();
            let over = record.progress.batch >= steps;
            let write = folder.is_due(control.write_every) && !over;
            if let Some(Diverged { place, loss }) = trainer.settle(&mut tally, write || over || go_on.is_err())? {
                let rate = record.config.lr * place.factor;
                let [step, batch] = [place.step + 1, place.batch + 1];
                let place = format!("step {step} (epoch {number}, batch {batch})");
                return Err(record.diverged(folder, format!("the loss is {loss} at {place} with a rate of {rate:e}")));
            }
            record.progress.partial = Partial::new(&tally, earlier.seconds + began.elapsed().as_secs_f64());
            go_on?;
            if write { record.write(folder, trainer) } else { Ok(()) }
        })?;
        Ok(tally)
    }

    /// Mean loss, accuracy and confusion over the validation pictures, of the averaged network if there is one.
    fn validate(&mut self, observer: &mut dyn Observer) -> Result<(Tally, Confusion)> {
        let mut tally = Tally::default();
        let mut confusion = Confusion::new(self.record.data.classes.len());
        if let Some(ema) = &mut self.trainer.ema {
            ema.swap()?;
        }
        let (network, placement, stop) = (&self.trainer.network, self.trainer.placement, &self.stop);
        let order: Vec<usize> = (0..self.val.len()).collect();
        let result =
            self.val.for_each_batch(&order, self.record.config.batch_size, 0, observer, "validation", |given| {
                stop.check()?;
                let Some((input, labels)) = given else { return Ok(()) };
                let x = placement.place(&input.tensor)?;
                let logits = no_grad(|| network.suffix(&x, input.stage, false))?;
                let loss = cross_entropy(&logits, &labels, &CrossEntropy::default())?.item()?;
                let logits = logits.to_f32_vec()?;
                tally.add(loss, &logits, labels.as_slice());
                confusion.add(&logits, labels.as_slice());
                Ok(())
            });
        if let Some(ema) = &mut self.trainer.ema {
            ema.swap()?;
        }
        result.map(|()| (tally, confusion))
    }

    fn finish_epoch(
        &mut self,
        folder: &mut RunFolder,
        epoch: Epoch,
        confusion: Confusion,
        control: Control,
    ) -> Result<()> {
        let Run { record, trainer, train, val, .. } = self;
        let progress = &mut record.progress;
        let best = progress.best.map(|i| progress.history[i]);
        let improved = best.is_none_or(|best| is_better(&epoch, &best));
        progress.history.push(epoch);
        progress.batch = 0;
        progress.partial = Partial::default();
        if improved {
            progress.best = Some(progress.history.len() - 1);
            progress.confusion = confusion;
        }
        for picture in train.skipped().iter().chain(val.skipped()) {
            if !progress.skipped.contains(picture) {
                progress.skipped.push(picture.clone());
            }
        }
        // What is kept is the averaged network, if there is one.
        if let Some(ema) = &mut trainer.ema {
            ema.swap()?;
        }
        folder.record(epoch, || trainer.network.snapshot(), improved);
        if let Some(ema) = &mut trainer.ema {
            ema.swap()?;
        }
        if folder.is_due(control.write_every) && epoch.epoch < epoch.epochs {
            record.write(folder, trainer)
        } else {
            Ok(())
        }
    }
}
