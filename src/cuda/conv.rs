//! Convolutions on the device: which kernel, with which geometry, over which grid.

use super::backend::Extents;
use super::launch::{Divider, Kernel, address, address_or_null, device, empty, typed};
use super::source::CONV;
use super::{Context, norm};
use crate::cpu::conv::ConvShape;
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};
use bytemuck::{Pod, Zeroable};

/// Where the rows of an implicit matrix lie; `tile.cuh` says what the fields mean.
#[derive(Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
struct Gather {
    rows: i32,
    taps: [i32; 2],
    run: i32,
    pixel: i32,
    source: [i32; 2],
    step: [i32; 2],
    start: [i32; 2],
    tap_step: i32,
    filter: [i32; 2],
    filter_step: i32,
    filter_w_taps: i32,
    target: [i32; 2],
    target_start: [i32; 2],
    target_step: [i32; 2],
    grid_w: Divider,
    grid: Divider,
}

impl Default for Divider {
    fn default() -> Self {
        Divider::new(1)
    }
}

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

/// What multiplies: which cores, and how large a tile of the result a block computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// CUDA cores, f32 sums of products in f32.
    Simt(Tile),
    /// Tensor cores, TF32 for f32 and bf16 for bf16.
    Mma(Tile),
}

/// Rows and columns of a block's tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tile {
    /// 128 x 128.
    Large,
    /// 128 x 64, for 64 output channels.
    Narrow,
    /// 64 x 64, for few rows.
    Small,
}

impl Tile {
    pub(super) fn extents(self) -> [usize; 2] {
        match self {
            Tile::Large => [128, 128],
            Tile::Narrow => [128, 64],
            Tile::Small => [64, 64],
        }
    }
}

/// Below so many blocks a smaller tile is taken: a card has about as many multiprocessors.
const FEW_BLOCKS: usize = 128;
/// Blocks that a filter gradient is cut into, at least where there are enough positions. A number of its own, not the card's:
/// the sums must not depend on it.
const WGRAD_BLOCKS: usize = 264;

impl Engine {
    /// For a product of `rows` x `columns`. `aligned` says whether 16-byte packs work on both operands.
    pub(super) fn choose(context: &Context, dtype: DType, aligned: bool, rows: usize, columns: usize) -> Engine {
        let blocks = |tile: Tile| {
            let [m, n] = tile.extents();
            rows.div_ceil(m) * columns.div_ceil(n)
        };
        let mma = aligned && context.uses_tensor_cores(dtype);
        // Turing has 64 KiB of shared memory, less than the large tile's sums.
        let roomy = context.backend().architecture().0 >= 8;
        let tile = match () {
            _ if !roomy => Tile::Small,
            _ if blocks(Tile::Large) >= FEW_BLOCKS && columns > 64 => Tile::Large,
            _ if blocks(Tile::Narrow) >= FEW_BLOCKS && mma => Tile::Narrow,
            _ => Tile::Small,
        };
        if mma { Engine::Mma(tile) } else { Engine::Simt(tile) }
    }

    pub(super) fn tile(self) -> [usize; 2] {
        match self {
            Engine::Simt(tile) | Engine::Mma(tile) => tile.extents(),
        }
    }

    /// Elements of K in one of its tiles.
    fn depth(self, dtype: DType) -> usize {
        match self {
            Engine::Simt(Tile::Large) => 8,
            Engine::Simt(_) => 16,
            Engine::Mma(_) => 64 / dtype.size(),
        }
    }

    /// Bytes of shared memory: two or four stages of both operands, or the tile of sums, whichever is more.
    pub(super) fn shared(self, dtype: DType) -> u32 {
        let [m, n] = self.tile();
        let sums = m * (n + 4) * 4;
        let stages = match self {
            Engine::Simt(_) => 2 * self.depth(dtype) * (m + n + 8) * 4,
            Engine::Mma(_) => 4 * (m + n) * 64,
        };
        sums.max(stages) as u32
    }

    fn index(self, dtype: DType) -> usize {
        match (self, dtype) {
            (Engine::Simt(Tile::Large), DType::BF16) => 2,
            (Engine::Simt(_), DType::BF16) => 3,
            (Engine::Simt(Tile::Large), _) => 0,
            (Engine::Simt(_), _) => 1,
            (Engine::Mma(tile), DType::BF16) => 7 + tile as usize,
            (Engine::Mma(tile), _) => 4 + tile as usize,
        }
    }
}

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

/// Elements in 16 bytes.
fn pack(dtype: DType) -> usize {
    16 / dtype.size()
}

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

/// How the first layer is laid out: its input with padding written out and channels padded, so that a row of the filter
/// is one aligned run.
#[derive(Clone, Copy)]
struct FirstLayer {
    padded: [usize; 2],
    pixel: usize,
    /// Taps of a row of the packed filter: the run is `row_taps * pixel`.
    row_taps: usize,
}

impl FirstLayer {
    /// Fewer channels than a pack, and a filter wide enough for rows of it to be worth merging.
    fn of(shape: &ConvShape, dtype: DType) -> Option<FirstLayer> {
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

    fn pack_input(&self, x: &Tensor, shape: &ConvShape) -> Result<Tensor> {
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

    fn filter_params(&self, shape: &ConvShape, filter: &Tensor, packed: &Tensor) -> RowFilterParams {
        RowFilterParams {
            filter: address(filter),
            packed: address(packed),
            outputs: shape.o as i32,
            taps_h: shape.kh as i32,
            taps_w: shape.kw as i32,
            c: shape.c as i32,
            packed_w: self.row_taps as i32,
            pixel: self.pixel as i32,
        }
    }

    fn gather(&self, shape: &ConvShape) -> Gather {
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

/// The patches that outputs see.
fn patches(shape: &ConvShape) -> Gather {
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
fn stride_classes(shape: &ConvShape) -> Vec<Gather> {
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

/// Filters `[O, KH, KW, C]` (f32) as the forward kernels read them: in the activations' type, packed for the first layer.
pub fn pack_filter(filter: &Tensor, shape: &ConvShape, dtype: DType) -> Result<Tensor> {
    let context = device();
    if let Some(first) = FirstLayer::of(shape, dtype) {
        let packed = empty(&[shape.o, shape.kh, first.row_taps, first.pixel], dtype)?;
        let kernel = Kernel(CONV, typed(dtype, "pack_row_filter_f32", "pack_row_filter_bf16"));
        context.launch_over(kernel, packed.numel(), &first.filter_params(shape, filter, &packed))?;
        return Ok(packed);
    }
    if dtype == DType::F32 {
        return Ok(filter.detach());
    }
    let packed = empty(filter.dims(), dtype)?;
    context.launch_over(Kernel(CONV, "cast_filter_bf16"), filter.numel(), &filter_params(filter, &packed, shape))?;
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
    let packed_x;
    let (source, gather) = match &first {
        Some(first) => {
            packed_x = first.pack_input(x, shape)?;
            (&packed_x, first.gather(shape))
        }
        None => (x, patches(shape)),
    };
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
        ..conv_params(source, packed, &y, &gather, shape.o, (gather.taps[0] * gather.taps[1] * gather.run) as usize)
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

/// Gradient to the filter, `[O, KH, KW, C]` in f32.
pub fn backward_filter(x: &Tensor, dy: &Tensor, shape: &ConvShape) -> Result<Tensor> {
    check_size("conv2d", shape)?;
    let (context, dtype) = (device(), dy.dtype());
    let first = FirstLayer::of(shape, dtype);
    let packed_x;
    let (source, gather) = match &first {
        Some(first) => {
            packed_x = first.pack_input(x, shape)?;
            (&packed_x, first.gather(shape))
        }
        None => (x, patches(shape)),
    };
    let columns = (gather.taps[0] * gather.taps[1] * gather.run) as usize;
    let (run, positions) = (gather.run as usize, gather.rows as usize);
    let aligned = run % pack(dtype) == 0 && shape.o.is_multiple_of(pack(dtype));
    let engine = match Engine::choose(context, dtype, aligned, shape.o, columns) {
        // There are always enough blocks, since the sum is split: the tile follows the extents.
        engine if context.backend().architecture().0 < 8 => engine,
        Engine::Mma(_) if shape.o >= 128 => Engine::Mma(Tile::Large),
        Engine::Simt(_) if shape.o >= 128 && columns >= 128 => Engine::Simt(Tile::Large),
        Engine::Mma(_) => Engine::Mma(Tile::Small),
        Engine::Simt(_) => Engine::Simt(Tile::Small),
    };
    let [m, n] = engine.tile();
    let tiles = shape.o.div_ceil(m) * columns.div_ceil(n);
    let depth = engine.depth(dtype);
    let split = positions.div_ceil((WGRAD_BLOCKS / tiles).max(1)).next_multiple_of(depth);
    let splits = positions.div_ceil(split);
    let parts = empty(&[splits, shape.o, columns], DType::F32)?;
    let params = WgradParams {
        x: address(source),
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
        _ => {
            let sum = empty(&[shape.o, columns], DType::F32)?;
            let params = SumPartsParams {
                parts: address(&parts),
                sum: address(&sum),
                n: (shape.o * columns) as i32,
                splits: splits as i32,
            };
            context.launch_over(Kernel(CONV, "sum_parts"), shape.o * columns, &params)?;
            sum
        }
    };
    let dims = [shape.o, shape.kh, shape.kw, shape.c];
    match &first {
        None => Ok(packed.with_shape(dims)),
        Some(first) => {
            let filter = empty(&dims, DType::F32)?;
            // The same struct, read the other way round.
            let params = RowFilterParams {
                filter: address(&packed),
                packed: address(&filter),
                ..first.filter_params(shape, &filter, &packed)
            };
            context.launch_over(Kernel(CONV, "unpack_row_filter"), filter.numel(), &params)?;
            Ok(filter)
        }
    }
}
