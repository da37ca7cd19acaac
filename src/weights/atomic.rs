//! Files that are whole or not there at all.

use crate::error::{Error, Result};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use tempfile::Builder;

/// Names of unfinished files begin and end with these.
const MARKS: (&str, &str) = (".hone-", ".partial");

/// Removes the unfinished files that a killed program has left in `folder`.
pub fn remove_partial(folder: &Path) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if name.to_str().is_some_and(|name| name.starts_with(MARKS.0) && name.ends_with(MARKS.1)) {
            // What cannot be removed is in nobody's way.
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Writes `path` through `body`: into a file beside it that takes its name once everything is on disk. If anything fails,
/// an earlier file of that name stays as it was, and the unfinished one is removed.
pub fn write_atomically(path: &Path, body: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if path.is_dir() {
        return Err(Error::file(path, "is a folder, expected a file to write", "choose another name"));
    }
    let mut builder = Builder::new();
    builder.prefix(MARKS.0).suffix(MARKS.1);
    // Temporary files are private by default; what takes their name should be as readable as any other file.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let file = builder.tempfile_in(folder).map_err(Error::io("write", path))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    body(&mut out).and_then(|()| out.flush()).map_err(Error::io("write", path))?;
    let file = out.into_inner().map_err(|e| Error::io("write", path)(e.into_error()))?;
    file.as_file().sync_all().map_err(Error::io("write", path))?;
    file.persist(path).map_err(|e| Error::io("write", path)(e.error))?;
    // The new name is safe once its folder is on disk too; not every system lets a folder be opened for that.
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
    Ok(())
}
