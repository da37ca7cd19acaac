//! The micro-kernel: a tile of sums in registers.

use super::Epilogue;
use super::ahead::Ahead;
use crate::cpu::float::Float;
use crate::cpu::simd::Simd;

/// Rows of a micro-kernel's tile; six pointers and the loop's own fit x86-64's general registers.
pub(in crate::cpu) const TILE_ROWS: usize = 6;

/// One call of the micro-kernel: up to [`TILE_ROWS`] rows of C, one panel, one block of depth.
pub(in crate::cpu) struct Tile<'a, T, A> {
    /// For each run, where each of the rows has it; past the last row anything readable.
    pub(in crate::cpu) runs: &'a [[*const f32; TILE_ROWS]],
    pub(in crate::cpu) words: usize,
    /// The first word of a run.
    pub(in crate::cpu) first: usize,
    pub(in crate::cpu) b: *const f32,
    pub(in crate::cpu) c: *mut T,
    pub(in crate::cpu) targets: &'a [usize; TILE_ROWS],
    pub(in crate::cpu) rows: usize,
    pub(in crate::cpu) column: usize,
    pub(in crate::cpu) columns: usize,
    /// Sums to go on from, a full tile of them.
    pub(in crate::cpu) before: Option<*mut f32>,
    /// Where sums are left for the next block of depth; after the last one the result goes to `c`.
    pub(in crate::cpu) after: Option<*mut f32>,
    pub(in crate::cpu) epilogue: Epilogue<'a, T>,
    pub(in crate::cpu) ahead: A,
}

impl<'a, T: Float, A: Ahead> Tile<'a, T, A> {
    /// A tile that goes through all `words` of a run and leaves its sums.
    #[inline(always)]
    pub(in crate::cpu) fn of_sums(
        runs: &'a [[*const f32; TILE_ROWS]],
        words: usize,
        b: &[T],
        [rows, columns]: [usize; 2],
        sums: *mut f32,
        ahead: A,
    ) -> Self {
        Tile {
            runs,
            words,
            first: 0,
            b: b.as_ptr().cast(),
            c: std::ptr::null_mut(),
            targets: &[0; TILE_ROWS],
            rows,
            column: 0,
            columns,
            before: None,
            after: Some(sums),
            epilogue: Epilogue::default(),
            ahead,
        }
    }

    /// Chooses the kernel for the rows and the vectors that the columns need.
    ///
    /// # Safety
    /// As for [`Tile::micro_kernel`].
    #[inline(always)]
    pub(in crate::cpu) unsafe fn compute<S: Simd>(&self, simd: S) {
        // SAFETY: passed on.
        unsafe {
            match self.rows {
                ..=2 => self.compute_rows::<S, 2>(simd),
                3..=4 => self.compute_rows::<S, 4>(simd),
                _ => self.compute_rows::<S, TILE_ROWS>(simd),
            }
        }
    }

    /// # Safety
    /// As for [`Tile::micro_kernel`].
    #[inline(always)]
    unsafe fn compute_rows<S: Simd, const R: usize>(&self, simd: S) {
        // SAFETY: passed on; every narrower kernel reads the same rows of B and fewer of their columns.
        unsafe {
            match self.columns.div_ceil(S::LANES) {
                1 => self.micro_kernel::<S, R, 1>(simd),
                2 => self.micro_kernel::<S, R, 2>(simd),
                3 => self.micro_kernel::<S, R, 3>(simd),
                _ => self.micro_kernel::<S, R, 4>(simd),
            }
        }
    }

    /// # Safety
    /// Each pointer of `runs` is readable for `words` words of any alignment from `first` on, `b` for as many rows of
    /// the full tile's width, `before` and `after` for a full tile, and `targets + column` for `columns` values of `c`, which
    /// nothing else touches meanwhile.
    #[inline(always)]
    unsafe fn micro_kernel<S: Simd, const R: usize, const V: usize>(&self, simd: S) {
        let width = S::LANES * S::VECTORS;
        let mut sums = [[simd.splat(0.0); V]; R];
        if let Some(before) = self.before {
            for (r, sums) in sums.iter_mut().enumerate() {
                for (v, sum) in sums.iter_mut().enumerate() {
                    // SAFETY: a full tile of sums.
                    *sum = unsafe { simd.load(before.add(r * width + v * S::LANES)) };
                }
            }
        }
        let (mut b, mut ahead) = (self.b, self.ahead);
        for pointers in self.runs {
            let pointers = *pointers;
            let (mut at, end) = (self.first, self.first + self.words);
            while at < end {
                ahead.ask(simd);
                // SAFETY: the contract above.
                let b_row: [S::V; V] = std::array::from_fn(|v| unsafe { simd.load(b.add(v * S::LANES)) });
                for r in 0..R {
                    // SAFETY: the contract above.
                    let a = simd.splat(unsafe { pointers[r].add(at).read_unaligned() });
                    for v in 0..V {
                        sums[r][v] = T::multiply_words(simd, a, b_row[v], sums[r][v]);
                    }
                }
                // SAFETY: one row further within B, or one past its end.
                b = unsafe { b.add(width) };
                at += 1;
            }
        }
        // Through memory, so that nothing below asks for a register by its number: the sums would not be kept in registers
        // above either.
        let mut room = std::mem::MaybeUninit::<[f32; TILE_ROWS * 64]>::uninit();
        let after = self.after.unwrap_or(room.as_mut_ptr().cast());
        for (r, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                // SAFETY: a full tile of sums, or the room for the widest.
                unsafe { simd.store(after.add(r * width + v * S::LANES), *sum) };
            }
        }
        if self.after.is_some() {
            return;
        }
        for (r, target) in self.targets.iter().enumerate().take(self.rows) {
            let at = target + self.column;
            // SAFETY: the row's `V` vectors have just been stored, here as there is no other place for them.
            let sums = unsafe { std::slice::from_raw_parts(after.add(r * width), V * S::LANES) };
            // SAFETY: `columns` values from there are ours; the residual is as long as C; the buffers hold the widest tile.
            unsafe {
                let residual = self.epilogue.added(self.c, at);
                if self.columns == V * S::LANES {
                    self.finish::<S, V>(simd, sums, self.c.add(at), residual);
                    continue;
                }
                // A last panel that does not fill its vectors goes through buffers that do.
                let (mut c_row, mut residual_row) = ([T::default(); 64], [T::default(); 64]);
                let residual = residual.map(|residual| {
                    std::ptr::copy_nonoverlapping(residual, residual_row.as_mut_ptr(), self.columns);
                    residual_row.as_ptr()
                });
                self.finish::<S, V>(simd, sums, c_row.as_mut_ptr(), residual);
                std::ptr::copy_nonoverlapping(c_row.as_ptr(), self.c.add(at), self.columns);
            }
        }
    }

    /// Applies the epilogue to a row of the tile and stores it.
    ///
    /// # Safety
    /// `c` and `residual` are valid for `V * LANES` values.
    #[inline(always)]
    unsafe fn finish<S: Simd, const V: usize>(&self, simd: S, sums: &[f32], c: *mut T, residual: Option<*const T>) {
        for at in (0..V * S::LANES).step_by(S::LANES) {
            // SAFETY: the contract above; a bias has as many values as C has columns.
            unsafe {
                let sum = simd.load(sums[at..at + S::LANES].as_ptr());
                let bias = self.epilogue.bias.map(|bias| load_bias(simd, &bias[self.column..], at));
                self.epilogue.store_from(simd, sum, bias, residual.map(|residual| residual.add(at)), c.add(at));
            }
        }
    }
}

/// A vector of `bias` from `at` on, zero past its end.
#[inline(always)]
fn load_bias<S: Simd>(simd: S, bias: &[f32], at: usize) -> S::V {
    let rest = &bias[at.min(bias.len())..];
    if rest.len() >= S::LANES {
        // SAFETY: just checked.
        return unsafe { simd.load(rest.as_ptr()) };
    }
    let mut padded = [0.0; 64];
    padded[..rest.len()].copy_from_slice(rest);
    // SAFETY: 64 floats are at least a vector.
    unsafe { simd.load(padded.as_ptr()) }
}
