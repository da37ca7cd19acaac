//! A convolution in training, with what the norm after it asks for: moments and pooled maxima are taken of a few pictures' results while
//! these are in cache. Those of early layers are larger than any cache, and would have to come from memory again.

use super::conv::{ConvShape, PackedFilter, forward};
use super::float::Float;
use super::gemm::Epilogue;
use super::norm::Moments;
use super::pool::{PoolShape, signed_max_pool};
use rayon::prelude::*;

/// Where the signed maxima of windows go, as [`signed_max_pool`] has them.
pub struct Maxima<'a, T> {
    /// One a channel.
    pub signs: &'a [f32],
    /// The pooling of the convolution's results.
    pub shape: &'a PoolShape,
    /// The maxima.
    pub maxima: &'a mut [T],
    /// The places they come from.
    pub places: &'a mut [u8],
}

/// Some pictures, and where what is taken of them goes.
struct Pictures<'a, T> {
    x: &'a [T],
    z: &'a mut [T],
    moments: Option<super::norm::Group<'a>>,
    maxima: Option<(&'a mut [T], &'a mut [u8])>,
}

/// `z = conv(x, filter)`, its mean and biased variance by channel if asked for, and its maxima.
pub fn forward_and_take<T: Float>(
    x: &[T],
    filter: &PackedFilter<T>,
    shape: &ConvShape,
    z: &mut [T],
    statistics: Option<[&mut [f32]; 2]>,
    maxima: Option<Maxima<T>>,
) {
    shape.check(x.len(), z.len());
    let [oh, ow] = shape.output();
    if let Some(Maxima { shape: pooling, maxima, places, signs }) = &maxima {
        let windows = pooling.n * pooling.output().iter().product::<usize>() * shape.o;
        assert_eq!([pooling.n, pooling.h, pooling.w, pooling.c], [shape.n, oh, ow, shape.o], "what is pooled");
        assert!([maxima.len(), places.len()] == [windows; 2] && signs.len() == shape.o, "buffers fit the pooling");
    }
    let together = filter.pictures_together(shape).clamp(1, shape.n.max(1));
    let [image_of_x, image_of_z] = [x.len(), z.len()].map(|len| len / shape.n.max(1));
    let mut moments =
        statistics.as_ref().map(|_| Moments::of_groups::<T>(z.len(), (together * image_of_z).max(1), shape.o));
    let mut groups = moments.as_mut().map(Moments::groups);
    let pooling = maxima.as_ref().map(|maxima| (maxima.signs, *maxima.shape));
    let mut windows = maxima.map(|Maxima { shape, maxima, places, .. }| {
        let len = (together * shape.output().iter().product::<usize>() * shape.c).max(1);
        maxima.chunks_mut(len).zip(places.chunks_mut(len))
    });
    let pictures: Vec<Pictures<T>> = z
        .chunks_mut((together * image_of_z).max(1))
        .enumerate()
        .map(|(i, z)| Pictures {
            x: &x[i * together * image_of_x..][..z.len() / image_of_z * image_of_x],
            z,
            moments: groups.as_mut().and_then(Iterator::next),
            maxima: windows.as_mut().and_then(Iterator::next),
        })
        .collect();
    pictures.into_par_iter().with_max_len(1).for_each(|Pictures { x, z, moments, maxima }| {
        let n = z.len() / image_of_z;
        forward(x, filter, &ConvShape { n, ..*shape }, Epilogue::default(), z);
        if let Some(moments) = moments {
            moments.take(z);
        }
        if let (Some((maxima, places)), Some((signs, pooling))) = (maxima, pooling) {
            signed_max_pool(z, signs, &PoolShape { n, ..pooling }, maxima, places);
        }
    });
    drop(groups);
    if let (Some(moments), Some([mean, variance])) = (moments, statistics) {
        moments.combine(mean, variance);
    }
}
