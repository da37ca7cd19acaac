//! Decoding, resizing, cropping and normalising against torchvision on PIL images.

use hone::data::{Pixels, Preprocess, decode};
use proptest::prelude::*;
use safetensors::{Dtype, SafeTensors};
use std::fs;
use std::path::Path;

fn fixtures() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures"))
}

/// Compression that loses something leaves decoders a choice of rounding and of chroma filter; otherwise there is none.
fn is_lossy(name: &str) -> bool {
    name.ends_with(".jpg") || name == "photo.webp"
}

/// Mean and largest difference.
fn difference(got: &[u8], want: &[u8]) -> (f64, u8) {
    assert_eq!(got.len(), want.len());
    let differences = got.iter().zip(want).map(|(got, want)| got.abs_diff(*want));
    let sum: f64 = differences.clone().map(f64::from).sum();
    (sum / want.len() as f64, differences.max().unwrap())
}

#[test]
fn pictures_match_torchvision() {
    let bytes = fs::read(fixtures().join("golden/preprocess.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&bytes).unwrap();
    let mut names = golden.names();
    names.sort();
    let mut files: Vec<String> = fs::read_dir(fixtures().join("images"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    files.sort();
    assert_eq!(names, files, "every file has its reference");
    assert_eq!(names.len(), 25);

    let preprocess = Preprocess::imagenet(224);
    let mut failures = Vec::new();
    for name in names {
        let want = golden.tensor(name).unwrap();
        assert_eq!((want.dtype(), want.shape()), (Dtype::U8, &[224, 224, 3][..]));
        let got = preprocess.load(&fixtures().join("images").join(name)).unwrap();
        let (mean, most) = difference(&got, want.data());
        println!("{name:<20} mean {mean:.4} most {most}");
        let (mean_limit, limit) = if is_lossy(name) { (0.5, 8) } else { (1.0, 1) };
        if !(mean <= mean_limit && most <= limit) {
            failures.push(format!("{name} (mean {mean}, most {most})"));
        }
    }
    assert!(failures.is_empty(), "differ from torchvision: {}", failures.join(", "));
}

#[test]
fn sizes_round_as_torchvision_does() {
    let preprocess = Preprocess::imagenet(224);
    let huge = (256, 256 * u64::from(u32::MAX));
    for (size, want) in [
        ((640, 480), (341, 256)),
        ((480, 640), (256, 341)),
        ((256, 256), (256, 256)),
        ((1, 10_000), (256, 2_560_000)),
        ((1, u32::MAX), huge),
        ((255, 257), (256, 258)),
        ((257, 511), (256, 509)),
    ] {
        assert_eq!(preprocess.resized_size(size.0, size.1), want, "{size:?}");
    }
    // round(size * 256 / 224)
    for (crop, resize) in [(224, 256), (96, 110), (128, 146), (160, 183), (288, 329), (32, 37)] {
        let preprocess = Preprocess::imagenet(crop);
        assert_eq!((preprocess.crop, preprocess.resize), (crop, resize));
    }
}

/// A picture whose pixel tells its place, up to 256 x 256.
fn coordinates(width: u32, height: u32) -> Pixels {
    let data = (0..height).flat_map(|y| (0..width).flat_map(move |x| [x as u8, y as u8, 0])).collect();
    Pixels { width, height, data }
}

fn noise(width: u32, height: u32) -> Pixels {
    let hash = |i: u32| (i.wrapping_mul(2_654_435_761) >> 13) as u8;
    Pixels { width, height, data: (0..width * height * 3).map(hash).collect() }
}

#[test]
fn halves_of_a_pixel_go_to_the_even_neighbour() {
    // Nothing is resized, so that the first pixel tells where the crop begins: round((width - crop) / 2) in Python.
    for (width, left) in [(33, 0), (34, 1), (35, 2), (36, 2), (37, 2), (38, 3), (39, 4), (41, 4)] {
        let preprocess = Preprocess { resize: 32, ..Preprocess::imagenet(32) };
        assert_eq!(preprocess.apply(&coordinates(width, 32)).unwrap()[..2], [left, 0], "{width}x32");
        assert_eq!(preprocess.apply(&coordinates(32, width)).unwrap()[..2], [0, left], "32x{width}");
    }
}

#[test]
fn a_crop_larger_than_the_picture_is_padded() {
    let preprocess = Preprocess { resize: 30, ..Preprocess::imagenet(33) };
    let white = |width, height| Pixels { width, height, data: vec![255; (width * height * 3) as usize] };
    let at = |out: &[u8], x: usize, y: usize| out[(y * 33 + x) * 3];
    let out = preprocess.apply(&white(10, 10)).unwrap();
    assert_eq!(out.len(), 33 * 33 * 3);
    // (33 - 30) / 2 = 1 before, 2 after.
    assert_eq!([0, 1, 30, 31].map(|x| at(&out, x, 16)), [0, 255, 255, 0]);
    assert_eq!([0, 1, 30, 31].map(|y| at(&out, 16, y)), [0, 255, 255, 0]);
    // Padded on one axis, cropped on the other.
    let out = preprocess.apply(&white(10, 40)).unwrap();
    assert_eq!([0, 1, 30, 31].map(|x| at(&out, x, 16)), [0, 255, 255, 0]);
    assert_eq!([0, 32].map(|y| at(&out, 16, y)), [255, 255]);
}

#[test]
fn strips_cost_no_more_than_squares() {
    let preprocess = Preprocess::imagenet(224);
    // Whole, the first would be 256 x 256000000 after the resize, 196 GB.
    for (width, height) in [(1, 1_000_000), (1_000_000, 1), (3, 65_535), (65_535, 2)] {
        assert_eq!(preprocess.apply(&noise(width, height)).unwrap().len(), 224 * 224 * 3, "{width}x{height}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_crop_alone_is_the_crop_of_the_whole(width in 1u32..300, height in 1u32..300, crop in 8u32..64) {
        let picture = noise(width, height);
        let preprocess = Preprocess::imagenet(crop);
        let (whole_width, whole_height) = preprocess.resized_size(width, height);
        prop_assume!(whole_width.max(whole_height) < 3000);
        // A crop as large as the longer side keeps the whole, with black above and below or left and right.
        let side = whole_width.max(whole_height) as u32;
        let whole = Preprocess { crop: side, ..preprocess.clone() }.apply(&picture).unwrap();
        let offset = |extent: u64| {
            let margin = (u64::from(side) - extent) / 2;
            let start = ((extent - u64::from(crop)) as f64 / 2.0).round_ties_even();
            margin as usize + start as usize
        };
        let (left, top) = (offset(whole_width), offset(whole_height));
        let want: Vec<u8> = (top..top + crop as usize)
            .flat_map(|y| whole[(y * side as usize + left) * 3..][..crop as usize * 3].to_vec())
            .collect();
        // The resize chooses the precision of its weights by the largest of them, which may be outside the crop. So rows may
        // round to a neighbour, and columns, sums of such rows, to one more.
        let (mean, most) = difference(&preprocess.apply(&picture).unwrap(), &want);
        prop_assert!(mean <= 0.5 && most <= 2, "mean {mean}, most {most}");
    }

    #[test]
    fn a_part_is_cut_out_before_it_is_resized(left in 0u32..40, top in 0u32..40, side in 1u32..60) {
        let picture = noise(100, 101);
        let preprocess = Preprocess { resize: 32, ..Preprocess::imagenet(32) };
        let rows = picture.data.chunks_exact(300).skip(top as usize).take(side as usize);
        let data = rows.flat_map(|row| row[left as usize * 3..][..side as usize * 3].to_vec()).collect();
        let part = Pixels { width: side, height: side, data };
        let got = preprocess.resize_part(&picture, [left, top, side, side]).unwrap();
        prop_assert!(got == preprocess.apply(&part).unwrap());
    }
}

#[test]
fn what_cannot_be_resized_is_an_error() {
    let preprocess = Preprocess::imagenet(8);
    let short = Pixels { data: vec![0; 10], ..noise(4, 4) };
    assert!(preprocess.apply(&short).unwrap_err().to_string().contains("10 bytes for 4x4"));
    assert!(preprocess.apply(&noise(0, 4)).is_err());
    assert!(Preprocess::imagenet(0).apply(&noise(4, 4)).is_err());
    assert!(preprocess.resize_part(&noise(4, 4), [2, 2, 3, 2]).unwrap_err().to_string().contains("of 4x4"));
    assert!(preprocess.resize_part(&noise(4, 4), [0, 0, 0, 2]).is_err());
}

#[test]
fn normalisation_has_the_bits_of_torchvision() {
    let preprocess = Preprocess::imagenet(224);
    let pixels: Vec<u8> = (0..=255).flat_map(|x| [x, x, x]).collect();
    let mut out = vec![f32::NAN; pixels.len()];
    preprocess.normalize(&pixels, &mut out);
    for (i, (&x, &y)) in pixels.iter().zip(&out).enumerate() {
        let channel = i % 3;
        // ToTensor divides by 255, Normalize subtracts and divides in place, all in f32.
        let want = (f32::from(x) / 255.0 - preprocess.mean[channel]) / preprocess.std[channel];
        assert_eq!(y.to_bits(), want.to_bits());
    }
    // From torchvision itself: Normalize(ToTensor) of 0, 1, 128 and 255.
    for (x, bits) in TORCHVISION {
        let got = [0, 1, 2].map(|channel| out[usize::from(x) * 3 + channel].to_bits());
        assert_eq!(got, bits, "{x}");
    }
}

/// Bits of red, green and blue.
const TORCHVISION: [(u8, [u32; 3]); 4] = [
    (0, [0xc0078bbd, 0xc0024924, 0xbfe6f809]),
    (1, [0xc006732b, 0xc0012a4f, 0xbfe4bcea]),
    (128, [0x3d97af32, 0x3e521b48, 0x3eda5d3c]),
    (255, [0x400fee1d, 0x401b6db7, 0x4028f5c3]),
];

#[test]
fn exif_orientation_is_applied_on_request_alone() {
    let file = fixtures().join("images/exif_rotate6.jpg");
    let plain = decode(&file, false).unwrap();
    let turned = decode(&file, true).unwrap();
    assert_eq!((turned.width, turned.height), (plain.height, plain.width));
    let preprocess = Preprocess::imagenet(64);
    let upright = Preprocess { exif: true, ..preprocess.clone() };
    assert_eq!(preprocess.load(&file).unwrap(), preprocess.apply(&plain).unwrap());
    assert_eq!(upright.load(&file).unwrap(), preprocess.apply(&turned).unwrap());
}
