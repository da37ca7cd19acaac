//! `y = max(x, 0)`; the gradient passes where the output is positive.

use super::require_float;
use crate::autograd::record;
use crate::error::Result;
use crate::tensor::{Device, Tensor, with_float};
use crate::{cpu, cuda};

/// The rectifier. NaN stays NaN.
pub fn relu(x: &Tensor) -> Result<Tensor> {
    require_float("relu", &[x])?;
    let y = match x.device() {
        Device::Cpu => with_float!(x.dtype(), T => {
            Tensor::build(x.shape().clone(), |y| cpu::elementwise::relu::<T>(x.as_slice(), y))
        }),
        Device::Cuda => cuda::elementwise::relu(x)?,
    };
    // The rule keeps the output, which the next layer keeps as well, rather than the input, which nobody else needs.
    Ok(record("relu", y, &[x], |y| {
        let y = y.clone();
        Box::new(move |dy, _| {
            Ok(vec![Some(match dy.device() {
                Device::Cpu => with_float!(dy.dtype(), T => {
                    dy.map_in_place(|dy| cpu::elementwise::relu_backward::<T>(y.as_slice(), dy))
                }),
                Device::Cuda => cuda::elementwise::relu_backward(&y, &dy)?,
            })])
        })
    }))
}
