//! Batch normalisation, ReLU and max pooling of `[n, h, w, c]`, pooling first: what follows the first convolution.
//!
//! Its results are the network's largest, and pooling keeps a quarter of them. Normalisation and ReLU keep the order of a channel's values,
//! or turn it round where the scale is negative: so it is values times the sign of the scale that are pooled, and only the maxima are
//! normalised. On the way back sums over them are all that the parameters' gradients take.

use super::float::Float;
use super::norm::{Columns, by_columns, load, store, whole_rows};
use super::norm_backward::Gate;
use super::pool::{Covering, PoolShape};
use super::simd::Simd;
use rayon::prelude::*;
use std::array;
use std::ops::Range;

/// 1 or -1 for every channel, with which its scale is not negative.
pub fn signs(scale: &[f32]) -> Vec<f32> {
    scale.iter().map(|&scale| if scale < 0.0 { -1.0 } else { 1.0 }).collect()
}

/// The gradients of maxima, `[n, oh, ow, c]`, and the places that these come from.
pub struct OfMaxima<'a, T> {
    dy: &'a [T],
    places: &'a [u8],
    shape: &'a PoolShape,
    columns: Covering,
}

impl<'a, T: Float> OfMaxima<'a, T> {
    /// Of a pooling.
    pub fn new(dy: &'a [T], places: &'a [u8], shape: &'a PoolShape) -> Self {
        let windows = shape.n * shape.output().iter().product::<usize>() * shape.c;
        assert!([dy.len(), places.len()] == [windows; 2], "buffers fit the shape");
        OfMaxima { dy, places, shape, columns: Covering::columns(shape) }
    }

    /// [`super::norm_backward::backward_input`] of what was pooled; the gate is not one of outputs.
    pub fn backward_input(&self, x: &[T], gate: Gate<T>, abc: [&[f32]; 3], dx: &mut [T]) {
        let (row_len, rows) = (self.row_len(), self.shape.n * self.shape.h);
        assert!([x.len(), dx.len()] == [rows * row_len; 2], "buffers fit the shape");
        dx.par_chunks_mut(row_len).zip(x.par_chunks(row_len)).enumerate().for_each(|(row, (dx, x))| {
            self.backward_input_of_row(x, gate, abc, row, dx);
        });
    }

    /// The same of some rows of all pictures', those that `x` and `dx` hold, on this thread.
    pub fn backward_input_of_rows(&self, x: &[T], gate: Gate<T>, abc: [&[f32]; 3], rows: Range<usize>, dx: &mut [T]) {
        let row_len = self.row_len();
        assert!([x.len(), dx.len()] == [rows.len() * row_len; 2], "buffers fit the shape");
        for (row, (dx, x)) in rows.zip(dx.chunks_exact_mut(row_len).zip(x.chunks_exact(row_len))) {
            self.backward_input_of_row(x, gate, abc, row, dx);
        }
    }

    /// Values of a row of what was pooled.
    fn row_len(&self) -> usize {
        self.shape.w * self.shape.c
    }

    fn backward_input_of_row(&self, x: &[T], gate: Gate<T>, abc: [&[f32]; 3], row: usize, dx: &mut [T]) {
        let OfMaxima { dy, places, shape, ref columns } = *self;
        let [oh, ow] = shape.output();
        assert!(row < shape.n * shape.h, "a row of the pictures");
        let (image, row) = (row / shape.h, row % shape.h);
        // The place of each row of windows' first column, and its first window.
        let rows = shape.covering(row, oh).map(|(ky, oy)| (ky * shape.kernel, (image * oh + oy) * ow)).collect();
        assert!(!matches!(gate, Gate::Outputs(_)) && gate.fits(dx.len(), shape.c) && whole_rows(x, &abc));
        assert_eq!(abc[0].len(), shape.c, "vectors of channels");
        by_columns(shape.c, BackwardRow { x, gate, abc, dy, places, rows, columns, dx });
    }
}

/// A row of pixels, each of which collects from the windows that it is the maximum of.
struct BackwardRow<'a, T> {
    x: &'a [T],
    gate: Gate<'a, T>,
    abc: [&'a [f32]; 3],
    dy: &'a [T],
    places: &'a [u8],
    rows: Vec<(usize, usize)>,
    columns: &'a Covering,
    dx: &'a mut [T],
}

impl<T: Float> Columns for BackwardRow<'_, T> {
    const BF16: bool = T::PER_WORD > 1;

    #[inline(always)]
    unsafe fn run<S: Simd, const V: usize>(&mut self, simd: S, column: usize) {
        let channels = self.abc[0].len();
        // SAFETY: the contract; windows that cover something are windows of the image.
        unsafe {
            let [a, b, c] = self.abc.map(|x| load::<f32, S, V>(simd, x.as_ptr().add(column)));
            let affine = self.gate.affine::<S, V>(simd, column);
            for pixel in 0..self.x.len() / channels {
                let mut g = [simd.splat(0.0); V];
                for &(row_place, row) in &self.rows {
                    for &(kx, ox) in self.columns.of(pixel) {
                        let (place, at) = ((row_place + kx) as u8, (row + ox) * channels + column);
                        let dy = load::<T, S, V>(simd, self.dy.as_ptr().add(at));
                        for v in 0..V {
                            let taken = simd.where_equal(self.places.as_ptr().add(at + v * S::LANES), place, dy[v]);
                            g[v] = simd.add(g[v], taken);
                        }
                    }
                }
                let at = pixel * channels + column;
                let x = load::<T, S, V>(simd, self.x.as_ptr().add(at));
                let g = self.gate.pass(simd, at, &x, &affine, g);
                let values = array::from_fn(|v| simd.mul_add(a[v], g[v], simd.mul_add(b[v], x[v], c[v])));
                store::<T, S, V>(simd, self.dx.as_mut_ptr().add(at), values);
            }
        }
    }
}
