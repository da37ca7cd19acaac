//! Picture files to RGB, as torchvision's default loader does: `PIL.Image.open(path).convert("RGB")`.
//!
//! - Alpha is dropped, not blended with a background.
//! - EXIF orientation is ignored unless asked for. A TIFF's orientation is part of the format, and Pillow always heeds it.
//! - Samples of 16 bits keep their high byte. Pillow does so too, but for 16-bit gray, which it clips at 255: nearly every
//!   pixel becomes white. There hone differs on purpose.
//! - Samples of 32 bits, integer or float, are refused: nothing says which of their values is white.
//! - Of an animation the first frame is taken. Where a GIF's does not cover the canvas, there is black.
//! - A file that is cut off is an error, also where a decoder would fill in gray.

use crate::error::{Error, Result};
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits};
use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// Pictures with more pixels are refused. Pillow's own limit is 179 million.
pub const MAX_PIXELS: u64 = 1 << 28;
/// Room for a decoded picture in the decoder's own sample format: [`MAX_PIXELS`] of 8-bit RGBA, half as many of 16-bit.
const MAX_BYTES: u64 = MAX_PIXELS * 4;
/// Beyond this many pixels the header must be borne out by the size of the file, so that a file of a few bytes cannot have
/// a gigabyte allocated for it.
const PLAUSIBLE_PIXELS: u64 = 1 << 24;
/// Pixels that a byte of file can stand for. PNG's deflate comes to 8 pixels * 1032 on a blank page; JPEG stays under 400.
const PIXELS_PER_BYTE: u64 = 1 << 14;

/// A decoded picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pixels {
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// `[height, width, 3]`, red first.
    pub data: Vec<u8>,
}

/// Reads and decodes a picture file; the content tells the format, not the name. `exif` turns the picture upright, as its
/// EXIF orientation says.
///
/// Errors: [`Error::Io`] if the file cannot be read, [`Error::File`] if it is no picture, in a format that is not known,
/// damaged, cut off, or larger than [`MAX_PIXELS`].
pub fn decode(path: &Path, exif: bool) -> Result<Pixels> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    decode_bytes(&bytes, path, exif)
}

/// Decodes the content of a picture file, as [`decode`] does. `path` is for the error message alone.
pub fn decode_bytes(bytes: &[u8], path: &Path, exif: bool) -> Result<Pixels> {
    // The decoders are written with hostile files in mind, but there are many of them, and what they assert differs. Should
    // one panic, the picture is a bad one like any other, and not the end of a night's training. They own all they touch,
    // so nothing half-changed outlives the panic.
    let result = catch_unwind(AssertUnwindSafe(|| decode_unguarded(bytes, exif)))
        .unwrap_or_else(|_| Err(Problem::damaged("its decoder gave up on it")));
    result.map_err(|Problem { what, hint }| Error::file(path, what, hint))
}

/// What is wrong with a picture and what can be done about it.
struct Problem {
    what: String,
    hint: &'static str,
}

impl Problem {
    fn damaged(what: impl Into<String>) -> Self {
        Problem { what: what.into(), hint: "replace it with an intact copy, or remove it" }
    }

    fn unsupported(what: impl Into<String>) -> Self {
        Problem { what: what.into(), hint: "save it as 8-bit JPEG or PNG, or remove it" }
    }

    fn too_large(what: impl Into<String>) -> Self {
        Problem { what: what.into(), hint: "scale it down, or remove it" }
    }

    fn from_decoder(format: ImageFormat, error: &ImageError) -> Self {
        // Some of these messages run over several lines.
        let reason = error.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        match error {
            ImageError::Unsupported(_) => {
                Problem::unsupported(format!("a kind of {format:?} that is not read ({reason})"))
            }
            ImageError::Limits(_) => Problem::too_large(format!("{format:?} that takes too much memory ({reason})")),
            _ => Problem::damaged(format!("damaged {format:?} ({reason})")),
        }
    }
}

fn decode_unguarded(bytes: &[u8], exif: bool) -> Result<Pixels, Problem> {
    if bytes.is_empty() {
        return Err(Problem::damaged("the file is empty"));
    }
    let format = image::guess_format(bytes).map_err(|_| {
        Problem::unsupported("not a picture in a known format (JPEG, PNG, WebP, BMP, GIF and TIFF are known)")
    })?;
    if !is_complete(format, bytes) {
        return Err(Problem::damaged(format!("{format:?} that is cut off")));
    }
    let failed = |error: ImageError| Problem::from_decoder(format, &error);
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    reader.limits(limits());
    let mut decoder = reader.into_decoder().map_err(failed)?;
    check_size(decoder.dimensions(), decoder.total_bytes(), bytes.len())?;
    decoder.set_limits(limits()).map_err(failed)?;
    let orientation = match exif || format == ImageFormat::Tiff {
        // An orientation that cannot be read is none.
        true => decoder.orientation().unwrap_or(Orientation::NoTransforms),
        false => Orientation::NoTransforms,
    };
    let mut image = DynamicImage::from_decoder(decoder).map_err(failed)?;
    image.apply_orientation(orientation);
    to_rgb(image)
}

/// What a decoder may allocate: the picture, and as much again to work in.
fn limits() -> Limits {
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(2 * MAX_BYTES);
    limits
}

/// Checks what a header says before anything is allocated for it.
fn check_size((width, height): (u32, u32), decoded: u64, file: usize) -> Result<(), Problem> {
    let pixels = u64::from(width) * u64::from(height);
    if pixels == 0 {
        return Err(Problem::damaged(format!("a picture of {width}x{height} pixels")));
    }
    if pixels > MAX_PIXELS {
        return Err(Problem::too_large(format!("{width}x{height} pixels are more than the {MAX_PIXELS} accepted")));
    }
    if decoded > MAX_BYTES {
        let problem = format!("{width}x{height} pixels take {decoded} bytes, more than the {MAX_BYTES} accepted");
        return Err(Problem::too_large(problem));
    }
    if pixels > PLAUSIBLE_PIXELS && pixels / PIXELS_PER_BYTE > file as u64 {
        return Err(Problem::damaged(format!(
            "a header that promises {width}x{height} pixels in a file of {file} bytes"
        )));
    }
    Ok(())
}

fn to_rgb(image: DynamicImage) -> Result<Pixels, Problem> {
    let (width, height) = (image.width(), image.height());
    let high_byte = |x: u16| (x >> 8) as u8;
    let data = match image {
        DynamicImage::ImageRgb8(image) => image.into_raw(),
        DynamicImage::ImageRgba8(image) => spread::<4, _>(&image, |x| x),
        DynamicImage::ImageLuma8(image) => spread::<1, _>(&image, |x| x),
        DynamicImage::ImageLumaA8(image) => spread::<2, _>(&image, |x| x),
        DynamicImage::ImageRgb16(image) => spread::<3, _>(&image, high_byte),
        DynamicImage::ImageRgba16(image) => spread::<4, _>(&image, high_byte),
        DynamicImage::ImageLuma16(image) => spread::<1, _>(&image, high_byte),
        DynamicImage::ImageLumaA16(image) => spread::<2, _>(&image, high_byte),
        other => return Err(Problem::unsupported(format!("samples of a kind that is not read ({:?})", other.color()))),
    };
    Ok(Pixels { width, height, data })
}

/// Pixels of `N` samples to RGB: of one or two the first is gray, of three or four the first three are the colours; what is
/// left is alpha.
fn spread<const N: usize, T: Copy>(samples: &[T], to_u8: impl Fn(T) -> u8) -> Vec<u8> {
    let channels = if N < 3 { [0, 0, 0] } else { [0, 1, 2] };
    samples.as_chunks::<N>().0.iter().flat_map(|pixel| channels.map(|c| to_u8(pixel[c]))).collect()
}

/// Whether the file is as long as it says, for formats whose decoders fill in what is missing and say nothing. Pillow, and so
/// torchvision, refuses such files. The other decoders find out themselves.
fn is_complete(format: ImageFormat, bytes: &[u8]) -> bool {
    match format {
        ImageFormat::Jpeg => jpeg_is_complete(bytes),
        // "RIFF", then the number of bytes that follow.
        ImageFormat::WebP => bytes
            .get(4..8)
            .and_then(|size| size.try_into().ok())
            .is_some_and(|size| u64::from(u32::from_le_bytes(size)) + 8 <= bytes.len() as u64),
        _ => true,
    }
}

/// Whether there is an end marker.
fn jpeg_is_complete(bytes: &[u8]) -> bool {
    const STAND_ALONE: std::ops::RangeInclusive<u8> = 0xd0..=0xd8; // RST0 to RST7, SOI
    const END_OF_IMAGE: u8 = 0xd9;
    // Segments are skipped by their length: a thumbnail within one has an end marker of its own. In between, as in the
    // compressed data, 0xff begins a marker unless 0 or another 0xff follows.
    let mut rest = bytes;
    while let Some(at) = rest.iter().position(|&byte| byte == 0xff) {
        rest = &rest[at + 1..];
        match *rest {
            [END_OF_IMAGE, ..] => return true,
            [0 | 1 | 0xff, ..] => {}
            [marker, ..] if STAND_ALONE.contains(&marker) => {}
            [_, high, low, ..] => rest = rest.get(1 + usize::from(u16::from_be_bytes([high, low]))..).unwrap_or(&[]),
            _ => return false,
        }
    }
    false
}
