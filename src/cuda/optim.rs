//! Optimiser updates of all parameters in one launch.

use super::CudaBuffer;
use super::backend::Extents;
use super::launch::{Kernel, address, device, empty};
use super::source::OPTIM;
use crate::error::Result;
use crate::tensor::{DType, Tensor};
use bytemuck::{Pod, Zeroable};
use std::sync::Arc;

/// Elements of a block; `PIECE` in optim.cu.
const PIECE: usize = 4096;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct ParameterEntry {
    value: u64,
    gradient: u64,
    first: u64,
    second: u64,
    n: i64,
    group: i32,
    unused: i32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct OptimParams {
    parameters: u64,
    pieces: u64,
    scalars: u64,
    guard: u64,
}

/// A parameter with its gradient and state, all on the device and of one length.
pub struct Entry<'a> {
    /// What is updated.
    pub value: &'a Tensor,
    /// Its gradient.
    pub gradient: &'a Tensor,
    /// First moment or velocity.
    pub first: &'a CudaBuffer,
    /// Second moment; none for SGD.
    pub second: Option<&'a CudaBuffer>,
    /// Index of its scalars.
    pub group: usize,
}

/// Tables of a set of parameters, used in every step that has the same ones at the same addresses.
pub struct Update {
    kernel: &'static str,
    entries: Vec<ParameterEntry>,
    tables: Option<Arc<Tables>>,
    scalars: CudaBuffer,
    blocks: usize,
}

/// Which parameter lies where, and which block updates which piece of it.
pub struct Tables {
    parameters: CudaBuffer,
    pieces: CudaBuffer,
}

fn table(entries: &[Entry]) -> Vec<ParameterEntry> {
    entries
        .iter()
        .map(|e| ParameterEntry {
            value: address(e.value),
            gradient: address(e.gradient),
            first: e.first.address(),
            second: e.second.map_or(0, CudaBuffer::address),
            n: e.value.numel() as i64,
            group: e.group as i32,
            unused: 0,
        })
        .collect()
}

impl Update {
    /// Tables for `entries`, updated by Adam if `adam`, else by SGD, with `scalars`: 8 floats a group for Adam, 4 for SGD, in
    /// the order of their structs in optim.cu.
    pub fn new(entries: &[Entry], adam: bool, scalars: &[f32]) -> Result<Update> {
        let mut update = Update {
            kernel: if adam { "adam" } else { "sgd" },
            entries: Vec::new(),
            tables: None,
            scalars: CudaBuffer::from_slice(scalars)?,
            blocks: 0,
        };
        update.fit(entries)?;
        Ok(update)
    }

    /// Makes the tables those of `entries`, which they may be already.
    pub fn fit(&mut self, entries: &[Entry]) -> Result<()> {
        let wanted = table(entries);
        if bytemuck::cast_slice::<_, u8>(&wanted) == bytemuck::cast_slice::<_, u8>(&self.entries) {
            return Ok(());
        }
        let mut pieces = Vec::new();
        for (i, entry) in entries.iter().enumerate() {
            let count = entry.value.numel().div_ceil(PIECE);
            pieces.extend((0..count).flat_map(|piece| [i as i32, piece as i32]));
        }
        self.tables = Some(Arc::new(Tables {
            parameters: CudaBuffer::from_slice::<u8>(bytemuck::cast_slice(&wanted))?,
            pieces: CudaBuffer::from_slice::<u8>(bytemuck::cast_slice(&pieces))?,
        }));
        (self.entries, self.blocks) = (wanted, pieces.len() / 2);
        Ok(())
    }

    /// What a captured step reads, to be kept as long as it.
    pub fn tables(&self) -> Option<Arc<Tables>> {
        self.tables.clone()
    }

    /// Sets what changes from step to step. Not part of a captured graph.
    pub fn set_scalars(&self, scalars: &[f32]) -> Result<()> {
        self.scalars.upload(scalars)
    }

    /// Updates every parameter, unless `guard` `[]` is given and not finite.
    pub fn run(&self, guard: Option<&Tensor>) -> Result<()> {
        let Some(tables) = &self.tables else { return Ok(()) };
        let params = OptimParams {
            parameters: tables.parameters.address(),
            pieces: tables.pieces.address(),
            scalars: self.scalars.address(),
            guard: guard.map_or(0, address),
        };
        device().launch(Kernel(OPTIM, self.kernel), [self.blocks as u32, 1, 1], &params)
    }
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct ClipParams {
    squares: u64,
    clip: u64,
    norm: u64,
    max: f32,
    n: i32,
}

/// The factor that brings gradients with these sums of squares `[n]` to a norm of `max` at most, and the norm they have; `[1]`
/// each.
pub fn clip(squares: &Tensor, max: f32) -> Result<(Tensor, Tensor)> {
    let (factor, norm) = (empty(&[1], DType::F32)?, empty(&[1], DType::F32)?);
    let params = ClipParams {
        squares: address(squares),
        clip: address(&factor),
        norm: address(&norm),
        max,
        n: squares.numel() as i32,
    };
    let extents = Extents { grid: [1, 1, 1], threads: 32, shared: 0 };
    device().launch_with(Kernel(OPTIM, "clip_factor"), extents, &params)?;
    Ok((factor, norm))
}
