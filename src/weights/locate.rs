//! Where the bundled weights are.

use crate::error::{Error, Result};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The bundled file, from the project's root.
const BUNDLED: &str = "weights/resnet18-tinyimagenet.safetensors";
/// Folders above the executable that are searched: `target/release/hone` lies two below the project's root.
const LEVELS: usize = 4;

/// The bundled weights: what `$HONE_WEIGHTS` (given as `environment`) names, a file or a folder that holds one; else the
/// file in the working directory, or beside the executable or in a folder above it.
pub fn locate_default(environment: Option<OsString>) -> Result<PathBuf> {
    let hint = "give --weights FILE, or set HONE_WEIGHTS to the file";
    let name = Path::new(BUNDLED).file_name().unwrap_or_default();
    if let Some(value) = environment.filter(|value| !value.is_empty()) {
        let given = PathBuf::from(value);
        let places = [given.clone(), given.join(name), given.join(BUNDLED)];
        return places.into_iter().find(|place| place.is_file()).ok_or_else(|| {
            Error::file(&given, "HONE_WEIGHTS names neither a file nor a folder with the bundled weights", hint)
        });
    }
    let executable = std::env::current_exe().and_then(|path| path.canonicalize()).ok();
    let above = executable.iter().flat_map(|exe| exe.ancestors().skip(1).take(LEVELS));
    let mut places = vec![PathBuf::from(BUNDLED)];
    places.extend(executable.iter().filter_map(|exe| Some(exe.parent()?.join(name))));
    places.extend(above.map(|folder| folder.join(BUNDLED)));
    match places.iter().find(|place| place.is_file()) {
        Some(found) => Ok(found.clone()),
        None => {
            let list = places.iter().map(|place| place.display().to_string()).collect::<Vec<_>>().join(", ");
            Err(Error::config(format!("the bundled weights are in none of: {list}"), hint))
        }
    }
}
