//! Batch normalisation over the rows of `[rows, channels]`: every pixel of every image is a row.
//!
//! Ioffe and Szegedy, "Batch normalization", 2015. Statistics are taken over pieces that stay in cache, in two passes of
//! which the second corrects the mean of the first (Chan, Golub and LeVeque, 1983, equation 1.7). Pieces are combined in
//! f64 with their update of 1979, so that a large mean does not cancel a small variance.

use super::float::Float;
use super::portable::Scalar;
use super::simd::{Isa, Simd, Task, dispatch, vectorised};
use crate::tensor::pool::Scratch;
use rayon::prelude::*;
use std::array;

/// Rows that are added in f32 before the sum goes on in f64.
const SHORT: usize = 32;

/// Values in as many whole rows as fit a chunk.
pub(super) fn chunk_of<T: Float>(channels: usize) -> usize {
    (T::CHUNK / channels.max(1)).max(1) * channels
}

/// Mean and biased variance of every channel.
pub fn statistics<T: Float>(x: &[T], mean: &mut [f32], variance: &mut [f32]) {
    let mut moments = Moments::of_groups::<T>(x.len(), x.len().max(1), mean.len());
    moments.groups().for_each(|part| part.take(x));
    moments.combine(mean, variance);
}

/// Mean and squared deviations of pieces of `[rows, channels]`, each of which stays in cache, and what they are of. Groups of rows are
/// cut into pieces alike, and may be taken apart.
pub struct Moments {
    /// `[piece][mean, squares][channel]`
    parts: Scratch<f32>,
    channels: usize,
    /// Values of all groups, of one but the last, and of a piece but the last of a group.
    values: usize,
    group: usize,
    piece: usize,
}

/// The moments of a group.
pub struct Group<'a> {
    parts: &'a mut [f32],
    channels: usize,
    values: usize,
    piece: usize,
}

impl Moments {
    /// Not yet taken, of `values` values of type `T` in groups of `group`; whole rows.
    pub fn of_groups<T: Float>(values: usize, group: usize, channels: usize) -> Self {
        let piece = chunk_of::<T>(channels);
        assert!(group.is_multiple_of(channels) || group >= values, "groups are whole rows");
        let pieces = values / group * group.div_ceil(piece) + (values % group).div_ceil(piece);
        Moments { parts: Scratch::take(pieces * 2 * channels), channels, values, group, piece }
    }

    /// The groups, to be taken in any order.
    pub fn groups(&mut self) -> impl Iterator<Item = Group<'_>> {
        let Moments { ref mut parts, channels, values, group, piece } = *self;
        let starts = (0..values).step_by(group);
        starts.zip(parts.chunks_mut(group.div_ceil(piece) * 2 * channels)).map(move |(start, parts)| Group {
            parts,
            channels,
            values: group.min(values - start),
            piece,
        })
    }

    /// Mean and biased variance of every channel of all that has been taken.
    pub fn combine(&self, mean: &mut [f32], variance: &mut [f32]) {
        let channels = self.channels;
        let groups = (0..self.values).step_by(self.group).map(|start| self.group.min(self.values - start));
        let pieces = groups.flat_map(|len| (0..len).step_by(self.piece).map(move |start| self.piece.min(len - start)));
        // Piece by piece, for all channels of one lie together.
        let (mut count, mut totals, mut squares) = (0.0, vec![0.0; channels], vec![0.0; channels]);
        for (part, values) in self.parts.chunks_exact(2 * channels).zip(pieces) {
            let rows = (values / channels) as f64;
            let (part_mean, part_squares) = part.split_at(channels);
            let share = rows / (count + rows);
            combine_moments(part_mean, part_squares, share, count * share, &mut totals, &mut squares);
            count += rows;
        }
        for (to, total) in mean.iter_mut().zip(totals) {
            *to = total as f32;
        }
        for (to, squares) in variance.iter_mut().zip(squares) {
            *to = (squares / count) as f32;
        }
    }
}

vectorised! {
    /// A piece's moments joined to those of the pieces before. It has `share` of all rows; `weight` is that of the means' squared difference.
    fn combine_moments(
        mean: &[f32], squares: &[f32], share: f64, weight: f64, total: &mut [f64], total_squares: &mut [f64],
    ) {
        for (((&mean, &squares), total), total_squares) in mean.iter().zip(squares).zip(total).zip(total_squares) {
            let delta = f64::from(mean) - *total;
            *total_squares += f64::from(squares) + delta * delta * weight;
            *total += delta * share;
        }
    }

    /// `totals += part`.
    pub(super) fn add_part(part: &[f32], totals: &mut [f64]) {
        for (total, &part) in totals.iter_mut().zip(part) {
            *total += f64::from(part);
        }
    }
}

impl Group<'_> {
    /// Takes them of the group's rows.
    pub fn take<T: Float>(self, x: &[T]) {
        let Group { parts, channels, values, piece } = self;
        assert_eq!(x.len(), values, "the group's rows");
        parts.par_chunks_mut(2 * channels).zip(x.par_chunks(piece)).for_each(|(part, x)| {
            let (mean, squares) = part.split_at_mut(channels);
            by_columns(channels, PieceMoments { x, mean, squares });
        });
    }
}

/// `y = act(x * scale + shift + residual)`, channel by channel; the residual and the ReLU if asked for. NaN stays NaN.
pub fn affine<T: Float>(x: &[T], scale: &[f32], shift: &[f32], residual: Option<&[T]>, relu: bool, y: &mut [T]) {
    let channels = scale.len();
    let chunk = chunk_of::<T>(channels);
    assert!(x.len() == y.len() && residual.is_none_or(|residual| residual.len() == y.len()), "as many values");
    assert!(whole_rows(x, &[scale, shift]), "whole rows");
    y.par_chunks_mut(chunk).zip(x.par_chunks(chunk)).enumerate().for_each(|(i, (y, x))| {
        let residual = residual.map(|residual| &residual[i * chunk..][..y.len()]);
        by_columns(channels, Affine { x, scale, shift, residual, relu, y });
    });
}

/// Whether there are vectors of channels, all of the same number, for whole rows of `x`.
pub(super) fn whole_rows<T>(x: &[T], vectors: &[&[f32]]) -> bool {
    let channels = vectors[0].len();
    vectors.iter().all(|vector| vector.len() == channels) && x.len().is_multiple_of(channels)
}

/// For every channel the sum over rows; the gradient to a bias.
pub fn column_sums<T: Float>(x: &[T], sums: &mut [f32]) {
    let channels = sums.len();
    assert!(whole_rows(x, &[&*sums]), "whole rows");
    let chunk = chunk_of::<T>(channels);
    let mut parts = Scratch::<f32>::take(x.len().div_ceil(chunk) * channels);
    parts
        .par_chunks_mut(channels)
        .zip(x.par_chunks(chunk))
        .for_each(|(sums, x)| by_columns(channels, ColumnSums { x, sums }));
    let mut totals = vec![0.0; channels];
    parts.chunks_exact(channels).for_each(|part| add_part(part, &mut totals));
    for (sum, total) in sums.iter_mut().zip(totals) {
        *sum = total as f32;
    }
}

/// Work on some columns of `[rows, channels]`, all rows of them, so that what belongs to a channel stays in registers.
pub(super) trait Columns {
    /// As [`Task::BF16`].
    const BF16: bool;

    /// Columns from `column` on, `V` vectors of them.
    ///
    /// # Safety
    /// `column + V * LANES` is at most the number of channels, and every slice is `[rows, channels]` or `[channels]`.
    unsafe fn run<S: Simd, const V: usize>(&mut self, simd: S, column: usize);
}

struct ByColumns<C> {
    channels: usize,
    columns: C,
}

impl<C: Columns> Task for ByColumns<C> {
    type Output = ();
    const BF16: bool = C::BF16;

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let mut column = 0;
        // SAFETY: each call ends within the channels; `by_columns` is called with slices that fit.
        unsafe {
            while column + WIDE * S::LANES <= self.channels {
                self.columns.run::<S, WIDE>(simd, column);
                column += WIDE * S::LANES;
            }
            while column + S::LANES <= self.channels {
                self.columns.run::<S, 1>(simd, column);
                column += S::LANES;
            }
            while column < self.channels {
                self.columns.run::<Scalar, 1>(Scalar, column);
                column += 1;
            }
        }
    }
}

/// Vectors of columns that are worked on together.
const WIDE: usize = 4;
/// The values of so many vectors, the widest there are.
type Lanes<N> = [N; 64];

pub(super) fn by_columns(channels: usize, columns: impl Columns) {
    dispatch(Isa::current(), ByColumns { channels, columns });
}

/// `V` vectors from `p` on.
///
/// # Safety
/// `p` is valid for reading as many values.
#[inline(always)]
pub(super) unsafe fn load<T: Float, S: Simd, const V: usize>(simd: S, p: *const T) -> [S::V; V] {
    // SAFETY: the caller vouches for `p`.
    array::from_fn(|v| unsafe { T::load(simd, p.add(v * S::LANES)) })
}

/// `V` vectors to `p` on.
///
/// # Safety
/// `p` is valid for writing as many values.
#[inline(always)]
pub(super) unsafe fn store<T: Float, S: Simd, const V: usize>(simd: S, p: *mut T, values: [S::V; V]) {
    for (v, value) in values.into_iter().enumerate() {
        // SAFETY: the caller vouches for `p`.
        unsafe { T::store(simd, p.add(v * S::LANES), value) };
    }
}

/// `totals += values`.
#[inline(always)]
fn flush<S: Simd, const V: usize>(simd: S, values: [S::V; V], totals: &mut Lanes<f64>) {
    let mut lanes: Lanes<f32> = [0.0; 64];
    // SAFETY: the lanes hold the widest vectors.
    unsafe { store(simd, lanes.as_mut_ptr(), values) };
    for (total, &lane) in totals.iter_mut().zip(&lanes[..V * S::LANES]) {
        *total += f64::from(lane);
    }
}

/// Mean, and sum of the squares of what is left when it is taken away.
struct PieceMoments<'a, T> {
    x: &'a [T],
    mean: &'a mut [f32],
    squares: &'a mut [f32],
}

impl<T: Float> Columns for PieceMoments<'_, T> {
    const BF16: bool = T::PER_WORD > 1;

    #[inline(always)]
    unsafe fn run<S: Simd, const V: usize>(&mut self, simd: S, column: usize) {
        let (channels, width) = (self.mean.len(), V * S::LANES);
        let rows = (self.x.len() / channels) as f64;
        let zero = [simd.splat(0.0); V];
        let mut totals: Lanes<f64> = [0.0; 64];
        for x in self.x.chunks(SHORT * channels) {
            let mut sums = zero;
            for row in x.chunks_exact(channels) {
                // SAFETY: the contract.
                let x = unsafe { load::<T, S, V>(simd, row.as_ptr().add(column)) };
                sums = array::from_fn(|v| simd.add(sums[v], x[v]));
            }
            flush(simd, sums, &mut totals);
        }
        let mean = &mut self.mean[column..][..width];
        for (mean, total) in mean.iter_mut().zip(totals) {
            *mean = (total / rows) as f32;
        }
        // Deviations from the rounded mean: their sum says by how much it is off.
        // SAFETY: as many values.
        let rounded = unsafe { load::<f32, S, V>(simd, mean.as_ptr()) };
        let (mut deviations, mut squares): (Lanes<f64>, Lanes<f64>) = ([0.0; 64], [0.0; 64]);
        for x in self.x.chunks(SHORT * channels) {
            let (mut short_deviations, mut short_squares) = (zero, zero);
            for row in x.chunks_exact(channels) {
                // SAFETY: the contract.
                let x = unsafe { load::<T, S, V>(simd, row.as_ptr().add(column)) };
                for v in 0..V {
                    let deviation = simd.sub(x[v], rounded[v]);
                    short_deviations[v] = simd.add(short_deviations[v], deviation);
                    short_squares[v] = simd.mul_add(deviation, deviation, short_squares[v]);
                }
            }
            flush(simd, short_deviations, &mut deviations);
            flush(simd, short_squares, &mut squares);
        }
        for (i, (mean, out)) in mean.iter_mut().zip(&mut self.squares[column..]).enumerate() {
            *mean = (f64::from(*mean) + deviations[i] / rows) as f32;
            *out = (squares[i] - deviations[i] * deviations[i] / rows) as f32;
        }
    }
}

struct Affine<'a, T> {
    x: &'a [T],
    scale: &'a [f32],
    shift: &'a [f32],
    residual: Option<&'a [T]>,
    relu: bool,
    y: &'a mut [T],
}

impl<T: Float> Columns for Affine<'_, T> {
    const BF16: bool = T::PER_WORD > 1;

    #[inline(always)]
    unsafe fn run<S: Simd, const V: usize>(&mut self, simd: S, column: usize) {
        let channels = self.scale.len();
        // SAFETY: the contract.
        unsafe {
            let scale = load::<f32, S, V>(simd, self.scale.as_ptr().add(column));
            let shift = load::<f32, S, V>(simd, self.shift.as_ptr().add(column));
            for at in (column..self.x.len()).step_by(channels) {
                let x = load::<T, S, V>(simd, self.x.as_ptr().add(at));
                let mut y: [S::V; V] = array::from_fn(|v| simd.mul_add(x[v], scale[v], shift[v]));
                if let Some(residual) = self.residual {
                    let residual = load::<T, S, V>(simd, residual.as_ptr().add(at));
                    y = array::from_fn(|v| simd.add(y[v], residual[v]));
                }
                if self.relu {
                    y = y.map(|y| simd.relu(y));
                }
                store(simd, self.y.as_mut_ptr().add(at), y);
            }
        }
    }
}

struct ColumnSums<'a, T> {
    x: &'a [T],
    sums: &'a mut [f32],
}

impl<T: Float> Columns for ColumnSums<'_, T> {
    const BF16: bool = T::PER_WORD > 1;

    #[inline(always)]
    unsafe fn run<S: Simd, const V: usize>(&mut self, simd: S, column: usize) {
        let channels = self.sums.len();
        let mut sums = [simd.splat(0.0); V];
        // SAFETY: the contract.
        unsafe {
            for at in (column..self.x.len()).step_by(channels) {
                let x = load::<T, S, V>(simd, self.x.as_ptr().add(at));
                sums = array::from_fn(|v| simd.add(sums[v], x[v]));
            }
            store(simd, self.sums.as_mut_ptr().add(column), sums);
        }
    }
}
