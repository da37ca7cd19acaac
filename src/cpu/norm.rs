//! Batch normalisation over the rows of `[rows, channels]`: every pixel of every image is a row.
//!
//! Ioffe and Szegedy, "Batch normalization", 2015. Statistics are taken over pieces that stay in cache, in two passes of
//! which the second corrects the mean of the first (Chan, Golub and LeVeque, 1983, equation 1.7). Pieces are combined in
//! f64 with their update of 1979, so that a large mean does not cancel a small variance.

use super::float::Float;
use super::simd::vectorised;
use crate::tensor::pool::Scratch;
use rayon::prelude::*;

/// Rows that are added in f32 before the sum goes on in f64.
const SHORT: usize = 32;

/// Values in as many whole rows as fit a chunk.
fn chunk_of<T: Float>(channels: usize) -> usize {
    (T::CHUNK / channels.max(1)).max(1) * channels
}

/// Mean and biased variance of every channel.
pub fn statistics<T: Float>(x: &[T], mean: &mut [f32], variance: &mut [f32]) {
    let channels = mean.len();
    let chunk = chunk_of::<T>(channels);
    let mut parts = Scratch::<f32>::take(x.len().div_ceil(chunk) * 2 * channels);
    parts.par_chunks_mut(2 * channels).zip(x.par_chunks(chunk)).for_each(|(part, x)| {
        let (mean, squares) = part.split_at_mut(channels);
        T::read(x, |x| chunk_statistics(x, mean, squares));
    });
    for channel in 0..channels {
        let (mut count, mut total, mut squares) = (0.0f64, 0.0f64, 0.0f64);
        for (part, x) in parts.chunks_exact(2 * channels).zip(x.chunks(chunk)) {
            let rows = (x.len() / channels) as f64;
            let delta = f64::from(part[channel]) - total;
            squares += f64::from(part[channels + channel]) + delta * delta * count * rows / (count + rows);
            total += delta * rows / (count + rows);
            count += rows;
        }
        mean[channel] = total as f32;
        variance[channel] = (squares / count) as f32;
    }
}

/// `y = act(x * scale + shift + residual)`, channel by channel; the residual and the ReLU if asked for. NaN stays NaN.
pub fn affine<T: Float>(x: &[T], scale: &[f32], shift: &[f32], residual: Option<&[T]>, relu: bool, y: &mut [T]) {
    let chunk = chunk_of::<T>(scale.len());
    y.par_chunks_mut(chunk).zip(x.par_chunks(chunk)).enumerate().for_each(|(i, (y, x))| {
        let residual = residual.map(|residual| &residual[i * chunk..][..y.len()]);
        T::write(y, |y| {
            T::read(x, |x| affine_chunk(x, scale, shift, y));
            // The piece is in cache still.
            match residual {
                Some(residual) => T::read(residual, |residual| add_relu_chunk(residual, relu, y)),
                None if relu => relu_chunk(y),
                None => {}
            }
        });
    });
}

/// For every channel the sums of `dy` and of `dy * (x - mean) * rstd`: the gradients to shift and scale.
pub fn parameter_gradients<T: Float>(
    x: &[T],
    dy: &[T],
    mean: &[f32],
    rstd: &[f32],
    dscale: &mut [f32],
    dshift: &mut [f32],
) {
    let channels = mean.len();
    let chunk = chunk_of::<T>(channels);
    let mut parts = Scratch::<f32>::take(x.len().div_ceil(chunk) * 2 * channels);
    parts.par_chunks_mut(2 * channels).zip(x.par_chunks(chunk).zip(dy.par_chunks(chunk))).for_each(
        |(part, (x, dy))| {
            let (sum, product) = part.split_at_mut(channels);
            T::read(x, |x| T::read(dy, |dy| chunk_products(x, dy, mean, sum, product)));
        },
    );
    for channel in 0..channels {
        let total = |i: usize| parts.chunks_exact(2 * channels).map(|part| f64::from(part[i])).sum::<f64>();
        dshift[channel] = total(channel) as f32;
        dscale[channel] = (total(channels + channel) * f64::from(rstd[channel])) as f32;
    }
}

/// `dy = a * dy + b * x + c`, channel by channel.
pub fn backward_input<T: Float>(x: &[T], a: &[f32], b: &[f32], c: &[f32], dy: &mut [T]) {
    let chunk = chunk_of::<T>(a.len());
    dy.par_chunks_mut(chunk)
        .zip(x.par_chunks(chunk))
        .for_each(|(dy, x)| T::read(x, |x| T::update(dy, |dy| backward_chunk(x, a, b, c, dy))));
}

/// For every channel the sum over rows; the gradient to a bias.
pub fn column_sums<T: Float>(x: &[T], sums: &mut [f32]) {
    let channels = sums.len();
    let chunk = chunk_of::<T>(channels);
    let mut parts = Scratch::<f32>::take(x.len().div_ceil(chunk) * channels);
    parts.par_chunks_mut(channels).zip(x.par_chunks(chunk)).for_each(|(sums, x)| {
        sums.fill(0.0);
        T::read(x, |x| add_rows(x, sums));
    });
    for (channel, sum) in sums.iter_mut().enumerate() {
        *sum = parts.chunks_exact(channels).map(|part| f64::from(part[channel])).sum::<f64>() as f32;
    }
}

vectorised! {
    fn add_rows(x: &[f32], sums: &mut [f32]) {
        for row in x.chunks_exact(sums.len()) {
            for (sum, &x) in sums.iter_mut().zip(row) {
                *sum += x;
            }
        }
    }

    fn chunk_statistics(x: &[f32], mean: &mut [f32], squares: &mut [f32]) {
        let channels = mean.len();
        let rows = (x.len() / channels) as f64;
        let mut totals = Scratch::<f64>::take(2 * channels);
        let (sums, square_sums) = totals.split_at_mut(channels);
        sums.fill(0.0);
        for x in x.chunks(SHORT * channels) {
            mean.fill(0.0);
            for row in x.chunks_exact(channels) {
                for (mean, &x) in mean.iter_mut().zip(row) {
                    *mean += x;
                }
            }
            for (sum, &part) in sums.iter_mut().zip(mean.iter()) {
                *sum += f64::from(part);
            }
        }
        for (mean, sum) in mean.iter_mut().zip(sums.iter_mut()) {
            *mean = (*sum / rows) as f32;
        }
        // Deviations from the rounded mean: their sum says by how much it is off.
        sums.fill(0.0);
        square_sums.fill(0.0);
        let mut parts = Scratch::<f32>::take(2 * channels);
        let (deviations, part_squares) = parts.split_at_mut(channels);
        for x in x.chunks(SHORT * channels) {
            deviations.fill(0.0);
            part_squares.fill(0.0);
            for row in x.chunks_exact(channels) {
                for (((square, deviation), &mean), &x) in
                    part_squares.iter_mut().zip(deviations.iter_mut()).zip(mean.iter()).zip(row)
                {
                    let d = x - mean;
                    *deviation += d;
                    *square += d * d;
                }
            }
            for ((sum, square_sum), (&deviation, &square)) in
                sums.iter_mut().zip(square_sums.iter_mut()).zip(deviations.iter().zip(part_squares.iter()))
            {
                *sum += f64::from(deviation);
                *square_sum += f64::from(square);
            }
        }
        for (((mean, squares), &sum), &square_sum) in
            mean.iter_mut().zip(squares).zip(sums.iter()).zip(square_sums.iter())
        {
            *mean = (f64::from(*mean) + sum / rows) as f32;
            *squares = (square_sum - sum * sum / rows) as f32;
        }
    }

    fn affine_chunk(x: &[f32], scale: &[f32], shift: &[f32], y: &mut [f32]) {
        let channels = scale.len();
        for (y, x) in y.chunks_exact_mut(channels).zip(x.chunks_exact(channels)) {
            for (((y, &x), &scale), &shift) in y.iter_mut().zip(x).zip(scale).zip(shift) {
                *y = x * scale + shift;
            }
        }
    }

    fn add_relu_chunk(residual: &[f32], relu: bool, y: &mut [f32]) {
        let floor = if relu { 0.0 } else { f32::NEG_INFINITY };
        for (y, &residual) in y.iter_mut().zip(residual) {
            let sum = *y + residual;
            *y = if sum < floor { floor } else { sum };
        }
    }

    fn relu_chunk(y: &mut [f32]) {
        for y in y {
            *y = if *y < 0.0 { 0.0 } else { *y };
        }
    }

    fn chunk_products(x: &[f32], dy: &[f32], mean: &[f32], sum: &mut [f32], product: &mut [f32]) {
        let channels = mean.len();
        sum.fill(0.0);
        product.fill(0.0);
        for (x, dy) in x.chunks_exact(channels).zip(dy.chunks_exact(channels)) {
            for ((((sum, product), &x), &dy), &mean) in sum.iter_mut().zip(product.iter_mut()).zip(x).zip(dy).zip(mean) {
                *sum += dy;
                *product += dy * (x - mean);
            }
        }
    }

    fn backward_chunk(x: &[f32], a: &[f32], b: &[f32], c: &[f32], dy: &mut [f32]) {
        let channels = a.len();
        for (dy, x) in dy.chunks_exact_mut(channels).zip(x.chunks_exact(channels)) {
            for ((((dy, &x), &a), &b), &c) in dy.iter_mut().zip(x).zip(a).zip(b).zip(c) {
                *dy = a * *dy + (b * x + c);
            }
        }
    }
}
