//! Holding out a part of the pictures of each class for validation.

use super::folder::Sample;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// Where the division into pictures to train and to validate with comes from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Split {
    /// The folders `train` and `val`.
    Folders,
    /// Chance: the share `share` of each class was held out, the same for the same seed.
    Seeded {
        /// The share of pictures held out, between 0 and 1.
        share: f64,
        /// Decides which.
        seed: u64,
    },
}

/// Holds out the share `share` of each class, rounded, but at least one picture and not all where there are two or more:
/// (training, validation), each in the order of `samples`.
///
/// What is drawn for a class depends on `seed`, on the label and on the number of its pictures, and on nothing else.
pub(super) fn hold_out(samples: Vec<Sample>, classes: usize, share: f64, seed: u64) -> (Vec<Sample>, Vec<Sample>) {
    let mut by_class = vec![Vec::new(); classes];
    for sample in samples {
        by_class[sample.label].push(sample);
    }
    let (mut train, mut val) = (Vec::new(), Vec::new());
    for (label, pictures) in by_class.into_iter().enumerate() {
        let held_out = draw(pictures.len(), share, seed, label);
        for (sample, held_out) in pictures.into_iter().zip(held_out) {
            if held_out { val.push(sample) } else { train.push(sample) }
        }
    }
    (train, val)
}

/// Which of `count` pictures of a class are held out.
fn draw(count: usize, share: f64, seed: u64, label: usize) -> Vec<bool> {
    let held_out = match count {
        0 | 1 => 0,
        _ => ((count as f64 * share).round() as usize).clamp(1, count - 1),
    };
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(label as u64);
    let mut order: Vec<usize> = (0..count).collect();
    order.shuffle(&mut rng);
    let mut drawn = vec![false; count];
    order[..held_out].iter().for_each(|&picture| drawn[picture] = true);
    drawn
}
