//! From files to batches, doing once what comes out the same in every epoch.

use super::{BnMode, CacheMode, Observer};
use crate::autograd::no_grad;
use crate::data::{Preprocess, Sample, ordered_parallel};
use crate::error::{Error, Result};
use crate::nn::{FEATURES, ResNet18};
use crate::tensor::{Tensor, pool};
use rayon::prelude::*;
use serde::Serialize;
use std::path::PathBuf;
use std::sync::Arc;

/// Pictures decoded ahead of the one being computed, in batches.
const BATCHES_AHEAD: usize = 2;
/// Decoded pictures are kept from epoch to epoch if they take no more bytes than this.
const PIXEL_BUDGET: usize = 2 << 30;

/// A picture that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// The file.
    pub file: PathBuf,
    /// Why, in one line that names the file.
    pub reason: String,
}

/// Decodes `samples[order[..]]` in parallel and ahead of the compute, in groups of `batch`.
pub(super) fn decode_batches(
    samples: Arc<[Sample]>,
    order: Vec<usize>,
    preprocess: &Preprocess,
    batch: usize,
) -> impl Iterator<Item = Vec<(usize, Result<Vec<u8>>)>> + use<> {
    let preprocess = preprocess.clone();
    let mut left = order.len();
    let load = move |i: usize| (order[i], preprocess.load(&samples[order[i]].path));
    let mut items = ordered_parallel(left, rayon::current_num_threads(), BATCHES_AHEAD * batch, load);
    std::iter::from_fn(move || {
        let take = batch.min(left);
        left -= take;
        (take > 0).then(|| items.by_ref().take(take).collect())
    })
}

/// `[N, crop, crop, 3]`, normalised, from decoded pictures.
pub(super) fn images(pictures: &[&[u8]], preprocess: &Preprocess) -> Tensor {
    let side = preprocess.crop as usize;
    Tensor::build([pictures.len(), side, side, 3], |out: &mut [f32]| {
        out.par_chunks_mut(side * side * 3).zip(pictures).for_each(|(out, picture)| preprocess.normalize(picture, out));
    })
}

/// Where the pictures of a split come from in an epoch.
enum Source {
    /// Decoded anew.
    Files,
    /// Decoded once, 8 bits a value; none for those that cannot be read.
    Pixels(Vec<Option<Vec<u8>>>),
    /// Sent through the frozen backbone once, `[N, 512]`; rows of those that cannot be read are zero.
    Features(Tensor),
}

/// What the network is given.
pub(super) enum Input {
    /// `[N, H, W, 3]`.
    Images(Tensor),
    /// `[N, 512]`.
    Features(Tensor),
}

impl Input {
    /// The features of the batch; computed if they are not there yet.
    pub fn features(&self, network: &ResNet18, training: bool) -> Result<Tensor> {
        match self {
            Input::Images(images) => network.features(images, training),
            Input::Features(features) => Ok(features.clone()),
        }
    }
}

/// Training or validation pictures.
pub(super) struct Split {
    samples: Arc<[Sample]>,
    preprocess: Preprocess,
    source: Source,
    /// Known to be unreadable.
    bad: Vec<bool>,
    /// Those, with the reason.
    pub skipped: Vec<Skipped>,
    /// "training pictures", for messages.
    name: &'static str,
}

impl Split {
    pub fn new(name: &'static str, samples: Vec<Sample>, preprocess: &Preprocess) -> Self {
        let bad = vec![false; samples.len()];
        let (samples, preprocess) = (samples.into(), preprocess.clone());
        Split { samples, preprocess, source: Source::Files, bad, skipped: Vec::new(), name }
    }

    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// Keeps what stays the same from epoch to epoch, as far as the settings allow.
    pub fn prepare(
        &mut self,
        network: &ResNet18,
        bn: BnMode,
        cache: CacheMode,
        batch: usize,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        let picture = (self.preprocess.crop as usize).pow(2) * 3;
        match (cache, bn) {
            (CacheMode::Off, _) => return Ok(()),
            (CacheMode::Auto, BnMode::Frozen) => {
                let len = self.len();
                let mut features = vec![0.0; len * FEATURES];
                self.for_each_decoded(batch, observer, |indices, pictures, preprocess| {
                    let rows = no_grad(|| network.features(&images(pictures, preprocess), false))?;
                    for (&i, row) in indices.iter().zip(rows.as_slice::<f32>().chunks_exact(FEATURES)) {
                        features[i * FEATURES..][..FEATURES].copy_from_slice(row);
                    }
                    Ok(())
                })?;
                self.source = Source::Features(Tensor::from_slice(&features, [len, FEATURES])?);
                pool::release_unused();
            }
            (CacheMode::Auto, BnMode::Batch) if self.len() * picture <= PIXEL_BUDGET => {
                let mut pixels = vec![None; self.len()];
                self.for_each_decoded(batch, observer, |indices, pictures, _| {
                    indices.iter().zip(pictures).for_each(|(&i, p)| pixels[i] = Some(p.to_vec()));
                    Ok(())
                })?;
                self.source = Source::Pixels(pixels);
            }
            (CacheMode::Auto, BnMode::Batch) => return Ok(()),
        }
        self.check_classes()
    }

    /// One pass over all pictures in their order, those that cannot be read left out.
    fn for_each_decoded(
        &mut self,
        batch: usize,
        observer: &mut dyn Observer,
        mut body: impl FnMut(&[usize], &[&[u8]], &Preprocess) -> Result<()>,
    ) -> Result<()> {
        let total = self.len();
        let mut done = 0;
        let order = (0..total).collect();
        for decoded in decode_batches(self.samples.clone(), order, &self.preprocess, batch) {
            done += decoded.len();
            let good = self.keep_readable(decoded, observer);
            let indices: Vec<usize> = good.iter().map(|(i, _)| *i).collect();
            let pictures: Vec<&[u8]> = good.iter().map(|(_, picture)| picture.as_slice()).collect();
            if !good.is_empty() {
                body(&indices, &pictures, &self.preprocess)?;
            }
            observer.progress(self.name, done, total);
        }
        Ok(())
    }

    /// Leaves out what could not be decoded, and reports it the first time.
    fn keep_readable(
        &mut self,
        decoded: Vec<(usize, Result<Vec<u8>>)>,
        observer: &mut dyn Observer,
    ) -> Vec<(usize, Vec<u8>)> {
        let mut good = Vec::with_capacity(decoded.len());
        for (i, result) in decoded {
            match result {
                Ok(picture) => good.push((i, picture)),
                Err(_) if self.bad[i] => {}
                Err(error) => {
                    self.bad[i] = true;
                    let skipped = Skipped { file: self.samples[i].path.clone(), reason: error.to_string() };
                    observer.skipped(&skipped);
                    self.skipped.push(skipped);
                }
            }
        }
        good
    }

    /// An error if all the pictures of a class are known to be unreadable, or all there are. Call it after a full pass.
    pub fn check_classes(&self) -> Result<()> {
        let mut readable = std::collections::BTreeMap::<usize, (usize, &Sample)>::new();
        for (sample, &bad) in self.samples.iter().zip(&self.bad) {
            readable.entry(sample.label).or_insert((0, sample)).0 += usize::from(!bad);
        }
        match readable.values().find(|(count, _)| *count == 0) {
            Some((_, sample)) => {
                let folder = sample.path.parent().unwrap_or(&sample.path);
                let problem = format!("none of the {} in it can be read", self.name);
                Err(Error::data(folder, problem, "replace the damaged files or remove the class"))
            }
            None => Ok(()),
        }
    }

    /// Calls `body` with each batch of `order` in turn: what the network is given, and the labels. Pictures that cannot be
    /// read leave their batch smaller, whatever the source, so that caching changes nothing.
    pub fn for_each_batch(
        &mut self,
        order: Vec<usize>,
        batch: usize,
        observer: &mut dyn Observer,
        phase: &'static str,
        mut body: impl FnMut(Input, Tensor) -> Result<()>,
    ) -> Result<()> {
        let total = order.len();
        let mut done = 0;
        let mut give = |indices: Vec<usize>, input: Input, samples: &[Sample]| -> Result<()> {
            let labels: Vec<i64> = indices.iter().map(|&i| samples[i].label as i64).collect();
            body(input, Tensor::from_slice(&labels, [labels.len()])?)
        };
        if matches!(self.source, Source::Files) {
            for decoded in decode_batches(self.samples.clone(), order, &self.preprocess, batch) {
                done += decoded.len();
                let (indices, pictures): (Vec<_>, Vec<_>) = self.keep_readable(decoded, observer).into_iter().unzip();
                if !indices.is_empty() {
                    let pictures: Vec<&[u8]> = pictures.iter().map(Vec::as_slice).collect();
                    give(indices, Input::Images(images(&pictures, &self.preprocess)), &self.samples)?;
                }
                observer.progress(phase, done, total);
            }
            return self.check_classes();
        }
        for chunk in order.chunks(batch) {
            done += chunk.len();
            let indices: Vec<usize> = chunk.iter().copied().filter(|&i| !self.bad[i]).collect();
            if indices.is_empty() {
                continue;
            }
            let input = match &self.source {
                Source::Pixels(pixels) => {
                    let pictures: Vec<&[u8]> = indices.iter().filter_map(|&i| pixels[i].as_deref()).collect();
                    Input::Images(images(&pictures, &self.preprocess))
                }
                Source::Features(features) => Input::Features(rows(features, &indices)),
                Source::Files => unreachable!("handled above"),
            };
            give(indices, input, &self.samples)?;
            observer.progress(phase, done, total);
        }
        Ok(())
    }
}

/// Rows `indices` of a matrix.
fn rows(matrix: &Tensor, indices: &[usize]) -> Tensor {
    let width = matrix.dims()[1];
    Tensor::build([indices.len(), width], |out: &mut [f32]| {
        for (out, &i) in out.chunks_exact_mut(width).zip(indices) {
            out.copy_from_slice(&matrix.as_slice::<f32>()[i * width..][..width]);
        }
    })
}
