//! Convolution: forward, gradient to the input, gradient to the filter, each as a product over an implicit matrix.

use super::float::{Float, convert};
use super::gather::Gather;
use super::gemm::{Epilogue, PackedB, multiply};
use super::gemm_transposed::{Order, multiply_transposed};
use super::pool::{PoolShape, max_pool};
use super::simd::Isa;
use super::tiles::multiply::Product;
use super::tiles::{TileFilter, transposed};
use super::winograd::{self, Algorithm, Winograd};
use crate::tensor::pool::Scratch;
use rayon::prelude::*;
use std::borrow::Cow;
use std::ops::Range;
use std::sync::Mutex;

/// Below this many input channels the taps of a filter's row are merged into one run over a padded copy of the input:
/// runs of three floats would leave the micro-kernel mostly overhead.
const FEW_CHANNELS: usize = 16;

/// Compiles an expression for the tiles of an instruction set that has them.
macro_rules! on_tiles {
    ($isa:expr, $U:ident => $body:expr) => {
        match $isa {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Isa::Amx if Isa::Amx.is_supported() => {
                type $U = super::tiles::amx::Amx;
                $body
            }
            _ => {
                type $U = super::tiles::amx::Emulated;
                $body
            }
        }
    };
}

/// Extents of a convolution. The input is `[n, h, w, c]`, filters are `[o, kh, kw, c]`, the output is `[n, oh, ow, o]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct ConvShape {
    /// Images.
    pub n: usize,
    /// Input rows.
    pub h: usize,
    /// Input columns.
    pub w: usize,
    /// Input channels.
    pub c: usize,
    /// Output channels.
    pub o: usize,
    /// Filter rows.
    pub kh: usize,
    /// Filter columns.
    pub kw: usize,
    /// Rows and columns between outputs.
    pub stride: [usize; 2],
    /// Rows and columns of zeros around the input.
    pub padding: [usize; 2],
}

impl ConvShape {
    /// Output rows and columns. The filter must fit the padded input.
    pub fn output(&self) -> [usize; 2] {
        [
            (self.h + 2 * self.padding[0] - self.kh) / self.stride[0] + 1,
            (self.w + 2 * self.padding[1] - self.kw) / self.stride[1] + 1,
        ]
    }

    /// Panics unless the input has `input` values and the output `output`.
    pub(super) fn check(&self, input: usize, output: usize) {
        let [oh, ow] = self.output();
        assert!(
            input == self.n * self.h * self.w * self.c && output == self.n * oh * ow * self.o,
            "buffers fit the shape"
        );
    }

    /// Multiply-adds of one pass over it, padding included.
    pub fn multiply_adds(&self) -> usize {
        let [oh, ow] = self.output();
        self.n * oh * ow * self.o * self.kh * self.kw * self.c
    }

    fn merges_taps(&self) -> bool {
        self.c < FEW_CHANNELS && self.kw > 1
    }

    /// The patches that outputs see, as rows, of pixels of `pixel` values.
    fn patches(&self, pixel: usize) -> Gather {
        let (output, [ph, pw]) = (self.output(), self.padding.map(|p| p as isize));
        let taps = (0..self.kh as isize).flat_map(|y| (0..self.kw as isize).map(move |x| [y - ph, x - pw]));
        Gather {
            images: self.n,
            grid: output,
            source: [self.h, self.w],
            pixel,
            run: pixel,
            step: self.stride,
            taps: taps.collect(),
            target: output,
            target_step: [1, 1],
            target_start: [0, 0],
        }
    }

    /// The same rows over the input padded by [`pad`], with one run for each row of the filter.
    fn merged_patches(&self, run: usize) -> Gather {
        Gather {
            source: [self.h + 2 * self.padding[0], self.padded_columns(run)],
            run,
            taps: (0..self.kh as isize).map(|y| [y, 0]).collect(),
            ..self.patches(self.c)
        }
    }

    /// Columns of the padded input that runs of `run` values end in.
    fn padded_columns(&self, run: usize) -> usize {
        self.w + 2 * self.padding[1] + run.div_ceil(self.c) - self.kw
    }

    /// Values of a tap, or of a row of merged ones, in whole words.
    fn run<T: Float>(&self) -> usize {
        let run = if self.merges_taps() { self.kw * self.c } else { self.c };
        run.next_multiple_of(T::PER_WORD)
    }
}

/// A copy of `x` with its padding written out, for runs of `run` values.
fn pad<T: Float>(x: &[T], shape: &ConvShape, run: usize) -> Scratch<T> {
    let [ph, pw] = shape.padding;
    let (row, padded_row) = (shape.w * shape.c, shape.padded_columns(run) * shape.c);
    let padded_h = shape.h + 2 * ph;
    let mut out = Scratch::<T>::take(shape.n * padded_h * padded_row);
    out.par_chunks_mut(padded_h * padded_row).zip(x.par_chunks(shape.h * row)).for_each(|(out, x)| {
        out.fill(T::default());
        for (out, x) in out.chunks_exact_mut(padded_row).skip(ph).zip(x.chunks_exact(row)) {
            out[pw * shape.c..][..row].copy_from_slice(x);
        }
    });
    out
}

/// `x` with whole words a pixel: itself, or a copy in which a zero fills the last word.
fn whole_words<T: Float>(x: &[T], channels: usize) -> Cow<'_, [T]> {
    let padded = channels.next_multiple_of(T::PER_WORD);
    if padded == channels {
        return Cow::Borrowed(x);
    }
    let mut out = vec![T::default(); x.len() / channels * padded];
    for (out, x) in out.chunks_exact_mut(padded).zip(x.chunks_exact(channels)) {
        out[..channels].copy_from_slice(x);
    }
    Cow::Owned(out)
}

/// `x` in f32: where no instruction multiplies pairs of bf16, doing it by others takes longer than this copy.
fn widened<T: Float>(x: &[T]) -> Scratch<f32> {
    let mut wide = Scratch::take(x.len());
    convert(x, &mut wide);
    wide
}

/// Filters for [`forward`], prepared for the algorithm that suits their shape.
pub enum PackedFilter<T> {
    /// A product over the patches.
    Direct(PackedB<T>),
    /// Winograd's algorithm.
    Winograd(Winograd<T>),
    /// Winograd's algorithm in f32, where no instruction multiplies activations as they are.
    WinogradWide(Winograd<f32>),
    /// A product over the patches, on tiles.
    Tiles(Isa, TileFilter),
}

impl<T: Float> PackedFilter<T> {
    /// Pictures that a thread may take by themselves, as fast as all together: enough for the blocks of tiles that share a transformed
    /// filter, or all of them if filters are transformed when they are used.
    pub(super) fn pictures_together(&self, shape: &ConvShape) -> usize {
        match self {
            PackedFilter::Direct(_) if shape.merges_taps() => 1,
            PackedFilter::Winograd(filter) => filter.pictures_together(shape),
            PackedFilter::WinogradWide(filter) => filter.pictures_together(shape),
            _ => shape.n,
        }
    }
}

/// What a forward pass is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Results alone: f32 may be multiplied as two bf16, and by Winograd's algorithm in the first layer.
    Inference,
    /// Gradients as well: a ReLU whose input is zero up to rounding passes its gradient or not, which a gradient far below sums up.
    Training,
}

/// Filters `[o, kh, kw, c]` prepared for [`forward`].
pub fn pack_filter<T: Float>(isa: Isa, filter: &[f32], shape: &ConvShape, purpose: Purpose) -> PackedFilter<T> {
    // What is rounded to bf16 anyway gives no exact zero.
    let exact = purpose == Purpose::Training && T::PER_WORD == 1;
    let algorithm = match winograd::rows::suits(isa, shape) && !exact {
        true => Algorithm::Rows,
        false => winograd::algorithm(isa, shape, shape.c, shape.o),
    };
    if !exact && suits_tiles::<T>(isa, shape, algorithm) {
        return PackedFilter::Tiles(isa, on_tiles_product(shape).pack_columns::<T>(isa, filter, shape.o));
    }
    match algorithm {
        Algorithm::Direct => PackedFilter::Direct(pack_filter_directly(isa, filter, shape)),
        algorithm if winograd::multiplies::<T>(isa) => {
            PackedFilter::Winograd(Winograd::new(isa, algorithm, filter, shape))
        }
        algorithm => PackedFilter::WinogradWide(Winograd::new(isa, algorithm, filter, shape)),
    }
}

/// Whether tiles are faster than `algorithm` would be: three products of tiles take about as long as one of f32, so that in f32
/// Winograd's wins where it saves most of them.
fn suits_tiles<T: Float>(isa: Isa, shape: &ConvShape, algorithm: Algorithm) -> bool {
    let saves_most = algorithm != Algorithm::Direct && (algorithm == Algorithm::Rows || shape.stride == [1, 1]);
    isa.has_tiles() && (T::PER_WORD == 2 || !saves_most)
}

/// Filters `[o, kh, kw, c]` packed for [`forward_directly`].
pub fn pack_filter_directly<T: Float>(isa: Isa, filter: &[f32], shape: &ConvShape) -> PackedB<T> {
    let run = if shape.merges_taps() { shape.kw * shape.c } else { shape.c };
    PackedB::from_columns(isa, filter, shape.kh * shape.kw * shape.c, shape.o, run)
}

/// The forward pass as a product on tiles.
fn on_tiles_product(shape: &ConvShape) -> Product {
    match shape.merges_taps() {
        true => Product::of_rows(shape.patches(shape.c), shape.kw),
        false => Product::new(shape.patches(shape.c)),
    }
}

/// `y = epilogue(conv(x, filter))`.
pub fn forward<T: Float>(x: &[T], filter: &PackedFilter<T>, shape: &ConvShape, epilogue: Epilogue<T>, y: &mut [T]) {
    match filter {
        PackedFilter::Direct(filter) => forward_directly(x, filter, shape, epilogue, y),
        PackedFilter::Winograd(filter) => filter.forward(x, shape, epilogue, y),
        PackedFilter::WinogradWide(filter) => filter.forward(x, shape, epilogue, y),
        PackedFilter::Tiles(isa, filter) => {
            on_tiles!(*isa, U => on_tiles_product(shape).multiply::<U, T>(*isa, x, filter, y, epilogue))
        }
    }
}

/// The max pooling of what [`forward`] gives, `pooling` of its extents, to `y`. The first layer's is pooled as it is computed.
pub fn forward_max_pool<T: Float>(
    x: &[T],
    filter: &PackedFilter<T>,
    shape: &ConvShape,
    epilogue: Epilogue<T>,
    pooling: &PoolShape,
    y: &mut [T],
) {
    match filter {
        PackedFilter::Winograd(Winograd::Rows(filter)) => {
            winograd::rows::forward_max_pool(x, filter, shape, epilogue, pooling, y)
        }
        PackedFilter::WinogradWide(Winograd::Rows(filter)) => {
            winograd::rows::forward_max_pool(x, filter, shape, epilogue, pooling, y)
        }
        _ => {
            let mut whole = Scratch::take(pooling.n * pooling.h * pooling.w * pooling.c);
            forward(x, filter, shape, epilogue, &mut whole);
            max_pool(&whole, pooling, y);
        }
    }
}

/// [`forward`] as a product over the patches.
pub fn forward_directly<T: Float>(x: &[T], filter: &PackedB<T>, shape: &ConvShape, epilogue: Epilogue<T>, y: &mut [T]) {
    let run = shape.run::<T>();
    if shape.merges_taps() {
        multiply(&pad(x, shape, run), &shape.merged_patches(run), filter, y, epilogue);
    } else {
        multiply(&whole_words(x, shape.c), &shape.patches(run), filter, y, epilogue);
    }
}

/// Gradient to the input.
pub fn backward_input<T: Float>(isa: Isa, dy: &[T], filter: &[f32], shape: &ConvShape, dx: &mut [T]) {
    let algorithm = winograd::algorithm(isa, shape, shape.o, shape.c);
    if suits_tiles::<T>(isa, shape, algorithm) {
        return backward_input_by_classes(dy, shape, shape.o, dx, |start, _, gather, dx| {
            let product = Product::new(gather.clone());
            let packed = product.pack_rows::<T>(isa, filter, shape.c, start);
            on_tiles!(isa, U => product.multiply::<U, T>(isa, dy, &packed, dx, Epilogue::default()));
        });
    }
    if algorithm == Algorithm::Direct || shape.stride != [1, 1] {
        return backward_input_directly(isa, dy, filter, shape, dx);
    }
    BackwardFilter::new(isa, filter, shape).backward_input(dy, shape, dx);
}

/// Filters for the gradient to the input by Winograd's algorithm, of a stride of one: in the type of activations, or in f32 where no
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

    fn backward_input(&self, dy: &[T], shape: &ConvShape, dx: &mut [T]) {
        let turned = ConvShape { c: shape.o, o: shape.c, ..*shape };
        match self {
            BackwardFilter::Same(filter) => filter.forward(dy, &turned, Epilogue::default(), dx),
            BackwardFilter::Wide(filter) => filter.forward(dy, &turned, Epilogue::default(), dx),
        }
    }
}

/// [`backward_input`] as products over patches of the output's gradient.
pub fn backward_input_directly<T: Float>(isa: Isa, dy: &[T], filter: &[f32], shape: &ConvShape, dx: &mut [T]) {
    if !winograd::multiplies::<T>(isa) {
        let mut wide = Scratch::<f32>::take(dx.len());
        backward_input_directly(isa, &widened(dy), filter, shape, &mut wide);
        return convert(&wide, dx);
    }
    let dy = whole_words(dy, shape.o);
    let pixel = shape.o.next_multiple_of(T::PER_WORD);
    backward_input_by_classes(&dy, shape, pixel, dx, |start, depth, gather, dx| {
        let packed = PackedB::from_rows(isa, filter, depth, shape.c, shape.o, start);
        multiply(&dy, gather, &packed, dx, Epilogue::default());
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
    product: impl Fn(&(dyn Fn(usize) -> usize + Sync), usize, &Gather, &mut [T]),
) {
    assert!(dy.len() >= shape.n * shape.output().iter().product::<usize>() * pixel, "a gradient for each output");
    let classes = stride_classes(shape, pixel);
    if classes.iter().any(|(taps, _)| taps.is_empty()) {
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
    pub(super) fn len(&self, shape: &ConvShape) -> usize {
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
/// piece, for what [`takes_gradients_as_made`] accepts. `make` fills rows of it.
pub fn backward_as_made<T: Float>(
    isa: Isa,
    x: &[T],
    shape: &ConvShape,
    make: &(dyn Fn(Range<usize>, &mut [T]) + Sync),
    dfilter: &mut [f32],
    with_input: Option<(&[f32], &mut [T])>,
) {
    if winograd::rows::suits(isa, shape) {
        return winograd::rows_wgrad::backward_filter(isa, x, OutputGradient::Made(make), shape, dfilter);
    }
    let image = ConvShape { n: 1, ..*shape };
    let ([oh, _], image_len) = (shape.output(), image.h * image.w * image.c);
    let input = with_input.map(|(filter, dx)| {
        let pictures: Vec<Mutex<&mut [T]>> = dx.chunks_exact_mut(image_len).map(Mutex::new).collect();
        (BackwardFilter::<T>::new(isa, filter, &image), pictures)
    });
    let make = |picture: usize, dy: &mut [T]| {
        make(picture * oh..(picture + 1) * oh, dy);
        if let Some((filter, pictures)) = &input {
            let mut dx = pictures[picture].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            filter.backward_input(dy, &image, &mut dx);
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
