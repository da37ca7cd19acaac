//! The program on the emulated grid, as a user runs it on a card.

use crate::support::require_device;
use std::path::Path;
use std::process::{Command, Output};

fn hone(arguments: &[&str], memory: Option<usize>) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hone"));
    command.args(arguments).env("HONE_CUDA", "emulator");
    if let Some(bytes) = memory {
        command.env("HONE_EMULATOR_MEMORY", bytes.to_string());
    }
    command.output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn doctor_checks_every_kernel() {
    require_device!();
    let output = hone(&["doctor"], None);
    let lines = text(&output.stdout);
    assert!(output.status.success(), "{lines}{}", text(&output.stderr));
    assert!(lines.contains("emulated grid") && lines.contains("checks passed"), "{lines}");
    for name in ["bf16 conv 7x7 of 3 channels", "gemm tensor cores, tf32", "f32 adam", "bf16 batch norm"] {
        assert!(lines.contains(name), "{name} in {lines}");
    }
    assert!(!lines.contains("WRONG"), "{lines}");
}

/// One line that says what is needed, what is free, and the batch that would fit.
#[test]
fn memory_that_does_not_suffice() {
    require_device!();
    let output = hone(&["bench", "forward", "--device", "cuda", "--batch", "64", "--size", "64"], Some(64 << 20));
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert_eq!(message.lines().count(), 1, "{message}");
    for part in ["out of memory", "MiB more are needed", "are free", "a batch of", "(it is 64)"] {
        assert!(message.contains(part), "{part} in {message}");
    }
}

#[test]
fn training_and_using_a_model() {
    require_device!();
    let folder = tempfile::tempdir().unwrap();
    let pictures = folder.path().join("pictures");
    hone::data::demo::write_pictures(&pictures, 4, 2, 48, 0).unwrap();
    let path = |p: &Path| p.to_str().unwrap().to_string();
    let (data, out) = (path(&pictures), path(&folder.path().join("run")));
    let arguments = ["train", &data, "--out", &out, "--device", "cuda", "--precision", "bf16", "--image-size", "32"];
    let output = hone(&[&arguments[..], &["--epochs", "2", "--batch-size", "4"]].concat(), None);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let model = path(&folder.path().join("run/model.safetensors"));
    let accuracy = |device: &str| {
        let output = hone(&["eval", &model, &data, "--device", device, "--json"], None);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        (value["accuracy"].as_f64().unwrap(), value["loss"].as_f64().unwrap())
    };
    let ((cuda, cuda_loss), (cpu, cpu_loss)) = (accuracy("cuda"), accuracy("cpu"));
    assert!(cuda == cpu && (cuda_loss - cpu_loss).abs() < 1e-4, "{cuda_loss} and {cpu_loss}");
}
