//! From files to batches, doing once what comes out the same in every epoch.

use super::Observer;
use super::config::{BnMode, CacheMode, TrainConfig};
use super::pictures::{Pictures, Skipped, batches};
use super::placement::Placement;
use super::stop::Stop;
use crate::autograd::no_grad;
use crate::cuda;
use crate::data::{Augment, Pixels, Preprocess, Sample, decode, generator};
use crate::error::{Error, Result};
use crate::nn::{ResNet18, Stage};
use crate::tensor::{Device, Tensor, pool};
use rayon::prelude::*;
use std::sync::Arc;

/// `[N, crop, crop, 3]`, normalised, from decoded pictures. To the card they go as bytes.
pub(super) fn images(pictures: &[&[u8]], preprocess: &Preprocess, placement: Placement) -> Result<Tensor> {
    let side = preprocess.crop as usize;
    let dims = [pictures.len(), side, side, 3];
    match placement.device {
        Device::Cpu => Ok(Tensor::build(dims, |out: &mut [f32]| {
            let each = out.par_chunks_mut(side * side * 3).zip(pictures);
            each.for_each(|(out, picture)| preprocess.normalize(picture, out));
        })),
        Device::Cuda => {
            let bytes = Tensor::build(dims, |out: &mut [u8]| {
                out.chunks_exact_mut(side * side * 3).zip(pictures).for_each(|(out, p)| out.copy_from_slice(p));
            });
            let bytes = bytes.to_device(Device::Cuda)?;
            let (mean, deviation) = (preprocess.mean, preprocess.std);
            cuda::image::normalise(&bytes, None, [side; 2], mean, deviation, placement.dtype())
        }
    }
}

/// Where the pictures of a split come from in an epoch. Entries of pictures that cannot be read are empty.
enum Source {
    /// Decoded anew.
    Files,
    /// Decoded once at full size, to be changed at random in every epoch.
    Originals(Arc<Vec<Option<Pixels>>>),
    /// Decoded and preprocessed once, 8 bits a value.
    Pictures(Vec<Option<Vec<u8>>>),
    /// Sent through the frozen stages once: what `stage` is given, and the extents of one picture's.
    Activations { stage: Stage, dims: Vec<usize>, values: Vec<f32> },
}

/// What the network is given.
pub struct Input {
    /// The stage that takes it.
    pub stage: Stage,
    /// As `ResNet18::prefix` gives it for that stage: images for the stem.
    pub tensor: Tensor,
}

/// What pictures are for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// To learn from; every class needs one.
    Training,
    /// To see how good that is.
    Validation,
}

impl Part {
    /// For messages.
    fn name(self) -> &'static str {
        match self {
            Part::Training => "training pictures",
            Part::Validation => "validation pictures",
        }
    }
}

/// Training or validation pictures.
pub(super) struct Split<'a> {
    part: Part,
    pictures: Pictures,
    preprocess: Preprocess,
    augment: Augment,
    seed: u64,
    placement: Placement,
    source: Source,
    /// Looked at while pictures are decoded.
    stop: Stop<'a>,
}

impl<'a> Split<'a> {
    pub fn new(
        part: Part,
        samples: Vec<Sample>,
        preprocess: &Preprocess,
        augment: Augment,
        seed: u64,
        placement: Placement,
        stop: Stop<'a>,
    ) -> Self {
        // What is mixed on the CPU goes to the card after that.
        let placement = if augment == Augment::Strong { Placement::default() } else { placement };
        let (pictures, preprocess) = (Pictures::new(samples.into()), preprocess.clone());
        Split { part, pictures, preprocess, augment, seed, placement, source: Source::Files, stop }
    }

    pub fn len(&self) -> usize {
        self.pictures.samples.len()
    }

    /// Pictures found to be unreadable so far.
    pub fn skipped(&self) -> &[Skipped] {
        &self.pictures.skipped
    }

    /// Class of every picture.
    pub fn labels(&self) -> impl Iterator<Item = usize> + '_ {
        self.pictures.samples.iter().map(|sample| sample.label)
    }

    /// Keeps what stays the same from epoch to epoch, as far as the settings and `budget` (in bytes, reduced by what is
    /// used) allow: what the stages below `cut` give, else the decoded pictures. Returns what it keeps, in words.
    pub fn prepare(
        &mut self,
        network: &ResNet18,
        cut: Stage,
        config: &TrainConfig,
        budget: &mut usize,
        observer: &mut dyn Observer,
    ) -> Result<&'static str> {
        self.source = Source::Files;
        if config.cache == CacheMode::Off || self.len() == 0 {
            return Ok("nothing");
        }
        let side = self.preprocess.crop as usize;
        let batch = config.batch_size;
        if self.augment != Augment::None {
            return self.keep_originals(batch, budget, observer);
        }
        if config.bn == BnMode::Frozen && cut > Stage::Stem {
            let probe =
                no_grad(|| network.prefix(&self.placement.place(&Tensor::zeros([1, side, side, 3]))?, cut, false))?;
            let bytes = self.len() * probe.numel() * size_of::<f32>();
            if bytes <= *budget {
                *budget -= bytes;
                self.keep_activations(network, cut, probe.dims()[1..].to_vec(), batch, observer)?;
                pool::release_unused();
                return Ok(if cut == Stage::Head { "features" } else { "activations" });
            }
        }
        let bytes = self.len() * side * side * 3;
        if bytes > *budget {
            return Ok("nothing");
        }
        *budget -= bytes;
        let mut pictures = vec![None; self.len()];
        self.for_each_decoded(batch, observer, |indices, decoded| {
            indices.iter().zip(decoded).for_each(|(&i, p)| pictures[i] = Some(p.to_vec()));
            Ok(())
        })?;
        self.source = Source::Pictures(pictures);
        Ok("decoded pictures")
    }

    fn keep_activations(
        &mut self,
        network: &ResNet18,
        stage: Stage,
        dims: Vec<usize>,
        batch: usize,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        let row: usize = dims.iter().product();
        let mut values = vec![0.0; self.len() * row];
        let (preprocess, placement) = (self.preprocess.clone(), self.placement);
        self.for_each_decoded(batch, observer, |indices, pictures| {
            let x = no_grad(|| network.prefix(&images(pictures, &preprocess, placement)?, stage, false))?;
            for (&i, x) in indices.iter().zip(x.to_f32_vec()?.chunks_exact(row)) {
                values[i * row..][..row].copy_from_slice(x);
            }
            Ok(())
        })?;
        self.source = Source::Activations { stage, dims, values };
        Ok(())
    }

    /// Decodes everything at full size; gives up, and keeps nothing, once the budget is spent.
    fn keep_originals(
        &mut self,
        batch: usize,
        budget: &mut usize,
        observer: &mut dyn Observer,
    ) -> Result<&'static str> {
        let (samples, exif) = (self.pictures.samples.clone(), self.preprocess.exif);
        let mut originals = vec![None; self.len()];
        let (mut used, mut done) = (0, 0);
        for decoded in batches((0..self.len()).collect(), batch, move |i| decode(&samples[i].path, exif)) {
            self.stop.check()?;
            done += decoded.len();
            let (indices, pictures) = self.pictures.readable(decoded, observer);
            for (i, picture) in indices.into_iter().zip(pictures) {
                used += picture.data.len();
                originals[i] = Some(picture);
            }
            if used > *budget {
                return Ok("nothing");
            }
            observer.progress(self.part.name(), done, self.len());
        }
        *budget -= used;
        self.source = Source::Originals(Arc::new(originals));
        self.check_readable()?;
        Ok("decoded pictures")
    }

    /// One pass over all pictures in their order, of which enough must be readable.
    fn for_each_decoded(
        &mut self,
        batch: usize,
        observer: &mut dyn Observer,
        mut body: impl FnMut(&[usize], &[&[u8]]) -> Result<()>,
    ) -> Result<()> {
        let Split { pictures, preprocess, stop, .. } = self;
        pictures.for_each_batch(preprocess, batch, self.part.name(), observer, |indices, pictures| {
            stop.check()?;
            body(indices, pictures)
        })?;
        self.check_readable()
    }

    /// An error if all pictures are known to be unreadable, for training those of a class. Call it after a full pass.
    fn check_readable(&self) -> Result<()> {
        let Pictures { samples, bad, .. } = &self.pictures;
        let sample = match self.part {
            Part::Training => {
                let mut readable = std::collections::BTreeMap::<usize, (usize, &Sample)>::new();
                for (sample, &bad) in samples.iter().zip(bad) {
                    readable.entry(sample.label).or_insert((0, sample)).0 += usize::from(!bad);
                }
                readable.values().find(|(count, _)| *count == 0).map(|(_, sample)| *sample)
            }
            Part::Validation => samples.first().filter(|_| bad.iter().all(|&bad| bad)),
        };
        let Some(sample) = sample else { return Ok(()) };
        let folder = sample.path.parent().unwrap_or(&sample.path);
        let (problem, hint) = match self.part {
            Part::Training => ("none of the training pictures in it can be read", "remove the class"),
            Part::Validation => ("none of the validation pictures can be read", "remove them to hold out others"),
        };
        Err(Error::data(folder, problem, format!("replace the damaged files or {hint}")))
    }

    /// What decodes picture `i` as `epoch` sees it, for sources that need work in every epoch.
    fn loader(&self, epoch: usize) -> impl Fn(usize) -> Result<Vec<u8>> + Send + Sync + use<> {
        let (samples, preprocess) = (self.pictures.samples.clone(), self.preprocess.clone());
        let (augment, seed) = (self.augment, self.seed);
        let originals = match &self.source {
            Source::Originals(originals) => Some(originals.clone()),
            _ => None,
        };
        move |i| {
            let path = &samples[i].path;
            let decoded;
            let picture = match &originals {
                Some(kept) => kept[i].as_ref().ok_or_else(|| Error::file(path, "cannot be read", "replace it"))?,
                None => {
                    decoded = decode(path, preprocess.exif)?;
                    &decoded
                }
            };
            augment
                .apply(picture, &preprocess, generator(seed, epoch, i))
                .map_err(|e| Error::file(path, e.to_string(), "replace or remove it"))
        }
    }

    /// Calls `body` with each batch of `order` in turn: what the network is given, and the labels. Pictures that cannot be
    /// read leave their batch smaller, whatever the source, so that caching changes nothing; a batch may be empty.
    pub fn for_each_batch(
        &mut self,
        order: &[usize],
        batch: usize,
        epoch: usize,
        observer: &mut dyn Observer,
        phase: &'static str,
        mut body: impl FnMut(Option<(Input, Tensor)>) -> Result<()>,
    ) -> Result<()> {
        let total = order.len();
        let mut done = 0;
        if matches!(self.source, Source::Files | Source::Originals(_)) {
            for decoded in batches(order.to_vec(), batch, self.loader(epoch)) {
                done += decoded.len();
                let (indices, pictures) = self.pictures.readable(decoded, observer);
                let pictures: Vec<&[u8]> = pictures.iter().map(Vec::as_slice).collect();
                let tensor = || images(&pictures, &self.preprocess, self.placement);
                body(self.batch(&indices, || Ok(Input { stage: Stage::Stem, tensor: tensor()? }))?)?;
                observer.progress(phase, done, total);
            }
            return self.check_readable();
        }
        for chunk in order.chunks(batch) {
            done += chunk.len();
            let indices: Vec<usize> = chunk.iter().copied().filter(|&i| !self.pictures.bad[i]).collect();
            body(self.batch(&indices, || self.kept(&indices))?)?;
            observer.progress(phase, done, total);
        }
        Ok(())
    }

    fn batch(&self, indices: &[usize], input: impl FnOnce() -> Result<Input>) -> Result<Option<(Input, Tensor)>> {
        if indices.is_empty() {
            return Ok(None);
        }
        let labels: Vec<i64> = indices.iter().map(|&i| self.pictures.samples[i].label as i64).collect();
        Ok(Some((input()?, Tensor::from_slice(&labels, [labels.len()])?)))
    }

    /// The input of a batch from what was kept.
    fn kept(&self, indices: &[usize]) -> Result<Input> {
        Ok(match &self.source {
            Source::Pictures(pictures) => {
                let pictures: Vec<&[u8]> = indices.iter().filter_map(|&i| pictures[i].as_deref()).collect();
                Input { stage: Stage::Stem, tensor: images(&pictures, &self.preprocess, self.placement)? }
            }
            Source::Activations { stage, dims, values } => {
                let row: usize = dims.iter().product();
                let dims = [&[indices.len()], dims.as_slice()].concat();
                let tensor = Tensor::build(dims, |out: &mut [f32]| {
                    for (out, &i) in out.chunks_exact_mut(row).zip(indices) {
                        out.copy_from_slice(&values[i * row..][..row]);
                    }
                });
                Input { stage: *stage, tensor: self.placement.place(&tensor)? }
            }
            Source::Files | Source::Originals(_) => unreachable!("these are decoded in every epoch"),
        })
    }
}
