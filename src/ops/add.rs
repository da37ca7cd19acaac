//! `c = a + b`; the gradient goes to both unchanged.

use super::{require_float, require_one_device};
use crate::autograd::record;
use crate::error::{Error, Result};
use crate::tensor::{Device, Tensor, with_float};
use crate::{cpu, cuda};

/// The elementwise sum of two tensors of one shape.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    require_float("add", &[a, b])?;
    require_one_device("add", &[a, b])?;
    if a.dims() != b.dims() {
        return Err(Error::shape("add", "two tensors of one shape", &[a.dims(), b.dims()]));
    }
    let c = match a.device() {
        Device::Cpu => with_float!(a.dtype(), T => {
            Tensor::build(a.shape().clone(), |c| cpu::elementwise::add::<T>(a.as_slice(), b.as_slice(), c))
        }),
        Device::Cuda => cuda::elementwise::add(a, b)?,
    };
    Ok(record("add", c, &[a, b], |_| Box::new(|dc, _| Ok(vec![Some(dc.clone()), Some(dc)]))))
}
