//! Random changes to training pictures, decided by (seed, epoch, picture) and so independent of threads.

use super::decode::Pixels;
use super::transforms::Preprocess;
use crate::error::Result;
use clap::ValueEnum;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// torchvision's RandomResizedCrop: share of the area, and ratio of the sides.
const AREA: std::ops::Range<f64> = 0.08..1.0;
const RATIO: std::ops::Range<f64> = 3.0 / 4.0..4.0 / 3.0;
/// Tries to fit such a rectangle before the centre is taken.
const TRIES: usize = 10;
/// Colour jitter: brightness, contrast and saturation are multiplied by 1 plus or minus up to this.
const JITTER: f32 = 0.4;
/// Random erasing (Zhong et al., 2020): how often, which share of the area, which ratio of the sides.
const ERASE: f64 = 0.25;
const ERASED_AREA: std::ops::Range<f64> = 0.02..0.33;
const ERASED_RATIO: std::ops::Range<f64> = 0.3..3.3;
/// Weights of red, green and blue in gray.
const LUMA: [f32; 3] = [0.299, 0.587, 0.114];

/// How much pictures are changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Augment {
    /// Not at all.
    None,
    /// Mirrored half of the time.
    Flip,
    /// A random part, resized, mirrored half of the time.
    Standard,
    /// The same with colour jitter and random erasing; batches are mixed on top of it, by the training step.
    Strong,
}

/// The generator for what is random about one thing in one epoch: a picture, or with `index` beyond them a batch.
pub fn generator(seed: u64, epoch: usize, index: usize) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream((epoch as u64) << 32 | index as u64);
    rng
}

impl Augment {
    /// The picture as epoch `epoch` sees it: `[crop, crop, 3]`.
    pub fn apply(self, picture: &Pixels, preprocess: &Preprocess, mut rng: ChaCha8Rng) -> Result<Vec<u8>> {
        let mut pixels = match self {
            Augment::None | Augment::Flip => preprocess.apply(picture)?,
            Augment::Standard | Augment::Strong => {
                let part = random_part(picture.width, picture.height, &mut rng);
                preprocess.resize_part(picture, part)?
            }
        };
        if self == Augment::None {
            return Ok(pixels);
        }
        let side = preprocess.crop as usize;
        if rng.random_bool(0.5) {
            flip(&mut pixels, side);
        }
        if self == Augment::Strong {
            jitter(&mut pixels, &mut rng);
            if rng.random_bool(ERASE) {
                erase(&mut pixels, side, preprocess.mean, &mut rng);
            }
        }
        Ok(pixels)
    }
}

/// Left, top, width and height of a random part; the centre, if none is found.
fn random_part(width: u32, height: u32, rng: &mut ChaCha8Rng) -> [u32; 4] {
    let (w, h) = (f64::from(width), f64::from(height));
    for _ in 0..TRIES {
        let area = w * h * rng.random_range(AREA);
        let ratio = rng.random_range(RATIO.start.ln()..RATIO.end.ln()).exp();
        let (pw, ph) = ((area * ratio).sqrt().round(), (area / ratio).sqrt().round());
        if pw >= 1.0 && ph >= 1.0 && pw <= w && ph <= h {
            let (pw, ph) = (pw as u32, ph as u32);
            return [rng.random_range(0..=width - pw), rng.random_range(0..=height - ph), pw, ph];
        }
    }
    let ratio = (w / h).clamp(RATIO.start, RATIO.end);
    let pw = w.min(h * ratio).round().max(1.0) as u32;
    let ph = h.min(w / ratio).round().max(1.0) as u32;
    [(width - pw) / 2, (height - ph) / 2, pw, ph]
}

fn flip(pixels: &mut [u8], side: usize) {
    pixels.chunks_exact_mut(side * 3).for_each(|row| row.as_chunks_mut::<3>().0.reverse());
}

/// Brightness, then contrast about the mean gray, then saturation about each pixel's gray.
fn jitter(pixels: &mut [u8], rng: &mut ChaCha8Rng) {
    let [brightness, contrast, saturation] = std::array::from_fn(|_| rng.random_range(1.0 - JITTER..1.0 + JITTER));
    let gray = |p: &[u8; 3]| (0..3).map(|c| LUMA[c] * f32::from(p[c])).sum::<f32>();
    let pixels = pixels.as_chunks_mut::<3>().0;
    let total: f64 = pixels.iter().map(|p| f64::from(gray(p))).sum();
    let mean = (total / pixels.len() as f64) as f32 * brightness;
    for pixel in pixels {
        let lit = pixel.map(|x| mean + contrast * (f32::from(x) * brightness - mean));
        let gray: f32 = (0..3).map(|c| LUMA[c] * lit[c]).sum();
        *pixel = lit.map(|x| (gray + saturation * (x - gray)).round().clamp(0.0, 255.0) as u8);
    }
}

/// Fills a random rectangle with the mean colour, which is zero to the network.
fn erase(pixels: &mut [u8], side: usize, mean: [f32; 3], rng: &mut ChaCha8Rng) {
    let colour = mean.map(|m| (m * 255.0).round().clamp(0.0, 255.0) as u8);
    let area = (side * side) as f64 * rng.random_range(ERASED_AREA);
    let ratio = rng.random_range(ERASED_RATIO.start.ln()..ERASED_RATIO.end.ln()).exp();
    let extent = |x: f64| (x.sqrt().round() as usize).clamp(1, side);
    let (w, h) = (extent(area * ratio), extent(area / ratio));
    let (left, top) = (rng.random_range(0..=side - w), rng.random_range(0..=side - h));
    for row in pixels.chunks_exact_mut(side * 3).skip(top).take(h) {
        row.as_chunks_mut::<3>().0[left..left + w].fill(colour);
    }
}
