//! What the rows of a convolution's matrix see.

use super::super::launch::Divider;
use crate::cpu::conv::ConvShape;
use bytemuck::{Pod, Zeroable};

/// Where the rows of an implicit matrix lie; `tile.cuh` says what the fields mean.
#[derive(Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Gather {
    pub(super) rows: i32,
    pub(super) taps: [i32; 2],
    pub(super) run: i32,
    pub(super) pixel: i32,
    pub(super) source: [i32; 2],
    pub(super) step: [i32; 2],
    pub(super) start: [i32; 2],
    pub(super) tap_step: i32,
    pub(super) filter: [i32; 2],
    pub(super) filter_step: i32,
    pub(super) filter_w_taps: i32,
    pub(super) target: [i32; 2],
    pub(super) target_start: [i32; 2],
    pub(super) target_step: [i32; 2],
    pub(super) grid_w: Divider,
    pub(super) grid: Divider,
}

impl Gather {
    /// Values of a row.
    pub(super) fn depth(&self) -> usize {
        (self.taps[0] * self.taps[1] * self.run) as usize
    }
}

/// The patches that outputs see.
pub(super) fn patches(shape: &ConvShape) -> Gather {
    let output = shape.output();
    Gather {
        rows: (shape.n * output[0] * output[1]) as i32,
        taps: [shape.kh as i32, shape.kw as i32],
        run: shape.c as i32,
        pixel: shape.c as i32,
        source: [shape.h as i32, shape.w as i32],
        step: shape.stride.map(|x| x as i32),
        start: shape.padding.map(|x| -(x as i32)),
        tap_step: 1,
        filter: [0, 0],
        filter_step: 1,
        filter_w_taps: shape.kw as i32,
        target: output.map(|x| x as i32),
        target_start: [0, 0],
        target_step: [1, 1],
        grid_w: Divider::new(output[1]),
        grid: Divider::new(output[0] * output[1]),
    }
}

/// For each class of input positions that agree modulo the stride, what they see of `dy`.
pub(super) fn stride_classes(shape: &ConvShape) -> Vec<Gather> {
    let output = shape.output();
    let mut classes = Vec::new();
    for ry in 0..shape.stride[0] {
        for rx in 0..shape.stride[1] {
            // Along each axis: the first tap that reaches the class, how many do, the output it reads, and positions.
            let axis = |r: usize, k: usize, p: usize, s: usize, extent: usize| {
                let first = (r + p) % s;
                let taps = k.saturating_sub(first).div_ceil(s);
                let start = (r + p - first) / s;
                (first as i32, taps as i32, start as i32, (extent + s - 1 - r) / s)
            };
            let (fy, ty, sy, gh) = axis(ry, shape.kh, shape.padding[0], shape.stride[0], shape.h);
            let (fx, tx, sx, gw) = axis(rx, shape.kw, shape.padding[1], shape.stride[1], shape.w);
            classes.push(Gather {
                rows: (shape.n * gh * gw) as i32,
                taps: [ty, tx],
                run: shape.o as i32,
                pixel: shape.o as i32,
                source: output.map(|x| x as i32),
                step: [1, 1],
                start: [sy, sx],
                tap_step: -1,
                filter: [fy, fx],
                // Strides of rows and columns may differ; a class is then one launch with its own step below.
                filter_step: shape.stride[0] as i32,
                filter_w_taps: shape.kw as i32,
                target: [shape.h as i32, shape.w as i32],
                target_start: [ry as i32, rx as i32],
                target_step: shape.stride.map(|x| x as i32),
                grid_w: Divider::new(gw.max(1)),
                grid: Divider::new((gh * gw).max(1)),
            });
        }
    }
    classes
}
