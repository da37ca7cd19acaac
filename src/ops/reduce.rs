//! Sum and mean over all elements, and multiplication by a constant.

use super::{require_f32, require_float};
use crate::autograd::record;
use crate::error::{Error, Result};
use crate::tensor::{DType, Device, Tensor, with_float};
use crate::{cpu, cuda};

/// The sum of all elements, a scalar. Accumulated in f64.
pub fn sum(x: &Tensor) -> Result<Tensor> {
    require_f32("sum", &[x])?;
    reduce("sum", x, 1.0)
}

/// The mean of all elements, a scalar. Accumulated in f64.
pub fn mean(x: &Tensor) -> Result<Tensor> {
    require_f32("mean", &[x])?;
    if x.numel() == 0 {
        return Err(Error::shape("mean", "at least one element", &[x.dims()]));
    }
    reduce("mean", x, 1.0 / x.numel() as f64)
}

fn reduce(op: &'static str, x: &Tensor, factor: f64) -> Result<Tensor> {
    let y = match x.device() {
        Device::Cpu => Tensor::full([], (cpu::elementwise::sum(x.as_slice()) * factor) as f32),
        Device::Cuda => cuda::elementwise::sum(x, false, factor as f32)?,
    };
    Ok(record(op, y, &[x], |_| {
        let shape = x.shape().clone();
        Box::new(move |dy, _| {
            Ok(vec![Some(match dy.device() {
                Device::Cpu => Tensor::full(shape, dy.item()? * factor as f32),
                Device::Cuda => cuda::elementwise::fill(&shape, DType::F32, factor as f32, Some(&dy))?,
            })])
        })
    }))
}

/// `factor * x`.
pub fn scale(x: &Tensor, factor: f32) -> Result<Tensor> {
    require_float("scale", &[x])?;
    let y = match x.device() {
        Device::Cpu => {
            with_float!(x.dtype(), T => x.detach().map_in_place(|x| cpu::elementwise::scale::<T>(x, factor)))
        }
        Device::Cuda => cuda::elementwise::scale(x, factor, None)?,
    };
    Ok(record("scale", y, &[x], |_| {
        Box::new(move |dy, _| {
            Ok(vec![Some(match dy.device() {
                Device::Cpu => {
                    with_float!(dy.dtype(), T => dy.map_in_place(|dy| cpu::elementwise::scale::<T>(dy, factor)))
                }
                Device::Cuda => cuda::elementwise::scale(&dy, factor, None)?,
            })])
        })
    }))
}
