//! Folders, hostile picture files, and the loader.

use hone::data::{
    Augment, Dataset, Pixels, Preprocess, Sample, decode, decode_bytes, expand_inputs, generator, open_evaluation,
    ordered_parallel,
};
use image::{DynamicImage, ImageFormat};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tempfile::TempDir;

/// A folder with these files, each empty: what matters here is names.
fn tree(files: &[&str]) -> TempDir {
    let dir = TempDir::new().unwrap();
    for file in files {
        let path = dir.path().join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, b"").unwrap();
    }
    dir
}

fn names(dir: &TempDir, samples: &[Sample]) -> Vec<String> {
    samples.iter().map(|s| s.path.strip_prefix(dir.path()).unwrap().to_string_lossy().into_owned()).collect()
}

fn error(dir: &Path) -> String {
    Dataset::open(dir, 0.2, 0).unwrap_err().to_string()
}

#[test]
fn train_and_val_folders() {
    let dir = tree(&[
        "train/bees/2.JPG",
        "train/bees/10.jpg",
        "train/bees/more/a.png",
        "train/bees/notes.txt",
        "train/ants/x.WebP",
        "train/.cache/x.jpg",
        "train/readme.jpg",
        "val/ants/y.jpeg",
        "val/bees/z.tif",
        "other/x.jpg",
    ]);
    let data = Dataset::open(dir.path(), 0.2, 0).unwrap();
    assert_eq!(data.classes, ["ants", "bees"]);
    let want = ["train/ants/x.WebP", "train/bees/10.jpg", "train/bees/2.JPG", "train/bees/more/a.png"];
    assert_eq!(names(&dir, &data.train), want);
    assert_eq!(data.train.iter().map(|s| s.label).collect::<Vec<_>>(), [0, 1, 1, 1]);
    assert_eq!(names(&dir, &data.val), ["val/ants/y.jpeg", "val/bees/z.tif"]);
    assert!(data.warnings.is_empty());
}

#[test]
fn messages_say_what_was_looked_for() {
    let missing = Path::new("no/such/folder");
    assert!(error(missing).contains("no/such/folder") && error(missing).contains("train/CLASS/PICTURE"));
    let empty = tree(&[]);
    assert!(error(empty.path()).contains("no class folders"), "{}", error(empty.path()));
    let one = tree(&["cats/a.jpg"]);
    assert!(error(one.path()).contains("one class folder only"));
    let hollow = tree(&["cats/a.jpg", "dogs/a.txt", "owls/x/y.doc"]);
    let text = error(hollow.path());
    assert!(text.contains("dogs, owls") && text.contains(".jpg") && !text.contains('\n'), "{text}");
    let unknown = tree(&["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/c/1.jpg"]);
    assert!(error(unknown.path()).contains("\"c\""));
    let file = tree(&["x.jpg"]);
    assert!(error(&file.path().join("x.jpg")).contains("a file"));
}

#[test]
fn missing_validation_is_told() {
    let dir = tree(&["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg"]);
    let data = Dataset::open(dir.path(), 0.2, 0).unwrap();
    assert!(data.warnings.iter().any(|w| w.contains("\"b\"")));
    let dir = tree(&["train/a/1.jpg", "train/a/2.jpg", "train/b/1.jpg", "train/b/2.jpg", "valid/a/1.jpg"]);
    let data = Dataset::open(dir.path(), 0.2, 0).unwrap();
    assert!(data.warnings.iter().any(|w| w.contains("valid")));
    assert_eq!((data.train.len(), data.val.len()), (2, 2));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn splits_are_stratified_and_decided_by_the_seed(counts in prop::collection::vec(1usize..30, 2..5),
                                                     share in 0.01f64..0.99, seed: u64) {
        let files: Vec<String> =
            counts.iter().enumerate().flat_map(|(c, &n)| (0..n).map(move |i| format!("class{c}/{i}.png"))).collect();
        let dir = tree(&files.iter().map(String::as_str).collect::<Vec<_>>());
        let data = Dataset::open(dir.path(), share, seed).unwrap();
        prop_assert_eq!(&data, &Dataset::open(dir.path(), share, seed).unwrap());
        let all: BTreeSet<PathBuf> = data.train.iter().chain(&data.val).map(|s| s.path.clone()).collect();
        prop_assert_eq!(all.len(), files.len(), "complete and disjoint");
        for (class, &count) in counts.iter().enumerate() {
            let held_out = data.val.iter().filter(|s| s.label == class).count();
            let wanted = if count < 2 { 0 } else { ((count as f64 * share).round() as usize).clamp(1, count - 1) };
            prop_assert_eq!(held_out, wanted);
        }
    }
}

#[test]
fn another_seed_splits_otherwise() {
    let files: Vec<String> = (0..80).map(|i| format!("{}/{i}.png", if i % 2 == 0 { "a" } else { "b" })).collect();
    let dir = tree(&files.iter().map(String::as_str).collect::<Vec<_>>());
    let val = |seed| Dataset::open(dir.path(), 0.3, seed).unwrap().val;
    assert_ne!(val(1), val(2));
}

#[test]
fn evaluation_uses_the_models_classes() {
    let dir = tree(&["train/a/1.jpg", "val/b/1.jpg", "val/a/1.jpg"]);
    let classes = ["c", "b", "a"].map(String::from);
    let samples = open_evaluation(dir.path(), &classes).unwrap();
    assert_eq!(names(&dir, &samples), ["val/a/1.jpg", "val/b/1.jpg"]);
    assert_eq!(samples.iter().map(|s| s.label).collect::<Vec<_>>(), [2, 1]);
    let text = open_evaluation(dir.path(), &["a".to_string()]).unwrap_err().to_string();
    assert!(text.contains("\"b\"") && text.contains("(a)"), "{text}");
}

#[cfg(unix)]
#[test]
fn links_in_a_circle_end() {
    let dir = tree(&["a/1.jpg", "b/1.jpg"]);
    std::os::unix::fs::symlink(dir.path(), dir.path().join("a/up")).unwrap();
    let found = expand_inputs(&[dir.path().join("a")]).unwrap();
    assert!(found.len() >= 2 && found.len() < 10, "{found:?}");
}

#[test]
fn inputs_are_expanded_in_order() {
    let dir = tree(&["z.png", "d/b.jpg", "d/a.jpg", "e/x.txt"]);
    let files = expand_inputs(&[dir.path().join("z.png"), dir.path().join("d")]).unwrap();
    let want = ["z.png", "d/a.jpg", "d/b.jpg"].map(|name| dir.path().join(name));
    assert_eq!(files, want);
    assert!(expand_inputs(&[dir.path().join("e")]).unwrap_err().to_string().contains("no pictures"));
    assert!(expand_inputs(&[dir.path().join("nothing")]).is_err());
}

fn fixture_images() -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/images"));
    let mut files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    files.into_iter().map(|p| (p.file_name().unwrap().to_string_lossy().into_owned(), fs::read(p).unwrap())).collect()
}

#[test]
fn truncated_pictures_are_errors() {
    for (name, bytes) in fixture_images() {
        for part in [0, 1, 2, 8, 30, bytes.len() / 3, bytes.len() / 2] {
            let result = decode_bytes(&bytes[..part.min(bytes.len() - 1)], false);
            // What a GIF or TIFF needs may lie before the cut; nothing else can do without its second half.
            let may_succeed =
                part > 30 && (name.ends_with(".gif") || name.ends_with(".tiff") || name.contains("onepixel"));
            assert!(may_succeed || result.is_err(), "{name} cut to {part} bytes");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn damaged_pictures_never_panic(which in 0usize..25, at in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12)) {
        let images = fixture_images();
        let small: Vec<_> = images.into_iter().filter(|(_, bytes)| bytes.len() < 120_000).collect();
        let mut bytes = small[which % small.len()].1.clone();
        for (index, value) in at {
            let i = index.index(bytes.len().min(600));
            bytes[i] = value;
        }
        if let Ok(picture) = decode_bytes(&bytes, true) {
            prop_assert_eq!(picture.data.len(), picture.width as usize * picture.height as usize * 3);
        }
    }
}

fn encode(image: DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

#[test]
fn alpha_is_dropped_and_16_bits_keep_their_high_byte() {
    let rgba = image::RgbaImage::from_pixel(3, 2, image::Rgba([200, 100, 50, 0]));
    let picture = decode_bytes(&encode(rgba.into(), ImageFormat::Png), false).unwrap();
    assert_eq!((picture.width, picture.height, &picture.data[..3]), (3, 2, &[200u8, 100, 50][..]));
    let gray = image::ImageBuffer::<image::Luma<u16>, _>::from_pixel(1, 1, image::Luma([0x8f_ff]));
    let picture = decode_bytes(&encode(DynamicImage::ImageLuma16(gray), ImageFormat::Png), false).unwrap();
    assert_eq!(picture.data, [0x8f; 3]);
    let rgb = image::ImageBuffer::<image::Rgb<u16>, _>::from_pixel(1, 1, image::Rgb([0x0100, 0x7fff, 0xffff]));
    let picture = decode_bytes(&encode(DynamicImage::ImageRgb16(rgb), ImageFormat::Png), false).unwrap();
    assert_eq!(picture.data, [0x01, 0x7f, 0xff]);
}

#[test]
fn the_content_tells_the_format() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("really-a-png.jpg");
    let gray = image::GrayImage::from_pixel(2, 2, image::Luma([7]));
    fs::write(&path, encode(gray.into(), ImageFormat::Png)).unwrap();
    assert_eq!(decode(&path, false).unwrap().data, [7; 12]);
    fs::write(&path, b"hello").unwrap();
    let text = decode(&path, false).unwrap_err().to_string();
    assert!(text.contains("really-a-png.jpg") && text.contains("not a picture"), "{text}");
}

#[test]
fn a_header_that_promises_too_much_is_refused() {
    // A BMP of 60000 x 60000 pixels in 54 bytes.
    let mut bytes = encode(image::RgbImage::new(1, 1).into(), ImageFormat::Bmp);
    bytes[18..22].copy_from_slice(&60_000u32.to_le_bytes());
    bytes[22..26].copy_from_slice(&60_000u32.to_le_bytes());
    assert!(decode_bytes(&bytes, false).unwrap_err().contains("60000x60000"));
}

#[test]
fn results_come_in_order() {
    for threads in 1..=4 {
        for ahead in [1, 3, 100] {
            let got: Vec<usize> = ordered_parallel(200, threads, ahead, |i| {
                if i % 7 == 0 {
                    std::thread::yield_now();
                }
                i * i
            })
            .collect();
            assert_eq!(got, (0..200).map(|i| i * i).collect::<Vec<_>>());
        }
    }
    assert_eq!(ordered_parallel(0, 3, 2, |i| i).count(), 0);
}

#[test]
fn no_more_is_done_ahead_than_allowed_and_dropping_stops() {
    let begun = Arc::new(AtomicUsize::new(0));
    let counter = begun.clone();
    let mut items = ordered_parallel(1000, 3, 5, move |i| {
        counter.fetch_add(1, Ordering::SeqCst);
        i
    });
    assert_eq!(items.next(), Some(0));
    drop(items);
    assert!(begun.load(Ordering::SeqCst) <= 6, "one taken, five ahead");
}

#[test]
fn a_panic_reaches_whoever_takes_the_result() {
    let mut items = ordered_parallel(4, 2, 2, |i| if i == 1 { panic!("item {i}") } else { i });
    assert_eq!(items.next(), Some(0));
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| items.next()));
    assert!(caught.is_err());
    assert_eq!(items.next(), Some(2));
}

/// A picture whose red tells the column and whose green tells the row.
fn ramp(width: u32, height: u32) -> Pixels {
    let pixel = |i: u32| [(i % width * 255 / width) as u8, (i / width * 255 / height) as u8, 128];
    Pixels { width, height, data: (0..width * height).flat_map(pixel).collect() }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn augmented_pictures_fit_whatever_the_original(width in 1u32..300, height in 1u32..300, seed: u64) {
        let preprocess = Preprocess::imagenet(64);
        for augment in [Augment::None, Augment::Flip, Augment::Standard, Augment::Strong] {
            let draw = |index| augment.apply(&ramp(width, height), &preprocess, generator(seed, 3, index)).unwrap();
            prop_assert_eq!(draw(7).len(), 64 * 64 * 3);
            prop_assert_eq!(draw(7), draw(7), "the same picture in the same epoch is changed alike");
        }
    }
}

#[test]
fn augmentation_does_what_its_name_says() {
    let preprocess = Preprocess::imagenet(64);
    let picture = ramp(200, 150);
    let draws = |augment: Augment| -> Vec<Vec<u8>> {
        (0..200).map(|i| augment.apply(&picture, &preprocess, generator(1, 1, i)).unwrap()).collect()
    };
    let plain = preprocess.apply(&picture).unwrap();
    assert!(draws(Augment::None).iter().all(|p| *p == plain));
    let mirrored: Vec<u8> = plain
        .chunks_exact(64 * 3)
        .flat_map(|row| row.chunks_exact(3).rev().flatten().copied().collect::<Vec<_>>())
        .collect();
    let flips = draws(Augment::Flip);
    let count = flips.iter().filter(|p| **p == mirrored).count();
    assert!((70..130).contains(&count) && flips.iter().all(|p| *p == plain || *p == mirrored), "{count} of 200");
    // A random part covers a smaller range of columns than the centre crop does, now and then a larger one.
    let range = |p: &[u8]| {
        let red = || p.iter().step_by(3);
        i32::from(*red().max().unwrap()) - i32::from(*red().min().unwrap())
    };
    let standard = draws(Augment::Standard);
    let smaller = standard.iter().filter(|p| range(p) < range(&plain)).count();
    assert!(smaller > 80 && smaller < 200, "{smaller}");
    assert!(standard.iter().all(|p| p.iter().skip(2).step_by(3).all(|&blue| blue.abs_diff(128) <= 1)), "colours stay");
    let strong = draws(Augment::Strong);
    let recoloured = strong.iter().filter(|p| p.iter().skip(2).step_by(3).any(|&blue| blue.abs_diff(128) > 4)).count();
    assert!(recoloured > 150, "{recoloured}");
    let gray = preprocess.mean.map(|m| (m * 255.0).round() as u8);
    let erased = strong.iter().filter(|p| p.chunks_exact(3).filter(|pixel| **pixel == gray).count() >= 64).count();
    assert!((25..80).contains(&erased), "about a quarter of 200: {erased}");
}
