//! `C = A B`; `dA = dC B^T`, `dB = A^T dC`.

use super::{require_f32, require_one_device};
use crate::autograd::record;
use crate::cpu::Isa;
use crate::cpu::gather::Gather;
use crate::cpu::gemm::{Epilogue, PackedB, multiply};
use crate::cpu::gemm_transposed::{Order, multiply_transposed};
use crate::cuda::gemm::{Layout, multiply as cuda_multiply};
use crate::error::{Error, Result};
use crate::tensor::{Device, Tensor};

/// The product of `a` `[M, K]` and `b` `[K, N]`, `[M, N]`.
pub fn matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    require_f32("matmul", &[a, b])?;
    require_one_device("matmul", &[a, b])?;
    let (m, k, n) = match (a.dims(), b.dims()) {
        (&[m, k], &[kb, n]) if k == kb && k > 0 => (m, k, n),
        _ => return Err(Error::shape("matmul", "[M, K] and [K, N]", &[a.dims(), b.dims()])),
    };
    let isa = Isa::current();
    let c = match a.device() {
        Device::Cpu => Tensor::build([m, n], |c: &mut [f32]| {
            let packed = PackedB::from_rows(isa, b.as_slice(), k, n, k, |row| row * n);
            multiply(a.as_slice(), &Gather::matrix(m, k), &packed, c, Epilogue::default())
        }),
        Device::Cuda => cuda_multiply(a, b, Layout::Nn, None)?,
    };
    Ok(record("matmul", c, &[a, b], |_| {
        let saved_a = b.requires_grad().then(|| a.detach());
        let saved_b = a.requires_grad().then(|| b.detach());
        Box::new(move |dc, _| {
            if dc.device() == Device::Cuda {
                let da = saved_b.map(|b| cuda_multiply(&dc, &b, Layout::Nt, None)).transpose()?;
                let db = saved_a.map(|a| cuda_multiply(&a, &dc, Layout::Tn, None)).transpose()?;
                return Ok(vec![da, db]);
            }
            let dc = dc.as_slice::<f32>();
            let da = saved_b.map(|b| {
                Tensor::build([m, k], |da| {
                    let packed = PackedB::from_columns(isa, b.as_slice(), n, k, n);
                    multiply(dc, &Gather::matrix(m, n), &packed, da, Epilogue::default())
                })
            });
            let db = saved_a.map(|a| {
                Tensor::build([k, n], |db| {
                    multiply_transposed(isa, a.as_slice(), &Gather::matrix(m, k), dc, n, db, Order::RowMajor)
                })
            });
            Ok(vec![da, db])
        })
    }))
}
