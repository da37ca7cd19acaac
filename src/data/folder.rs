//! Folders of labelled pictures, as torchvision's ImageFolder reads them.

use crate::error::{Error, Result};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// Extensions of pictures that can be decoded, in lower case; files are matched in any case.
pub const EXTENSIONS: [&str; 10] = ["jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff"];
/// The layouts, for error messages.
const LAYOUTS: &str = "expected train/CLASS/PICTURE and val/CLASS/PICTURE, or CLASS/PICTURE";

/// A picture and its class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The file.
    pub path: PathBuf,
    /// Index among the classes.
    pub label: usize,
}

/// Pictures to train and to validate with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dataset {
    /// Names of the classes, sorted.
    pub classes: Vec<String>,
    /// For training.
    pub train: Vec<Sample>,
    /// For validation.
    pub val: Vec<Sample>,
    /// What the user should know about the folder, a line each.
    pub warnings: Vec<String>,
}

impl Dataset {
    /// Reads `dir`: `train/CLASS/*` and `val/CLASS/*`, or `train/CLASS/*` or `CLASS/*` alone. The latter are split, the same
    /// way for the same `seed`: of every class the share `val_split` is held out, at least one picture where there are two.
    pub fn open(dir: &Path, val_split: f64, seed: u64) -> Result<Dataset> {
        check_folder(dir)?;
        let (train, val) = (dir.join("train"), dir.join("val"));
        let mut warnings = Vec::new();
        let root = if train.is_dir() { &train } else { dir };
        let classes = class_names(root)?;
        if classes.len() < 2 {
            let found = if classes.is_empty() { "no class folders" } else { "one class folder only" };
            let hint = format!("{LAYOUTS}, with two classes at least ({})", extensions());
            return Err(Error::data(root, found, hint));
        }
        let samples = read_classes(root, &classes, &classes)?;
        if train.is_dir() && val.is_dir() {
            let held_out = class_names(&val)?;
            if let Some(unknown) = held_out.iter().find(|class| !classes.contains(class)) {
                let problem = format!("class {unknown:?} is not among the training classes {classes:?}");
                return Err(Error::data(&val, problem, "name the folders of train and val alike"));
            }
            for class in classes.iter().filter(|class| !held_out.contains(class)) {
                warnings.push(format!("{}: no folder for class {class:?}, it is not validated", val.display()));
            }
            let val = read_classes(&val, &held_out, &classes)?;
            return Ok(Dataset { classes, train: samples, val, warnings });
        }
        for other in ["valid", "validation", "test"] {
            if train.is_dir() && dir.join(other).is_dir() {
                warnings.push(format!("{}: not used; name it val to validate with it", dir.join(other).display()));
            }
        }
        let (train, val) = split(samples, classes.len(), val_split, seed);
        warnings.push(format!(
            "{}: no val folder, held out {} of {} pictures",
            dir.display(),
            val.len(),
            val.len() + train.len()
        ));
        Ok(Dataset { classes, train, val, warnings })
    }
}

/// Labelled pictures to evaluate a model of these `classes` on: `val/CLASS/*` if there is a val folder, else `CLASS/*`.
pub fn open_evaluation(dir: &Path, classes: &[String]) -> Result<Vec<Sample>> {
    check_folder(dir)?;
    let val = dir.join("val");
    let root = if val.is_dir() { &val } else { dir };
    let found = class_names(root)?;
    if found.is_empty() {
        return Err(Error::data(root, "no class folders", "expected val/CLASS/PICTURE or CLASS/PICTURE"));
    }
    if let Some(unknown) = found.iter().find(|class| !classes.contains(class)) {
        let listed = classes.iter().take(20).cloned().collect::<Vec<_>>().join(", ");
        let more = if classes.len() > 20 { ", ..." } else { "" };
        let problem = format!("folder {unknown:?} is none of the model's {} classes ({listed}{more})", classes.len());
        return Err(Error::data(root, problem, "name the folders after the model's classes"));
    }
    read_classes(root, &found, classes)
}

/// Files as they are, folders replaced by the pictures in them and below, sorted.
pub fn expand_inputs(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        let metadata = std::fs::metadata(path).map_err(Error::io("open", path))?;
        if !metadata.is_dir() {
            files.push(path.clone());
            continue;
        }
        let found = pictures_below(path)?;
        if found.is_empty() {
            return Err(Error::data(path, "no pictures in it or below", format!("looked for {}", extensions())));
        }
        files.extend(found);
    }
    Ok(files)
}

fn extensions() -> String {
    EXTENSIONS.map(|e| format!(".{e}")).join(" ")
}

fn check_folder(dir: &Path) -> Result<()> {
    let metadata = std::fs::metadata(dir)
        .map_err(|error| Error::data(dir, format!("cannot open the folder of pictures ({error})"), LAYOUTS))?;
    match metadata.is_dir() {
        true => Ok(()),
        false => Err(Error::data(dir, "a file, not a folder of pictures", LAYOUTS)),
    }
}

/// Entries of a folder in the order of their names.
fn sorted_entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(dir).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
    let mut paths: Vec<PathBuf> =
        entries.map_err(Error::io("read the folder", dir))?.iter().map(|e| e.path()).collect();
    paths.sort();
    Ok(paths)
}

/// Names of the folders in `root`, sorted. Hidden ones, such as `.ipynb_checkpoints`, are no classes.
fn class_names(root: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for path in sorted_entries(root)?.into_iter().filter(|path| path.is_dir()) {
        match path.file_name().and_then(OsStr::to_str) {
            Some(name) if name.starts_with('.') => {}
            Some(name) => names.push(name.to_string()),
            None => return Err(Error::data(&path, "the name of this class is not UTF-8", "rename the folder")),
        }
    }
    names.sort();
    Ok(names)
}

/// The pictures of the folders `names` in `root`, labelled by the place of their name in `classes`.
fn read_classes(root: &Path, names: &[String], classes: &[String]) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    let mut empty = Vec::new();
    for name in names {
        let pictures = pictures_below(&root.join(name))?;
        if pictures.is_empty() {
            empty.push(name.as_str());
        }
        let label = classes.iter().position(|class| class == name).expect("names are among the classes");
        samples.extend(pictures.into_iter().map(|path| Sample { path, label }));
    }
    if !empty.is_empty() {
        let problem = format!("no pictures for {} of {} classes: {}", empty.len(), names.len(), empty.join(", "));
        let hint = format!("add some or remove the folder ({}; {LAYOUTS})", extensions());
        return Err(Error::data(root, problem, hint));
    }
    Ok(samples)
}

fn is_picture(path: &Path) -> bool {
    let extension = path.extension().and_then(OsStr::to_str).map(str::to_ascii_lowercase);
    extension.is_some_and(|e| EXTENSIONS.contains(&e.as_str()))
}

/// Pictures in `dir` and below, links followed: those of a folder in the order of their names, then its folders'.
fn pictures_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut pictures = Vec::new();
    let mut stack = vec![dir.to_path_buf()];
    // Real paths of the folders seen, so that links that lead back up do not go round for ever.
    let mut seen = BTreeSet::new();
    while let Some(folder) = stack.pop() {
        if !seen.insert(std::fs::canonicalize(&folder).map_err(Error::io("read the folder", &folder))?) {
            continue;
        }
        let (folders, files): (Vec<_>, Vec<_>) = sorted_entries(&folder)?.into_iter().partition(|path| path.is_dir());
        pictures.extend(files.into_iter().filter(|path| is_picture(path)));
        stack.extend(folders.into_iter().rev());
    }
    Ok(pictures)
}

/// Holds out a share of each class.
fn split(samples: Vec<Sample>, classes: usize, share: f64, seed: u64) -> (Vec<Sample>, Vec<Sample>) {
    let mut by_class = vec![Vec::new(); classes];
    for sample in samples {
        by_class[sample.label].push(sample);
    }
    let (mut train, mut val) = (Vec::new(), Vec::new());
    for (label, pictures) in by_class.into_iter().enumerate() {
        let count = pictures.len();
        let held_out = match count {
            0 | 1 => 0,
            _ => ((count as f64 * share).round() as usize).clamp(1, count - 1),
        };
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(label as u64);
        let mut order: Vec<usize> = (0..count).collect();
        order.shuffle(&mut rng);
        let chosen: BTreeSet<usize> = order.into_iter().take(held_out).collect();
        for (i, sample) in pictures.into_iter().enumerate() {
            if chosen.contains(&i) { val.push(sample) } else { train.push(sample) }
        }
    }
    (train, val)
}
