//! Pooling on the device.

use super::launch::{Kernel, address, device, empty, typed};
use super::source::POOL;
use crate::cpu::pool::PoolShape;
use crate::error::Result;
use crate::tensor::{DType, Tensor};
use bytemuck::{Pod, Zeroable};

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct MaxPoolParams {
    x: u64,
    y: u64,
    places: u64,
    dy: u64,
    from: u64,
    dx: u64,
    images: i32,
    h: i32,
    w: i32,
    c: i32,
    oh: i32,
    ow: i32,
    kernel: i32,
    stride: i32,
    padding: i32,
    unused: i32,
}

impl MaxPoolParams {
    fn new(shape: &PoolShape) -> Self {
        let [oh, ow] = shape.output();
        MaxPoolParams {
            images: shape.n as i32,
            h: shape.h as i32,
            w: shape.w as i32,
            c: shape.c as i32,
            oh: oh as i32,
            ow: ow as i32,
            kernel: shape.kernel as i32,
            stride: shape.stride as i32,
            padding: shape.padding as i32,
            ..Self::zeroed()
        }
    }
}

/// Maxima of windows, and which of a window's places each came from (U8).
pub fn max_pool(x: &Tensor, shape: &PoolShape) -> Result<(Tensor, Tensor)> {
    let [oh, ow] = shape.output();
    let dims = [shape.n, oh, ow, shape.c];
    let (y, places) = (empty(&dims, x.dtype())?, empty(&dims, DType::U8)?);
    let params = MaxPoolParams { x: address(x), y: address(&y), places: address(&places), ..MaxPoolParams::new(shape) };
    device().launch_over(Kernel(POOL, typed(x.dtype(), "max_pool_f32", "max_pool_bf16")), y.numel(), &params)?;
    Ok((y, places))
}

/// Gradient to the input.
pub fn max_pool_backward(dy: &Tensor, places: &Tensor, shape: &PoolShape) -> Result<Tensor> {
    let dx = empty(&[shape.n, shape.h, shape.w, shape.c], dy.dtype())?;
    let params =
        MaxPoolParams { dy: address(dy), from: address(places), dx: address(&dx), ..MaxPoolParams::new(shape) };
    let kernel = Kernel(POOL, typed(dy.dtype(), "max_pool_backward_f32", "max_pool_backward_bf16"));
    device().launch_over(kernel, dx.numel(), &params)?;
    Ok(dx)
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct AveragePoolParams {
    x: u64,
    y: u64,
    dy: u64,
    dx: u64,
    images: i32,
    pixels: i32,
    c: i32,
    unused: i32,
}

/// Means over the pixels of `x` `[N, .., C]`, `[N, C]` in f32.
pub fn average_pool(x: &Tensor) -> Result<Tensor> {
    let (images, c) = (x.dims()[0], x.dims()[x.dims().len() - 1]);
    let y = empty(&[images, c], DType::F32)?;
    let params = AveragePoolParams {
        x: address(x),
        y: address(&y),
        dy: 0,
        dx: 0,
        images: images as i32,
        pixels: (x.numel() / (images * c).max(1)) as i32,
        c: c as i32,
        unused: 0,
    };
    device().launch_over(
        Kernel(POOL, typed(x.dtype(), "average_pool_f32", "average_pool_bf16")),
        y.numel(),
        &params,
    )?;
    Ok(y)
}

/// Gradient to the input, of the extents `dims` and the type `dtype`.
pub fn average_pool_backward(dy: &Tensor, dims: &[usize], dtype: DType) -> Result<Tensor> {
    let dx = empty(dims, dtype)?;
    let [images, c] = [dims[0], dims[dims.len() - 1]];
    let params = AveragePoolParams {
        x: 0,
        y: 0,
        dy: address(dy),
        dx: address(&dx),
        images: images as i32,
        pixels: (dx.numel() / (images * c).max(1)) as i32,
        c: c as i32,
        unused: 0,
    };
    let kernel = Kernel(POOL, typed(dtype, "average_pool_backward_f32", "average_pool_backward_bf16"));
    device().launch_over(kernel, dx.numel(), &params)?;
    Ok(dx)
}
