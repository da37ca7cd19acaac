//! The gradients of a convolution, to its input and to its filter.

use super::*;
use crate::cpu::gemm_transposed::{Order, multiply_transposed};
use crate::cpu::tiles::transposed;
use std::ops::Range;
use std::sync::Mutex;

/// Gradient to the input; with `accumulate` it is added to what `dx` holds.
pub fn backward_input<T: Float>(isa: Isa, dy: &[T], filter: &[f32], shape: &ConvShape, dx: &mut [T], accumulate: bool) {
    match BackwardFilter::new(isa, filter, shape) {
        Some(filter) => filter.backward_input(dy, shape, dx, accumulate),
        None => backward_input_directly(isa, dy, filter, shape, dx, accumulate),
    }
}

/// Filters for the gradient to the input.
enum BackwardFilter<T> {
    /// Winograd's algorithm.
    Same(Winograd<T>),
    /// The same in f32, where no instruction multiplies activations as they are.
    Wide(Winograd<f32>),
    /// Products on tiles, one a class of [`backward_input_by_classes`].
    Tiles(Isa, Vec<TileFilter>),
}

impl<T: Float> BackwardFilter<T> {
    /// For a convolution of this geometry, or none if a product over the patches suits it best.
    fn new(isa: Isa, filter: &[f32], shape: &ConvShape) -> Option<Self> {
        let algorithm = winograd::algorithm(isa, shape, shape.o, shape.c);
        if suits_tiles::<T>(isa, algorithm, shape) {
            let pack = |(taps, gather): (Vec<usize>, Gather)| {
                Product::new(gather).pack_rows::<T>(isa, filter, shape.c, row_of_filter(shape, &taps))
            };
            return Some(BackwardFilter::Tiles(isa, stride_classes(shape, shape.o).map(pack).collect()));
        }
        match algorithm {
            Algorithm::Direct => None,
            algorithm if winograd::multiplies::<T>(isa) => {
                Some(BackwardFilter::Same(Winograd::for_backward_input(isa, algorithm, filter, shape)))
            }
            algorithm => Some(BackwardFilter::Wide(Winograd::for_backward_input(isa, algorithm, filter, shape))),
        }
    }

    fn backward_input(&self, dy: &[T], shape: &ConvShape, dx: &mut [T], accumulate: bool) {
        match self {
            BackwardFilter::Same(filter) => filter.backward_input(dy, shape, dx, accumulate),
            BackwardFilter::Wide(filter) => filter.backward_input(dy, shape, dx, accumulate),
            BackwardFilter::Tiles(isa, filters) => {
                let mut filters = filters.iter();
                backward_input_by_classes(dy, shape, shape.o, dx, accumulate, |_, gather, dx| {
                    let (product, filter) = (Product::new(gather), filters.next().expect("one a class"));
                    on_tiles!(*isa, U => product.multiply::<U, T>(*isa, dy, filter, dx, Epilogue::adding(accumulate)));
                });
            }
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
    backward_input_by_classes(&dy, shape, pixel, dx, accumulate, |taps, gather, dx| {
        let depth = taps.len() * shape.o;
        let packed = PackedB::from_rows(isa, filter, depth, shape.c, shape.o, row_of_filter(shape, taps));
        multiply(&dy, &gather, &packed, dx, Epilogue::adding(accumulate));
    });
}

/// Where row `k` of the right side over these taps, `[tap][output channel]`, begins in the filter: a run of input channels.
fn row_of_filter(shape: &ConvShape, taps: &[usize]) -> impl Fn(usize) -> usize + Sync {
    let ConvShape { c, o, kh, kw, .. } = *shape;
    move |k| ((k % o) * kh * kw + taps[k / o]) * c
}

/// Input positions that agree modulo the stride see the same taps of the filter: each such class is a convolution of `dy` with
/// stride one, so a stride wastes no work on taps that fall between outputs. `product` is given the taps, where the left side's rows lie,
/// and the result.
fn backward_input_by_classes<T: Float>(
    dy: &[T],
    shape: &ConvShape,
    pixel: usize,
    dx: &mut [T],
    accumulate: bool,
    mut product: impl FnMut(&[usize], Gather, &mut [T]),
) {
    assert!(dy.len() >= shape.n * shape.output().iter().product::<usize>() * pixel, "a gradient for each output");
    let (classes, residues) = (stride_classes(shape, pixel), shape.stride[0] * shape.stride[1]);
    let classes: Vec<_> = classes.collect();
    if !accumulate && classes.len() < residues {
        dx.fill(T::default());
    }
    for (taps, gather) in classes {
        product(&taps, gather, dx);
    }
}

/// For every residue of an input position modulo the stride that there are positions of and taps reach, those taps and where they read
/// `dy`, of `pixel` values a pixel.
fn stride_classes(shape: &ConvShape, pixel: usize) -> impl Iterator<Item = (Vec<usize>, Gather)> {
    let (shape, output) = (*shape, shape.output());
    let ([sh, sw], [ph, pw]) = (shape.stride, shape.padding);
    let classes = (0..sh).flat_map(move |y| (0..sw).map(move |x| (y, x))).map(move |(ry, rx)| {
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
        (taps, gather)
    });
    classes.filter(|(taps, gather)| !taps.is_empty() && !gather.grid.contains(&0))
}

/// The gradient of a convolution's output, `[n, oh, ow, o]`.
#[derive(Clone, Copy)]
pub enum OutputGradient<'a, T> {
    /// In memory.
    There(&'a [T]),
    /// Made while it is used, so that it need not go to memory.
    Made(Making<'a, T>),
}

/// How the gradient of a convolution's output is made.
#[derive(Clone, Copy)]
pub struct Making<'a, T> {
    /// Given some rows of all pictures', fills them.
    pub make: &'a (dyn Fn(Range<usize>, &mut [T]) + Sync),
    /// The largest of what that reads, a value for each of the gradient: products ask for what comes next of it.
    pub of: &'a [T],
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
    if multiplies_on_tiles::<T>(isa) {
        return !with_input && shape.o <= transposed::MADE_COLUMNS;
    }
    if winograd::rows::suits(isa, shape) {
        return !with_input;
    }
    winograd::algorithm(isa, shape, shape.o, shape.c) == Algorithm::Blocks
        && winograd::wgrad::suits_pictures::<T>(isa, shape)
}

/// Gradients to the filter and, if asked for with the filter, to the input, of a convolution whose output's gradient is made piece by
/// piece, for what [`takes_gradients_as_made`] accepts. The gradient to the input comes with whether it is added to
/// what is there.
pub fn backward_as_made<T: Float>(
    isa: Isa,
    x: &[T],
    shape: &ConvShape,
    making: Making<T>,
    dfilter: &mut [f32],
    with_input: Option<(&[f32], &mut [T], bool)>,
) {
    assert!(takes_gradients_as_made::<T>(isa, shape, with_input.is_some()), "a convolution that this is for");
    let image = ConvShape { n: 1, ..*shape };
    let ([oh, ow], image_len) = (shape.output(), image.h * image.w * image.c);
    let input = with_input.map(|(filter, dx, accumulate)| {
        assert_eq!(dx.len(), shape.n * image_len, "the input's gradient is shaped as it");
        let pictures: Vec<Mutex<&mut [T]>> = dx.chunks_exact_mut(image_len).map(Mutex::new).collect();
        let filter = BackwardFilter::<T>::new(isa, filter, &image).expect("an algorithm that gradients are made for");
        (filter, pictures, accumulate)
    });
    // Whole pictures, if the gradient to the input is taken of them.
    let make = |rows: Range<usize>, dy: &mut [T]| {
        (making.make)(rows.clone(), dy);
        let Some((filter, pictures, accumulate)) = &input else { return };
        for (picture, dy) in (rows.start / oh..).zip(dy.chunks_exact(oh * ow * shape.o)) {
            let mut dx = pictures[picture].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            filter.backward_input(dy, &image, &mut dx, *accumulate);
        }
    };
    let made = OutputGradient::Made(Making { make: &make, ..making });
    if multiplies_on_tiles::<T>(isa) {
        backward_filter_on_tiles(isa, x, made, shape, dfilter);
    } else if winograd::rows::suits(isa, shape) {
        winograd::rows::wgrad::backward_filter(isa, x, made, shape, dfilter);
    } else {
        let make = |picture: usize, dy: &mut [T]| make(picture * oh..(picture + 1) * oh, dy);
        winograd::wgrad::backward_filter_by_pictures(isa, x, shape, &make, dfilter);
    }
}

/// Gradient to the filter, `[o, kh, kw, c]`.
pub fn backward_filter<T: Float>(isa: Isa, x: &[T], dy: &[T], shape: &ConvShape, dfilter: &mut [f32]) {
    if multiplies_on_tiles::<T>(isa) {
        backward_filter_directly(isa, x, dy, shape, dfilter);
    } else if winograd::rows::suits(isa, shape) {
        winograd::rows::wgrad::backward_filter(isa, x, OutputGradient::There(dy), shape, dfilter);
    } else if winograd::wgrad::suits::<T>(isa, shape) {
        winograd::wgrad::backward_filter(isa, x, dy, shape, dfilter);
    } else {
        backward_filter_directly(isa, x, dy, shape, dfilter);
    }
}

/// Whether tiles multiply activations as they are, which no algorithm saves enough of to win.
fn multiplies_on_tiles<T: Float>(isa: Isa) -> bool {
    isa.has_tiles() && T::PER_WORD == 2
}

/// [`backward_filter`] as a product over the patches.
pub fn backward_filter_directly<T: Float>(isa: Isa, x: &[T], dy: &[T], shape: &ConvShape, dfilter: &mut [f32]) {
    let patches = shape.patches(shape.c);
    if isa.has_tiles() {
        backward_filter_on_tiles(isa, x, OutputGradient::There(dy), shape, dfilter);
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

fn backward_filter_on_tiles<T: Float>(
    isa: Isa,
    x: &[T],
    dy: OutputGradient<T>,
    shape: &ConvShape,
    dfilter: &mut [f32],
) {
    let (patches, kw) = (shape.patches(shape.c), shape.merged_columns());
    on_tiles!(isa, U => transposed::multiply_transposed::<U, T>(isa, x, &patches, kw, dy, shape.o, dfilter));
}
