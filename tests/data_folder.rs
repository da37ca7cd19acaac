//! Folders of pictures: layouts, the split, messages.

use hone::data::{Dataset, Sample, Split, expand_inputs, open_evaluation};
use hone::error::Error;
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A folder with these files, each empty: what matters here is names. Those that end in a slash are folders.
fn tree<S: AsRef<str>>(files: &[S]) -> TempDir {
    let dir = TempDir::new().unwrap();
    for file in files.iter().map(AsRef::as_ref) {
        let path = dir.path().join(file);
        if file.ends_with('/') {
            fs::create_dir_all(path).unwrap();
        } else {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, b"").unwrap();
        }
    }
    dir
}

fn open(dir: &TempDir) -> Dataset {
    Dataset::open(dir.path(), 0.2, 0).unwrap()
}

/// The message for a folder that cannot be used: one line, with the path and what was looked for.
fn error(dir: &Path) -> String {
    let error = Dataset::open(dir, 0.2, 0).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::Data { .. }) && !text.contains('\n'), "{text}");
    assert!(text.contains(dir.to_str().unwrap()), "{text}");
    text
}

fn names(dir: &TempDir, samples: &[Sample]) -> Vec<String> {
    samples.iter().map(|s| s.path.strip_prefix(dir.path()).unwrap().to_string_lossy().into_owned()).collect()
}

fn labels(samples: &[Sample]) -> Vec<usize> {
    samples.iter().map(|sample| sample.label).collect()
}

#[test]
fn train_and_val_folders() {
    let dir = tree(&[
        "train/bees/2.JPG",
        "train/bees/10.jpg",
        "train/bees/more/a.png",
        "train/bees/notes.txt",
        "train/bees/._2.JPG",
        "train/bees/.thumbnails/2.jpg",
        "train/ants/x.WebP",
        "train/.ipynb_checkpoints/x.jpg",
        "train/readme.jpg",
        "val/ants/y.jpeg",
        "val/bees/z.tif",
        "other/x.jpg",
    ]);
    let data = open(&dir);
    assert_eq!(data.classes, ["ants", "bees"]);
    let want = ["train/ants/x.WebP", "train/bees/10.jpg", "train/bees/2.JPG", "train/bees/more/a.png"];
    assert_eq!(names(&dir, &data.train), want);
    assert_eq!(labels(&data.train), [0, 1, 1, 1]);
    assert_eq!(names(&dir, &data.val), ["val/ants/y.jpeg", "val/bees/z.tif"]);
    assert_eq!(labels(&data.val), [0, 1]);
    assert_eq!(data.split, Split::Folders);
    assert!(data.warnings.is_empty(), "{:?}", data.warnings);
}

#[test]
fn the_order_is_that_of_image_folder() {
    // sorted(os.walk(..)) compares the paths of folders as strings, where "-" comes before "/".
    let dir =
        tree(&["b/z.png", "b/x/1.png", "b/x-1/1.png", "b/x/y/1.png", "b/a.png", "é/1.png", "Z/1.png", "a b/1.gif"]);
    let samples = open_evaluation(dir.path(), &["Z", "a b", "b", "é"].map(String::from)).unwrap();
    let want = ["Z/1.png", "a b/1.gif", "b/a.png", "b/z.png", "b/x/1.png", "b/x-1/1.png", "b/x/y/1.png", "é/1.png"];
    assert_eq!(names(&dir, &samples), want);
    assert_eq!(labels(&samples), [0, 1, 2, 2, 2, 2, 2, 3]);
}

#[test]
fn class_folders_alone_are_split() {
    let dir =
        tree(&["cats/1.png", "cats/2.png", "dogs/1.png", "dogs/2.png", "readme.md", ".git/x.png", "__MACOSX/x.png"]);
    let data = open(&dir);
    assert_eq!(data.classes, ["cats", "dogs"]);
    assert_eq!((labels(&data.train), labels(&data.val)), (vec![0, 1], vec![0, 1]));
    assert_eq!(data.split, Split::Seeded { share: 0.2, seed: 0 });
    assert!(data.warnings.len() == 1 && data.warnings[0].contains("held out 2 of 4"), "{:?}", data.warnings);
}

#[test]
fn train_may_be_a_class() {
    let dir = tree(&["bus/1.png", "bus/2.png", "train/1.png", "train/2.png"]);
    assert_eq!(open(&dir).classes, ["bus", "train"]);
}

#[test]
fn what_is_not_validated_is_told() {
    let dir = tree(&["train/a/1.jpg", "train/b/1.jpg", "train/c/1.jpg", "val/a/1.jpg", "val/c/"]);
    let data = open(&dir);
    assert_eq!(labels(&data.val), [0]);
    assert_eq!(data.warnings.len(), 2);
    assert!(data.warnings[0].contains("\"b\"") && data.warnings[1].contains("\"c\""), "{:?}", data.warnings);

    let dir = tree(&["train/a/1.jpg", "train/a/2.jpg", "train/b/1.jpg", "valid/a/1.jpg", "test/a/1.jpg", "notes/x"]);
    let data = open(&dir);
    assert_eq!((data.train.len(), data.val.len()), (2, 1));
    let told = data.warnings.join("\n");
    assert_eq!(data.warnings.len(), 4, "{told}");
    assert!(told.contains("one picture of class \"b\""), "{told}");
    assert!(told.contains("valid: not used; rename it to val") && told.contains("test: not used"), "{told}");
}

#[test]
fn messages_say_what_was_looked_for() {
    let dir = tree(&["x.jpg", "empty/"]);
    let missing = error(&dir.path().join("nothing"));
    assert!(missing.contains("No such file") || missing.contains("cannot find"), "{missing}");
    for text in [missing, error(&dir.path().join("x.jpg")), error(&dir.path().join("empty"))] {
        assert!(text.contains("train/CLASS/") && text.contains("val/CLASS/") && text.contains(".jpeg"), "{text}");
    }
    assert!(error(&dir.path().join("x.jpg")).contains("a file, not a folder"));
    assert!(error(&dir.path().join("empty")).contains("no class folders"));
}

#[test]
fn classes_that_cannot_be_used_are_named() {
    let one = tree(&["cats/a.jpg"]);
    assert!(error(one.path()).contains("one class folder only, \"cats\""));
    let flat = tree(&["1.jpg", "2.jpg"]);
    assert!(error(flat.path()).contains("pictures that are in none"));
    let hollow = tree(&["cats/a.jpg", "dogs/a.heic", "dogs/b.heic", "owls/", "rats/x/y.doc"]);
    let text = error(hollow.path());
    assert!(text.contains("3 of 4 classes: dogs (but 2 files .heic), owls, rats (but 1 file .doc)"), "{text}");
    let unknown = tree(&["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/c/1.jpg"]);
    let text = error(unknown.path());
    assert!(text.contains("class \"c\"") && text.contains("(a, b)"), "{text}");
    let no_val = tree(&["train/a/1.jpg", "train/b/1.jpg", "val/"]);
    assert!(error(no_val.path()).contains("no pictures to validate with"));
    let many = tree(&(0..50).map(|i| format!("class{i:02}/")).collect::<Vec<_>>());
    assert!(error(many.path()).contains("class19 and 30 more"));
}

#[test]
fn folders_in_the_wrong_place_are_recognised() {
    for files in [
        &["Train/a/1.jpg", "Train/b/1.jpg", "Test/a/1.jpg"][..],
        &["val/a/1.jpg", "val/b/1.jpg", "other/1.jpg"],
        &["train/1.jpg", "val/1.jpg"],
    ] {
        let text = error(tree(files).path());
        assert!(text.contains("look like parts of a data set"), "{text}");
    }
    let nested = tree(&["download/train/a/1.jpg", "download/train/b/1.jpg"]);
    assert!(error(nested.path()).contains(&format!("perhaps {} is meant", nested.path().join("download").display())));
}

#[test]
fn a_share_that_is_none_is_refused() {
    let dir = tree(&["a/1.jpg", "a/2.jpg", "b/1.jpg"]);
    for share in [0.0, 1.0, -0.1, 1.5, f64::NAN, f64::INFINITY] {
        let error = Dataset::open(dir.path(), share, 0).unwrap_err();
        assert!(matches!(error, Error::Config { .. }), "{share}: {error}");
    }
    // With a val folder it is not needed.
    let dir = tree(&["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg"]);
    assert!(Dataset::open(dir.path(), 0.0, 0).is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn splits_are_stratified_and_decided_by_the_seed(
        counts in prop::collection::vec(1usize..30, 2..5),
        share in 0.01f64..0.99,
        seed: u64,
    ) {
        let mut files: Vec<String> =
            counts.iter().enumerate().flat_map(|(c, &n)| (0..n).map(move |i| format!("class{c}/{i}.png"))).collect();
        let dir = tree(&files);
        let data = Dataset::open(dir.path(), share, seed).unwrap();
        prop_assert_eq!(&data, &Dataset::open(dir.path(), share, seed).unwrap());
        let all: BTreeSet<&PathBuf> = data.train.iter().chain(&data.val).map(|sample| &sample.path).collect();
        prop_assert_eq!((all.len(), data.train.len() + data.val.len()), (files.len(), files.len()), "complete, disjoint");
        for (class, &count) in counts.iter().enumerate() {
            let held_out = data.val.iter().filter(|sample| sample.label == class).count();
            let wanted = if count < 2 { 0 } else { ((count as f64 * share).round() as usize).clamp(1, count - 1) };
            prop_assert_eq!(held_out, wanted);
            let folder = format!("class{class}");
            prop_assert!(data.train.iter().all(|s| (s.label == class) == s.path.parent().unwrap().ends_with(&folder)));
        }
        // Files written in another order, in another place.
        files.reverse();
        let other = tree(&files);
        prop_assert_eq!(names(&dir, &data.val), names(&other, &Dataset::open(other.path(), share, seed).unwrap().val));
    }
}

#[test]
fn another_seed_splits_otherwise() {
    let files: Vec<String> =
        (0..80).map(|i| format!("{}/{:02}.png", if i % 2 == 0 { "a" } else { "b" }, i / 2)).collect();
    let dir = tree(&files);
    let val = |seed| Dataset::open(dir.path(), 0.3, seed).unwrap().val;
    assert_ne!(val(1), val(2));
    // And classes are drawn independently of each other.
    let drawn = |label| {
        let of_class = val(1).into_iter().filter(move |sample| sample.label == label);
        of_class.map(|sample| sample.path.file_name().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!((drawn(0).len(), drawn(1).len()), (12, 12));
    assert_ne!(drawn(0), drawn(1));
}

#[test]
fn evaluation_uses_the_models_classes() {
    let classes = ["c", "b", "a"].map(String::from);
    let dir = tree(&["train/a/1.jpg", "val/b/1.jpg", "val/a/1.jpg"]);
    let samples = open_evaluation(dir.path(), &classes).unwrap();
    assert_eq!(names(&dir, &samples), ["val/a/1.jpg", "val/b/1.jpg"]);
    assert_eq!(labels(&samples), [2, 1]);
    let flat = tree(&["a/1.jpg", "c/1.jpg", "b/"]);
    assert_eq!(labels(&open_evaluation(flat.path(), &classes).unwrap()), [2, 0]);

    let error = |dir: &Path, classes: &[String]| {
        let text = open_evaluation(dir, classes).unwrap_err().to_string();
        assert!(text.contains(dir.to_str().unwrap()), "{text}");
        text
    };
    let text = error(dir.path(), &classes[2..]);
    assert!(text.contains("\"b\"") && text.contains("1 classes (a)"), "{text}");
    let unsplit = tree(&["train/a/1.jpg"]);
    assert!(error(unsplit.path(), &classes).contains(unsplit.path().join("train").to_str().unwrap()));
    assert!(error(tree(&["a/x.heic"]).path(), &classes).contains("no pictures (but 1 file .heic)"));
    assert!(error(&unsplit.path().join("nothing"), &classes).contains("cannot open"));
}

#[test]
fn inputs_are_expanded_in_order() {
    let dir = tree(&["z.png", "odd name", "d/b.jpg", "d/a.jpg", "d/sub/c.bmp", "d/x.txt", "e/x.txt"]);
    let paths = |names: &[&str]| names.iter().map(|name| dir.path().join(name)).collect::<Vec<_>>();
    let files = expand_inputs(&paths(&["z.png", "odd name", "d"])).unwrap();
    assert_eq!(files, paths(&["z.png", "odd name", "d/a.jpg", "d/b.jpg", "d/sub/c.bmp"]));
    assert!(expand_inputs(&paths(&["z.png", "e"])).unwrap_err().to_string().contains("no pictures"));
    assert!(expand_inputs(&paths(&["nothing"])).unwrap_err().to_string().contains("nothing"));
    assert!(expand_inputs(&[]).unwrap_err().to_string().contains("no pictures given"));
}

#[cfg(unix)]
mod unix {
    use super::*;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_are_followed_but_not_in_circles() {
        let dir = tree(&["a/1.jpg", "b/1.jpg", "b/sub/2.jpg"]);
        let outside = tree(&["deep/3.jpg", "4.jpg"]);
        symlink(dir.path(), dir.path().join("a/up")).unwrap();
        symlink(dir.path().join("b"), dir.path().join("b/sub/again")).unwrap();
        symlink("self", dir.path().join("b/self")).unwrap();
        symlink(outside.path(), dir.path().join("c")).unwrap();
        symlink(outside.path().join("4.jpg"), dir.path().join("a/5.jpg")).unwrap();
        let samples = open_evaluation(dir.path(), &["a", "b", "c"].map(String::from)).unwrap();
        let want = ["a/1.jpg", "a/5.jpg", "b/1.jpg", "b/sub/2.jpg", "c/4.jpg", "c/deep/3.jpg"];
        assert_eq!(names(&dir, &samples), want);
    }

    #[test]
    fn folders_may_be_deep() {
        let dir = tree(&["a/1.jpg"]);
        let deep = dir.path().join("a").join("d/".repeat(500));
        fs::create_dir_all(&deep).unwrap();
        fs::write(deep.join("2.jpg"), b"").unwrap();
        assert_eq!(expand_inputs(&[dir.path().to_path_buf()]).unwrap().len(), 2);
    }

    #[test]
    fn names_need_not_be_utf_8() {
        let odd = OsStr::from_bytes(b"p\xff.jpg");
        let dir = tree(&["a/1.jpg", "b/1.jpg"]);
        fs::write(dir.path().join("a").join(odd), b"").unwrap();
        let samples = open_evaluation(dir.path(), &["a", "b"].map(String::from)).unwrap();
        assert!(samples.iter().any(|sample| sample.path.ends_with(odd)));
        // A class has a name that is printed and saved.
        fs::create_dir(dir.path().join(OsStr::from_bytes(b"c\xff"))).unwrap();
        assert!(error(dir.path()).contains("not UTF-8"));
    }
}
