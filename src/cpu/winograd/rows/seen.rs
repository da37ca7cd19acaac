//! What some rows of outputs see of an image, transformed along rows.

use super::super::transforms::*;
use crate::cpu::conv::ConvShape;
use crate::cpu::float::{Float, copy_with};
use crate::cpu::gemm::Shares;
use crate::cpu::parallel::piece;
use crate::cpu::simd::Simd;
use crate::tensor::pool::Scratch;
use std::marker::PhantomData;
use std::ops::Range;

/// Rows of outputs that a task computes: everything in between stays in L2.
pub(super) const ROWS_OF_TASK: usize = 8;
/// More channels fill runs that are long enough for the direct product.
pub(super) const MAX_CHANNELS: usize = 4;
/// Tiles of a vector at most.
const TILES: usize = LANES / MAX_CHANNELS;

/// Some rows of outputs of an image, and what they see of it, in words of the same pixels of two of the rows (`ROWS`), or of their two phases.
pub(super) struct Seen<'a, T, W, const ROWS: bool> {
    x: &'a [T],
    pub shape: &'a ConvShape,
    image: usize,
    rows: Range<usize>,
    output: [usize; 2],
    /// Tiles of a row of outputs.
    across: usize,
    products: PhantomData<W>,
}

/// Phases whose values have a plane together.
pub(super) const fn phases_of_plane<W: Float>(rows: bool) -> usize {
    if rows { 1 } else { W::PER_WORD }
}

impl<'a, T: Float, W: Float, const ROWS: bool> Seen<'a, T, W, ROWS> {
    /// Planes of a position, whether there is a slot for all of them or not.
    const PLANES: usize = PHASES / phases_of_plane::<W>(ROWS);

    /// How many parts a convolution has.
    pub fn count(shape: &ConvShape) -> usize {
        shape.n * shape.output()[0].div_ceil(ROWS_OF_TASK)
    }

    /// One of its parts.
    pub fn new(x: &'a [T], shape: &'a ConvShape, i: usize) -> Self {
        let oh = shape.output()[0];
        let blocks = oh.div_ceil(ROWS_OF_TASK);
        let (image, block) = (i / blocks, i % blocks);
        Self::of_rows(x, shape, image, piece(block, blocks, oh))
    }

    /// Some rows of an image.
    pub fn of_rows(x: &'a [T], shape: &'a ConvShape, image: usize, rows: Range<usize>) -> Self {
        assert!(shape.c <= MAX_CHANNELS, "room for the channels");
        let output @ [_, ow] = shape.output();
        let across = ow.div_ceil(row_axis::<W>().outputs);
        Seen { x, shape, image, rows, output, across, products: PhantomData }
    }

    /// Its rows among those of all images' outputs.
    pub fn rows(&self) -> Range<usize> {
        let first = self.image * self.output[0];
        first + self.rows.start..first + self.rows.end
    }

    /// The pixels that the next part sees and this one does not, or what follows an image, for so many tiles to ask for.
    pub fn next_pixels(&self, tiles: usize) -> Shares {
        let ConvShape { h, w, c, kh, stride, padding, .. } = *self.shape;
        let seen = ((self.rows.end - 1) * stride[0] + kh).saturating_sub(padding[0]).min(h);
        let first = self.x.as_ptr().wrapping_add((self.image * h + seen) * w * c);
        Shares::new(first, self.rows.len() * stride[0] * w * c, tiles)
    }

    /// Tiles of all rows.
    pub fn tiles(&self) -> usize {
        self.rows.len() * self.across
    }

    /// Tiles whose values words begin with: those of all rows, or of the first half.
    pub fn words(&self) -> usize {
        self.rows_of_words() * self.across
    }

    /// The rows of these tiles. Where there is another row in a word, it is as many further.
    fn rows_of_words(&self) -> usize {
        if ROWS { self.rows.len().div_ceil(W::PER_WORD) } else { self.rows.len() }
    }

    /// The first output of a tile, of all images', and how many of the tile lie inside the image.
    #[inline]
    pub fn outputs(&self, tile: usize) -> (usize, usize) {
        let ([oh, ow], whole) = (self.output, row_axis::<W>().outputs);
        let (row, left) = (self.rows.start + tile / self.across, tile % self.across * whole);
        ((self.image * oh + row) * ow + left, whole.min(ow - left))
    }

    /// Values to a row of transformed inputs, a position of it and a plane of that.
    #[inline]
    pub fn offset(&self, [row, position, plane]: [usize; 3]) -> usize {
        let plane_len = self.across.next_multiple_of(TILES) * MAX_CHANNELS * W::PER_WORD;
        ((row * all_positions::<W>() + position) * Self::PLANES + plane) * plane_len
    }

    /// What a tile sees: its words for the filter's first row at the first position and the first plane of it lie at the beginning, and for
    /// others as far from there as [`Seen::offset`] says.
    #[inline]
    pub fn tile<'b>(&self, inputs: &'b [W], tile: usize) -> &'b [W] {
        let (row, column) = (tile / self.across * self.shape.stride[0], tile % self.across);
        let last = [self.shape.kh - 1, all_positions::<W>() - 1, Self::PLANES - 1];
        let words = MAX_CHANNELS * W::PER_WORD;
        &inputs[self.offset([row, 0, 0]) + column * words..][..self.offset(last) + words]
    }

    /// The rows of the image that the outputs see: `[row][position][plane][tile][channel]`, in words.
    #[inline(always)]
    pub fn transform<S: Simd>(&self, simd: S) -> Scratch<W> {
        let (stride, apart) = (self.shape.stride[0], self.rows_of_words());
        let rows = (apart - 1) * stride + self.shape.kh;
        let (row_len, plane_len) = (self.offset([1, 0, 0]), self.offset([0, 0, 1]));
        let mut out = Scratch::<W>::take(rows * row_len);
        let two = ROWS && W::PER_WORD > 1;
        let (mut padded, mut others) = (self.room_for_row(), two.then(|| self.room_for_row()));
        for (row, out) in out.chunks_exact_mut(row_len).enumerate() {
            let pixels = self.read_row(simd, row, &mut padded);
            // Not by a closure, which would be a function of its own, without the instruction set.
            let others = match &mut others {
                Some(others) => self.read_row(simd, row + apart * stride, others),
                None => pixels,
            };
            for tile in (0..self.across).step_by(S::LANES / MAX_CHANNELS) {
                let out = &mut out[tile * MAX_CHANNELS * W::PER_WORD..];
                unrolled!(PLANE in 0 1 => {
                    if const { PLANE < Self::PLANES } {
                        let first = self.transform_phase::<S, PLANE>(simd, pixels, tile);
                        let last = match const { (W::PER_WORD, ROWS) } {
                            (1, _) => first,
                            (_, true) => self.transform_phase::<S, PLANE>(simd, others, tile),
                            (_, false) => self.transform_phase::<S, 1>(simd, pixels, tile),
                        };
                        unrolled!(POSITION => {
                            if const { POSITION < all_positions::<W>() } {
                                let out = out[(POSITION * Self::PLANES + PLANE) * plane_len..][..S::LANES * W::PER_WORD].as_mut_ptr();
                                // SAFETY: a vector of words.
                                unsafe { W::store_words(simd, out, first[POSITION], last[POSITION]) };
                            }
                        });
                    }
                });
            }
        }
        out
    }

    /// Room for a row of pixels between zeros. Inputs of a tile that follow its outputs are the next one's, and after a pixel's channels
    /// others' are read.
    fn room_for_row(&self) -> Scratch<f32> {
        let ConvShape { w, c, padding, .. } = *self.shape;
        let pixels = self.across.next_multiple_of(TILES) * row_axis::<W>().outputs * PHASES + ROW_TAPS;
        let mut padded = Scratch::<f32>::take(pixels.max(w + padding[1]) * c + MAX_CHANNELS);
        padded.fill(0.0);
        padded
    }

    /// A row of the image, counted from the first that the outputs see, which may be outside.
    #[inline(always)]
    fn read_row<'b, S: Simd>(&self, simd: S, row: usize, padded: &'b mut [f32]) -> &'b [f32] {
        let ConvShape { h, w, c, stride, padding, .. } = *self.shape;
        let pixels = &mut padded[padding[1] * c..][..w * c];
        match (self.rows.start * stride[0] + row).checked_sub(padding[0]) {
            Some(row) if row < h => copy_with(simd, &self.x[(self.image * h + row) * w * c..][..w * c], pixels),
            _ => pixels.fill(0.0),
        }
        padded
    }

    /// `B^T d` of a phase of as many tiles as a vector has, from `tile` on.
    #[inline(always)]
    fn transform_phase<S: Simd, const PHASE: usize>(&self, simd: S, padded: &[f32], tile: usize) -> [S::V; MAX] {
        let (c, apart) = (self.shape.c, row_axis::<W>().outputs * PHASES * self.shape.c);
        let tiles = S::LANES / MAX_CHANNELS;
        let last = (tiles - 1) * apart + ((RowInput::<W, PHASE>::VALUES - 1) * PHASES + PHASE) * c + MAX_CHANNELS;
        let from = padded[tile * apart..][..last].as_ptr();
        let values = vectors!(simd, RowInput::<W, PHASE>::VALUES, I => {
            // SAFETY: those of the last tile end where the slice does.
            unsafe { simd.load_fours(from.add((I * PHASES + PHASE) * c), apart) }
        });
        RowInput::<W, PHASE>::apply(simd, &values)
    }
}
