//! Folders of labelled pictures, as torchvision's ImageFolder reads them: a folder for each class.
//!
//! Classes are numbered in the order of their names, by code point. Their pictures are found at any depth and sorted as
//! ImageFolder sorts them; unlike there, hidden files and folders are passed over.

use super::split::{Split, hold_out};
use super::walk::{describe_others, dotted_extensions, folders_in, holds_pictures, pictures_below};
use crate::error::{Error, Result};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// The layouts, for error messages.
const LAYOUTS: &str = "pictures are looked for in train/CLASS/ and val/CLASS/, or in CLASS/";
/// What people call the parts of a data set, in lower case.
const PARTS: [&str; 8] = ["train", "training", "val", "valid", "validation", "dev", "test", "testing"];
/// Names in a message before it says "and so many more".
const MAX_LISTED: usize = 20;

/// A picture and its class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The file.
    pub path: PathBuf,
    /// Index among the classes.
    pub label: usize,
}

/// Pictures to train and to validate with.
#[derive(Clone, Debug, PartialEq)]
pub struct Dataset {
    /// Names of the classes, sorted.
    pub classes: Vec<String>,
    /// For training, in the order of their labels.
    pub train: Vec<Sample>,
    /// For validation, in the order of their labels.
    pub val: Vec<Sample>,
    /// Where the division in two comes from.
    pub split: Split,
    /// What the user should know about the folder, a line each.
    pub warnings: Vec<String>,
}

/// A folder of class folders: the name and the pictures of each class, sorted by name.
struct ClassFolders {
    root: PathBuf,
    classes: Vec<(String, Vec<PathBuf>)>,
}

impl Dataset {
    /// Reads the folder `dir`, in one of three layouts:
    ///
    /// - `train/CLASS/PICTURE` and `val/CLASS/PICTURE`;
    /// - `train/CLASS/PICTURE` alone;
    /// - `CLASS/PICTURE`.
    ///
    /// In the latter two the share `val_split` of each class, between 0 and 1, is held out for validation: at least one
    /// picture of each class that has two, the same ones for the same `seed`. A validation folder of any other name (`valid`,
    /// `test`) is not used, and a warning says so.
    ///
    /// Errors: [`Error::Data`] if there are fewer than two classes, a class has no pictures, `val` has a class that `train`
    /// lacks or has no pictures at all, or `dir` is in no such layout; [`Error::Config`] if `val_split` is needed and not
    /// between 0 and 1; [`Error::Io`] if a folder cannot be read.
    pub fn open(dir: &Path, val_split: f64, seed: u64) -> Result<Dataset> {
        check_folder(dir)?;
        let (train, val) = (dir.join("train"), dir.join("val"));
        if !has_folders(&train)? {
            reject_misnamed_parts(dir)?;
            return Dataset::from_one(ClassFolders::open_complete(dir)?, val_split, seed);
        }
        let train = ClassFolders::open_complete(&train)?;
        if val.is_dir() {
            return Dataset::from_two(train, ClassFolders::open(&val)?);
        }
        let mut dataset = Dataset::from_one(train, val_split, seed)?;
        let unused = folders_in(dir)?.into_iter().filter(|folder| !folder.ends_with("train") && is_part(folder));
        dataset
            .warnings
            .extend(unused.map(|f| format!("{}: not used; rename it to val to validate with it", f.display())));
        Ok(dataset)
    }

    fn from_two(train: ClassFolders, val: ClassFolders) -> Result<Dataset> {
        let labels = train.labels();
        if let Some((unknown, _)) = val.classes.iter().find(|(name, _)| !labels.contains_key(name.as_str())) {
            let problem = format!("class {unknown:?} is not in {} ({})", train.root.display(), list(&train.names()));
            return Err(Error::data(&val.root, problem, "give the class folders of train and val the same names"));
        }
        if val.classes.iter().all(|(_, pictures)| pictures.is_empty()) {
            let hint =
                format!("put some in val/CLASS/ ({}), or remove it to hold out some of train", dotted_extensions());
            return Err(Error::data(&val.root, "no pictures to validate with", hint));
        }
        let validated = |name: &str| val.classes.iter().any(|(other, pictures)| other == name && !pictures.is_empty());
        let missing = train.names().into_iter().filter(|name| !validated(name));
        let warnings = missing.map(|n| format!("{}: no pictures of class {n:?} to validate with", val.root.display()));
        let warnings = warnings.collect();
        let val = val.samples(&labels);
        let classes = train.names();
        Ok(Dataset { classes, train: train.samples(&labels), val, split: Split::Folders, warnings })
    }

    fn from_one(all: ClassFolders, share: f64, seed: u64) -> Result<Dataset> {
        if !(share > 0.0 && share < 1.0) {
            let hint = "give a share of the pictures between 0 and 1, such as 0.2, or a val folder";
            return Err(Error::config(format!("cannot hold out {share} of the pictures for validation"), hint));
        }
        let (classes, root) = (all.names(), all.root.display().to_string());
        let single = all.classes.iter().filter(|(_, pictures)| pictures.len() == 1);
        let mut warnings: Vec<String> = single
            .map(|(name, _)| format!("{root}: one picture of class {name:?}, which leaves none to validate with"))
            .collect();
        let samples = all.samples(&all.labels());
        let total = samples.len();
        let (train, val) = hold_out(samples, classes.len(), share, seed);
        warnings.insert(0, format!("{root}: no val folder, held out {} of {total} pictures", val.len()));
        Ok(Dataset { classes, train, val, split: Split::Seeded { share, seed }, warnings })
    }
}

/// Labelled pictures to evaluate a model with the given `classes` on: those of `dir/val/CLASS/` if there is such a folder,
/// else all of `dir/CLASS/`. Labels are places in `classes`. Classes without pictures are no error.
///
/// Errors: [`Error::Data`] if a folder is none of the classes, or there are no pictures; [`Error::Io`] if a folder cannot be
/// read.
pub fn open_evaluation(dir: &Path, classes: &[String]) -> Result<Vec<Sample>> {
    check_folder(dir)?;
    let val = dir.join("val");
    let found = ClassFolders::open(if has_folders(&val)? { &val } else { dir })?;
    let labels: HashMap<&str, usize> = classes.iter().enumerate().map(|(label, name)| (name.as_str(), label)).collect();
    if let Some((unknown, _)) = found.classes.iter().find(|(name, _)| !labels.contains_key(name.as_str())) {
        let problem =
            format!("folder {unknown:?} is none of the model's {} classes ({})", classes.len(), list(classes));
        let hint = match unknown.as_str() {
            "train" => format!("to evaluate on the training pictures, give {}", dir.join("train").display()),
            _ => "name the folders after the model's classes, or remove it".into(),
        };
        return Err(Error::data(&found.root, problem, hint));
    }
    let samples = found.samples(&labels);
    if samples.is_empty() {
        let hint = format!("pictures are looked for in val/CLASS/, or in CLASS/ ({})", dotted_extensions());
        return Err(Error::data(&found.root, format!("no pictures{}", describe_others(&found.root)?), hint));
    }
    Ok(samples)
}

impl ClassFolders {
    fn open(root: &Path) -> Result<Self> {
        let mut classes = Vec::new();
        for folder in folders_in(root)? {
            let Some(name) = folder.file_name().and_then(|name| name.to_str()) else {
                return Err(Error::data(&folder, "the name of this class folder is not UTF-8", "rename it"));
            };
            classes.push((name.to_string(), pictures_below(&folder)?));
        }
        Ok(ClassFolders { root: root.to_path_buf(), classes })
    }

    /// With two classes at least, and pictures of each.
    fn open_complete(root: &Path) -> Result<Self> {
        let this = ClassFolders::open(root)?;
        if this.classes.len() < 2 {
            return Err(this.too_few_classes()?);
        }
        let empty: Vec<_> = this.classes.iter().filter(|(_, pictures)| pictures.is_empty()).collect();
        if empty.is_empty() {
            return Ok(this);
        }
        let mut described = Vec::new();
        for (name, _) in &empty {
            described.push(format!("{name}{}", describe_others(&root.join(name))?));
        }
        let problem = format!("no pictures of {} of {} classes: {}", empty.len(), this.classes.len(), list(&described));
        let hint = format!("add pictures ({}) or remove the folders; {LAYOUTS}", dotted_extensions());
        Err(Error::data(root, problem, hint))
    }

    fn too_few_classes(&self) -> Result<Error> {
        let mut problem = match self.classes.first() {
            None => "no class folders".to_string(),
            Some((name, _)) => format!("one class folder only, {name:?}"),
        };
        if holds_pictures(&self.root)? {
            problem += ", and pictures that are in none";
        }
        let mut hint = format!("{LAYOUTS}, for two classes at least ({})", dotted_extensions());
        // A folder around the data set, as archives often have.
        if let Some((name, _)) = self.classes.first() {
            let inner = self.root.join(name);
            if folders_in(&inner)?.len() >= 2 || has_folders(&inner.join("train"))? {
                hint = format!("perhaps {} is meant; {hint}", inner.display());
            }
        }
        Ok(Error::data(&self.root, problem, hint))
    }

    fn names(&self) -> Vec<String> {
        self.classes.iter().map(|(name, _)| name.clone()).collect()
    }

    fn labels(&self) -> HashMap<&str, usize> {
        self.classes.iter().enumerate().map(|(label, (name, _))| (name.as_str(), label)).collect()
    }

    /// All pictures. Every class must be among `labels`.
    fn samples(&self, labels: &HashMap<&str, usize>) -> Vec<Sample> {
        let of_class = |(name, pictures): &(String, Vec<PathBuf>)| {
            let label = labels[name.as_str()];
            pictures.iter().map(|path| Sample { path: path.clone(), label }).collect::<Vec<_>>()
        };
        self.classes.iter().flat_map(of_class).collect()
    }
}

fn check_folder(dir: &Path) -> Result<()> {
    let problem = match std::fs::metadata(dir) {
        Ok(metadata) if metadata.is_dir() => return Ok(()),
        Ok(_) => "a file, not a folder of pictures".into(),
        Err(error) => format!("cannot open the folder of pictures ({error})"),
    };
    Err(Error::data(dir, problem, format!("give a folder that exists; {LAYOUTS} ({})", dotted_extensions())))
}

/// Whether `dir` is a folder with folders in it.
fn has_folders(dir: &Path) -> Result<bool> {
    Ok(dir.is_dir() && !folders_in(dir)?.is_empty())
}

/// Whether the folder is called like a part of a data set.
fn is_part(folder: &Path) -> bool {
    let name = folder.file_name().map(|name| name.to_string_lossy().to_lowercase());
    name.is_some_and(|name| PARTS.contains(&name.as_str()))
}

/// Before folders are taken for classes: `Train` and `Test` are none, and to tell them apart is no use to anyone. (`train`
/// among `bus` and `ship` is, and holds pictures rather than folders.)
fn reject_misnamed_parts(dir: &Path) -> Result<()> {
    let folders = folders_in(dir)?;
    let mut parts = Vec::new();
    for folder in folders.iter().filter(|folder| is_part(folder)) {
        let holds_classes = has_folders(folder)? && !holds_pictures(folder)?;
        if holds_classes || folders.iter().all(|folder| is_part(folder)) {
            parts.push(folder.file_name().unwrap_or_default().to_string_lossy().into_owned());
        }
    }
    if parts.is_empty() {
        return Ok(());
    }
    let problem = format!("{} look like parts of a data set and not like classes", list(&parts));
    let hint = format!("call the parts train and val, with class folders in each; {LAYOUTS}");
    Err(Error::data(dir, problem, hint))
}

/// Names for a message.
fn list(names: &[String]) -> String {
    let listed = names[..names.len().min(MAX_LISTED)].join(", ");
    match names.len().checked_sub(MAX_LISTED) {
        None | Some(0) => listed,
        Some(more) => format!("{listed} and {more} more"),
    }
}
