//! Using a trained model: accuracy on a folder, predictions for pictures, features.

use super::Observer;
use super::inputs::images;
use super::metrics::{Confusion, Tally};
use super::model::Model;
use super::pictures::{Pictures, Skipped};
use crate::autograd::no_grad;
use crate::data::Sample;
use crate::error::{Error, Result};
use crate::ops::{CrossEntropy, cross_entropy};
use crate::tensor::Tensor;
use std::path::PathBuf;
use std::sync::Arc;

/// Pictures sent through the network together.
const BATCH: usize = 32;

/// How a model does on labelled pictures.
pub struct Evaluation {
    /// Share classified rightly.
    pub accuracy: f64,
    /// Mean cross-entropy.
    pub loss: f64,
    /// Pictures read.
    pub images: usize,
    /// What was taken for what.
    pub confusion: Confusion,
    /// Pictures that could not be read.
    pub skipped: Vec<Skipped>,
}

/// Calls `body` with the indices and the image tensor of each batch of readable pictures; returns the others.
fn for_each_batch(
    model: &Model,
    samples: Arc<[Sample]>,
    observer: &mut dyn Observer,
    mut body: impl FnMut(&[usize], &Tensor) -> Result<()>,
) -> Result<Vec<Skipped>> {
    let mut all = Pictures::new(samples);
    all.for_each_batch(&model.preprocess, BATCH, "pictures", observer, |indices, pictures| {
        no_grad(|| body(indices, &images(pictures, &model.preprocess, model.placement)?))
    })?;
    let total = all.samples.len();
    if all.skipped.len() == total {
        let path = all.skipped.first().map_or_else(PathBuf::new, |s| s.file.clone());
        return Err(Error::data(path, format!("none of the {total} pictures can be read"), "check the files"));
    }
    Ok(all.skipped)
}

/// Accuracy, loss and confusion over `samples`, whose labels are indices of the model's classes.
pub fn evaluate(model: &Model, samples: Vec<Sample>, observer: &mut dyn Observer) -> Result<Evaluation> {
    let samples: Arc<[Sample]> = samples.into();
    let mut tally = Tally::default();
    let mut confusion = Confusion::new(model.classes.len());
    let skipped = for_each_batch(model, samples.clone(), observer, |indices, images| {
        let logits = model.network.forward(images, false)?;
        let labels: Vec<i64> = indices.iter().map(|&i| samples[i].label as i64).collect();
        let targets = Tensor::from_slice(&labels, [labels.len()])?;
        let loss = cross_entropy(&logits, &targets, &CrossEntropy::default())?.item()?;
        let logits = logits.to_f32_vec()?;
        tally.add(loss, &logits, &labels);
        confusion.add(&logits, &labels);
        Ok(())
    })?;
    Ok(Evaluation {
        accuracy: tally.accuracy().unwrap_or(f64::NAN),
        loss: tally.mean_loss().unwrap_or(f64::NAN),
        images: tally.count,
        confusion,
        skipped,
    })
}

fn unlabelled(paths: Vec<PathBuf>) -> Arc<[Sample]> {
    paths.into_iter().map(|path| Sample { path, label: 0 }).collect()
}

/// What a model takes a picture for.
pub struct Prediction {
    /// The picture.
    pub file: PathBuf,
    /// Index of a class and its probability, the most probable first.
    pub classes: Vec<(usize, f32)>,
}

/// The `top` most probable classes of every picture that can be read; the others are told to the observer.
pub fn predict(model: &Model, paths: Vec<PathBuf>, top: usize, observer: &mut dyn Observer) -> Result<Vec<Prediction>> {
    let samples = unlabelled(paths);
    let mut predictions = Vec::with_capacity(samples.len());
    for_each_batch(model, samples.clone(), observer, |indices, images| {
        let logits = model.network.forward(images, false)?;
        for (&i, row) in indices.iter().zip(logits.to_f32_vec()?.chunks_exact(model.classes.len())) {
            let mut classes: Vec<(usize, f32)> = softmax(row).into_iter().enumerate().collect();
            classes.sort_by(|a, b| b.1.total_cmp(&a.1));
            classes.truncate(top);
            predictions.push(Prediction { file: samples[i].path.clone(), classes });
        }
        Ok(())
    })?;
    Ok(predictions)
}

fn softmax(row: &[f32]) -> Vec<f32> {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exp: Vec<f32> = row.iter().map(|x| (x - max).exp()).collect();
    let sum: f32 = exp.iter().sum();
    exp.into_iter().map(|x| x / sum).collect()
}

/// Rows of features and logits, in the order of the files they are for.
#[derive(Default)]
pub struct Features {
    /// `[N, 512]`.
    pub features: Vec<f32>,
    /// `[N, classes]`.
    pub logits: Vec<f32>,
    /// Where each of the N comes from.
    pub files: Vec<PathBuf>,
}

impl Features {
    /// Adds the rows of normalised images `[N, H, W, 3]`.
    pub fn add(&mut self, model: &Model, images: &Tensor) -> Result<()> {
        let images = &model.placement.place(images)?;
        let features = no_grad(|| model.network.features(images, false))?;
        let logits = no_grad(|| model.network.head().forward(&features))?;
        self.features.extend(features.to_f32_vec()?);
        self.logits.extend(logits.to_f32_vec()?);
        Ok(())
    }
}

/// Features and logits of every picture that can be read; the others are told to the observer.
pub fn features_of(model: &Model, paths: Vec<PathBuf>, observer: &mut dyn Observer) -> Result<Features> {
    let samples = unlabelled(paths);
    let mut all = Features::default();
    for_each_batch(model, samples.clone(), observer, |indices, images| {
        all.add(model, images)?;
        all.files.extend(indices.iter().map(|&i| samples[i].path.clone()));
        Ok(())
    })?;
    Ok(all)
}
