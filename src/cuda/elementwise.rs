//! Maps over elements, conversions and sums.

use super::launch::{Kernel, address, address_or_null, device, empty, typed};
use super::source::ELEMENTWISE;
use crate::error::Result;
use crate::tensor::{DType, Shape, Tensor};
use bytemuck::{Pod, Zeroable};

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct MapParams {
    a: u64,
    b: u64,
    y: u64,
    scalar: u64,
    factor: f32,
    unused: u32,
    n: i64,
}

fn map(
    names: [&'static str; 2],
    a: Option<&Tensor>,
    b: Option<&Tensor>,
    y: &Tensor,
    scalar: Option<&Tensor>,
    factor: f32,
) -> Result<()> {
    let params = MapParams {
        a: address_or_null(a),
        b: address_or_null(b),
        y: address(y),
        scalar: address_or_null(scalar),
        factor,
        unused: 0,
        n: y.numel() as i64,
    };
    device().launch_over(Kernel(ELEMENTWISE, typed(y.dtype(), names[0], names[1])), y.numel(), &params)
}

/// `a + b`.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let y = empty(a.dims(), a.dtype())?;
    map(["add_f32", "add_bf16"], Some(a), Some(b), &y, None, 0.0)?;
    Ok(y)
}

/// `a + b` in the memory of `a`, which must not be shared.
pub fn add_assign(a: &Tensor, b: &Tensor) -> Result<()> {
    map(["add_f32", "add_bf16"], Some(a), Some(b), a, None, 0.0)
}

/// `max(x, 0)`; NaN stays NaN.
pub fn relu(x: &Tensor) -> Result<Tensor> {
    let y = empty(x.dims(), x.dtype())?;
    map(["relu_f32", "relu_bf16"], Some(x), None, &y, None, 0.0)?;
    Ok(y)
}

/// `dy` where `y > 0`.
pub fn relu_backward(y: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let dx = empty(dy.dims(), dy.dtype())?;
    map(["relu_backward_f32", "relu_backward_bf16"], Some(dy), Some(y), &dx, None, 0.0)?;
    Ok(dx)
}

/// `x * factor`, times `scalar` `[1]` if it is given.
pub fn scale(x: &Tensor, factor: f32, scalar: Option<&Tensor>) -> Result<Tensor> {
    let y = empty(x.dims(), x.dtype())?;
    map(["scale_f32", "scale_bf16"], Some(x), None, &y, scalar, factor)?;
    Ok(y)
}

/// All elements `value`, times `scalar` `[1]` if it is given.
pub fn fill(shape: &Shape, dtype: DType, value: f32, scalar: Option<&Tensor>) -> Result<Tensor> {
    let y = empty(shape, dtype)?;
    map(["fill_f32", "fill_bf16"], None, None, &y, scalar, value)?;
    Ok(y)
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct ConvertParams {
    x: u64,
    y: u64,
    n: i64,
}

/// `x` with elements of another floating-point type.
pub fn convert(x: &Tensor, dtype: DType) -> Result<Tensor> {
    if x.dtype() == dtype {
        return Ok(x.detach());
    }
    let y = empty(x.dims(), dtype)?;
    let params = ConvertParams { x: address(x), y: address(&y), n: x.numel() as i64 };
    device().launch_over(Kernel(ELEMENTWISE, typed(dtype, "bf16_to_f32", "f32_to_bf16")), x.numel(), &params)?;
    Ok(y)
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct ReduceParams {
    x: u64,
    parts: u64,
    n: i64,
    squares: i32,
    blocks: i32,
    factor: f32,
    unused: u32,
}

/// Elements a block adds up.
const REDUCE_SHARE: usize = 1 << 14;

/// `factor` times the sum of all elements, or of their squares, `[]`. Parts are added in a fixed order.
pub fn sum(x: &Tensor, squares: bool, factor: f32) -> Result<Tensor> {
    let (context, blocks) = (device(), x.numel().div_ceil(REDUCE_SHARE).clamp(1, 1024));
    let parts = empty(&[blocks], DType::F32)?;
    let total = empty(&[], DType::F32)?;
    let mut params = ReduceParams {
        x: address(x),
        parts: address(&parts),
        n: x.numel() as i64,
        squares: squares.into(),
        blocks: blocks as i32,
        factor,
        unused: 0,
    };
    context.launch(Kernel(ELEMENTWISE, "reduce"), [blocks as u32, 1, 1], &params)?;
    (params.x, params.parts, params.n) = (address(&parts), address(&total), blocks as i64);
    let extents = super::backend::Extents { grid: [1, 1, 1], threads: 32, shared: 0 };
    context.launch_with(Kernel(ELEMENTWISE, "reduce_parts"), extents, &params)?;
    Ok(total)
}
