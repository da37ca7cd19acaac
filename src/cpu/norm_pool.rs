//! Batch normalisation, ReLU and max pooling of `[n, h, w, c]`, pooling first: what follows the first convolution.
//!
//! Its results are the network's largest, and pooling keeps a quarter of them. Normalisation and ReLU keep the order of a channel's values,
//! or turn it round where the scale is negative: so it is values times the sign of the scale that are pooled, and only the maxima are
//! normalised. On the way back sums over them are all that the parameters' gradients take.

use super::float::Float;
use super::norm;
use super::norm_backward::{self, Gate};
use super::pool::{PoolShape, max_pool_backward_row, max_pool_row_with_places};
use crate::tensor::pool::Scratch;
use rayon::prelude::*;
use std::ops::Range;

/// 1 or -1 for every channel, with which its scale is not negative.
pub fn signs(scale: &[f32]) -> Vec<f32> {
    scale.iter().map(|&scale| if scale < 0.0 { -1.0 } else { 1.0 }).collect()
}

/// The maxima of `x * signs` in each window, and the place in it that each comes from, as [`super::pool::max_pool_with_places`] has it.
pub fn signed_max_pool<T: Float>(x: &[T], signs: &[f32], shape: &PoolShape, maxima: &mut [T], places: &mut [u8]) {
    let ([oh, ow], row_len) = (shape.output(), shape.w * shape.c);
    let (out_len, zeros) = (ow * shape.c, vec![0.0; shape.c]);
    assert!(x.len() == shape.n * shape.h * row_len && signs.len() == shape.c, "buffers fit the shape");
    assert!([maxima.len(), places.len()] == [shape.n * oh * out_len; 2], "buffers fit the shape");
    maxima.par_chunks_mut(out_len).zip(places.par_chunks_mut(out_len)).enumerate().for_each(|(i, (maxima, places))| {
        let (image, row) = (i / oh, i % oh);
        let rows = shape.rows(row);
        let mut signed = Scratch::<T>::take(rows.len() * row_len);
        let x = &x[(image * shape.h + rows.start) * row_len..(image * shape.h + rows.end) * row_len];
        norm::affine_of_rows(x, [signs, &zeros], false, &mut signed);
        max_pool_row_with_places(&signed, shape, row, maxima, places);
    });
}

/// [`norm_backward::backward_input`] of what was pooled, from the gradient of the maxima and their places.
pub fn backward_input<T: Float>(
    x: &[T],
    gate: Gate<T>,
    coefficients: [&[f32]; 3],
    pooled: (&[T], &[u8]),
    shape: &PoolShape,
    dx: &mut [T],
) {
    let row_len = shape.w * shape.c;
    assert!([x.len(), dx.len()] == [shape.n * shape.h * row_len; 2], "buffers fit the shape");
    dx.par_chunks_mut(row_len).zip(x.par_chunks(row_len)).enumerate().for_each(|(row, (dx, x))| {
        backward_input_of_rows(x, gate, coefficients, pooled, shape, row..row + 1, dx);
    });
}

/// [`backward_input`] of some rows of all pictures', those that `x` and `dx` hold, on this thread.
pub fn backward_input_of_rows<T: Float>(
    x: &[T],
    gate: Gate<T>,
    coefficients: [&[f32]; 3],
    (dy, places): (&[T], &[u8]),
    shape: &PoolShape,
    rows: Range<usize>,
    dx: &mut [T],
) {
    let (row_len, image) = (shape.w * shape.c, shape.output().iter().product::<usize>() * shape.c);
    assert!([x.len(), dx.len()] == [rows.len() * row_len; 2], "buffers fit the shape");
    assert!([dy.len(), places.len()] == [shape.n * image; 2], "buffers fit the shape");
    for (row, (dx, x)) in rows.zip(dx.chunks_exact_mut(row_len).zip(x.chunks_exact(row_len))) {
        let image = row / shape.h * image..(row / shape.h + 1) * image;
        max_pool_backward_row(&dy[image.clone()], &places[image], shape, row % shape.h, dx);
        norm_backward::input_gradients_of_rows(x, gate, coefficients, None, dx);
    }
}
