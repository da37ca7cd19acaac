//! The gradients of a convolution, to its input and to its filter.

use super::*;
use crate::cpu::gemm_transposed::{Order, multiply_transposed};
use crate::cpu::tiles::transposed;
use std::ops::Range;
use std::sync::Mutex;

/// Gradient to the input; with `accumulate` it is added to what `dx` holds.
pub fn backward_input<T: Float>(isa: Isa, dy: &[T], filter: &[f32], shape: &ConvShape, dx: &mut [T], accumulate: bool) {
    let algorithm = winograd::algorithm(isa, shape, shape.o, shape.c);
    if suits_tiles::<T>(isa, shape, algorithm) {
        return backward_input_by_classes(dy, shape, shape.o, dx, accumulate, |start, _, gather, dx| {
            let product = Product::new(gather.clone());
            let packed = product.pack_rows::<T>(isa, filter, shape.c, start);
            on_tiles!(isa, U => product.multiply::<U, T>(isa, dy, &packed, dx, Epilogue::adding(accumulate)));
        });
    }
    if algorithm == Algorithm::Direct {
        return backward_input_directly(isa, dy, filter, shape, dx, accumulate);
    }
    BackwardFilter::new(isa, filter, shape).backward_input(dy, shape, dx, accumulate);
}

/// Filters for the gradient to the input by Winograd's algorithm: in the type of activations, or in f32 where no
/// instruction multiplies these.
enum BackwardFilter<T> {
    Same(Winograd<T>),
    Wide(Winograd<f32>),
}

impl<T: Float> BackwardFilter<T> {
    fn new(isa: Isa, filter: &[f32], shape: &ConvShape) -> Self {
        let algorithm = winograd::algorithm(isa, shape, shape.o, shape.c);
        match winograd::multiplies::<T>(isa) {
            true => BackwardFilter::Same(Winograd::for_backward_input(isa, algorithm, filter, shape)),
            false => BackwardFilter::Wide(Winograd::for_backward_input(isa, algorithm, filter, shape)),
        }
    }

    fn backward_input(&self, dy: &[T], shape: &ConvShape, dx: &mut [T], accumulate: bool) {
        match self {
            BackwardFilter::Same(filter) => filter.backward_input(dy, shape, dx, accumulate),
            BackwardFilter::Wide(filter) => filter.backward_input(dy, shape, dx, accumulate),
        }
    }
}

/// [`backward_input`] as products over patches of the output's gradient.
pub fn backward_input_directly<T: Float>(
    isa: Isa,
    dy: &[T],
    filter: &[f32],
    shape: &ConvShape,
    dx: &mut [T],
    accumulate: bool,
) {
    if !winograd::multiplies::<T>(isa) {
        let mut wide = if accumulate { widened(dx) } else { Scratch::take(dx.len()) };
        backward_input_directly(isa, &widened(dy), filter, shape, &mut wide, accumulate);
        return convert(&wide, dx);
    }
    let dy = whole_words(dy, shape.o);
    let pixel = shape.o.next_multiple_of(T::PER_WORD);
    backward_input_by_classes(&dy, shape, pixel, dx, accumulate, |start, depth, gather, dx| {
        let packed = PackedB::from_rows(isa, filter, depth, shape.c, shape.o, start);
        multiply(&dy, gather, &packed, dx, Epilogue::adding(accumulate));
    });
}

/// Input positions that agree modulo the stride see the same taps of the filter: each such class is a convolution of `dy` with
/// stride one, so a stride wastes no work on taps that fall between outputs. `product` is given where row `k` of the right
/// side begins in the filter, how many rows there are, where the left side's lie, and the result.
fn backward_input_by_classes<T: Float>(
    dy: &[T],
    shape: &ConvShape,
    pixel: usize,
    dx: &mut [T],
    accumulate: bool,
    product: impl Fn(&(dyn Fn(usize) -> usize + Sync), usize, &Gather, &mut [T]),
) {
    assert!(dy.len() >= shape.n * shape.output().iter().product::<usize>() * pixel, "a gradient for each output");
    let classes = stride_classes(shape, pixel);
    if !accumulate && classes.iter().any(|(taps, _)| taps.is_empty()) {
        dx.fill(T::default());
    }
    for (taps, gather) in classes.iter().filter(|(taps, gather)| !taps.is_empty() && gather.rows() > 0) {
        // Row (tap, o) of the right side is the filter's run of input channels at [o][tap].
        let tap_count = shape.kh * shape.kw;
        let start = |k: usize| ((k % shape.o) * tap_count + taps[k / shape.o]) * shape.c;
        product(&start, taps.len() * shape.o, gather, dx);
    }
}

/// For every residue of an input position modulo the stride, the taps that reach it and where they read `dy`,
/// of `pixel` values a pixel.
fn stride_classes(shape: &ConvShape, pixel: usize) -> Vec<(Vec<usize>, Gather)> {
    let output = shape.output();
    let ([sh, sw], [ph, pw]) = (shape.stride, shape.padding);
    let mut classes = Vec::with_capacity(sh * sw);
    for (ry, rx) in (0..sh).flat_map(|y| (0..sw).map(move |x| (y, x))) {
        let mut taps = Vec::new();
        let mut displacements = Vec::new();
        for (y, x) in (0..shape.kh).flat_map(|y| (0..shape.kw).map(move |x| (y, x))) {
            // Output row (ry + ph - y) / sh, when that is whole; the remainder is taken before the sign can matter.
            if (ry + ph + sh * shape.kh - y).is_multiple_of(sh) && (rx + pw + sw * shape.kw - x).is_multiple_of(sw) {
                taps.push(y * shape.kw + x);
                let exact = |r: usize, p: usize, k: usize, s: usize| ((r + p) as isize - k as isize) / s as isize;
                displacements.push([exact(ry, ph, y, sh), exact(rx, pw, x, sw)]);
            }
        }
        let gather = Gather {
            images: shape.n,
            grid: [(shape.h + sh - 1 - ry) / sh, (shape.w + sw - 1 - rx) / sw],
            source: output,
            pixel,
            run: pixel,
            step: [1, 1],
            taps: displacements,
            target: [shape.h, shape.w],
            target_step: shape.stride,
            target_start: [ry, rx],
        };
        classes.push((taps, gather));
    }
    classes
}

/// The gradient of a convolution's output, `[n, oh, ow, o]`.
#[derive(Clone, Copy)]
pub enum OutputGradient<'a, T> {
    /// In memory.
    There(&'a [T]),
    /// Made while it is used, so that it need not go to memory: given some rows of all pictures', fills them.
    Made(&'a (dyn Fn(Range<usize>, &mut [T]) + Sync)),
}

impl<T> OutputGradient<'_, T> {
    /// Number of its values.
    pub(in crate::cpu) fn len(&self, shape: &ConvShape) -> usize {
        match self {
            OutputGradient::There(dy) => dy.len(),
            OutputGradient::Made(_) => shape.n * shape.output().iter().product::<usize>() * shape.o,
        }
    }
}

/// Whether [`backward_as_made`] is for this convolution, with the gradient to the input or without: where the output's gradient of all
/// pictures is too large for caches and that of one can be used by itself.
pub fn takes_gradients_as_made<T: Float>(isa: Isa, shape: &ConvShape, with_input: bool) -> bool {
    if winograd::rows::suits(isa, shape) {
        return !with_input;
    }
    let algorithm = winograd::algorithm(isa, shape, shape.o, shape.c);
    let on_tiles = suits_tiles::<T>(isa, shape, algorithm);
    algorithm == Algorithm::Blocks && !on_tiles && winograd::wgrad::suits_pictures::<T>(isa, shape)
}

/// Gradients to the filter and, if asked for with the filter, to the input, of a convolution whose output's gradient is made piece by
/// piece, for what [`takes_gradients_as_made`] accepts. `make` fills rows of it. The gradient to the input comes with whether it is added to
/// what is there.
pub fn backward_as_made<T: Float>(
    isa: Isa,
    x: &[T],
    shape: &ConvShape,
    make: &(dyn Fn(Range<usize>, &mut [T]) + Sync),
    dfilter: &mut [f32],
    with_input: Option<(&[f32], &mut [T], bool)>,
) {
    assert!(takes_gradients_as_made::<T>(isa, shape, with_input.is_some()), "a convolution that this is for");
    if winograd::rows::suits(isa, shape) {
        return winograd::rows_wgrad::backward_filter(isa, x, OutputGradient::Made(make), shape, dfilter);
    }
    let image = ConvShape { n: 1, ..*shape };
    let ([oh, _], image_len) = (shape.output(), image.h * image.w * image.c);
    let input = with_input.map(|(filter, dx, accumulate)| {
        assert_eq!(dx.len(), shape.n * image_len, "the input's gradient is shaped as it");
        let pictures: Vec<Mutex<&mut [T]>> = dx.chunks_exact_mut(image_len).map(Mutex::new).collect();
        (BackwardFilter::<T>::new(isa, filter, &image), pictures, accumulate)
    });
    let make = |picture: usize, dy: &mut [T]| {
        make(picture * oh..(picture + 1) * oh, dy);
        if let Some((filter, pictures, accumulate)) = &input {
            let mut dx = pictures[picture].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            filter.backward_input(dy, &image, &mut dx, *accumulate);
        }
    };
    winograd::wgrad::backward_filter_by_pictures(isa, x, shape, &make, dfilter);
}

/// Gradient to the filter, `[o, kh, kw, c]`.
pub fn backward_filter<T: Float>(isa: Isa, x: &[T], dy: &[T], shape: &ConvShape, dfilter: &mut [f32]) {
    if winograd::rows::suits(isa, shape) {
        winograd::rows_wgrad::backward_filter(isa, x, OutputGradient::There(dy), shape, dfilter);
    } else if winograd::wgrad::suits::<T>(isa, shape) && !(isa.has_tiles() && T::PER_WORD == 2) {
        winograd::wgrad::backward_filter(isa, x, dy, shape, dfilter);
    } else {
        backward_filter_directly(isa, x, dy, shape, dfilter);
    }
}

/// [`backward_filter`] as a product over the patches.
pub fn backward_filter_directly<T: Float>(isa: Isa, x: &[T], dy: &[T], shape: &ConvShape, dfilter: &mut [f32]) {
    let patches = shape.patches(shape.c);
    if isa.has_tiles() {
        on_tiles!(isa, U => transposed::multiply_transposed::<U, T>(isa, x, &patches, dy, shape.o, dfilter));
    } else if !winograd::multiplies::<T>(isa) {
        backward_filter_directly(isa, &widened(x), &widened(dy), shape, dfilter);
    } else if shape.merges_taps() {
        let run = shape.kw * shape.c;
        let padded = pad(x, shape, run);
        multiply_transposed(isa, &padded, &shape.merged_patches(run), dy, shape.o, dfilter, Order::ColumnMajor);
    } else {
        multiply_transposed(isa, x, &patches, dy, shape.o, dfilter, Order::ColumnMajor);
    }
}
