//! Transpositions between PyTorch's layouts, as files have them, and hone's.

use crate::error::{Error, Result};
use crate::tensor::Tensor;
use rayon::prelude::*;

/// `[A, B, P]` to `[A, P, B]`: moves channels innermost or back. `NCHW` to `NHWC` is A=N, B=C, P=H*W.
fn swap_inner(values: &[f32], b: usize, p: usize, out: &mut [f32]) {
    values.par_chunks_exact((b * p).max(1)).zip(out.par_chunks_exact_mut((b * p).max(1))).for_each(|(plane, out)| {
        for (i, row) in plane.chunks_exact(p).enumerate() {
            for (j, &value) in row.iter().enumerate() {
                out[j * b + i] = value;
            }
        }
    });
}

/// A `[N, H, W, C]` tensor from `NCHW` values; filters `[O, KH, KW, I]` from `OIHW` likewise. `dims` is the order of the
/// file: N, C, H, W.
pub fn from_channels_first(values: &[f32], dims: &[usize]) -> Result<Tensor> {
    match *dims {
        [n, c, h, w] if values.len() == n * c * h * w => {
            Ok(Tensor::build([n, h, w, c], |out| swap_inner(values, c, h * w, out)))
        }
        _ => Err(Error::shape("from_channels_first", "4 extents and as many values", &[dims, &[values.len()]])),
    }
}

/// The values of an `[N, H, W, C]` tensor in the order `NCHW`, with those extents.
pub fn to_channels_first(tensor: &Tensor) -> Result<(Vec<f32>, Vec<usize>)> {
    match *tensor.dims() {
        [n, h, w, c] => {
            let mut values = vec![0.0; tensor.numel()];
            swap_inner(tensor.as_slice(), h * w, c, &mut values);
            Ok((values, vec![n, c, h, w]))
        }
        _ => Err(Error::shape("to_channels_first", "4 extents", &[tensor.dims()])),
    }
}
