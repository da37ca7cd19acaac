//! From a decoded picture to the network's input: torchvision's `Resize`, `CenterCrop`, `ToTensor` and `Normalize` on PIL
//! images, to within a rounding of the resize.

use super::decode::{Pixels, decode};
use crate::error::{Error, Result};
use fast_image_resize::images::{TypedCroppedImage, TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Mean and standard deviation of ImageNet's training pictures, red, green and blue in `[0, 1]`, as torchvision has them.
const IMAGENET_MEAN: [f32; 3] = [0.485, 0.456, 0.406];
const IMAGENET_STD: [f32; 3] = [0.229, 0.224, 0.225];
/// The usual crop and the short side that it is cut from. Other sizes keep their ratio.
const USUAL_CROP: u64 = 224;
const USUAL_RESIZE: u64 = 256;

/// Resize of the short side, centre crop, scaling to `[0, 1]`, normalisation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Preprocess {
    /// Short side after the resize, in pixels.
    pub resize: u32,
    /// Side of the crop, in pixels.
    pub crop: u32,
    /// Subtracted from red, green and blue in `[0, 1]`.
    pub mean: [f32; 3],
    /// What they are divided by then.
    pub std: [f32; 3],
    /// Whether pictures are turned upright as their EXIF orientation says. torchvision does not.
    pub exif: bool,
}

/// The pixels that the crop keeps of one axis of the resized picture, and where in the crop they go.
struct Window {
    start: u64,
    len: u32,
    margin: u32,
}

impl Preprocess {
    /// What networks pretrained on ImageNet expect, for input of `image_size` x `image_size` pixels: the short side is
    /// resized to `image_size * 256 / 224`, rounded.
    pub fn imagenet(image_size: u32) -> Self {
        let resize = (u64::from(image_size) * USUAL_RESIZE + USUAL_CROP / 2) / USUAL_CROP;
        Preprocess {
            resize: u32::try_from(resize).unwrap_or(u32::MAX),
            crop: image_size,
            mean: IMAGENET_MEAN,
            std: IMAGENET_STD,
            exif: false,
        }
    }

    /// Width and height of a `width` x `height` picture after the resize: the short side is [`Preprocess::resize`], the other
    /// is cut down to a whole number. They are 64 bits wide because a long strip may come to more than 2^32 pixels.
    ///
    /// From torchvision's `_compute_resized_output_size`.
    pub fn resized_size(&self, width: u32, height: u32) -> (u64, u64) {
        let (short, long) = (width.min(height), width.max(height));
        let resize = u64::from(self.resize);
        let other = resize * u64::from(long) / u64::from(short.max(1));
        if width <= height { (resize, other) } else { (other, resize) }
    }

    /// Decodes and preprocesses a file: `[crop, crop, 3]`.
    ///
    /// Errors: those of [`decode`]; [`Error::Argument`] if `resize` or `crop` is 0.
    pub fn load(&self, path: &Path) -> Result<Vec<u8>> {
        self.apply(&decode(path, self.exif)?)
    }

    /// Antialiased bilinear resize as Pillow's, then centre crop: `[crop, crop, 3]`. Where the resized picture is smaller than
    /// the crop there is black around it.
    ///
    /// Just the pixels of the crop are computed and stored, so a strip of 1 x 10000 is as cheap as a square. They are those
    /// that the whole would have there, but for roundings: filters reach beyond the crop where the picture does.
    ///
    /// Errors: [`Error::Argument`] if `resize` or `crop` is 0, or the picture is not `[height, width, 3]` with a pixel at least.
    pub fn apply(&self, picture: &Pixels) -> Result<Vec<u8>> {
        self.check(picture)?;
        let (width, height) = self.resized_size(picture.width, picture.height);
        let (x, y) = (self.window(width), self.window(height));
        let (left, box_width) = x.source_box(width, picture.width);
        let (top, box_height) = y.source_box(height, picture.height);
        let options = bilinear().crop(left, top, box_width, box_height);
        let kept = resize(&part(picture, [0, 0, picture.width, picture.height])?, [x.len, y.len], &options)?;
        if x.margin == 0 && y.margin == 0 && (x.len, y.len) == (self.crop, self.crop) {
            return Ok(kept);
        }
        let side = self.crop as usize;
        let mut padded = vec![0; side * side * 3];
        let rows = padded.chunks_exact_mut(side * 3).skip(y.margin as usize);
        for (row, pixels) in rows.zip(kept.chunks_exact(x.len as usize * 3)) {
            row[x.margin as usize * 3..][..pixels.len()].copy_from_slice(pixels);
        }
        Ok(padded)
    }

    /// The part `[left, top, width, height]` of a picture, cut out and then resized to `[crop, crop, 3]`, as torchvision's
    /// `resized_crop` does.
    ///
    /// Errors: as [`Preprocess::apply`]; also if the part is empty or not within the picture.
    pub fn resize_part(&self, picture: &Pixels, [left, top, width, height]: [u32; 4]) -> Result<Vec<u8>> {
        self.check(picture)?;
        if width == 0 || height == 0 {
            return Err(argument(format!("a part of {width}x{height} pixels")));
        }
        resize(&part(picture, [left, top, width, height])?, [self.crop; 2], &bilinear())
    }

    /// `(x / 255 - mean) / std` in f32, in the order in which `ToTensor` and `Normalize` compute it, so that bits agree.
    ///
    /// `pixels` and `out` are `[.., 3]`. Panics if their lengths differ or are no multiple of 3.
    pub fn normalize(&self, pixels: &[u8], out: &mut [f32]) {
        assert!(pixels.len() == out.len() && pixels.len().is_multiple_of(3), "{} to {}", pixels.len(), out.len());
        // There are only 3 * 256 results.
        let table: [[f32; 256]; 3] = std::array::from_fn(|channel| {
            std::array::from_fn(|x| (x as f32 / 255.0 - self.mean[channel]) / self.std[channel])
        });
        for (out, pixel) in out.as_chunks_mut::<3>().0.iter_mut().zip(pixels.as_chunks::<3>().0) {
            *out = std::array::from_fn(|channel| table[channel][usize::from(pixel[channel])]);
        }
    }

    fn check(&self, picture: &Pixels) -> Result<()> {
        if self.resize == 0 || self.crop == 0 {
            return Err(argument(format!("resize {} and crop {} must be at least 1", self.resize, self.crop)));
        }
        if picture.width == 0 || picture.height == 0 {
            return Err(argument(format!("a picture of {}x{} pixels", picture.width, picture.height)));
        }
        Ok(())
    }

    /// What the centre crop keeps of an axis of `extent` pixels. From torchvision's `center_crop`.
    fn window(&self, extent: u64) -> Window {
        let crop = u64::from(self.crop);
        if extent < crop {
            // The padding is halved and cut down before the picture, halved and rounded up after it.
            return Window { start: 0, len: extent as u32, margin: ((crop - extent) / 2) as u32 };
        }
        // Python's round takes halves to the even neighbour.
        let start = ((extent - crop) as f64 / 2.0).round_ties_even();
        Window { start: start as u64, len: self.crop, margin: 0 }
    }
}

impl Window {
    /// Start and length, in pixels of a source axis of `source` pixels that is resized to `extent`, of what the window shows.
    fn source_box(&self, extent: u64, source: u32) -> (f64, f64) {
        let (source, scale) = (f64::from(source), f64::from(source) / extent as f64);
        let start = self.start as f64 * scale;
        // Rounding must not push the end over the edge.
        (start, (f64::from(self.len) * scale).min(source - start))
    }
}

fn bilinear() -> ResizeOptions {
    // Convolution widens the filter when it scales down, which is what Pillow's antialiasing is.
    ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Bilinear)).use_alpha(false)
}

/// A view of one type, as the resizing is compiled for every type that it is used with.
type Part<'a> = TypedCroppedImage<'a, TypedImageRef<'a, U8x3>>;

/// The part `[left, top, width, height]` of a picture.
fn part(picture: &Pixels, [left, top, width, height]: [u32; 4]) -> Result<Part<'_>> {
    let whole = TypedImageRef::from_buffer(picture.width, picture.height, &picture.data).map_err(|e| {
        argument(format!("{} bytes for {}x{} pixels: {e}", picture.data.len(), picture.width, picture.height))
    })?;
    TypedCroppedImage::new(whole, left, top, width, height).map_err(|e| {
        argument(format!("part {width}x{height} at ({left}, {top}) of {}x{}: {e}", picture.width, picture.height))
    })
}

/// `[height, width, 3]` for the size `[width, height]`.
fn resize(source: &Part, [width, height]: [u32; 2], options: &ResizeOptions) -> Result<Vec<u8>> {
    let mut pixels = vec![0; width as usize * height as usize * 3];
    let mut target =
        TypedImage::<U8x3>::from_buffer(width, height, &mut pixels).map_err(|e| argument(e.to_string()))?;
    Resizer::new().resize_typed(source, &mut target, options).map_err(|e| argument(e.to_string()))?;
    Ok(pixels)
}

fn argument(problem: String) -> Error {
    Error::Argument { op: "preprocess", problem }
}
