//! Picture files in folders and below, in an order that does not depend on the file system.

use crate::error::{Error, Result};
use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};

/// Extensions of pictures that can be decoded, in lower case; files are matched in any case.
pub const EXTENSIONS: [&str; 10] = ["jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff"];

/// Picture files for prediction: files as they are given, whatever their names, and in place of a folder the pictures in it
/// and below, sorted.
///
/// Errors: [`Error::Io`] for a path that does not exist or cannot be read, [`Error::Data`] for a folder without pictures,
/// [`Error::Config`] if there are no paths.
pub fn expand_inputs(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    if paths.is_empty() {
        return Err(Error::config("no pictures given", "name picture files, or folders that hold some"));
    }
    let mut files = Vec::new();
    for path in paths {
        if !fs::metadata(path).map_err(Error::io("open", path))?.is_dir() {
            files.push(path.clone());
            continue;
        }
        let found = pictures_below(path)?;
        if found.is_empty() {
            let hint = format!("put pictures there ({})", dotted_extensions());
            return Err(Error::data(path, format!("no pictures in it or below{}", describe_others(path)?), hint));
        }
        files.extend(found);
    }
    Ok(files)
}

/// [`EXTENSIONS`] for messages.
pub(super) fn dotted_extensions() -> String {
    EXTENSIONS.map(|extension| format!(".{extension}")).join(" ")
}

/// Pictures in `dir` and below, in the order of torchvision's ImageFolder: by the path of their folder as a string, then by
/// name.
pub(super) fn pictures_below(dir: &Path) -> Result<Vec<PathBuf>> {
    Ok(files_below(dir)?.into_iter().filter(|path| is_picture(path)).collect())
}

/// Whether `dir` itself holds pictures.
pub(super) fn holds_pictures(dir: &Path) -> Result<bool> {
    Ok(read_folder(dir)?.files.iter().any(|name| is_picture(Path::new(name))))
}

/// The folders in `dir`, sorted.
pub(super) fn folders_in(dir: &Path) -> Result<Vec<PathBuf>> {
    Ok(read_folder(dir)?.folders.iter().map(|folder| dir.join(&folder.name)).collect())
}

/// For messages: what files there are in a folder without pictures, as in " (but 12 files .heic, .txt)".
pub(super) fn describe_others(dir: &Path) -> Result<String> {
    let files = files_below(dir)?;
    let name = |path: &PathBuf| path.extension().map_or("without extension".into(), |e| format!(".{}", e.display()));
    let extensions: BTreeSet<String> = files.iter().map(name).collect();
    let plural = if files.len() == 1 { "" } else { "s" };
    Ok(match files.len() {
        0 => String::new(),
        count => format!(" (but {count} file{plural} {})", Vec::from_iter(extensions.into_iter().take(5)).join(", ")),
    })
}

fn is_picture(path: &Path) -> bool {
    let extension = path.extension().and_then(OsStr::to_str).map(str::to_ascii_lowercase);
    extension.is_some_and(|extension| EXTENSIONS.contains(&extension.as_str()))
}

/// All files in `dir` and below; links are followed. What `os.walk(dir, followlinks=True)` finds, sorted.
fn files_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let resolve = |folder: &Path| fs::canonicalize(folder).map_err(Error::io("read the folder", folder));
    let real = resolve(dir)?;
    // Real paths of the folders that need no visit: those visited, so that links in a circle come to an end, and those above,
    // so that a link upwards does not add the pictures of other classes to this one.
    let mut seen: BTreeSet<PathBuf> = real.ancestors().skip(1).map(Path::to_path_buf).collect();
    let mut visited = Vec::new();
    let mut to_visit = vec![(dir.to_path_buf(), real)];
    while let Some((folder, real)) = to_visit.pop() {
        if !seen.insert(real.clone()) {
            continue;
        }
        let Entries { folders, files } = read_folder(&folder)?;
        for Folder { name, is_link } in folders.into_iter().rev() {
            let path = folder.join(&name);
            let real = if is_link { resolve(&path)? } else { real.join(&name) };
            to_visit.push((path, real));
        }
        visited.push((folder, files));
    }
    // As strings, where "a-b" comes before "a/b". Paths compare by their parts, and there it comes after.
    visited.sort_by(|(a, _), (b, _)| by_bytes(a.as_os_str(), b.as_os_str()));
    Ok(visited.iter().flat_map(|(folder, files)| files.iter().map(|name| folder.join(name))).collect())
}

/// What a folder holds itself, sorted by name.
struct Entries {
    folders: Vec<Folder>,
    files: Vec<OsString>,
}

struct Folder {
    name: OsString,
    is_link: bool,
}

/// Reads one folder. What is hidden is passed over (`.git`, `.ipynb_checkpoints`, the `._NAME` that macOS leaves beside
/// NAME), and so is the `__MACOSX` of its archives: not pictures, whatever they are called.
fn read_folder(dir: &Path) -> Result<Entries> {
    let (mut folders, mut files) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(dir).map_err(Error::io("read the folder", dir))? {
        let entry = entry.map_err(Error::io("read the folder", dir))?;
        let name = entry.file_name();
        if name.as_encoded_bytes().starts_with(b".") || name == "__MACOSX" {
            continue;
        }
        // The kind comes with the entry for nothing; only links are asked where they lead. A broken one counts as a file, as
        // in ImageFolder, and is told as such when it is to be read.
        let kind = entry.file_type().map_err(Error::io("read the folder", dir))?;
        let is_link = kind.is_symlink();
        if kind.is_dir() || is_link && entry.path().is_dir() {
            folders.push(Folder { name, is_link });
        } else {
            files.push(name);
        }
    }
    folders.sort_by(|a, b| by_bytes(&a.name, &b.name));
    files.sort_by(|a, b| by_bytes(a, b));
    Ok(Entries { folders, files })
}

/// Python sorts strings by code point, which is the order of their bytes in UTF-8.
fn by_bytes(a: &OsStr, b: &OsStr) -> std::cmp::Ordering {
    a.as_encoded_bytes().cmp(b.as_encoded_bytes())
}
