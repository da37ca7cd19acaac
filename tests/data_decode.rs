//! Picture files: kinds, orientations, and damage.

use hone::data::{MAX_PIXELS, Pixels, decode, decode_bytes};
use hone::error::{Error, Result};
use image::{DynamicImage, ImageEncoder, ImageFormat};
use proptest::prelude::*;
use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use tempfile::TempDir;

/// Name and content of every fixture.
static FIXTURES: LazyLock<Vec<(String, Vec<u8>)>> = LazyLock::new(|| {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/images"));
    let mut files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.into_iter().map(|p| (p.file_name().unwrap().to_string_lossy().into_owned(), fs::read(p).unwrap())).collect()
});

fn fixture(name: &str) -> &'static [u8] {
    &FIXTURES.iter().find(|(other, _)| other == name).unwrap().1
}

fn read(bytes: &[u8]) -> Result<Pixels> {
    decode_bytes(bytes, Path::new("picture"), false)
}

fn encode(image: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.into().write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

#[test]
fn pictures_cut_off_are_errors() {
    for (name, bytes) in FIXTURES.iter() {
        let even = (0..24).map(|i| bytes.len() * i / 24);
        for len in even.chain([1, 2, 3, 8, 30, bytes.len() - 2, bytes.len() - 1]) {
            // All that is needed may come before the cut: in a GIF the first picture, in a PNG all but the end marker.
            let enough =
                name == "anim.gif" && len > bytes.len() / 4 || name.ends_with(".png") && len + 12 > bytes.len();
            let result = decode_bytes(&bytes[..len], Path::new(name), false);
            assert!(enough || result.is_err(), "{name}, {len} of {} bytes", bytes.len());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is damaged, there is an error or a picture, and no panic.
    #[test]
    fn damaged_pictures_never_panic(
        which: prop::sample::Index,
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 1..12),
    ) {
        let small: Vec<_> = FIXTURES.iter().filter(|(_, bytes)| bytes.len() < 120_000).collect();
        let (name, bytes) = which.get(&small);
        let mut bytes = bytes.clone();
        for (index, value, in_header) in damage {
            // Headers are a small part of a file, and what goes wrong in them goes further.
            let range = if in_header { bytes.len().min(700) } else { bytes.len() };
            bytes[index.index(range)] = value;
        }
        match decode_bytes(&bytes, Path::new(name), true) {
            Ok(picture) => prop_assert_eq!(picture.data.len(), picture.width as usize * picture.height as usize * 3),
            Err(error) => prop_assert!(matches!(error, Error::File { .. }), "{}", error),
        }
    }
}

#[test]
fn a_thumbnail_does_not_end_a_jpeg() {
    let jpeg = fixture("plain.jpg");
    // An application segment with an end marker within, as the thumbnail of a camera has one.
    let with_thumbnail = [&jpeg[..2], &[0xff, 0xef, 0, 6, 0xff, 0xd9, 1, 2], &jpeg[2..]].concat();
    let whole = read(jpeg).unwrap();
    assert_eq!(read(&with_thumbnail).unwrap(), whole);
    let error = read(&with_thumbnail[..with_thumbnail.len() / 2]).unwrap_err().to_string();
    assert!(error.contains("cut off"), "{error}");
    // What follows the end is nobody's business.
    assert_eq!(read(&[jpeg, b"trailing bytes"].concat()).unwrap(), whole);
}

#[test]
fn alpha_is_dropped_not_blended() {
    let rgba = image::RgbaImage::from_pixel(3, 2, image::Rgba([200, 100, 50, 0]));
    for format in [ImageFormat::Png, ImageFormat::WebP, ImageFormat::Tiff] {
        let picture = read(&encode(rgba.clone(), format)).unwrap();
        assert_eq!((picture.width, picture.height), (3, 2));
        assert_eq!(picture.data, [200, 100, 50].repeat(6), "{format:?}");
    }
    let gray = image::GrayAlphaImage::from_pixel(1, 2, image::LumaA([77, 3]));
    assert_eq!(read(&encode(gray, ImageFormat::Png)).unwrap().data, [77; 6]);
}

#[test]
fn sixteen_bits_keep_their_high_byte() {
    type Buffer<P> = image::ImageBuffer<P, Vec<u16>>;
    let data = |image: DynamicImage| read(&encode(image, ImageFormat::Png)).unwrap().data;
    let gray = Buffer::from_pixel(1, 1, image::Luma([0x8fff]));
    assert_eq!(data(DynamicImage::ImageLuma16(gray)), [0x8f; 3]);
    let gray_alpha = Buffer::from_pixel(1, 1, image::LumaA([0x8fff, 0x0100]));
    assert_eq!(data(DynamicImage::ImageLumaA16(gray_alpha)), [0x8f; 3]);
    let rgb = Buffer::from_pixel(1, 1, image::Rgb([0x0100, 0x7fff, 0xffff]));
    assert_eq!(data(DynamicImage::ImageRgb16(rgb)), [0x01, 0x7f, 0xff]);
    let rgba = Buffer::from_pixel(1, 1, image::Rgba([0x0100, 0x7fff, 0xffff, 0]));
    assert_eq!(data(DynamicImage::ImageRgba16(rgba)), [0x01, 0x7f, 0xff]);
}

#[test]
fn float_samples_are_refused() {
    let float = image::Rgb32FImage::from_pixel(2, 2, image::Rgb([0.5; 3]));
    let error = read(&encode(DynamicImage::ImageRgb32F(float), ImageFormat::Tiff)).unwrap_err().to_string();
    assert!(error.contains("save it as 8-bit"), "{error}");
}

/// A picture of 3 x 2 pixels that are all different.
fn six() -> image::RgbImage {
    image::RgbImage::from_fn(3, 2, |x, y| image::Rgb([(10 * x + 100 * y) as u8, 7, x as u8]))
}

/// A TIFF of 3 x 2 pixels without compression, little-endian.
fn tiff(orientation: u16) -> Vec<u8> {
    let pixels = six().into_raw();
    let (pixels_at, bits_at, directory_at) = (8, 26, 32u32);
    // Tag, type (3: u16, 4: u32), count, value, or its place where it does not fit: three numbers of bits.
    let entries: [(u16, u16, u32, u32); 10] = [
        (256, 4, 1, 3),
        (257, 4, 1, 2),
        (258, 3, 3, bits_at),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, pixels_at),
        (274, 3, 1, orientation.into()),
        (277, 3, 1, 3),
        (278, 4, 1, 2),
        (279, 4, 1, 18),
    ];
    let mut bytes = b"II*\0".to_vec();
    bytes.extend(directory_at.to_le_bytes());
    bytes.extend(pixels);
    bytes.extend([8, 0, 8, 0, 8, 0]);
    bytes.extend((entries.len() as u16).to_le_bytes());
    for (tag, kind, count, value) in entries {
        bytes.extend([tag.to_le_bytes(), kind.to_le_bytes()].concat());
        bytes.extend([count.to_le_bytes(), value.to_le_bytes()].concat());
    }
    bytes.extend([0; 4]);
    bytes
}

fn png_with_exif(orientation: u8) -> Vec<u8> {
    // A TIFF header and one directory of one entry: the orientation.
    let exif =
        [b"II*\0\x08\0\0\0\x01\0".as_slice(), &[0x12, 1, 3, 0, 1, 0, 0, 0, orientation, 0, 0, 0], &[0; 4]].concat();
    let mut bytes = Vec::new();
    let mut encoder = image::codecs::png::PngEncoder::new(&mut bytes);
    encoder.set_exif_metadata(exif).unwrap();
    encoder.write_image(six().as_raw(), 3, 2, image::ExtendedColorType::Rgb8).unwrap();
    bytes
}

/// The picture as it is to be seen: pixel (x, y) comes from (column, row) of what is stored, w x h.
fn upright(orientation: u8) -> Pixels {
    let (w, h) = (3, 2);
    let from = |x: u32, y: u32| match orientation {
        1 => (x, y),
        2 => (w - 1 - x, y),
        3 => (w - 1 - x, h - 1 - y),
        4 => (x, h - 1 - y),
        5 => (y, x),
        6 => (y, h - 1 - x),
        7 => (w - 1 - y, h - 1 - x),
        8 => (w - 1 - y, x),
        _ => unreachable!(),
    };
    let (width, height) = if orientation < 5 { (w, h) } else { (h, w) };
    let places = (0..height).flat_map(|y| (0..width).map(move |x| (x, y)));
    let data = places.flat_map(|(x, y)| six().get_pixel(from(x, y).0, from(x, y).1).0).collect();
    Pixels { width, height, data }
}

#[test]
fn all_orientations() {
    let name = Path::new("picture");
    for orientation in 1..=8 {
        let bytes = png_with_exif(orientation);
        assert_eq!(decode_bytes(&bytes, name, true).unwrap(), upright(orientation), "{orientation}");
        assert_eq!(decode_bytes(&bytes, name, false).unwrap(), upright(1), "{orientation}, not asked for");
        // In a TIFF it counts in any case, as in Pillow.
        let bytes = tiff(orientation.into());
        assert_eq!(decode_bytes(&bytes, name, false).unwrap(), upright(orientation), "TIFF, {orientation}");
    }
    // A value that means nothing turns nothing.
    assert_eq!(decode_bytes(&png_with_exif(77), name, true).unwrap(), upright(1));
}

#[test]
fn the_content_tells_the_format() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("really-a-png.jpg");
    fs::write(&path, encode(image::GrayImage::from_pixel(2, 2, image::Luma([7])), ImageFormat::Png)).unwrap();
    assert_eq!(decode(&path, false).unwrap().data, [7; 12]);
}

#[test]
fn errors_name_the_file_and_a_way_out() {
    let dir = TempDir::new().unwrap();
    let error = |content: &[u8]| {
        let path = dir.path().join("some.jpg");
        fs::write(&path, content).unwrap();
        let error = decode(&path, false).unwrap_err();
        assert!(matches!(&error, Error::File { path: named, .. } if *named == path), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("remove it") && !text.contains('\n'), "{text}");
        text
    };
    assert!(error(b"").contains("empty"));
    assert!(error(b"<!DOCTYPE html>").contains("not a picture"));
    assert!(error(&fixture("plain.jpg")[..5000]).contains("cut off"));
    assert!(error(&fixture("rgb.png")[..5000]).contains("damaged"));
    let missing = decode(&dir.path().join("nothing.png"), false).unwrap_err();
    assert!(matches!(missing, Error::Io { .. }) && missing.to_string().contains("nothing.png"));
}

/// A BMP of 1 x 1 pixels whose header says otherwise.
fn lying_bmp(width: u32, height: u32) -> Vec<u8> {
    let mut bytes = encode(image::RgbImage::new(1, 1), ImageFormat::Bmp);
    bytes[18..22].copy_from_slice(&width.to_le_bytes());
    bytes[22..26].copy_from_slice(&height.to_le_bytes());
    bytes
}

#[test]
fn headers_that_promise_too_much_are_refused() {
    let error = |bytes: &[u8]| read(bytes).unwrap_err().to_string();
    let text = error(&lying_bmp(60_000, 50_000));
    assert!(text.contains("60000x50000") && text.contains(&MAX_PIXELS.to_string()), "{text}");
    // Within the limit, but nothing that a file of a few bytes could hold.
    assert!(error(&lying_bmp(16_000, 16_000)).contains("promises 16000x16000"));
    // Small enough to be tried.
    assert!(error(&lying_bmp(600, 600)).contains("damaged"));
    // A canvas of 65535 x 65535 with two colours, and on it a picture of one pixel.
    let canvas = [b"GIF89a".as_slice(), &[0xff; 4], &[0x80, 0, 0, 1, 2, 3, 4, 5, 6]].concat();
    let gif = [&canvas, [b',', 0, 0, 0, 0, 1, 0, 1, 0, 0].as_slice(), &[2, 2, 0x44, 1, 0, b';']].concat();
    let text = error(&gif);
    assert!(text.contains("65535x65535"), "{text}");
}
