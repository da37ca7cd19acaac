//! Pictures for `hone demo`: four textures, drawn and then "photographed".
//!
//! A texture says how high and how light a surface is at a point. What makes a picture look like a photograph comes after
//! and is the same for all: a random palette, rotation, scale, perspective and bend, light from a side, vignetting, blur
//! and sensor noise. Palettes are drawn alike for every class, so that colour tells nothing.

use crate::error::{Error, Result};
use image::codecs::jpeg::JpegEncoder;
use image::{ExtendedColorType, ImageEncoder};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use std::f32::consts::TAU;
use std::path::Path;

/// Height and tone of a surface, both in `[0, 1]`, at a point; the last argument seeds its irregularities.
type Texture = fn(f32, f32, u32) -> (f32, f32);

/// The classes.
pub const CLASSES: [(&str, Texture); 4] =
    [("bricks", bricks), ("pebbles", pebbles), ("scales", scales), ("wood", wood)];

const JPEG_QUALITY: u8 = 88;

/// Draws `train` and `val` pictures of `size` pixels a side of every class into `dir/train/CLASS` and `dir/val/CLASS`. The
/// same `seed` gives the same files.
pub fn write_pictures(dir: &Path, train: usize, val: usize, size: u32, seed: u64) -> Result<()> {
    for (part, (split, count)) in [("train", train), ("val", val)].into_iter().enumerate() {
        for (class, &(name, texture)) in CLASSES.iter().enumerate() {
            let folder = dir.join(split).join(name);
            std::fs::create_dir_all(&folder).map_err(Error::io("create the folder", &folder))?;
            (0..count).into_par_iter().try_for_each(|i| {
                let mut rng = ChaCha8Rng::seed_from_u64(seed);
                rng.set_stream(((part * CLASSES.len() + class) << 32 | i) as u64);
                let path = folder.join(format!("{name}-{i:03}.jpg"));
                let mut jpeg = Vec::new();
                let pixels = draw(texture, size as usize, &mut rng);
                JpegEncoder::new_with_quality(&mut jpeg, JPEG_QUALITY)
                    .write_image(&pixels, size, size, ExtendedColorType::Rgb8)
                    .map_err(|e| Error::io("write", &path)(std::io::Error::other(e)))?;
                std::fs::write(&path, jpeg).map_err(Error::io("write", &path))
            })?;
        }
    }
    Ok(())
}

/// A number in `[0, 1)` for a point of the grid.
fn hash(x: i32, y: i32, seed: u32) -> f32 {
    let mut h =
        (x as u32).wrapping_mul(0x9e37_79b1) ^ (y as u32).wrapping_mul(0x85eb_ca77) ^ seed.wrapping_mul(0xc2b2_ae3d);
    h = (h ^ (h >> 15)).wrapping_mul(0x2c1b_3c6d);
    h = (h ^ (h >> 12)).wrapping_mul(0x297a_2d39);
    (h ^ (h >> 15)) as f32 / 4_294_967_296.0
}

fn mix(a: f32, b: f32, t: f32) -> f32 {
    a + (b - a) * t
}

/// 0 below `low`, 1 above `high`, smooth between.
fn smoothstep(low: f32, high: f32, x: f32) -> f32 {
    let t = ((x - low) / (high - low)).clamp(0.0, 1.0);
    t * t * (3.0 - 2.0 * t)
}

/// Value noise: random at the points of the grid, smooth between.
fn noise(x: f32, y: f32, seed: u32) -> f32 {
    let (ix, iy) = (x.floor(), y.floor());
    let (tx, ty) = (smoothstep(0.0, 1.0, x - ix), smoothstep(0.0, 1.0, y - iy));
    let at = |dx: i32, dy: i32| hash(ix as i32 + dx, iy as i32 + dy, seed);
    mix(mix(at(0, 0), at(1, 0), tx), mix(at(0, 1), at(1, 1), tx), ty)
}

/// Noise of several scales, each half as large and as strong as the last.
fn fractal(x: f32, y: f32, seed: u32) -> f32 {
    let octave = |i: u32| noise(x * (1 << i) as f32, y * (1 << i) as f32, seed.wrapping_add(i)) / (2 << i) as f32;
    (0..4).map(octave).sum()
}

/// Courses of bricks, every second one shifted by half a brick, with mortar between.
fn bricks(u: f32, v: f32, seed: u32) -> (f32, f32) {
    let course = (v * 1.1).floor();
    let along = u * 0.5 + 0.5 * course.rem_euclid(2.0);
    let (x, y) = (along - along.floor(), v * 1.1 - course);
    let edge = (x.min(1.0 - x) * 2.0).min(y.min(1.0 - y)) + 0.06 * (fractal(u * 3.0, v * 3.0, seed) - 0.5);
    let height = smoothstep(0.05, 0.14, edge) * (0.85 + 0.3 * (fractal(u * 5.0, v * 5.0, seed ^ 1) - 0.5));
    (height, 0.2 + 0.8 * hash(along.floor() as i32, course as i32, seed))
}

/// Rounded stones: cells around scattered points (Worley, "A cellular texture basis function", 1996).
fn pebbles(u: f32, v: f32, seed: u32) -> (f32, f32) {
    let (iu, iv) = (u.floor() as i32, v.floor() as i32);
    let (mut nearest, mut second, mut stone) = (f32::MAX, f32::MAX, 0.0);
    for (x, y) in (iu - 1..=iu + 1).flat_map(|x| (iv - 1..=iv + 1).map(move |y| (x, y))) {
        let (px, py) = (x as f32 + hash(x, y, seed), y as f32 + hash(x, y, seed ^ 7));
        let distance = (px - u).hypot(py - v);
        if distance < nearest {
            (nearest, second, stone) = (distance, nearest, hash(x, y, seed ^ 13));
        } else {
            second = second.min(distance);
        }
    }
    let height = smoothstep(0.02, 0.45, second - nearest) * (1.0 - 0.5 * nearest * nearest);
    (height, mix(stone, fractal(u * 4.0, v * 4.0, seed), 0.3))
}

/// Overlapping discs in shifted rows, as on fish and roofs.
fn scales(u: f32, v: f32, seed: u32) -> (f32, f32) {
    const RADIUS: f32 = 0.64;
    let below = (v / 0.5).floor() as i32;
    // Every row lies over the next one; the first disc that covers the point is what is seen.
    for row in below - 1..=below + 2 {
        let shift = 0.5 * row.rem_euclid(2) as f32;
        let column = (u - shift).round();
        let (dx, dy) = (u - shift - column, v - row as f32 * 0.5);
        let distance = dx.hypot(dy);
        if distance < RADIUS {
            let rim = smoothstep(RADIUS, RADIUS - 0.1, distance);
            let height = rim * (0.4 + 0.6 * smoothstep(-0.3, RADIUS, dy));
            let rings = 0.15 * (distance * 40.0).sin().abs();
            return (height, 0.15 + 0.7 * hash(column as i32, row, seed) + rings);
        }
    }
    (0.0, 0.5)
}

/// Grain along one direction: rings of a trunk cut lengthwise, bent by noise, with fine fibres.
fn wood(u: f32, v: f32, seed: u32) -> (f32, f32) {
    let bend = 2.2 * fractal(u * 0.12, v * 0.45, seed);
    let ring = v * 0.9 + bend * 2.0;
    let phase = ring - ring.floor();
    let grain = smoothstep(0.0, 0.75, phase) * smoothstep(1.0, 0.88, phase);
    let fibre = noise(u * 0.7, v * 14.0, seed ^ 3);
    (0.55 + 0.25 * grain + 0.2 * fibre, (0.25 + 0.55 * grain + 0.3 * (fibre - 0.5)).clamp(0.0, 1.0))
}

/// A map from the picture, whose coordinates run from -0.5 to 0.5, to the surface.
struct View {
    rotation: (f32, f32),
    scale: f32,
    tilt: (f32, f32),
    bend: f32,
    shift: (f32, f32),
    seed: u32,
}

impl View {
    fn random(rng: &mut impl Rng) -> Self {
        View {
            rotation: rng.random_range(0.0..TAU).sin_cos(),
            // From close up to three times as far.
            scale: 4.0 * 3f32.powf(rng.random_range(0.0..1.0)),
            tilt: (rng.random_range(-0.5..0.5), rng.random_range(-0.5..0.5)),
            bend: rng.random_range(0.0..0.5),
            shift: (rng.random_range(-100.0..100.0), rng.random_range(-100.0..100.0)),
            seed: rng.random(),
        }
    }

    fn surface(&self, x: f32, y: f32) -> (f32, f32) {
        let depth = 1.0 + self.tilt.0 * x + self.tilt.1 * y;
        let (x, y) = (x / depth * self.scale, y / depth * self.scale);
        let (sin, cos) = self.rotation;
        let (u, v) = (x * cos - y * sin + self.shift.0, x * sin + y * cos + self.shift.1);
        let bend = |seed: u32| self.bend * (fractal(u * 0.3, v * 0.3, self.seed ^ seed) - 0.5) * 2.0;
        (u + bend(101), v + bend(202))
    }
}

/// One picture, `[size, size, 3]`.
fn draw(texture: Texture, size: usize, rng: &mut impl Rng) -> Vec<u8> {
    let view = View::random(rng);
    let surface: Vec<(f32, f32)> = (0..size * size)
        .map(|i| {
            let coordinate = |i: usize| i as f32 / size as f32 - 0.5;
            let (u, v) = view.surface(coordinate(i % size), coordinate(i / size));
            texture(u, v, view.seed)
        })
        .collect();
    let mut linear = light(&surface, size, view.scale, rng);
    if rng.random_bool(0.5) {
        blur(&mut linear, size);
    }
    develop(&linear, rng)
}

/// Colours the surface and lights it from a side: `[size, size, 3]`, linear.
fn light(surface: &[(f32, f32)], size: usize, scale: f32, rng: &mut impl Rng) -> Vec<[f32; 3]> {
    let colour = |rng: &mut dyn Rng| -> [f32; 3] { std::array::from_fn(|_| rng.random_range(0.08..0.85)) };
    let [dark, bright, gap] = [colour(rng), colour(rng), colour(rng)];
    let (sin, cos) = rng.random_range(0.0..TAU).sin_cos();
    let relief = rng.random_range(0.4..1.2) * size as f32 / scale / 8.0;
    let gradient = (rng.random_range(-0.6..0.6), rng.random_range(-0.6..0.6));
    let (exposure, vignette) = (rng.random_range(0.7..1.2), rng.random_range(0.0..0.9));
    let shadow: u32 = rng.random();
    let height = |x: usize, y: usize| surface[y.min(size - 1) * size + x.min(size - 1)].0;
    (0..size * size)
        .map(|i| {
            let (x, y) = (i % size, i / size);
            let (h, tone) = surface[i];
            let slope = (height(x + 1, y) - h) * cos + (height(x, y + 1) - h) * sin;
            let (px, py) = (x as f32 / size as f32 - 0.5, y as f32 / size as f32 - 0.5);
            let shade = (0.75 - slope * relief).clamp(0.15, 1.5)
                * (1.0 + gradient.0 * px + gradient.1 * py)
                * (1.0 - vignette * (px * px + py * py))
                * (0.7 + 0.6 * smoothstep(0.35, 0.55, fractal(px * 1.5 + 9.0, py * 1.5 + 9.0, shadow)))
                * exposure;
            std::array::from_fn(|c| mix(gap[c], mix(dark[c], bright[c], tone), smoothstep(0.0, 0.5, h)) * shade)
        })
        .collect()
}

/// A soft lens: each pixel becomes the mean of itself and its neighbours.
fn blur(pixels: &mut [[f32; 3]], size: usize) {
    let source = pixels.to_vec();
    for (i, pixel) in pixels.iter_mut().enumerate() {
        let (x, y) = (i % size, i / size);
        let around = [-1isize, 0, 1].into_iter().flat_map(|dy| [-1isize, 0, 1].map(|dx| (dx, dy)));
        let mut sum = [0.0; 3];
        for (dx, dy) in around {
            let clamp = |p: usize, d: isize| p.saturating_add_signed(d).min(size - 1);
            let neighbour = source[clamp(y, dy) * size + clamp(x, dx)];
            (0..3).for_each(|c| sum[c] += neighbour[c]);
        }
        *pixel = sum.map(|s| s / 9.0);
    }
}

/// Sensor noise, gamma, 8 bits.
fn develop(linear: &[[f32; 3]], rng: &mut impl Rng) -> Vec<u8> {
    let grain = rng.random_range(0.0..0.06);
    let mut bytes = Vec::with_capacity(linear.len() * 3);
    for value in linear.iter().flatten() {
        // The sum of three uniform numbers is close enough to a bell curve.
        let bell: f32 = (0..3).map(|_| rng.random_range(-1.0f32..1.0)).sum();
        bytes.push(((value + grain * bell).clamp(0.0, 1.0).powf(1.0 / 2.2) * 255.0).round() as u8);
    }
    bytes
}
