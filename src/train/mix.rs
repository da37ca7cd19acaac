//! Mixing the pictures of a batch: mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019).

use crate::error::Result;
use crate::tensor::Tensor;
use rand::seq::SliceRandom;
use rand::{Rng, RngExt};
use rand_distr::{Beta, Distribution};
use std::sync::LazyLock;

/// Parameter of mixup's Beta distribution: mostly one picture with a little of another.
static MIXUP: LazyLock<Beta<f64>> = LazyLock::new(|| Beta::new(0.2, 0.2).expect("positive parameters"));

/// Images of which each is a mixture of two, and how.
pub struct Mixed {
    /// `[N, H, W, 3]`.
    pub images: Tensor,
    /// The labels of the second parts, `[N]`.
    pub labels: Tensor,
    /// Share of the first parts.
    pub share: f32,
}

/// Mixes a batch `[N, H, W, 3]` with a shuffled copy of itself: a weighted sum, or a rectangle cut out and replaced.
pub fn mix(images: &Tensor, labels: &Tensor, rng: &mut impl Rng) -> Result<Mixed> {
    let &[n, h, w, c] = images.dims() else { unreachable!("images have four extents") };
    let mut partner: Vec<usize> = (0..n).collect();
    partner.shuffle(rng);
    let picture = h * w * c;
    let x = images.as_slice::<f32>();
    let other = |i: usize| &x[partner[i] * picture..][..picture];
    let mut mixed = x.to_vec();
    let share = if rng.random_bool(0.5) {
        let share = MIXUP.sample(rng) as f32;
        for (i, own) in mixed.chunks_exact_mut(picture).enumerate() {
            own.iter_mut().zip(other(i)).for_each(|(a, b)| *a = share * *a + (1.0 - share) * b);
        }
        share
    } else {
        let side = (1.0 - rng.random_range(0.0f64..1.0)).sqrt();
        let extent = |full: usize| ((full as f64 * side) as usize).min(full);
        let (ch, cw) = (extent(h), extent(w));
        let (top, left) = (rng.random_range(0..=h - ch), rng.random_range(0..=w - cw));
        for (i, own) in mixed.chunks_exact_mut(picture).enumerate() {
            for row in top..top + ch {
                let at = (row * w + left) * c;
                own[at..][..cw * c].copy_from_slice(&other(i)[at..][..cw * c]);
            }
        }
        1.0 - (ch * cw) as f32 / (h * w) as f32
    };
    let labels: Vec<i64> = partner.iter().map(|&i| labels.as_slice::<i64>()[i]).collect();
    Ok(Mixed {
        images: Tensor::from_slice(&mixed, images.shape().clone())?,
        labels: Tensor::from_slice(&labels, [n])?,
        share,
    })
}
