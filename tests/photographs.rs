//! The classic exercise, ants and bees, on real photographs. They are not part of the project: the tests look for them in
//! `$HONE_ANTS_BEES` or beside the project, and say so where they are missing.

use hone::train::{Control, Outcome, TrainConfig, Weights, fit};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

fn photographs() -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data/ants-bees");
    let folder = std::env::var_os("HONE_ANTS_BEES").map_or(beside, PathBuf::from);
    if !folder.join("train").is_dir() {
        println!("skipped: no photographs in {}; set HONE_ANTS_BEES to a folder that has them", folder.display());
        return None;
    }
    Some(folder)
}

fn run(data: &Path, weights: Weights, epochs: usize) -> Outcome {
    let out = TempDir::new().unwrap();
    let config = TrainConfig { epochs, ..TrainConfig::new(data.to_path_buf(), weights) };
    fit(&config, &out.path().join("run"), Control::default(), &mut ()).unwrap()
}

#[test]
fn the_default_recipe_beats_an_untrained_backbone() {
    let Some(data) = photographs() else { return };
    let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("weights/resnet18-tinyimagenet.safetensors");
    let tuned = run(&data, Weights::File(bundled), 10).best.val_accuracy.unwrap();
    let untrained = run(&data, Weights::Random, 10).best.val_accuracy.unwrap();
    println!("validation accuracy: {tuned:.4} with the bundled weights, {untrained:.4} with an untrained backbone");
    assert!(tuned >= 0.78 && tuned >= untrained + 0.1, "{tuned} against {untrained}");
}
