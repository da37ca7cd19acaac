//! A run: data, network, optimiser, epochs, files; from the start or from a checkpoint.

use super::checkpoint::{self, Checkpoint, Fingerprint, Partial, Progress};
use super::config::{Balance, BnMode, TrainConfig, Weights};
use super::ema::Ema;
use super::inputs::Split;
use super::metrics::{Confusion, Tally};
use super::model::{classes, preprocess};
use super::placement::Placement;
use super::record::{Record, is_better};
use super::run_folder::{RunFolder, read_config};
use super::step::{Diverged, Place, Trainer};
use super::{Epoch, Observer, Outcome};
use crate::autograd::no_grad;
use crate::data::{Augment, Dataset, Preprocess, generator};
use crate::error::{Error, Result};
use crate::nn::{ResNet18, Stage};
use crate::ops::{CrossEntropy, cross_entropy};
use crate::optim::{Optimizer, Schedule};
use crate::tensor::{Device, Tensor};
use crate::weights::WeightsFile;
use rand::RngExt;
use rand::seq::SliceRandom;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
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
    let (run, classes, preprocess) = Run::new(config, control.device, observer)?;
    let folder = RunFolder::create(out, config, &classes, &preprocess)?;
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
    let config = match &saved {
        Some(saved) => saved.config.clone(),
        None => read_config(folder)?,
    };
    if let Some(saved) = saved.as_ref().filter(|saved| saved.progress.finished) {
        observer.note(&format!("{}: the run is complete", folder.display()));
        return saved.progress.outcome(&saved.data.classes, folder.join("model.safetensors"), start);
    }
    let (mut run, classes, preprocess) = Run::new(&config, control.device, observer)?;
    match saved {
        None => observer.note("no checkpoint yet, the run begins anew"),
        Some(saved) => {
            if saved.data != run.record.data {
                let problem = "the pictures are not those that the run began with";
                return Err(Error::data(&config.data, problem, "restore them, or start a new run"));
            }
            saved.restore(&run.trainer.network, &mut run.trainer.optimizer, run.trainer.ema.as_mut())?;
            let batch = saved.progress.batch;
            observer.note(&format!("goes on at epoch {}, batch {}", saved.progress.history.len() + 1, batch + 1));
            run.record.progress = saved.progress;
        }
    }
    run.train(RunFolder::reopen(folder, &classes, &preprocess), start, control, observer)
}

/// The network with a head for `names`, and the preprocessing that its file and the settings ask for.
fn load(config: &TrainConfig, names: &[String], observer: &mut dyn Observer) -> Result<(ResNet18, Preprocess)> {
    let mut result = Preprocess { exif: config.exif, ..Preprocess::imagenet(config.image_size) };
    let path = match &config.weights {
        Weights::Random => {
            observer.note("random weights: the backbone is untrained");
            return Ok((ResNet18::new(names.len(), config.seed), result));
        }
        Weights::File(path) => path,
    };
    let file = WeightsFile::open(path)?;
    let stored = preprocess(&file)?;
    (result.mean, result.std) = (stored.mean, stored.std);
    // A head is kept only if it is for these very classes: a run goes on from an earlier one.
    let same = classes(&file)?.is_some_and(|stored| stored == names);
    if same && ResNet18::classes_in(&file) == Some(names.len()) {
        observer.note(&format!("{}: kept its head, which is for the same classes", path.display()));
        return Ok((ResNet18::load(&file)?, result));
    }
    let network = ResNet18::load_backbone(&file, names.len(), config.seed)?;
    let old = match ResNet18::classes_in(&file) {
        Some(found) => format!("fc for {found} classes replaced by a"),
        None => "no usable fc in it, a".to_string(),
    };
    observer.note(&format!("{}: {old} new head for {}", path.display(), names.len()));
    Ok((network, result))
}

/// Labels and names of the pictures, by FNV-1a.
fn fingerprint(dataset: &Dataset) -> Fingerprint {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let mut add = |bytes: &[u8]| {
        bytes.iter().for_each(|&b| hash = (hash ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    };
    for sample in dataset.train.iter().chain(&dataset.val) {
        add(&sample.label.to_le_bytes());
        add(sample.path.file_name().unwrap_or_default().as_encoded_bytes());
    }
    add(&dataset.train.len().to_le_bytes());
    Fingerprint { classes: dataset.classes.clone(), hash: format!("{hash:016x}") }
}

struct Run {
    record: Record,
    trainer: Trainer,
    train: Split,
    val: Split,
    schedule: Schedule,
    /// The stage from which the caches are made; none before the first.
    cut: Option<Stage>,
}

impl Run {
    fn new(
        config: &TrainConfig,
        device: Device,
        observer: &mut dyn Observer,
    ) -> Result<(Self, Vec<String>, Preprocess)> {
        config.check()?;
        let placement = Placement::new(device, config.precision)?;
        let dataset = Dataset::open(&config.data, config.val_split, config.seed)?;
        dataset.warnings.iter().for_each(|line| observer.note(line));
        let (classes, train, val) = (dataset.classes.len(), dataset.train.len(), dataset.val.len());
        observer.note(&format!("{classes} classes, {train} training and {val} validation pictures"));
        let (network, preprocess) = load(config, &dataset.classes, observer)?;
        placement.move_network(&network)?;
        let steps_per_epoch = train.div_ceil(config.batch_size);
        let data = fingerprint(&dataset);
        let train = Split::new("training pictures", dataset.train, &preprocess, config.augment, config.seed, placement);
        let val = Split::new("validation pictures", dataset.val, &preprocess, Augment::None, config.seed, placement);
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
            schedule: Schedule {
                kind: config.schedule_kind(steps_per_epoch),
                warm_up: (config.warmup_epochs * steps_per_epoch as f64).round() as usize,
                total: config.epochs * steps_per_epoch,
            },
            record: Record { config: config.clone(), data, progress: Progress::default() },
            cut: None,
        };
        Ok((run, dataset.classes, preprocess))
    }

    fn train(
        mut self,
        mut folder: RunFolder,
        start: Instant,
        control: Control,
        observer: &mut dyn Observer,
    ) -> Result<Outcome> {
        while !self.record.is_over(observer) {
            let number = self.record.progress.history.len() + 1;
            self.set_cut(number, observer)?;
            let began = Instant::now();
            let earlier = self.record.progress.partial.seconds;
            let tally = self.train_epoch(&mut folder, number, began, control, observer)?;
            let trained = began.elapsed().as_secs_f64() + earlier;
            let (val, confusion) = self.validate(observer)?;
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
            self.finish_epoch(&mut folder, epoch, confusion, control)?;
            observer.epoch(&epoch);
        }
        self.record.progress.finished = true;
        self.record.write(&mut folder, &self.trainer)?;
        self.record.progress.outcome(&self.record.data.classes, folder.model(), start)
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
        let Run { record, trainer, train, schedule, .. } = self;
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
            let stop = control.stop.is_some_and(|stop| stop.load(Ordering::Relaxed));
            let over = record.progress.batch >= steps;
            let write = stop || (folder.is_due(control.write_every) && !over);
            if let Some(Diverged { place, loss }) = trainer.settle(&mut tally, write || over)? {
                return Err(record.diverged(folder, loss, &place));
            }
            record.progress.partial = Partial::new(&tally, earlier.seconds + began.elapsed().as_secs_f64());
            if write {
                record.write(folder, trainer)?;
            }
            if stop { Err(Error::Interrupted { run: folder.path().to_path_buf() }) } else { Ok(()) }
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
        let (network, placement) = (&self.trainer.network, self.trainer.placement);
        let order: Vec<usize> = (0..self.val.len()).collect();
        let result =
            self.val.for_each_batch(&order, self.record.config.batch_size, 0, observer, "validation", |given| {
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
        for picture in train.skipped.iter().chain(&val.skipped) {
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

/// scikit-learn's "balanced": pictures over classes times the pictures of the class.
fn balanced_weights(labels: impl Iterator<Item = usize>, classes: usize) -> Result<Tensor> {
    let mut counts = vec![0usize; classes];
    labels.for_each(|label| counts[label] += 1);
    let total: usize = counts.iter().sum();
    let weights: Vec<f32> = counts.iter().map(|&n| total as f32 / (classes * n.max(1)) as f32).collect();
    Tensor::from_slice(&weights, [classes])
}
