//! Batch norm and sums over rows on the device.

use super::launch::{Kernel, address, address_or_null, buffer, device, empty, pack, typed};
use super::source::BATCH_NORM;
use crate::error::Result;
use crate::tensor::{DType, Tensor};
use bytemuck::{Pod, Zeroable};

/// Mean and biased variance of every channel, `[C]` each.
pub struct Moments {
    /// Mean.
    pub mean: Tensor,
    /// Biased variance.
    pub variance: Tensor,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct ColumnParams {
    x: u64,
    parts: u64,
    rows: i32,
    channels: i32,
    rows_per_block: i32,
    unused: i32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct MergeStatisticsParams {
    parts: u64,
    mean: u64,
    variance: u64,
    rows: i32,
    channels: i32,
    rows_per_block: i32,
    blocks: i32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct NormParams {
    x: u64,
    residual: u64,
    y: u64,
    gamma: u64,
    beta: u64,
    mean: u64,
    variance: u64,
    count: i64,
    eps: f32,
    channels: i32,
    relu: i32,
    unused: i32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct NormBackwardParams {
    x: u64,
    y: u64,
    dy: u64,
    dx: u64,
    dresidual: u64,
    gamma: u64,
    mean: u64,
    variance: u64,
    parts: u64,
    dgamma: u64,
    dbeta: u64,
    count: i64,
    eps: f32,
    rows: i32,
    channels: i32,
    rows_per_block: i32,
    batch_statistics: i32,
    unused: i32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct ColumnPartsParams {
    parts: u64,
    sums: u64,
    blocks: i32,
    n: i32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct BlendParams {
    running: u64,
    batch: u64,
    keep: f32,
    factor: f32,
    n: i32,
    unused: i32,
}

/// How rows are shared out: blocks of 32 channels and of so many rows that all of them together fill a card. It follows from
/// the extents alone, as the sums must.
struct Rows {
    per_block: usize,
    blocks: usize,
    grid: [u32; 3],
}

impl Rows {
    fn of(rows: usize, channels: usize) -> Rows {
        const BLOCKS: usize = 1024;
        const AT_LEAST: usize = 64;
        let columns = channels.div_ceil(32);
        let per_block = rows.div_ceil((BLOCKS / columns).max(1)).max(AT_LEAST);
        let blocks = rows.div_ceil(per_block).max(1);
        Rows { per_block, blocks, grid: [columns as u32, blocks as u32, 1] }
    }
}

fn rows_and_channels(x: &Tensor) -> (usize, usize) {
    let channels = x.dims().last().copied().unwrap_or(1);
    (x.numel() / channels.max(1), channels)
}

/// Mean and biased variance over the rows of `x` `[.., C]`.
pub fn statistics(x: &Tensor) -> Result<Moments> {
    let (rows, channels) = rows_and_channels(x);
    let split = Rows::of(rows, channels);
    let parts = empty(&[split.blocks, 2, channels], DType::F32)?;
    let params = ColumnParams {
        x: address(x),
        parts: address(&parts),
        rows: rows as i32,
        channels: channels as i32,
        rows_per_block: split.per_block as i32,
        unused: 0,
    };
    device().launch(Kernel(BATCH_NORM, typed(x.dtype(), "statistics_f32", "statistics_bf16")), split.grid, &params)?;
    merge(&parts, rows, split.per_block)
}

/// The moments of `rows` rows from `parts` `[blocks, 2, C]` of `rows_per_block` each.
pub fn merge(parts: &Tensor, rows: usize, rows_per_block: usize) -> Result<Moments> {
    let channels = parts.dims()[2];
    let (mean, variance) = (empty(&[channels], DType::F32)?, empty(&[channels], DType::F32)?);
    let params = MergeStatisticsParams {
        parts: address(parts),
        mean: address(&mean),
        variance: address(&variance),
        rows: rows as i32,
        channels: channels as i32,
        rows_per_block: rows_per_block as i32,
        blocks: parts.dims()[0] as i32,
    };
    device().launch(Kernel(BATCH_NORM, "merge_statistics"), [channels.div_ceil(8) as u32, 1, 1], &params)?;
    Ok(Moments { mean, variance })
}

/// What normalisation needs besides its input. All are `[C]`.
#[derive(Clone, Copy)]
pub struct Affine<'a> {
    /// Scale.
    pub gamma: &'a Tensor,
    /// Shift.
    pub beta: &'a Tensor,
    /// Mean.
    pub mean: &'a Tensor,
    /// Variance.
    pub variance: &'a Tensor,
    /// Added to the variance.
    pub eps: f32,
}

/// `act((x - mean) / sqrt(variance + eps) * gamma + beta + residual)`.
pub fn normalise(x: &Tensor, affine: Affine, residual: Option<&Tensor>, relu: bool) -> Result<Tensor> {
    let y = empty(x.dims(), x.dtype())?;
    let (_, channels) = rows_and_channels(x);
    let params = NormParams {
        x: address(x),
        residual: address_or_null(residual),
        y: address(&y),
        gamma: address(affine.gamma),
        beta: address(affine.beta),
        mean: address(affine.mean),
        variance: address(affine.variance),
        count: x.numel() as i64,
        eps: affine.eps,
        channels: channels as i32,
        relu: relu.into(),
        unused: 0,
    };
    let kernel = Kernel(BATCH_NORM, typed(x.dtype(), "normalise_f32", "normalise_bf16"));
    device().launch_over(kernel, x.numel().div_ceil(pack(x.dtype())), &params)?;
    Ok(y)
}

/// Gradients of [`normalise`].
pub struct NormGradients {
    /// To the input; `None` if it was not asked for.
    pub dx: Option<Tensor>,
    /// To the residual, where it was asked for.
    pub dresidual: Option<Tensor>,
    /// To gamma.
    pub dgamma: Tensor,
    /// To beta.
    pub dbeta: Tensor,
}

/// Gradients of [`normalise`]: `y` is its output, given if it ended in a ReLU; `batch` says whether mean and variance are
/// those of `x`.
pub fn backward(
    x: &Tensor,
    y: Option<&Tensor>,
    dy: &Tensor,
    affine: Affine,
    batch: bool,
    needs_dx: bool,
    needs_dresidual: bool,
) -> Result<NormGradients> {
    let (context, (rows, channels)) = (device(), rows_and_channels(x));
    let split = Rows::of(rows, channels);
    let parts = empty(&[split.blocks, 2, channels], DType::F32)?;
    // Gradients of beta, then of gamma; the kernel takes them by address, autograd as tensors of their own.
    let sums = empty(&[2 * channels], DType::F32)?;
    let mut params = NormBackwardParams {
        x: address(x),
        y: address_or_null(y),
        dy: address(dy),
        dx: 0,
        dresidual: 0,
        gamma: address(affine.gamma),
        mean: address(affine.mean),
        variance: address(affine.variance),
        parts: address(&parts),
        dgamma: 0,
        dbeta: 0,
        count: x.numel() as i64,
        eps: affine.eps,
        rows: rows as i32,
        channels: channels as i32,
        rows_per_block: split.per_block as i32,
        batch_statistics: batch.into(),
        unused: 0,
    };
    context.launch(Kernel(BATCH_NORM, typed(x.dtype(), "norm_sums_f32", "norm_sums_bf16")), split.grid, &params)?;
    add_parts(&parts, split.blocks, &sums)?;
    (params.dbeta, params.dgamma) = (address(&sums), address(&sums) + 4 * channels as u64);
    let dx = needs_dx.then(|| empty(x.dims(), x.dtype())).transpose()?;
    let dresidual = needs_dresidual.then(|| empty(x.dims(), x.dtype())).transpose()?;
    if let Some(dx) = &dx {
        params.dx = address(dx);
        params.dresidual = address_or_null(dresidual.as_ref());
        let kernel = Kernel(BATCH_NORM, typed(x.dtype(), "norm_backward_f32", "norm_backward_bf16"));
        context.launch_over(kernel, x.numel().div_ceil(pack(x.dtype())), &params)?;
    }
    let half =
        |which: usize| buffer(&sums).part(which * channels, channels).map(|part| Tensor::from_cuda(&[channels], part));
    Ok(NormGradients { dx, dresidual, dgamma: half(1)?, dbeta: half(0)? })
}

fn add_parts(parts: &Tensor, blocks: usize, sums: &Tensor) -> Result<()> {
    let n = sums.numel();
    let params = ColumnPartsParams { parts: address(parts), sums: address(sums), blocks: blocks as i32, n: n as i32 };
    device().launch(Kernel(BATCH_NORM, "add_column_parts"), [n.div_ceil(8) as u32, 1, 1], &params)
}

/// For every column of `x` `[rows, C]` (f32) the sum over rows, `[C]`.
pub fn column_sums(x: &Tensor) -> Result<Tensor> {
    let (rows, channels) = rows_and_channels(x);
    let split = Rows::of(rows, channels);
    let parts = empty(&[split.blocks, channels], DType::F32)?;
    let params = ColumnParams {
        x: address(x),
        parts: address(&parts),
        rows: rows as i32,
        channels: channels as i32,
        rows_per_block: split.per_block as i32,
        unused: 0,
    };
    device().launch(Kernel(BATCH_NORM, "column_sums_f32"), split.grid, &params)?;
    let sums = empty(&[channels], DType::F32)?;
    add_parts(&parts, split.blocks, &sums)?;
    Ok(sums)
}

/// `running = running * keep + batch * factor`, in place.
pub fn blend(running: &Tensor, batch: &Tensor, keep: f32, factor: f32) -> Result<()> {
    let n = running.numel();
    let params = BlendParams { running: address(running), batch: address(batch), keep, factor, n: n as i32, unused: 0 };
    device().launch_over(Kernel(BATCH_NORM, "blend"), n, &params)
}
