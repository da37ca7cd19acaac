//! What the tests of the program share.

use hone::data::demo::write_pictures;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use tempfile::TempDir;

/// Four classes of eight training and four validation pictures.
pub static PICTURES: LazyLock<TempDir> = LazyLock::new(|| {
    let dir = TempDir::new().unwrap();
    write_pictures(dir.path(), 8, 4, 80, 1).unwrap();
    dir
});

/// The weights that come with the project.
pub fn bundled() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("weights/resnet18-tinyimagenet.safetensors")
}

/// A path as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
