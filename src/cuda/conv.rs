//! Convolutions on the device: which kernel, with which geometry, over which grid.

mod first_layer;
mod gather;

use super::backend::Extents;
use super::engine::{Engine, Tile};
use super::launch::{Divider, Kernel, address, address_or_null, device, empty, pack, typed};
use super::source::CONV;
use super::{Context, norm};
use crate::cpu::conv::ConvShape;
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};
use bytemuck::{Pod, Zeroable};
use first_layer::FirstLayer;
use gather::{Gather, patches, stride_classes};

const MAX_CLASSES: usize = 4;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct ConvParams {
    x: u64,
    filter: u64,
    y: u64,
    bias: u64,
    residual: u64,
    statistics: u64,
    outputs: i32,
    filter_pitch: i32,
    relu: i32,
    packed: i32,
    store_packed: i32,
    unused: i32,
    classes: [Gather; MAX_CLASSES],
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct WgradParams {
    x: u64,
    dy: u64,
    parts: u64,
    outputs: i32,
    columns: i32,
    positions: i32,
    split: i32,
    packed_x: i32,
    packed_dy: i32,
    run: Divider,
    taps_w: Divider,
    patches: Gather,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct SumPartsParams {
    parts: u64,
    sum: u64,
    n: i32,
    splits: i32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct PackFilterParams {
    filter: u64,
    packed: u64,
    outputs: i32,
    taps: i32,
    inputs: i32,
    unused: i32,
}

/// Blocks that a filter gradient is cut into, at least where there are enough positions. A number of its own, not the card's:
/// the sums must not depend on it.
const WGRAD_BLOCKS: usize = 264;

const CONV_KERNELS: [&str; 10] = [
    "conv_f32_simt_128x128",
    "conv_f32_simt_64x64",
    "conv_bf16_simt_128x128",
    "conv_bf16_simt_64x64",
    "conv_tf32_mma_128x128",
    "conv_tf32_mma_128x64",
    "conv_tf32_mma_64x64",
    "conv_bf16_mma_128x128",
    "conv_bf16_mma_128x64",
    "conv_bf16_mma_64x64",
];
const WGRAD_KERNELS: [&str; 10] = [
    "wgrad_f32_simt_128x128",
    "wgrad_f32_simt_64x64",
    "wgrad_bf16_simt_128x128",
    "wgrad_bf16_simt_64x64",
    "wgrad_tf32_mma_128x128",
    "wgrad_tf32_mma_128x64",
    "wgrad_tf32_mma_64x64",
    "wgrad_bf16_mma_128x128",
    "wgrad_bf16_mma_128x64",
    "wgrad_bf16_mma_64x64",
];

/// An error where a 32-bit index would not reach.
fn check_size(op: &'static str, shape: &ConvShape) -> Result<()> {
    let [oh, ow] = shape.output();
    let largest = (shape.n * shape.h * shape.w * shape.c.max(4)).max(shape.n * oh * ow * shape.o);
    match i32::try_from(largest) {
        Ok(_) => Ok(()),
        Err(_) => Err(Error::Argument {
            op,
            problem: format!("{largest} elements, expected less than 2^31; take smaller batches"),
        }),
    }
}

/// Filters `[O, KH, KW, C]` (f32) as the forward kernels read them: in the activations' type, packed for the first layer.
pub fn pack_filter(filter: &Tensor, shape: &ConvShape, dtype: DType) -> Result<Tensor> {
    if let Some(first) = FirstLayer::of(shape, dtype) {
        return first.pack_filter(filter, shape, dtype);
    }
    if dtype == DType::F32 {
        return Ok(filter.detach());
    }
    let packed = empty(filter.dims(), dtype)?;
    device().launch_over(Kernel(CONV, "cast_filter_bf16"), filter.numel(), &filter_params(filter, &packed, shape))?;
    Ok(packed)
}

fn filter_params(filter: &Tensor, packed: &Tensor, shape: &ConvShape) -> PackFilterParams {
    PackFilterParams {
        filter: address(filter),
        packed: address(packed),
        outputs: shape.o as i32,
        taps: (shape.kh * shape.kw) as i32,
        inputs: shape.c as i32,
        unused: 0,
    }
}

/// What is done to the sums before they are stored.
#[derive(Clone, Copy, Default)]
pub struct Epilogue<'a> {
    /// `[O]`, f32.
    pub bias: Option<&'a Tensor>,
    /// As the output.
    pub residual: Option<&'a Tensor>,
    /// Whether negative results become zero.
    pub relu: bool,
}

/// What the patches are read from, and where they lie in it: the input, or the first layer's copy of it.
fn source(x: &Tensor, shape: &ConvShape, first: Option<&FirstLayer>) -> Result<(Tensor, Gather)> {
    match first {
        Some(first) => Ok((first.pack_input(x, shape)?, first.gather(shape))),
        None => Ok((x.detach(), patches(shape))),
    }
}

/// `epilogue(conv(x, filter))` for a filter from [`pack_filter`]; with `statistics` also mean and biased variance of every
/// output channel, `[O]` each, taken from the sums before they leave the multiprocessor.
pub fn forward(
    x: &Tensor,
    packed: &Tensor,
    shape: &ConvShape,
    epilogue: Epilogue,
    statistics: bool,
) -> Result<(Tensor, Option<norm::Moments>)> {
    check_size("conv2d", shape)?;
    let (context, dtype, [oh, ow]) = (device(), x.dtype(), shape.output());
    let first = FirstLayer::of(shape, dtype);
    let (source, gather) = source(x, shape, first.as_ref())?;
    let y = empty(&[shape.n, oh, ow, shape.o], dtype)?;
    let rows = gather.rows as usize;
    let aligned = (gather.run as usize).is_multiple_of(pack(dtype));
    let engine = Engine::choose(context, dtype, aligned, rows, shape.o);
    let row_tiles = rows.div_ceil(engine.tile()[0]);
    let parts = statistics.then(|| empty(&[row_tiles, 2, shape.o], DType::F32)).transpose()?;
    let params = ConvParams {
        bias: address_or_null(epilogue.bias),
        residual: address_or_null(epilogue.residual),
        statistics: address_or_null(parts.as_ref()),
        relu: epilogue.relu.into(),
        ..conv_params(&source, packed, &y, &gather, shape.o, gather.depth())
    };
    launch_conv(context, engine, dtype, rows, 1, &params)?;
    let moments = parts.map(|parts| norm::merge(&parts, rows, engine.tile()[0])).transpose()?;
    Ok((y, moments))
}

fn conv_params(x: &Tensor, filter: &Tensor, y: &Tensor, gather: &Gather, outputs: usize, pitch: usize) -> ConvParams {
    ConvParams {
        x: address(x),
        filter: address(filter),
        y: address(y),
        bias: 0,
        residual: 0,
        statistics: 0,
        outputs: outputs as i32,
        filter_pitch: pitch as i32,
        relu: 0,
        packed: (gather.run % 4 == 0 && gather.pixel % 4 == 0).into(),
        store_packed: outputs.is_multiple_of(4).into(),
        unused: 0,
        classes: [*gather; MAX_CLASSES],
    }
}

fn launch_conv(
    context: &Context,
    engine: Engine,
    dtype: DType,
    rows: usize,
    classes: usize,
    params: &ConvParams,
) -> Result<()> {
    let [m, n] = engine.tile();
    let grid = [rows.div_ceil(m) as u32, (params.outputs as usize).div_ceil(n) as u32, classes as u32];
    let kernel = Kernel(CONV, CONV_KERNELS[engine.index(dtype)]);
    context.launch_with(kernel, Extents { grid, threads: 256, shared: engine.shared(dtype) }, params)
}

/// Gradient to the input. `filter` is `[O, KH, KW, C]` in f32.
pub fn backward_input(dy: &Tensor, filter: &Tensor, shape: &ConvShape) -> Result<Tensor> {
    check_size("conv2d", shape)?;
    let (context, dtype) = (device(), dy.dtype());
    if shape.stride[0] != shape.stride[1] {
        let problem = format!("stride {:?}: gradients on CUDA need the same for rows and columns", shape.stride);
        return Err(Error::Argument { op: "conv2d", problem });
    }
    let transposed = empty(&[shape.c, shape.kh, shape.kw, shape.o], dtype)?;
    let kernel = Kernel(CONV, typed(dtype, "transpose_filter_f32", "transpose_filter_bf16"));
    let grid = [shape.c.div_ceil(32) as u32, shape.o.div_ceil(32) as u32, (shape.kh * shape.kw) as u32];
    context.launch(kernel, grid, &filter_params(filter, &transposed, shape))?;
    let dx = empty(&[shape.n, shape.h, shape.w, shape.c], dtype)?;
    let aligned = shape.o.is_multiple_of(pack(dtype));
    for classes in stride_classes(shape).chunks(MAX_CLASSES) {
        let rows = classes.iter().map(|g| g.rows as usize).max().unwrap_or(0);
        let engine = Engine::choose(context, dtype, aligned, rows * classes.len(), shape.c);
        let mut params = conv_params(dy, &transposed, &dx, &classes[0], shape.c, shape.kh * shape.kw * shape.o);
        params.classes[..classes.len()].copy_from_slice(classes);
        launch_conv(context, engine, dtype, rows, classes.len(), &params)?;
    }
    Ok(dx)
}

/// The sum of the parts of a gradient.
fn sum_parts(context: &Context, parts: &Tensor, dims: [usize; 2]) -> Result<Tensor> {
    let sum = empty(&dims, DType::F32)?;
    let params = SumPartsParams {
        parts: address(parts),
        sum: address(&sum),
        n: sum.numel() as i32,
        splits: parts.dims()[0] as i32,
    };
    context.launch_over(Kernel(CONV, "sum_parts"), sum.numel(), &params)?;
    Ok(sum)
}

/// For a gradient of `outputs` x `columns`: there are always enough blocks, since the sum is split, and the tile follows the extents.
fn wgrad_engine(context: &Context, dtype: DType, aligned: bool, outputs: usize, columns: usize) -> Engine {
    match Engine::choose(context, dtype, aligned, outputs, columns) {
        engine if context.backend().architecture().0 < 8 => engine,
        Engine::Mma(_) if outputs >= 128 => Engine::Mma(Tile::Large),
        Engine::Simt(_) if outputs >= 128 && columns >= 128 => Engine::Simt(Tile::Large),
        Engine::Mma(_) => Engine::Mma(Tile::Small),
        Engine::Simt(_) => Engine::Simt(Tile::Small),
    }
}

/// Gradient to the filter, `[O, KH, KW, C]` in f32.
pub fn backward_filter(x: &Tensor, dy: &Tensor, shape: &ConvShape) -> Result<Tensor> {
    check_size("conv2d", shape)?;
    let (context, dtype) = (device(), dy.dtype());
    let first = FirstLayer::of(shape, dtype);
    let (source, gather) = source(x, shape, first.as_ref())?;
    let columns = gather.depth();
    let (run, positions) = (gather.run as usize, gather.rows as usize);
    let aligned = run % pack(dtype) == 0 && shape.o.is_multiple_of(pack(dtype));
    let engine = wgrad_engine(context, dtype, aligned, shape.o, columns);
    let [m, n] = engine.tile();
    let tiles = shape.o.div_ceil(m) * columns.div_ceil(n);
    let depth = engine.depth(dtype);
    let split = positions.div_ceil((WGRAD_BLOCKS / tiles).max(1)).next_multiple_of(depth);
    let splits = positions.div_ceil(split);
    let parts = empty(&[splits, shape.o, columns], DType::F32)?;
    let params = WgradParams {
        x: address(&source),
        dy: address(dy),
        parts: address(&parts),
        outputs: shape.o as i32,
        columns: columns as i32,
        positions: positions as i32,
        split: split as i32,
        packed_x: (run % 4 == 0).into(),
        packed_dy: shape.o.is_multiple_of(4).into(),
        run: Divider::new(run),
        taps_w: Divider::new(gather.taps[1] as usize),
        patches: gather,
    };
    let grid = [shape.o.div_ceil(m) as u32, columns.div_ceil(n) as u32, splits as u32];
    let kernel = Kernel(CONV, WGRAD_KERNELS[engine.index(dtype)]);
    context.launch_with(kernel, Extents { grid, threads: 256, shared: engine.shared(dtype) }, &params)?;
    let packed = match splits {
        1 => parts.with_shape([shape.o, columns]),
        _ => sum_parts(context, &parts, [shape.o, columns])?,
    };
    match first {
        None => Ok(packed.with_shape([shape.o, shape.kh, shape.kw, shape.c])),
        Some(first) => first.unpack_filter(&packed, shape),
    }
}
