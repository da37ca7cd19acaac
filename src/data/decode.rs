//! Picture files to RGB, as torchvision's loader does: `PIL.Image.open(path).convert("RGB")`.
//!
//! Alpha is dropped, not blended; EXIF orientation is ignored unless asked for. Pictures of 16 bits a channel keep their
//! high bytes. (Pillow clips 16-bit gray at 255, which leaves little but white; there hone differs on purpose.)

use crate::error::{Error, Result};
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits, metadata::Orientation};
use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// Pictures with more pixels are refused: a header of a few bytes must not make the program allocate gigabytes.
const MAX_PIXELS: u64 = 1 << 28;

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

/// Reads and decodes a file. `exif` turns the picture as its EXIF data says.
pub fn decode(path: &Path, exif: bool) -> Result<Pixels> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    decode_bytes(&bytes, exif).map_err(|problem| {
        Error::file(path, problem, "replace or remove it (JPEG, PNG, WebP, BMP, GIF and TIFF can be read)")
    })
}

/// Decodes a file's content; the format is told by the content, not by a name. The error says what is wrong.
pub fn decode_bytes(bytes: &[u8], exif: bool) -> std::result::Result<Pixels, String> {
    // Decoders are written against hostile files, but there are many of them: should one panic, it is a bad picture like
    // any other rather than the end of a night's training.
    catch_unwind(AssertUnwindSafe(|| decode_unguarded(bytes, exif)))
        .unwrap_or_else(|_| Err("the decoder failed on it".into()))
}

fn decode_unguarded(bytes: &[u8], exif: bool) -> std::result::Result<Pixels, String> {
    if bytes.is_empty() {
        return Err("an empty file".into());
    }
    let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(|e| e.to_string())?;
    let format = reader.format().ok_or("not a picture in a known format")?;
    if format == ImageFormat::Jpeg && !jpeg_is_complete(bytes) {
        return Err("a truncated JPEG".into());
    }
    reader.limits(Limits::no_limits());
    let mut decoder = reader.into_decoder().map_err(|e| describe(format, &e.to_string()))?;
    let (width, height) = decoder.dimensions();
    if width == 0 || height == 0 {
        return Err(format!("a picture of {width}x{height} pixels"));
    }
    if u64::from(width) * u64::from(height) > MAX_PIXELS {
        return Err(format!("{width}x{height} pixels are more than the {MAX_PIXELS} that are accepted"));
    }
    let mut limits = Limits::default();
    // At most 16 bytes a pixel, 32-bit RGBA, and as much again for the decoder.
    limits.max_alloc = Some(MAX_PIXELS * 32);
    decoder.set_limits(limits).map_err(|e| describe(format, &e.to_string()))?;
    let orientation =
        if exif { decoder.orientation().unwrap_or(Orientation::NoTransforms) } else { Orientation::NoTransforms };
    let mut image = DynamicImage::from_decoder(decoder).map_err(|e| describe(format, &e.to_string()))?;
    image.apply_orientation(orientation);
    Ok(to_rgb(image))
}

fn describe(format: ImageFormat, problem: &str) -> String {
    format!("a damaged {format:?} ({})", problem.lines().next().unwrap_or("no reason given").trim())
}

fn to_rgb(image: DynamicImage) -> Pixels {
    let (width, height) = (image.width(), image.height());
    let high = |samples: &[u16], channels: usize| -> Vec<u8> {
        let pixels = samples.chunks_exact(channels);
        pixels.flat_map(|p| if channels < 3 { [p[0]; 3] } else { [p[0], p[1], p[2]] }).map(|x| (x >> 8) as u8).collect()
    };
    let data = match &image {
        DynamicImage::ImageLuma16(image) => high(image, 1),
        DynamicImage::ImageLumaA16(image) => high(image, 2),
        DynamicImage::ImageRgb16(image) => high(image, 3),
        DynamicImage::ImageRgba16(image) => high(image, 4),
        // The conversion copies the colours and leaves alpha out.
        _ => image.into_rgb8().into_raw(),
    };
    Pixels { width, height, data }
}

/// Whether the compressed data is followed by an end marker. The decoder fills what is missing with gray and says nothing;
/// Pillow, and so torchvision, refuses such files.
fn jpeg_is_complete(bytes: &[u8]) -> bool {
    const START_OF_SCAN: u8 = 0xda;
    // Segments before the first scan are skipped by their length: a thumbnail in them has an end marker of its own.
    let mut at = 2;
    while let Some(&[0xff, marker]) = bytes.get(at..at + 2) {
        match marker {
            START_OF_SCAN => return bytes[at..].windows(2).any(|pair| pair == [0xff, 0xd9]),
            0xff => at += 1,
            0x01 | 0xd0..=0xd9 => at += 2,
            _ => match bytes.get(at + 2..at + 4) {
                Some(&[high, low]) => at += 2 + usize::from(u16::from_be_bytes([high, low])),
                _ => return false,
            },
        }
    }
    false
}
