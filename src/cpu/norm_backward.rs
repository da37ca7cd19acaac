//! The backward pass of batch normalisation over `[rows, channels]` and of the ReLU after it.

use super::float::Float;
use super::norm::{Columns, add_part, by_columns, chunk_of, load, store, whole_rows};
use super::simd::Simd;
use crate::tensor::pool::Scratch;
use rayon::prelude::*;
use std::array;

/// What a backward pass knows of the ReLU that the forward pass may have ended in: it lets the gradient pass where its input was
/// positive.
#[derive(Clone, Copy)]
pub enum Gate<'a, T> {
    /// There was none.
    Open,
    /// It gave these.
    Outputs(&'a [T]),
    /// Its input was `x * scale + shift`, which takes less time to compute again than to read.
    Affine([&'a [f32]; 2]),
}

impl<'a, T: Float> Gate<'a, T> {
    /// That of some rows.
    fn rows(self, first: usize, len: usize) -> Self {
        match self {
            Gate::Outputs(y) => Gate::Outputs(&y[first..][..len]),
            gate => gate,
        }
    }

    /// Whether it has what so many values and channels ask for.
    pub(super) fn fits(&self, values: usize, channels: usize) -> bool {
        match self {
            Gate::Open => true,
            Gate::Outputs(y) => y.len() == values,
            Gate::Affine(vectors) => vectors.iter().all(|vector| vector.len() == channels),
        }
    }

    /// The vectors of `scale` and `shift` of some columns.
    ///
    /// # Safety
    /// There are `V` vectors of channels from `column` on.
    #[inline(always)]
    pub(super) unsafe fn affine<S: Simd, const V: usize>(&self, simd: S, column: usize) -> [[S::V; V]; 2] {
        match self {
            // SAFETY: the caller's word.
            Gate::Affine(vectors) => vectors.map(|vector| unsafe { load(simd, vector.as_ptr().add(column)) }),
            _ => [[simd.splat(0.0); V]; 2],
        }
    }

    /// What it lets pass of `dy`. `x` are the inputs from `at` on, and `affine` is [`Gate::affine`].
    ///
    /// # Safety
    /// There are `V` vectors from `at` on.
    #[inline(always)]
    pub(super) unsafe fn pass<S: Simd, const V: usize>(
        &self,
        simd: S,
        at: usize,
        x: &[S::V; V],
        [scale, shift]: &[[S::V; V]; 2],
        dy: [S::V; V],
    ) -> [S::V; V] {
        match self {
            Gate::Open => dy,
            Gate::Outputs(y) => {
                // SAFETY: the caller's word.
                let y: [S::V; V] = unsafe { load(simd, y.as_ptr().add(at)) };
                array::from_fn(|v| simd.where_positive(y[v], dy[v]))
            }
            Gate::Affine(_) => array::from_fn(|v| simd.where_positive(simd.mul_add(x[v], scale[v], shift[v]), dy[v])),
        }
    }
}

/// What a backward pass sums over the rows: for every channel `g` and `g * (x - mean) * rstd`, the gradients to shift and
/// scale, where `g` is what the gate lets pass of `dy`. With [`Gate::Outputs`], `dy` becomes `g`; else it stays as it is.
pub fn parameter_gradients<T: Float>(
    x: &[T],
    gate: Gate<T>,
    dy: &mut [T],
    [mean, rstd]: [&[f32]; 2],
    dscale: &mut [f32],
    dshift: &mut [f32],
) {
    let channels = mean.len();
    let chunk = chunk_of::<T>(channels);
    assert!(x.len() == dy.len() && gate.fits(dy.len(), channels), "as many values");
    assert!(whole_rows(x, &[mean, rstd, &*dscale, &*dshift]), "whole rows");
    let mut parts = Scratch::<f32>::take(x.len().div_ceil(chunk) * 2 * channels);
    parts.par_chunks_mut(2 * channels).zip(x.par_chunks(chunk).zip(dy.par_chunks_mut(chunk))).enumerate().for_each(
        |(i, (part, (x, dy)))| {
            let (sums, products) = part.split_at_mut(channels);
            let gate = gate.rows(i * chunk, dy.len());
            by_columns(channels, BackwardSums { x, gate, dy, mean, sums, products });
        },
    );
    let mut totals = vec![0.0; 2 * channels];
    parts.chunks_exact(2 * channels).for_each(|part| add_part(part, &mut totals));
    let (sums, products) = totals.split_at(channels);
    for channel in 0..channels {
        dshift[channel] = sums[channel] as f32;
        dscale[channel] = (products[channel] * f64::from(rstd[channel])) as f32;
    }
}

/// `dx = a * g + b * x + c`, channel by channel, where `g` is what the gate lets pass of `dy`, or of what is in `dx`.
pub fn backward_input<T: Float>(x: &[T], gate: Gate<T>, [a, b, c]: [&[f32]; 3], dy: Option<&[T]>, dx: &mut [T]) {
    let chunk = chunk_of::<T>(a.len());
    assert!(x.len() == dx.len() && dy.is_none_or(|dy| dy.len() == dx.len()), "as many values");
    assert!(gate.fits(dx.len(), a.len()) && whole_rows(x, &[a, b, c]), "as many values");
    dx.par_chunks_mut(chunk).zip(x.par_chunks(chunk)).enumerate().for_each(|(i, (dx, x))| {
        let (gate, dy) = (gate.rows(i * chunk, dx.len()), dy.map(|dy| &dy[i * chunk..][..dx.len()]));
        by_columns(a.len(), BackwardInput { x, gate, a, b, c, dy, dx });
    });
}

struct BackwardSums<'a, T> {
    x: &'a [T],
    gate: Gate<'a, T>,
    dy: &'a mut [T],
    mean: &'a [f32],
    sums: &'a mut [f32],
    products: &'a mut [f32],
}

impl<T: Float> Columns for BackwardSums<'_, T> {
    const BF16: bool = T::PER_WORD > 1;

    #[inline(always)]
    unsafe fn run<S: Simd, const V: usize>(&mut self, simd: S, column: usize) {
        let channels = self.mean.len();
        let (mut sums, mut products) = ([simd.splat(0.0); V], [simd.splat(0.0); V]);
        // SAFETY: the contract.
        unsafe {
            let mean = load::<f32, S, V>(simd, self.mean.as_ptr().add(column));
            let affine = self.gate.affine::<S, V>(simd, column);
            for at in (column..self.x.len()).step_by(channels) {
                let x = load::<T, S, V>(simd, self.x.as_ptr().add(at));
                let dy = load::<T, S, V>(simd, self.dy.as_ptr().add(at));
                let g = self.gate.pass(simd, at, &x, &affine, dy);
                if let Gate::Outputs(_) = self.gate {
                    store(simd, self.dy.as_mut_ptr().add(at), g);
                }
                for v in 0..V {
                    sums[v] = simd.add(sums[v], g[v]);
                    products[v] = simd.mul_add(g[v], simd.sub(x[v], mean[v]), products[v]);
                }
            }
            store(simd, self.sums.as_mut_ptr().add(column), sums);
            store(simd, self.products.as_mut_ptr().add(column), products);
        }
    }
}

struct BackwardInput<'a, T> {
    x: &'a [T],
    gate: Gate<'a, T>,
    a: &'a [f32],
    b: &'a [f32],
    c: &'a [f32],
    dy: Option<&'a [T]>,
    dx: &'a mut [T],
}

impl<T: Float> Columns for BackwardInput<'_, T> {
    const BF16: bool = T::PER_WORD > 1;

    #[inline(always)]
    unsafe fn run<S: Simd, const V: usize>(&mut self, simd: S, column: usize) {
        let channels = self.a.len();
        let dx = self.dx.as_mut_ptr();
        let dy = self.dy.map_or(dx.cast_const(), |dy| dy.as_ptr());
        // SAFETY: the contract.
        unsafe {
            let [a, b, c] = [self.a, self.b, self.c].map(|x| load::<f32, S, V>(simd, x.as_ptr().add(column)));
            let affine = self.gate.affine::<S, V>(simd, column);
            for at in (column..self.x.len()).step_by(channels) {
                let x = load::<T, S, V>(simd, self.x.as_ptr().add(at));
                let g = self.gate.pass(simd, at, &x, &affine, load::<T, S, V>(simd, dy.add(at)));
                let values = array::from_fn(|v| simd.mul_add(a[v], g[v], simd.mul_add(b[v], x[v], c[v])));
                store::<T, S, V>(simd, dx.add(at), values);
            }
        }
    }
}
