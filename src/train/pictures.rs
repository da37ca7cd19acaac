//! Pictures read from files, in parallel and ahead of what is computed from them; those that cannot be read are told once.

use super::Observer;
use crate::data::{Preprocess, Sample, ordered_parallel};
use crate::error::Result;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::Arc;

/// Pictures decoded ahead of the one being computed, in batches.
const BATCHES_AHEAD: usize = 2;

/// A picture that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// The file.
    pub file: PathBuf,
    /// Why, in one line that names the file.
    pub reason: String,
}

/// Results of `load` for each index of `order`, computed in parallel and ahead, in groups of `batch`.
pub(super) fn batches<T: Send + 'static>(
    order: Vec<usize>,
    batch: usize,
    load: impl Fn(usize) -> Result<T> + Send + Sync + 'static,
) -> impl Iterator<Item = Vec<(usize, Result<T>)>> {
    let mut left = order.len();
    let f = move |i: usize| (order[i], load(order[i]));
    let mut items = ordered_parallel(left, rayon::current_num_threads(), BATCHES_AHEAD * batch, f);
    std::iter::from_fn(move || {
        let take = batch.min(left);
        left -= take;
        (take > 0).then(|| items.by_ref().take(take).collect())
    })
}

/// Files of pictures, and which of them cannot be read.
pub(super) struct Pictures {
    pub samples: Arc<[Sample]>,
    /// Known to be unreadable.
    pub bad: Vec<bool>,
    /// Those, with the reason.
    pub skipped: Vec<Skipped>,
}

impl Pictures {
    pub fn new(samples: Arc<[Sample]>) -> Self {
        Pictures { bad: vec![false; samples.len()], samples, skipped: Vec::new() }
    }

    /// The indices and contents of those that could be decoded; reports the others the first time.
    pub fn readable<T>(
        &mut self,
        decoded: Vec<(usize, Result<T>)>,
        observer: &mut dyn Observer,
    ) -> (Vec<usize>, Vec<T>) {
        let (mut indices, mut pictures) = (Vec::with_capacity(decoded.len()), Vec::with_capacity(decoded.len()));
        for (i, result) in decoded {
            match result {
                Ok(picture) => {
                    indices.push(i);
                    pictures.push(picture);
                }
                Err(_) if self.bad[i] => {}
                Err(error) => {
                    self.bad[i] = true;
                    let skipped = Skipped { file: self.samples[i].path.clone(), reason: error.to_string() };
                    observer.skipped(&skipped);
                    self.skipped.push(skipped);
                }
            }
        }
        (indices, pictures)
    }

    /// One pass over all pictures in their order, preprocessed, those that cannot be read left out: `body` is given the indices and
    /// the bytes of up to `batch` of them, and never none.
    pub fn for_each_batch(
        &mut self,
        preprocess: &Preprocess,
        batch: usize,
        phase: &'static str,
        observer: &mut dyn Observer,
        mut body: impl FnMut(&[usize], &[&[u8]]) -> Result<()>,
    ) -> Result<()> {
        let (samples, preprocess, total) = (self.samples.clone(), preprocess.clone(), self.samples.len());
        let mut done = 0;
        for decoded in batches((0..total).collect(), batch, move |i| preprocess.load(&samples[i].path)) {
            done += decoded.len();
            let (indices, pictures) = self.readable(decoded, observer);
            let pictures: Vec<&[u8]> = pictures.iter().map(Vec::as_slice).collect();
            if !indices.is_empty() {
                body(&indices, &pictures)?;
            }
            observer.progress(phase, done, total);
        }
        Ok(())
    }
}
