//! Decoding, resizing and cropping against torchvision on PIL images.

use hone::data::{Preprocess, decode};
use hone::weights::WeightsFile;
use std::path::Path;

fn fixtures() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures"))
}

/// Files whose compression loses nothing, so that decoders cannot differ.
fn is_lossless(name: &str) -> bool {
    !name.ends_with(".jpg") && name != "photo.webp"
}

#[test]
fn pictures_match_torchvision() {
    let golden = WeightsFile::open(&fixtures().join("golden/preprocess.safetensors")).unwrap();
    let preprocess = Preprocess::imagenet(224);
    assert_eq!((preprocess.resize, preprocess.crop), (256, 224));
    assert!(golden.entries().len() >= 25);
    let mut failures = Vec::new();
    for entry in golden.entries() {
        let want = golden.u8(&entry.name).unwrap();
        let got = preprocess.load(&fixtures().join("images").join(&entry.name)).unwrap();
        assert_eq!(got.len(), want.len(), "{}", entry.name);
        let differences = got.iter().zip(want).map(|(g, w)| g.abs_diff(*w));
        let most = differences.clone().max().unwrap();
        let mean = differences.map(f64::from).sum::<f64>() / want.len() as f64;
        println!("{:<20} mean {mean:.4} most {most}", entry.name);
        let fits = if is_lossless(&entry.name) { most <= 1 } else { mean <= 0.5 && most <= 8 };
        if !fits {
            failures.push(format!("{} (mean {mean}, most {most})", entry.name));
        }
    }
    assert!(failures.is_empty(), "differ from torchvision: {}", failures.join(", "));
}

#[test]
fn sizes_round_as_torchvision_does() {
    let preprocess = Preprocess::imagenet(224);
    for (size, want) in [
        ((640, 480), (341, 256)),
        ((480, 640), (256, 341)),
        ((256, 256), (256, 256)),
        ((1, 10_000), (256, 2_560_000)),
        ((255, 257), (256, 258)),
    ] {
        assert_eq!(preprocess.resized_size(size.0, size.1), want, "{size:?}");
    }
    // round(size * 256 / 224)
    for (crop, resize) in [(96, 110), (128, 146), (160, 183), (288, 329), (32, 37)] {
        assert_eq!(Preprocess::imagenet(crop).resize, resize);
    }
}

#[test]
fn a_crop_larger_than_the_picture_is_padded() {
    let preprocess = Preprocess { resize: 30, ..Preprocess::imagenet(33) };
    let white = hone::data::Pixels { width: 10, height: 10, data: vec![255; 300] };
    let out = preprocess.apply(&white).unwrap();
    let at = |x: usize, y: usize| out[(y * 33 + x) * 3];
    // (33 - 30) / 2 = 1 before, 2 after.
    assert_eq!((at(0, 16), at(1, 16), at(30, 16), at(31, 16)), (0, 255, 255, 0));
    assert_eq!((at(16, 0), at(16, 1), at(16, 30), at(16, 31)), (0, 255, 255, 0));
}

#[test]
fn normalisation_follows_torchvision() {
    let preprocess = Preprocess::imagenet(224);
    let pixels: Vec<u8> = (0..=255).flat_map(|x| [x, x, x]).collect();
    let mut out = vec![f32::NAN; pixels.len()];
    preprocess.normalize(&pixels, &mut out);
    for (i, (&x, &y)) in pixels.iter().zip(&out).enumerate() {
        let channel = i % 3;
        // ToTensor divides by 255, Normalize subtracts and divides in place, all in f32.
        assert_eq!(y, (f32::from(x) / 255.0 - preprocess.mean[channel]) / preprocess.std[channel]);
    }
}

#[test]
fn exif_orientation_is_applied_on_request_alone() {
    let file = fixtures().join("images/exif_rotate6.jpg");
    let plain = decode(&file, false).unwrap();
    let turned = decode(&file, true).unwrap();
    assert_eq!((turned.width, turned.height), (plain.height, plain.width));
    // Orientation 6: the first row is on the right, so that the bottom left corner comes to the top left.
    let corner = |p: &hone::data::Pixels, x: u32, y: u32| p.data[((y * p.width + x) * 3) as usize..][..3].to_vec();
    assert_eq!(corner(&turned, 0, 0), corner(&plain, 0, plain.height - 1));
    assert_eq!(corner(&turned, turned.width - 1, 0), corner(&plain, 0, 0));
}
