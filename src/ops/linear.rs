//! `y = x W^T + b`; `dx = dy W`, `dW = dy^T x`, `db` the column sums of `dy`.

use super::{require_f32, require_one_device, require_vector};
use crate::autograd::record;
use crate::cpu::gather::Gather;
use crate::cpu::gemm::{Epilogue, PackedB, multiply};
use crate::cpu::gemm_transposed::{Order, multiply_transposed};
use crate::cpu::{Isa, norm};
use crate::cuda::{
    self,
    gemm::{Layout, multiply as cuda_multiply},
};
use crate::error::{Error, Result};
use crate::tensor::{Device, Tensor};

/// A fully connected layer: `x` `[N, in]`, `weight` `[out, in]`, `bias` `[out]`; gives `[N, out]`.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    require_f32("linear", &[x, weight])?;
    require_one_device("linear", &[x, weight])?;
    let (n, inputs, outputs) = extents(x.dims(), weight.dims())?;
    if let Some(bias) = bias {
        require_vector("linear", bias, outputs)?;
    }
    let isa = Isa::current();
    let y = match x.device() {
        Device::Cpu => Tensor::build([n, outputs], |y: &mut [f32]| {
            let packed = PackedB::from_columns(isa, weight.as_slice(), inputs, outputs, inputs);
            multiply_packed(x, &packed, bias.map(|b| b.as_slice()), y)
        }),
        Device::Cuda => cuda_multiply(x, weight, Layout::Nt, bias)?,
    };
    let operands: Vec<&Tensor> = [x, weight].into_iter().chain(bias).collect();
    Ok(record("linear", y, &operands, |_| {
        let saved_x = weight.requires_grad().then(|| x.detach());
        let saved_weight = x.requires_grad().then(|| weight.detach());
        Box::new(move |dy, needs| {
            if dy.device() == Device::Cuda {
                let dx = saved_weight.map(|weight| cuda_multiply(&dy, &weight, Layout::Nn, None)).transpose()?;
                let dweight = saved_x.map(|x| cuda_multiply(&dy, &x, Layout::Tn, None)).transpose()?;
                let dbias = needs.get(2).map(|&needed| needed.then(|| cuda::norm::column_sums(&dy)).transpose());
                return Ok([dx, dweight].into_iter().chain(dbias.transpose()?).collect());
            }
            let dy = dy.as_slice::<f32>();
            let rows = Gather::matrix(n, outputs);
            let dx = saved_weight.map(|weight| {
                Tensor::build([n, inputs], |dx| {
                    let weight = weight.as_slice();
                    let packed = PackedB::from_rows(isa, weight, outputs, inputs, outputs, |row| row * inputs);
                    multiply(dy, &rows, &packed, dx, Epilogue::default())
                })
            });
            let dweight = saved_x.map(|x| {
                Tensor::build([outputs, inputs], |dw| {
                    multiply_transposed(isa, dy, &rows, x.as_slice(), inputs, dw, Order::RowMajor)
                })
            });
            let mut gradients = vec![dx, dweight];
            if let Some(&needed) = needs.get(2) {
                gradients.push(needed.then(|| Tensor::build([outputs], |db| norm::column_sums(dy, db))));
            }
            Ok(gradients)
        })
    }))
}

/// `N`, `IN` and `OUT` of a layer.
fn extents(x: &[usize], weight: &[usize]) -> Result<(usize, usize, usize)> {
    match (x, weight) {
        (&[n, i], &[o, wi]) if i == wi && i > 0 && o > 0 => Ok((n, i, o)),
        _ => Err(Error::shape("linear", "[N, IN] and [OUT, IN]", &[x, weight])),
    }
}

fn multiply_packed(x: &Tensor, packed: &PackedB, bias: Option<&[f32]>, y: &mut [f32]) {
    let rows = Gather::matrix(x.dims()[0], x.dims()[1]);
    multiply(x.as_slice(), &rows, packed, y, Epilogue { bias, ..Default::default() })
}

/// A layer's weight, packed for the CPU, and its bias.
pub struct PackedLinear {
    packed: PackedB,
    bias: Vec<f32>,
    /// `[OUT, IN]`.
    dims: [usize; 2],
}

impl PackedLinear {
    /// Of `weight` `[OUT, IN]` and `bias` `[OUT]`, both on the CPU.
    pub fn new(weight: &Tensor, bias: &Tensor) -> Result<Self> {
        require_f32("linear", &[weight])?;
        let &[outputs, inputs] = weight.dims() else {
            return Err(Error::shape("linear", "weights [OUT, IN]", &[weight.dims()]));
        };
        require_vector("linear", bias, outputs)?;
        let packed = PackedB::from_columns(Isa::current(), weight.as_slice(), inputs, outputs, inputs);
        Ok(PackedLinear { packed, bias: bias.to_vec(), dims: [outputs, inputs] })
    }
}

/// [`linear`], to the same bits, of `x` `[N, IN]` on the CPU. It is not recorded.
pub fn packed_linear(x: &Tensor, layer: &PackedLinear) -> Result<Tensor> {
    require_f32("linear", &[x])?;
    let (n, _, outputs) = extents(x.dims(), &layer.dims)?;
    Ok(Tensor::build([n, outputs], |y| multiply_packed(x, &layer.packed, Some(&layer.bias), y)))
}
