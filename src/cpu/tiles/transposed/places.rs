//! Sums of blocks, put in order and in their places in the gradient.

use super::super::super::simd::Simd;
use super::super::amx::TILE;
use super::super::{HALF, Sums};

/// Where sums go.
pub(super) struct Places {
    /// Whether they are the first, or are added to what is there.
    pub(super) first: bool,
    /// Whether those of a column are in order, not the even ones first.
    pub(super) in_order: bool,
    pub(super) columns: usize,
    /// Values from one column to the next.
    pub(super) row: usize,
    pub(super) sums: *mut f32,
}

/// Rows of a block, of a column each, that are not in their places.
pub(super) struct Unfinished {
    pub(super) row: usize,
    /// The block's 32 columns.
    pub(super) group: usize,
    /// Where in its columns it begins.
    pub(super) at: usize,
}

impl Default for Unfinished {
    fn default() -> Self {
        Unfinished { row: TILE, group: 0, at: 0 }
    }
}

impl Unfinished {
    /// Puts some rows of a block, whose sums are those of 32 columns, the even ones first, and a step, in their places, as far as there are.
    ///
    /// # Safety
    /// The places are valid, and nobody else's.
    #[inline(always)]
    pub(super) unsafe fn finish<S: Simd>(&mut self, simd: S, block: &Sums, places: &Places, rows: usize) {
        let end = TILE.min(self.row + rows);
        for row in std::mem::replace(&mut self.row, end)..end {
            let column = self.group * TILE + row % HALF * 2 + row / HALF;
            if column >= places.columns {
                continue;
            }
            let halves = block.0[row].as_ptr();
            for i in (0..HALF).step_by(S::LANES) {
                // SAFETY: a vector from `i` on is in either half, and two from `2 i` on in both; the contract.
                unsafe {
                    let mut sums = match places.in_order {
                        true => [0, S::LANES].map(|lane| simd.load(halves.add(2 * i + lane))),
                        false => simd.interleave(simd.load(halves.add(i)), simd.load(halves.add(HALF + i))),
                    };
                    let to = places.sums.add(column * places.row + self.at + 2 * i);
                    if !places.first {
                        sums = [simd.add(simd.load(to), sums[0]), simd.add(simd.load(to.add(S::LANES)), sums[1])];
                    }
                    simd.store(to, sums[0]);
                    simd.store(to.add(S::LANES), sums[1]);
                }
            }
        }
    }
}
