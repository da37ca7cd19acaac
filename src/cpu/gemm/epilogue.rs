//! What a product or a convolution does with its sums, and where it puts them.

use crate::cpu::float::Float;
use crate::cpu::simd::Simd;

/// What happens to a finished element of C: `relu(c + bias[column] + residual)`, the residual being what C holds if it accumulates.
#[derive(Clone, Copy)]
pub struct Epilogue<'a, T = f32> {
    /// One value for each column.
    pub bias: Option<&'a [f32]>,
    /// As C.
    pub residual: Option<&'a [T]>,
    /// Whether results are added to what C holds, in place of a residual.
    pub accumulate: bool,
    /// Whether negative results become zero.
    pub relu: bool,
}

impl<T> Epilogue<'_, T> {
    /// Results that are stored, or added to those that are there.
    pub fn adding(accumulate: bool) -> Self {
        Epilogue { accumulate, ..Self::default() }
    }
}

impl<T: Float> Epilogue<'_, T> {
    /// Panics unless it fits a result of `columns` columns and `values` values.
    pub(in crate::cpu) fn check(&self, columns: usize, values: usize) {
        assert!(self.bias.is_none_or(|bias| bias.len() == columns), "one bias a column");
        assert!(self.residual.is_none_or(|residual| residual.len() == values), "the residual is shaped as the result");
        assert!(!self.accumulate || self.residual.is_none(), "what is added is a residual or what is there");
    }

    /// Where what is added to C at `at` lies.
    ///
    /// # Safety
    /// `at` is within C and the residual.
    #[inline(always)]
    pub(super) unsafe fn added(&self, c: *mut T, at: usize) -> Option<*const T> {
        // SAFETY: the contract.
        unsafe {
            match self.residual {
                Some(residual) => Some(residual.as_ptr().add(at)),
                None => self.accumulate.then(|| c.add(at).cast_const()),
            }
        }
    }

    /// Finishes a vector of sums and stores it at `c[at..]`; `bias` is that of its columns.
    ///
    /// # Safety
    /// `c` is valid for reading and writing a vector at `at`, and the residual as long as `c`.
    #[inline(always)]
    pub(in crate::cpu) unsafe fn store<S: Simd>(&self, simd: S, sum: S::V, bias: Option<S::V>, c: *mut T, at: usize) {
        // SAFETY: the contract.
        unsafe {
            self.store_from(simd, sum, bias, self.added(c, at), c.add(at));
        }
    }

    /// [`Epilogue::store`] of two vectors, one after the other.
    ///
    /// # Safety
    /// As there, for both.
    #[inline(always)]
    pub(in crate::cpu) unsafe fn store_two<S: Simd>(
        &self,
        simd: S,
        sums: [S::V; 2],
        bias: [S::V; 2],
        c: *mut T,
        at: usize,
    ) {
        // SAFETY: the contract.
        unsafe {
            let added = self.added(c, at);
            let first = self.finished(simd, sums[0], Some(bias[0]), added);
            let second = self.finished(simd, sums[1], Some(bias[1]), added.map(|added| added.add(S::LANES)));
            T::store_two(simd, c.add(at), [first, second]);
        }
    }

    /// [`Epilogue::store`] at `c`, with the residual's values from `residual` on, if there is one.
    ///
    /// # Safety
    /// `c` is valid for writing a vector, `residual` for reading one.
    #[inline(always)]
    pub(super) unsafe fn store_from<S: Simd>(
        &self,
        simd: S,
        sum: S::V,
        bias: Option<S::V>,
        residual: Option<*const T>,
        c: *mut T,
    ) {
        // SAFETY: the contract.
        unsafe { T::store(simd, c, self.finished(simd, sum, bias, residual)) };
    }

    /// What is stored.
    ///
    /// # Safety
    /// `residual` is valid for reading a vector.
    #[inline(always)]
    unsafe fn finished<S: Simd>(&self, simd: S, mut sum: S::V, bias: Option<S::V>, residual: Option<*const T>) -> S::V {
        // SAFETY: the contract.
        unsafe {
            if let Some(bias) = bias {
                sum = simd.add(sum, bias);
            }
            if let Some(residual) = residual {
                sum = simd.add(sum, T::load(simd, residual));
            }
            if self.relu {
                sum = simd.relu(sum);
            }
        }
        sum
    }
}

impl<T> Default for Epilogue<'_, T> {
    fn default() -> Self {
        Epilogue { bias: None, residual: None, accumulate: false, relu: false }
    }
}

/// The result, shared by tasks that write disjoint parts of it.
pub(in crate::cpu) struct Output<T>(*mut T);
// SAFETY: each task of a product or a convolution writes its own rows and panels alone.
unsafe impl<T> Sync for Output<T> {}

impl<T> Output<T> {
    /// The tasks must be over before `result` is used again.
    pub(in crate::cpu) fn new(result: &mut [T]) -> Self {
        Output(result.as_mut_ptr())
    }

    pub(in crate::cpu) fn pointer(&self) -> *mut T {
        self.0
    }
}
