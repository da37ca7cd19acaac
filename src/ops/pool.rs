//! Max pooling and global average pooling.

use super::require_float;
use crate::autograd::record;
use crate::cpu::pool::PoolShape;
use crate::error::{Error, Result};
use crate::tensor::{Device, Tensor, with_float};
use crate::{cpu, cuda};

/// The maximum of every `kernel` by `kernel` window of `x` `[N, H, W, C]`, `stride` apart; padding is never the maximum.
/// The gradient goes to the first of equal maxima, as in PyTorch.
pub fn max_pool2d(x: &Tensor, kernel: usize, stride: usize, padding: usize) -> Result<Tensor> {
    require_float("max_pool2d", &[x])?;
    let shape = pool_shape(x.dims(), kernel, stride, padding)?;
    let PoolShape { n, h, w, c, .. } = shape;
    let [oh, ow] = shape.output();
    let dims = [n, oh, ow, c];
    let (y, places) = match x.device() {
        // What needs no gradient needs no places.
        Device::Cpu if !x.requires_grad() => {
            let y = with_float!(x.dtype(), T => {
                Tensor::build(dims, |y| cpu::pool::max_pool::<T>(x.as_slice(), &shape, y))
            });
            return Ok(y);
        }
        Device::Cpu => {
            let mut y = None;
            let places = Tensor::build(dims, |places| {
                y = Some(with_float!(x.dtype(), T => {
                    Tensor::build(dims, |y| cpu::pool::signed_max_pool::<T>(x.as_slice(), &vec![1.0; shape.c], &shape, y, places))
                }));
            });
            (y.expect("just built"), places)
        }
        Device::Cuda => cuda::pool::max_pool(x, &shape)?,
    };
    Ok(record("max_pool2d", y, &[x], |_| {
        Box::new(move |dy, _| {
            Ok(vec![Some(match dy.device() {
                Device::Cpu => with_float!(dy.dtype(), T => Tensor::build([n, h, w, c], |dx| {
                    cpu::pool::max_pool_backward::<T>(dy.as_slice(), places.as_slice(), &shape, dx)
                })),
                Device::Cuda => cuda::pool::max_pool_backward(&dy, &places, &shape)?,
            })])
        })
    }))
}

/// The extents of a max pooling of `dims`, or why there is none.
pub(super) fn pool_shape(dims: &[usize], kernel: usize, stride: usize, padding: usize) -> Result<PoolShape> {
    let &[n, h, w, c] = dims else {
        return Err(Error::shape("max_pool2d", "[N, H, W, C]", &[dims]));
    };
    // Places in a window are kept as bytes, and 255 is taken.
    if kernel == 0 || kernel > 15 || stride == 0 || padding > kernel / 2 {
        let problem = format!(
            "kernel {kernel}, stride {stride}, padding {padding}: expected a kernel of 1 to 15, a positive stride, padding \
             of at most half the kernel"
        );
        return Err(Error::Argument { op: "max_pool2d", problem });
    }
    if h + 2 * padding < kernel || w + 2 * padding < kernel || h * w * c == 0 {
        return Err(Error::shape("max_pool2d", format!("at least one window of {kernel}x{kernel}"), &[dims]));
    }
    Ok(PoolShape { n, h, w, c, kernel, stride, padding })
}

/// The mean over the pixels of each image and channel: `[N, H, W, C]` to `[N, C]`, F32.
pub fn global_avg_pool(x: &Tensor) -> Result<Tensor> {
    require_float("global_avg_pool", &[x])?;
    let (n, h, w, c) = match *x.dims() {
        [n, h, w, c] if h * w * c > 0 => (n, h, w, c),
        _ => return Err(Error::shape("global_avg_pool", "[N, H, W, C] with at least a pixel", &[x.dims()])),
    };
    let y = match x.device() {
        Device::Cpu => with_float!(x.dtype(), T => {
            Tensor::build([n, c], |y| cpu::pool::global_average::<T>(x.as_slice(), h * w, c, y))
        }),
        Device::Cuda => cuda::pool::average_pool(x)?,
    };
    let dtype = x.dtype();
    Ok(record("global_avg_pool", y, &[x], |_| {
        Box::new(move |dy, _| {
            Ok(vec![Some(match dy.device() {
                Device::Cpu => with_float!(dtype, T => Tensor::build([n, h, w, c], |dx| {
                    cpu::pool::global_average_backward::<T>(dy.as_slice(), h * w, c, dx)
                })),
                Device::Cuda => cuda::pool::average_pool_backward(&dy, &[n, h, w, c], dtype)?,
            })])
        })
    }))
}
