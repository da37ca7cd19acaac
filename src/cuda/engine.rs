//! What computes a tile of a product.

use super::Context;
use crate::tensor::DType;

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
    pub(super) fn depth(self, dtype: DType) -> usize {
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

    pub(super) fn index(self, dtype: DType) -> usize {
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
