//! Pictures on the device: bytes to normalised activations.

use super::CudaBuffer;
use super::launch::{Kernel, address, device, empty, typed};
use super::source::IMAGE;
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};
use bytemuck::{Pod, Zeroable};

/// The part of a picture that is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Crop {
    /// First row.
    pub top: usize,
    /// First column.
    pub left: usize,
    /// Whether left and right are exchanged.
    pub mirrored: bool,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct NormaliseImageParams {
    x: u64,
    crops: u64,
    y: u64,
    images: i32,
    source_h: i32,
    source_w: i32,
    h: i32,
    w: i32,
    mean: [f32; 3],
    deviation: [f32; 3],
    unused: i32,
}

/// `(x / 255 - mean) / deviation` of `pictures` `[N, H, W, 3]` (U8, on the device), cropped to `size` (rows, columns): from the
/// upper left corner, or as `crops` says for each picture. In the type `dtype`.
pub fn normalise(
    pictures: &Tensor,
    crops: Option<&[Crop]>,
    size: [usize; 2],
    mean: [f32; 3],
    deviation: [f32; 3],
    dtype: DType,
) -> Result<Tensor> {
    let (&[n, h, w, 3], DType::U8) = (pictures.dims(), pictures.dtype()) else {
        return Err(Error::shape("normalise_image", "U8 pictures [N, H, W, 3]", &[pictures.dims()]));
    };
    let given = crops.unwrap_or(&[]);
    let fits = |crop: &Crop| crop.top + size[0] <= h && crop.left + size[1] <= w;
    if !fits(&Crop::default()) || !given.iter().all(fits) || crops.is_some_and(|crops| crops.len() != n) {
        return Err(Error::shape("normalise_image", "a crop inside the picture for each", &[pictures.dims(), &size]));
    }
    let table: Vec<u8> = given
        .iter()
        .flat_map(|crop| [crop.top as i32, crop.left as i32, crop.mirrored.into(), 0])
        .flat_map(i32::to_ne_bytes)
        .collect();
    let table = crops.map(|_| CudaBuffer::from_slice(&table)).transpose()?;
    let y = empty(&[n, size[0], size[1], 3], dtype)?;
    let params = NormaliseImageParams {
        x: address(pictures),
        crops: table.as_ref().map_or(0, CudaBuffer::address),
        y: address(&y),
        images: n as i32,
        source_h: h as i32,
        source_w: w as i32,
        h: size[0] as i32,
        w: size[1] as i32,
        mean,
        deviation,
        unused: 0,
    };
    let kernel = Kernel(IMAGE, typed(dtype, "normalise_image_f32", "normalise_image_bf16"));
    device().launch_over(kernel, y.numel() / 3, &params)?;
    Ok(y)
}
