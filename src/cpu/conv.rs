//! Convolution: forward, and in `backward.rs` the gradients to the input and to the filter, each as a product over an implicit matrix.

use super::float::{Float, convert};
use super::gather::Gather;
use super::gemm::{Epilogue, PackedB, multiply};
use super::pool::{PoolShape, max_pool, max_pool_as_computed};
use super::simd::Isa;
use super::tiles::TileFilter;
use super::tiles::multiply::Product;
use super::winograd::{self, Algorithm, Winograd};
use crate::tensor::pool::Scratch;
use rayon::prelude::*;
use std::borrow::Cow;

/// Below this many input channels the taps of a filter's row are merged into one run over a padded copy of the input:
/// runs of three floats would leave the micro-kernel mostly overhead.
const FEW_CHANNELS: usize = 16;

/// Rows of outputs that tiles compute before they are pooled: of the network's first layer a quarter of an L2 of 2 MiB.
const ROWS_POOLED: usize = 32;

/// Compiles an expression for the tiles of an instruction set that has them.
macro_rules! on_tiles {
    ($isa:expr, $U:ident => $body:expr) => {
        match $isa {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Isa::Amx if Isa::Amx.is_supported() => {
                type $U = crate::cpu::tiles::amx::Amx;
                $body
            }
            _ => {
                type $U = crate::cpu::tiles::amx::Emulated;
                $body
            }
        }
    };
}

mod backward;

pub use backward::{
    Making, OutputGradient, backward_as_made, backward_filter, backward_filter_directly, backward_input,
    backward_input_directly, takes_gradients_as_made,
};

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

    /// Columns of the filter, if the taps of each of its rows are merged.
    fn merged_columns(&self) -> Option<usize> {
        self.merges_taps().then_some(self.kw)
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
            PackedFilter::Tiles(_, filter) => {
                let picture = shape.output().iter().product::<usize>() * shape.o * size_of::<T>();
                filter.pictures_together(picture, shape.n)
            }
            _ => shape.n,
        }
    }
}

/// What a forward pass is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Results alone.
    Inference,
    /// Gradients as well: a ReLU whose input is zero up to rounding passes its gradient or not, which a gradient far below sums up. Products of
    /// f32 by taps, of which the first layer's errors are passed on by all others, then lose no more than f32 itself does.
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
    if suits_tiles::<T>(isa, algorithm, shape) && !(exact && algorithm == Algorithm::Direct) {
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

/// Whether tiles, where there are any, are as fast as an algorithm by vectors for a forward pass or the gradient to the input. They are in bf16, and in
/// f32 unless very few products are left: on a core of one's own three times all products on tiles take 0.8 to 1.1 times as long as those, but
/// beside a program that multiplies tiles too, tiles take three to four times as long, vectors one and a half.
fn suits_tiles<T: Float>(isa: Isa, algorithm: Algorithm, shape: &ConvShape) -> bool {
    let few_are_left = match algorithm {
        Algorithm::Direct => false,
        Algorithm::Rows => true,
        Algorithm::Blocks | Algorithm::Strips => shape.stride == [1, 1],
    };
    isa.has_tiles() && (T::PER_WORD == 2 || !few_are_left)
}

/// Filters `[o, kh, kw, c]` packed for [`forward_directly`].
pub fn pack_filter_directly<T: Float>(isa: Isa, filter: &[f32], shape: &ConvShape) -> PackedB<T> {
    let run = if shape.merges_taps() { shape.kw * shape.c } else { shape.c };
    PackedB::from_columns(isa, filter, shape.kh * shape.kw * shape.c, shape.o, run)
}

/// The forward pass as a product on tiles.
fn on_tiles_product(shape: &ConvShape) -> Product {
    let patches = shape.patches(shape.c);
    match shape.merged_columns() {
        Some(kw) => Product::of_rows(patches, kw),
        None => Product::new(patches),
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
        PackedFilter::Tiles(isa, filter) => {
            let product = on_tiles_product(shape);
            max_pool_as_computed(pooling, ROWS_POOLED, y, |image, rows, out| {
                let of = (image, rows);
                on_tiles!(*isa, U => product.multiply_rows::<U, T>(*isa, x, filter, of, out, epilogue))
            });
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
