//! Matrix products on the device, and the rungs of the ladder for those who measure it.

use super::backend::Extents;
use super::engine::{Engine, Tile};
use super::launch::{Kernel, address, address_or_null, device, empty, pack};
use super::source::GEMM;
use crate::error::Result;
use crate::tensor::{DType, Tensor};
use bytemuck::{Pod, Zeroable};

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct GemmParams {
    a: u64,
    b: u64,
    bias: u64,
    c: u64,
    m: i32,
    n: i32,
    k: i32,
    a_transposed: i32,
    b_transposed: i32,
    packed_a: i32,
    packed_b: i32,
    unused: i32,
}

/// How the operands lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// A `[M, K]`, B `[K, N]`.
    Nn,
    /// A `[M, K]`, B `[N, K]`.
    Nt,
    /// A `[K, M]`, B `[K, N]`.
    Tn,
}

/// A kernel of the ladder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rung {
    /// A thread an element.
    Plain,
    /// Tiles of 32 x 32 in shared memory.
    Tiled,
    /// 4 x 4 sums a thread, tiles of 64 x 64.
    Registers4,
    /// 8 x 8 sums a thread, tiles of 128 x 128.
    Registers8,
    /// Tensor cores: TF32 for f32, bf16 for bf16.
    TensorCores,
}

/// `A B + bias` in f32, by the best kernel for it. `bias` is `[N]`.
pub fn multiply(a: &Tensor, b: &Tensor, layout: Layout, bias: Option<&Tensor>) -> Result<Tensor> {
    let ([m, n, k], dtype) = (extents(a, b, layout), a.dtype());
    let aligned = [pitch(a), pitch(b)].iter().all(|p| p % pack(dtype) == 0);
    let rung = match Engine::choose(device(), dtype, aligned && k > 0, m, n) {
        Engine::Mma(_) => Rung::TensorCores,
        Engine::Simt(Tile::Large) => Rung::Registers8,
        Engine::Simt(_) => Rung::Registers4,
    };
    run(rung, a, b, layout, bias)
}

fn pitch(x: &Tensor) -> usize {
    x.dims()[1]
}

fn extents(a: &Tensor, b: &Tensor, layout: Layout) -> [usize; 3] {
    let (&[a0, a1], &[b0, b1]) = (a.dims(), b.dims()) else { unreachable!("products of matrices") };
    match layout {
        Layout::Nn => [a0, b1, a1],
        Layout::Nt => [a0, b0, a1],
        Layout::Tn => [a1, b1, a0],
    }
}

/// `A B + bias` by the kernel of a rung. Tensor cores need rows of whole 16-byte packs in both operands.
pub fn run(rung: Rung, a: &Tensor, b: &Tensor, layout: Layout, bias: Option<&Tensor>) -> Result<Tensor> {
    let ([m, n, k], dtype) = (extents(a, b, layout), a.dtype());
    let c = empty(&[m, n], DType::F32)?;
    let params = GemmParams {
        a: address(a),
        b: address(b),
        bias: address_or_null(bias),
        c: address(&c),
        m: m as i32,
        n: n as i32,
        k: k as i32,
        a_transposed: (layout == Layout::Tn).into(),
        b_transposed: (layout == Layout::Nt).into(),
        packed_a: pitch(a).is_multiple_of(4).into(),
        packed_b: pitch(b).is_multiple_of(4).into(),
        unused: 0,
    };
    let of = |names: [&'static str; 3]| names[layout as usize];
    let blocks = |[rows, columns]: [usize; 2]| [m.div_ceil(rows) as u32, n.div_ceil(columns) as u32, 1];
    // The plain rungs have columns along x.
    let plain = |tile: usize| [n.div_ceil(tile) as u32, m.div_ceil(tile) as u32, 1];
    let (name, grid, threads, shared) = match (rung, dtype) {
        (Rung::Plain, _) => ("gemm_plain", plain(16), 256, 0),
        (Rung::Tiled, _) => ("gemm_tiled", plain(32), 1024, 0),
        (Rung::Registers4, _) => {
            let engine = Engine::Simt(Tile::Small);
            let name = of(["gemm_f32_64x64_nn", "gemm_f32_64x64_nt", "gemm_f32_64x64_tn"]);
            (name, blocks(engine.tile()), 256, engine.shared(dtype))
        }
        (Rung::Registers8, _) => {
            let engine = Engine::Simt(Tile::Large);
            let name = of(["gemm_f32_128x128_nn", "gemm_f32_128x128_nt", "gemm_f32_128x128_tn"]);
            (name, blocks(engine.tile()), 256, engine.shared(dtype))
        }
        (Rung::TensorCores, dtype) => {
            let engine = Engine::Mma(Tile::Large);
            let name = match dtype {
                DType::BF16 => of(["gemm_bf16_128x128_nn", "gemm_bf16_128x128_nt", "gemm_bf16_128x128_tn"]),
                _ => of(["gemm_tf32_128x128_nn", "gemm_tf32_128x128_nt", "gemm_tf32_128x128_tn"]),
            };
            (name, blocks(engine.tile()), 256, engine.shared(dtype))
        }
    };
    device().launch_with(Kernel(GEMM, name), Extents { grid, threads, shared }, &params)?;
    Ok(c)
}
