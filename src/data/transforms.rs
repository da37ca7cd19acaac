//! From a decoded picture to the network's input, pixel for pixel as torchvision does on PIL images.

use super::decode::{Pixels, decode};
use crate::error::{Error, Result};
use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The network's usual input and the short side it is cropped from; other sizes keep their ratio.
const CROP: u32 = 224;
const RESIZE: u32 = 256;

/// Resize of the short side, centre crop, scaling to `[0, 1]`, normalisation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Preprocess {
    /// Short side after the resize, in pixels.
    pub resize: u32,
    /// Side of the crop, in pixels.
    pub crop: u32,
    /// Subtracted from red, green and blue.
    pub mean: [f32; 3],
    /// What they are divided by then.
    pub std: [f32; 3],
    /// Whether pictures are turned as their EXIF data says.
    pub exif: bool,
}

/// A stretch of the resized picture along one axis, and where in the crop it goes.
struct Window {
    start: u32,
    len: u32,
    target: u32,
}

impl Preprocess {
    /// ImageNet's mean and deviation; the short side is resized to `image_size * 256 / 224`, rounded.
    pub fn imagenet(image_size: u32) -> Self {
        Preprocess {
            resize: ((u64::from(image_size) * u64::from(RESIZE) + u64::from(CROP) / 2) / u64::from(CROP)) as u32,
            crop: image_size,
            mean: [0.485, 0.456, 0.406],
            std: [0.229, 0.224, 0.225],
            exif: false,
        }
    }

    /// Width and height after the resize: the short side is `resize`, the other is cut down to a whole number.
    pub fn resized_size(&self, width: u32, height: u32) -> (u64, u64) {
        let short = width.min(height);
        let other = |long: u32| (u64::from(self.resize) * u64::from(long)) / u64::from(short.max(1));
        let resize = u64::from(self.resize);
        if width <= height { (resize, other(height)) } else { (other(width), resize) }
    }

    /// Decodes and preprocesses a file: `[crop, crop, 3]`.
    pub fn load(&self, path: &Path) -> Result<Vec<u8>> {
        self.apply(&decode(path, self.exif)?).map_err(|problem| Error::file(path, problem, "replace or remove it"))
    }

    /// Antialiased bilinear resize, as Pillow's, then centre crop: `[crop, crop, 3]`. A picture that is smaller than the
    /// crop after the resize is padded with black, as torchvision does.
    pub fn apply(&self, picture: &Pixels) -> std::result::Result<Vec<u8>, String> {
        let (width, height) = self.resized_size(picture.width, picture.height);
        let (x, y) = (self.window(width), self.window(height));
        let region =
            self.resize_region(picture, [width, height], &x, &y).map_err(|e| format!("cannot resize it ({e})"))?;
        let crop = self.crop as usize;
        if (x.len, y.len) == (self.crop, self.crop) {
            return Ok(region);
        }
        let mut out = vec![0; crop * crop * 3];
        for (row, pixels) in region.chunks_exact(x.len as usize * 3).enumerate() {
            let at = ((y.target as usize + row) * crop + x.target as usize) * 3;
            out[at..][..pixels.len()].copy_from_slice(pixels);
        }
        Ok(out)
    }

    /// Resizes the part `[left, top, width, height]` of a picture to `[crop, crop, 3]`.
    pub(super) fn resize_part(&self, picture: &Pixels, part: [u32; 4]) -> std::result::Result<Vec<u8>, String> {
        resize(picture, part.map(f64::from), [self.crop; 2]).map_err(|e| format!("cannot resize it ({e})"))
    }

    /// The part of an axis of the resized picture that the crop keeps.
    fn window(&self, extent: u64) -> Window {
        let crop = u64::from(self.crop);
        if extent < crop {
            return Window { start: 0, len: extent as u32, target: ((crop - extent) / 2) as u32 };
        }
        // Python's round: halves go to the even neighbour.
        let start = ((extent - crop) as f64 / 2.0).round_ties_even();
        Window { start: start as u32, len: self.crop, target: 0 }
    }

    /// Computes just the pixels of the windows: the rest of a resized panorama is neither computed nor stored. Filters
    /// reach beyond the windows where the picture does, so the pixels are those of the whole.
    fn resize_region(
        &self,
        picture: &Pixels,
        [width, height]: [u64; 2],
        x: &Window,
        y: &Window,
    ) -> std::result::Result<Vec<u8>, Box<dyn std::error::Error>> {
        let scale = [f64::from(picture.width) / width as f64, f64::from(picture.height) / height as f64];
        let box_of = |w: &Window, scale: f64, extent: u32| {
            let start = f64::from(w.start) * scale;
            // Rounding must not push the box over the edge.
            (start, (f64::from(w.len) * scale).min(f64::from(extent) - start))
        };
        let (left, box_width) = box_of(x, scale[0], picture.width);
        let (top, box_height) = box_of(y, scale[1], picture.height);
        resize(picture, [left, top, box_width, box_height], [x.len, y.len])
    }

    /// `(x / 255 - mean) / std`, as ToTensor and Normalize compute it, for pixels `[.., 3]`.
    pub fn normalize(&self, pixels: &[u8], out: &mut [f32]) {
        // 3 * 256 results are all there are.
        let table: [[f32; 256]; 3] = std::array::from_fn(|channel| {
            std::array::from_fn(|x| (x as f32 / 255.0 - self.mean[channel]) / self.std[channel])
        });
        for (out, pixel) in out.as_chunks_mut::<3>().0.iter_mut().zip(pixels.as_chunks::<3>().0) {
            *out = std::array::from_fn(|channel| table[channel][usize::from(pixel[channel])]);
        }
    }
}

/// Antialiased bilinear resize of the part `[left, top, width, height]` to `[width, height]`.
fn resize(
    picture: &Pixels,
    [left, top, width, height]: [f64; 4],
    size: [u32; 2],
) -> std::result::Result<Vec<u8>, Box<dyn std::error::Error>> {
    let source = ImageRef::new(picture.width, picture.height, &picture.data, PixelType::U8x3)?;
    let mut target = Image::new(size[0], size[1], PixelType::U8x3);
    let options = ResizeOptions::new()
        .resize_alg(ResizeAlg::Convolution(FilterType::Bilinear))
        .crop(left, top, width, height)
        .use_alpha(false);
    Resizer::new().resize(&source, &mut target, &options)?;
    Ok(target.into_vec())
}
