//! Compiled kernels on disk, so that they are compiled once a machine.
//!
//! An entry is named by a hash of everything that decides it: source, target and compiler. It is written beside and renamed,
//! so that processes do not disturb each other, and it ends with a checksum, so that a damaged one is made again.

use fnv::FnvHasher;
use std::hash::Hasher;
use std::path::{Path, PathBuf};

/// Where entries lie: `$HONE_CACHE`, else the user's cache folder. `None` if there is no such place.
pub fn folder() -> Option<PathBuf> {
    let given = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    given("HONE_CACHE")
        .or_else(|| given("XDG_CACHE_HOME").map(|p| p.join("hone")))
        .or_else(|| given("LOCALAPPDATA").map(|p| p.join("hone")))
        .or_else(|| given("HOME").map(|p| p.join(".cache/hone")))
}

/// FNV-1a, 64 bits: the same on every machine and in every version of the standard library.
fn hash(seed: u64, parts: &[&[u8]]) -> u64 {
    let mut hasher = FnvHasher::with_key(FnvHasher::default().finish() ^ seed);
    for part in parts {
        hasher.write(&(part.len() as u64).to_le_bytes());
        hasher.write(part);
    }
    hasher.finish()
}

/// The name of an entry: what it is, and a hash of all that it depends on.
pub fn key(name: &str, suffix: &str, depends_on: &[&str]) -> String {
    let parts: Vec<&[u8]> = depends_on.iter().map(|s| s.as_bytes()).collect();
    format!("{name}-{:016x}{:016x}.{suffix}", hash(0, &parts), hash(1, &parts))
}

/// The entry's bytes; made by `make`, and kept, if it is not there or damaged. A cache that cannot be written is no error.
pub fn get_or_make<E>(
    folder: Option<&Path>,
    key: &str,
    make: impl FnOnce() -> Result<Vec<u8>, E>,
) -> Result<Vec<u8>, E> {
    let path = folder.map(|folder| folder.join(key));
    if let Some(bytes) = path.as_deref().and_then(read) {
        return Ok(bytes);
    }
    let bytes = make()?;
    if let Some(path) = path {
        let mut sealed = bytes.clone();
        sealed.extend_from_slice(&hash(2, &[&bytes]).to_le_bytes());
        let written = path.parent().map(std::fs::create_dir_all).transpose();
        if written.is_ok() {
            let _ = crate::weights::write_atomically(&path, |file| std::io::Write::write_all(file, &sealed));
        }
    }
    Ok(bytes)
}

fn read(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = std::fs::read(path).ok()?;
    let at = bytes.len().checked_sub(8)?;
    let sum = bytes.split_off(at);
    (hash(2, &[&bytes]).to_le_bytes() == sum[..]).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_made_once_and_again_when_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let name = key("x", "cubin", &["source", "sm_90"]);
        assert_ne!(name, key("x", "cubin", &["source", "sm_80"]));
        assert_ne!(key("x", "cubin", &["ab", "c"]), key("x", "cubin", &["a", "bc"]));
        let mut made = 0;
        let mut get = || {
            get_or_make(Some(folder.path()), &name, || {
                made += 1;
                Ok::<_, ()>(vec![7; 100])
            })
            .unwrap()
        };
        assert_eq!((get(), get()), (vec![7; 100], vec![7; 100]));
        let path = folder.path().join(&name);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[50] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(get(), vec![7; 100]);
        std::fs::write(&path, b"short").unwrap();
        assert_eq!(get(), vec![7; 100]);
        assert_eq!(made, 3);
        // A folder that cannot be made is no error.
        let nowhere = path.join("below a file");
        assert_eq!(get_or_make(Some(&nowhere), &name, || Ok::<_, ()>(vec![1])), Ok(vec![1]));
    }
}
