//! A layer of few channels, whose input and filter are laid out anew.

use super::super::launch::{Kernel, address, device, empty, pack, typed};
use super::super::source::CONV;
use super::gather::{Gather, patches};
use crate::cpu::conv::ConvShape;
use crate::error::Result;
use crate::tensor::{DType, Tensor};
use bytemuck::{Pod, Zeroable};

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct PackChannelsParams {
    x: u64,
    y: u64,
    images: i32,
    h: i32,
    w: i32,
    c: i32,
    padded_h: i32,
    padded_w: i32,
    pixel: i32,
    top: i32,
    left: i32,
    unused: i32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct RowFilterParams {
    filter: u64,
    packed: u64,
    outputs: i32,
    taps_h: i32,
    taps_w: i32,
    c: i32,
    packed_w: i32,
    pixel: i32,
}

/// How the first layer is laid out: its input with padding written out and channels padded, so that a row of the filter
/// is one aligned run.
#[derive(Clone, Copy)]
pub(super) struct FirstLayer {
    padded: [usize; 2],
    pixel: usize,
    /// Taps of a row of the packed filter: the run is `row_taps * pixel`.
    row_taps: usize,
}

impl FirstLayer {
    /// Fewer channels than a pack, and a filter wide enough for rows of it to be worth merging.
    pub(super) fn of(shape: &ConvShape, dtype: DType) -> Option<FirstLayer> {
        if shape.c > 4 || shape.kw == 1 {
            return None;
        }
        // A position's run must begin at a multiple of a pack.
        let pixel = if (4 * shape.stride[1]).is_multiple_of(pack(dtype)) { 4 } else { pack(dtype) };
        let row_taps = (shape.kw * pixel).next_multiple_of(32) / pixel;
        let [_, ow] = shape.output();
        let columns = ((ow - 1) * shape.stride[1] + row_taps).max(shape.w + 2 * shape.padding[1]);
        Some(FirstLayer {
            padded: [shape.h + 2 * shape.padding[0], columns.next_multiple_of(pack(dtype))],
            pixel,
            row_taps,
        })
    }

    fn run(&self) -> usize {
        self.row_taps * self.pixel
    }

    pub(super) fn pack_input(&self, x: &Tensor, shape: &ConvShape) -> Result<Tensor> {
        let packed = empty(&[shape.n, self.padded[0], self.padded[1], self.pixel], x.dtype())?;
        let params = PackChannelsParams {
            x: address(x),
            y: address(&packed),
            images: shape.n as i32,
            h: shape.h as i32,
            w: shape.w as i32,
            c: shape.c as i32,
            padded_h: self.padded[0] as i32,
            padded_w: self.padded[1] as i32,
            pixel: self.pixel as i32,
            top: shape.padding[0] as i32,
            left: shape.padding[1] as i32,
            unused: 0,
        };
        let kernel = Kernel(CONV, typed(x.dtype(), "pack_channels_f32", "pack_channels_bf16"));
        device().launch_over(kernel, packed.numel() / self.pixel, &params)?;
        Ok(packed)
    }

    /// Filters `[O, KH, KW, C]` (f32) as the forward kernels read them.
    pub(super) fn pack_filter(&self, filter: &Tensor, shape: &ConvShape, dtype: DType) -> Result<Tensor> {
        let packed = empty(&[shape.o, shape.kh, self.row_taps, self.pixel], dtype)?;
        let kernel = Kernel(CONV, typed(dtype, "pack_row_filter_f32", "pack_row_filter_bf16"));
        device().launch_over(kernel, packed.numel(), &self.filter_params(shape, filter, &packed))?;
        Ok(packed)
    }

    /// A gradient laid out as a packed filter, as `[O, KH, KW, C]`.
    pub(super) fn unpack_filter(&self, packed: &Tensor, shape: &ConvShape) -> Result<Tensor> {
        let filter = empty(&[shape.o, shape.kh, shape.kw, shape.c], DType::F32)?;
        // The same struct, read the other way round.
        let params = self.filter_params(shape, packed, &filter);
        device().launch_over(Kernel(CONV, "unpack_row_filter"), filter.numel(), &params)?;
        Ok(filter)
    }

    fn filter_params(&self, shape: &ConvShape, from: &Tensor, to: &Tensor) -> RowFilterParams {
        RowFilterParams {
            filter: address(from),
            packed: address(to),
            outputs: shape.o as i32,
            taps_h: shape.kh as i32,
            taps_w: shape.kw as i32,
            c: shape.c as i32,
            packed_w: self.row_taps as i32,
            pixel: self.pixel as i32,
        }
    }

    pub(super) fn gather(&self, shape: &ConvShape) -> Gather {
        Gather {
            taps: [shape.kh as i32, 1],
            run: self.run() as i32,
            pixel: self.pixel as i32,
            source: self.padded.map(|x| x as i32),
            start: [0, 0],
            filter_w_taps: 1,
            ..patches(shape)
        }
    }
}
