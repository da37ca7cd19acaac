//! Elementwise maps and full reductions.

use super::float::Float;
use super::simd::vectorised;
use rayon::prelude::*;

/// Elements a task works on; two or three such pieces fit L2.
const CHUNK: usize = 1 << 15;

/// `y = relu(x)`; NaN stays NaN.
pub fn relu<T: Float>(x: &[T], y: &mut [T]) {
    y.par_chunks_mut(T::CHUNK)
        .zip(x.par_chunks(T::CHUNK))
        .for_each(|(y, x)| T::read(x, |x| T::write(y, |y| relu_chunk(x, y))));
}

/// `dy *= (y > 0)`, where `y` is what [`relu`] gave.
pub fn relu_backward<T: Float>(y: &[T], dy: &mut [T]) {
    dy.par_chunks_mut(T::CHUNK)
        .zip(y.par_chunks(T::CHUNK))
        .for_each(|(dy, y)| T::read(y, |y| T::update(dy, |dy| relu_backward_chunk(y, dy))));
}

/// `c = a + b`.
pub fn add<T: Float>(a: &[T], b: &[T], c: &mut [T]) {
    c.par_chunks_mut(T::CHUNK)
        .zip(a.par_chunks(T::CHUNK).zip(b.par_chunks(T::CHUNK)))
        .for_each(|(c, (a, b))| T::read(a, |a| T::read(b, |b| T::write(c, |c| add_chunk(a, b, c)))));
}

/// `a += b`.
pub fn add_assign<T: Float>(a: &mut [T], b: &[T]) {
    a.par_chunks_mut(T::CHUNK)
        .zip(b.par_chunks(T::CHUNK))
        .for_each(|(a, b)| T::read(b, |b| T::update(a, |a| add_assign_chunk(a, b))));
}

/// `a += b` for each part `b` of `parts`, all as long as `a`, in their order.
pub fn add_parts(a: &mut [f32], parts: &[f32]) {
    let len = a.len().max(1);
    assert!(parts.len().is_multiple_of(len), "parts of the same length");
    a.par_chunks_mut(CHUNK).enumerate().for_each(|(i, a)| {
        parts.chunks_exact(len).for_each(|b| add_assign_chunk(a, &b[i * CHUNK..][..a.len()]));
    });
}

/// `x *= factor`.
pub fn scale<T: Float>(x: &mut [T], factor: f32) {
    x.par_chunks_mut(T::CHUNK).for_each(|x| T::update(x, |x| scale_chunk(x, factor)));
}

/// Sum of all elements, in f64: pieces in parallel, then the pieces in order.
pub fn sum(x: &[f32]) -> f64 {
    let parts: Vec<f64> = x.par_chunks(CHUNK).map(sum_chunk).collect();
    parts.into_iter().sum()
}

/// Sum of the squares of all elements, in f64, as [`sum`].
pub fn sum_of_squares(x: &[f32]) -> f64 {
    let parts: Vec<f64> = x.par_chunks(CHUNK).map(sum_of_squares_chunk).collect();
    parts.into_iter().sum()
}

/// `a = a * keep + b * factor`.
pub fn blend(a: &mut [f32], b: &[f32], keep: f32, factor: f32) {
    a.par_chunks_mut(CHUNK).zip(b.par_chunks(CHUNK)).for_each(|(a, b)| blend_chunk(a, b, keep, factor));
}

vectorised! {
    fn blend_chunk(a: &mut [f32], b: &[f32], keep: f32, factor: f32) {
        for (a, &b) in a.iter_mut().zip(b) {
            *a = *a * keep + b * factor;
        }
    }

    fn sum_of_squares_chunk(x: &[f32]) -> f64 {
        let mut lanes = [0.0f64; 8];
        let (blocks, rest) = x.as_chunks::<8>();
        for block in blocks {
            for (lane, &x) in lanes.iter_mut().zip(block) {
                *lane += f64::from(x) * f64::from(x);
            }
        }
        lanes.into_iter().sum::<f64>() + rest.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>()
    }

    fn relu_chunk(x: &[f32], y: &mut [f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = if x < 0.0 { 0.0 } else { x };
        }
    }

    fn relu_backward_chunk(y: &[f32], dy: &mut [f32]) {
        for (dy, &y) in dy.iter_mut().zip(y) {
            *dy = if y <= 0.0 { 0.0 } else { *dy };
        }
    }

    fn add_chunk(a: &[f32], b: &[f32], c: &mut [f32]) {
        for ((c, &a), &b) in c.iter_mut().zip(a).zip(b) {
            *c = a + b;
        }
    }

    fn add_assign_chunk(a: &mut [f32], b: &[f32]) {
        for (a, &b) in a.iter_mut().zip(b) {
            *a += b;
        }
    }

    fn scale_chunk(x: &mut [f32], factor: f32) {
        for x in x {
            *x *= factor;
        }
    }

    fn sum_chunk(x: &[f32]) -> f64 {
        // Independent sums, so that the additions need not wait for each other.
        let mut lanes = [0.0f64; 8];
        let (blocks, rest) = x.as_chunks::<8>();
        for block in blocks {
            for (lane, &x) in lanes.iter_mut().zip(block) {
                *lane += f64::from(x);
            }
        }
        lanes.into_iter().sum::<f64>() + rest.iter().map(|&x| f64::from(x)).sum::<f64>()
    }
}
