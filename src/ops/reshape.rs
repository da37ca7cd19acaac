//! The same elements in the same order under another shape.

use crate::autograd::record;
use crate::error::{Error, Result};
use crate::tensor::{Shape, Tensor};

/// `x` with the extents `shape`, which must hold as many elements. Nothing is copied.
pub fn reshape(x: &Tensor, shape: impl Into<Shape>) -> Result<Tensor> {
    let shape = shape.into();
    if shape.numel() != x.numel() {
        return Err(Error::shape("reshape", format!("as many elements as {shape:?}"), &[x.dims()]));
    }
    Ok(record("reshape", x.with_shape(shape), &[x], |_| {
        let original = x.shape().clone();
        Box::new(move |dy, _| Ok(vec![Some(dy.with_shape(original))]))
    }))
}
