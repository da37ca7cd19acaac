//! Training any part of the network, and never losing a run: the program, killed and resumed.

mod common;

use common::{PICTURES, bundled, text};
use hone::data::demo::write_pictures;
use hone::train::{Control, Depth, Outcome, TrainConfig, Weights, fit};
use hone::weights::WeightsFile;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;
use tempfile::TempDir;

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hone"));
    command.args(args).env("HONE_WEIGHTS", bundled()).env_remove("HONE_ISA");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Arguments of a small run into `out`, with `extra` ones.
fn arguments<'a>(out: &'a Path, extra: &[&'a str]) -> Vec<&'a str> {
    let fixed =
        ["train", text(PICTURES.path()), "--out", text(out), "--image-size", "64", "--batch-size", "8", "--json"];
    [&fixed[..], extra].concat()
}

fn lines(output: &Output) -> Vec<Value> {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Trains; the epochs' figures that do not depend on the clock, and the last model's bytes.
fn train(extra: &[&str]) -> (Vec<[Value; 4]>, Vec<u8>) {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("run");
    let lines = lines(&command(&arguments(&out, extra)).output().unwrap());
    let epochs = lines.iter().filter(|line| line["event"] == "epoch");
    let figures = epochs
        .map(|e| ["train_loss", "train_accuracy", "val_loss", "val_accuracy"].map(|key| e[key].clone()))
        .collect();
    (figures, fs::read(out.join("last.safetensors")).unwrap())
}

fn first_loss(figures: &[[Value; 4]]) -> f64 {
    figures[0][0].as_f64().unwrap()
}

#[test]
fn every_depth_learns_and_caching_changes_no_bit() {
    for depth in ["layer4", "layer2", "all"] {
        let fixed = ["--train", depth, "--epochs", "2", "--lr-backbone", "1e-4"];
        let cached = train(&fixed);
        let plain = train(&[&fixed[..], &["--cache", "off"]].concat());
        assert!(cached == plain, "{depth}");
        let last = cached.0[1][0].as_f64().unwrap();
        assert!(last < first_loss(&cached.0), "{depth}: {last}");
    }
    // A budget of nothing is no cache at all.
    let small = train(&["--train", "layer4", "--epochs", "2", "--lr-backbone", "1e-4", "--cache-mb", "0"]);
    assert!(small == train(&["--train", "layer4", "--epochs", "2", "--lr-backbone", "1e-4"]));
}

#[test]
fn what_is_decided_by_the_seed_does_not_depend_on_threads() {
    let all = [
        "--epochs",
        "2",
        "--train",
        "layer3",
        "--augment",
        "strong",
        "--sampling",
        "balanced",
        "--class-weights",
        "balanced",
        "--label-smoothing",
        "0.1",
        "--ema",
        "0.9",
        "--optimizer",
        "adamw",
        "--schedule",
        "cosine",
        "--warmup-epochs",
        "0.5",
        "--clip-norm",
        "1",
    ];
    let run = |extra: &[&str]| train(&[&all[..], extra].concat());
    let one = run(&["--threads", "1"]);
    assert!(one == run(&["--threads", "3"]), "1 and 3 threads");
    assert!(one == run(&["--threads", "2", "--cache", "off"]), "decoded anew");
    assert!(one.1 != run(&["--seed", "1"]).1, "another seed");
}

fn library_run(config: TrainConfig) -> (Outcome, TempDir) {
    let dir = TempDir::new().unwrap();
    let outcome = fit(&config, &dir.path().join("run"), Control::default(), &mut ()).unwrap();
    (outcome, dir)
}

fn small_config() -> TrainConfig {
    let config = TrainConfig::new(PICTURES.path().to_path_buf(), Weights::File(bundled()));
    TrainConfig { image_size: 64, batch_size: 8, epochs: 2, ..config }
}

#[test]
fn frozen_layers_keep_every_bit_and_trained_ones_move() {
    let (_, dir) = library_run(TrainConfig { train: Depth::Layer3, ..small_config() });
    let (old, new) =
        (WeightsFile::open(&bundled()).unwrap(), WeightsFile::open(&dir.path().join("run/last.safetensors")).unwrap());
    for entry in old.entries().iter().filter(|e| !e.name.starts_with("fc.")) {
        let trained = entry.name.starts_with("layer3.") || entry.name.starts_with("layer4.");
        let same = match entry.name.ends_with("num_batches_tracked") {
            true => old.i64(&entry.name).unwrap() == new.i64(&entry.name).unwrap(),
            false => old.f32(&entry.name).unwrap() == new.f32(&entry.name).unwrap(),
        };
        assert_eq!(same, !trained, "{}", entry.name);
    }
}

#[test]
fn unfreezing_later_begins_as_the_head_alone() {
    let (head, _a) = library_run(TrainConfig { epochs: 3, ..small_config() });
    let later = TrainConfig { epochs: 3, train: Depth::Layer4, unfreeze_after: 2, ..small_config() };
    let (later, _b) = library_run(later);
    let losses = |o: &Outcome| o.epochs.iter().map(|e| (e.train_loss, e.val_loss)).collect::<Vec<_>>();
    assert_eq!(losses(&head)[..2], losses(&later)[..2]);
    assert_ne!(losses(&head)[2], losses(&later)[2]);
}

#[test]
fn parts_of_a_batch_add_up_to_it() {
    let (whole, _a) = library_run(small_config());
    let (parts, _b) = library_run(TrainConfig { accumulate: 3, ..small_config() });
    for (whole, parts) in whole.epochs.iter().zip(&parts.epochs) {
        assert!((whole.train_loss - parts.train_loss).abs() <= 1e-5);
    }
}

#[test]
fn patience_ends_a_run_that_does_not_improve() {
    // A rate so small that nothing changes after the first epoch but the loss's last digits, upwards or not.
    let config = TrainConfig { epochs: 50, lr: 1e-30, patience: Some(3), ..small_config() };
    let (outcome, _dir) = library_run(config);
    assert_eq!((outcome.epochs.len(), outcome.best.epoch), (4, 1));
}

#[test]
fn averages_are_what_is_evaluated_and_saved() {
    let (plain, a) = library_run(small_config());
    let (averaged, b) = library_run(TrainConfig { ema: Some(0.99), ..small_config() });
    assert_eq!(plain.epochs[0].train_loss, averaged.epochs[0].train_loss, "training is as without");
    assert_ne!(plain.epochs[0].val_loss, averaged.epochs[0].val_loss);
    let head =
        |dir: &TempDir| WeightsFile::open(&dir.path().join("run/last.safetensors")).unwrap().f32("fc.weight").unwrap();
    assert_ne!(head(&a), head(&b));
}

#[test]
fn a_loss_that_is_no_number_stops_the_run() {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("run");
    let extra = ["--optimizer", "sgd", "--lr", "1e38", "--epochs", "3"];
    let output = command(&arguments(&out, &extra)).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("step") && stderr.contains("1e38") && stderr.contains("--lr"), "{stderr}");
}

/// Everything at once, so that all state is needed to go on.
const DEMANDING: [&str; 16] = [
    "--train",
    "layer4",
    "--epochs",
    "3",
    "--augment",
    "strong",
    "--ema",
    "0.9",
    "--optimizer",
    "adamw",
    "--schedule",
    "one-cycle",
    "--unfreeze-after",
    "1",
    "--checkpoint-seconds",
    "0.05",
];

/// Models and figures that a finished run must agree in with one that was never interrupted.
fn remains(run: &Path) -> (Vec<u8>, Vec<u8>, Vec<String>) {
    let csv = fs::read_to_string(run.join("metrics.csv")).unwrap();
    // The last two columns are times.
    let figures = csv.lines().map(|line| line.rsplitn(3, ',').last().unwrap().to_string()).collect();
    let read = |name: &str| fs::read(run.join(name)).unwrap();
    (read("model.safetensors"), read("last.safetensors"), figures)
}

#[test]
fn killed_and_resumed_a_run_ends_with_the_same_bits() {
    let dir = TempDir::new().unwrap();
    let whole = dir.path().join("whole");
    assert!(command(&arguments(&whole, &DEMANDING)).output().unwrap().status.success());
    let want = remains(&whole);
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let mut kills = 0u64;
    for round in 0.. {
        let run = dir.path().join(format!("killed-{round}"));
        let mut args = arguments(&run, &DEMANDING);
        loop {
            let mut child = command(&args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            // Longer after many, so that a slow machine gets on between two as well.
            std::thread::sleep(Duration::from_millis(rng.random_range(20..900 + 10 * kills)));
            if let Some(status) = child.try_wait().unwrap() {
                assert!(status.success(), "round {round} after {kills} kills");
                break;
            }
            child.kill().unwrap();
            child.wait().unwrap();
            kills += 1;
            // Before its first file a run is not there to be resumed.
            if run.join("config.json").exists() {
                args = vec!["train", "--resume", text(&run), "--checkpoint-seconds", "0.05", "--json"];
            }
            assert!(kills < 400, "the run does not come to an end");
        }
        let got = remains(&run);
        assert_eq!(got.2, want.2, "round {round} after {kills} kills");
        assert!((&got.0, &got.1) == (&want.0, &want.1), "the models, round {round} after {kills} kills");
        let left: Vec<_> = fs::read_dir(&run).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left.len(), 5, "{left:?}");
        if kills >= 20 {
            break;
        }
    }
    // A finished run has nothing to go on with, and says what came of it.
    let again = lines(&command(&["train", "--resume", text(&whole), "--json"]).output().unwrap());
    assert_eq!(again.last().unwrap()["event"], "done");
    assert!(remains(&whole) == want);
}

#[cfg(unix)]
#[test]
fn ctrl_c_saves_and_says_how_to_go_on() {
    let dir = TempDir::new().unwrap();
    let (whole, run) = (dir.path().join("whole"), dir.path().join("run"));
    let extra = ["--train", "layer4", "--epochs", "12", "--augment", "standard"];
    assert!(command(&arguments(&whole, &extra)).output().unwrap().status.success());
    let mut child = command(&arguments(&run, &extra)).spawn().unwrap();
    // Once the first epoch is printed there is something to save.
    let mut stdout = std::io::BufReader::new(child.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut stdout, &mut String::new()).unwrap();
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    assert!(stderr.contains("hone train --resume"), "{stderr}");
    assert!(command(&["train", "--resume", text(&run)]).output().unwrap().status.success());
    let (got, want) = (remains(&run), remains(&whole));
    assert_eq!(got.2, want.2);
    assert!((got.0, got.1) == (want.0, want.1), "the models");
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_the_pass_before_the_first_epoch_too_and_the_run_goes_on_from_anywhere() {
    let dir = TempDir::new().unwrap();
    write_pictures(&dir.path().join("data"), 100, 2, 96, 5).unwrap();
    let weights = dir.path().join("weights.safetensors");
    fs::copy(bundled(), &weights).unwrap();
    let args = ["train", "data", "--weights", "weights.safetensors", "--image-size", "96", "--epochs", "2", "--out"];
    let start = |out: &str| command(&[&args[..], &[out, "--json"]].concat()).current_dir(dir.path()).spawn().unwrap();
    assert!(start("whole").wait_with_output().unwrap().status.success());
    let mut child = start("run");
    // The last note before the pictures are decoded is of the head.
    let mut stderr = std::io::BufReader::new(child.stderr.take().unwrap());
    let mut said = String::new();
    while !said.contains("head") {
        assert!(std::io::BufRead::read_line(&mut stderr, &mut said).unwrap() > 0, "{said}");
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    std::io::Read::read_to_string(&mut stderr, &mut said).unwrap();
    assert_eq!(output.status.code(), Some(130), "{said}");
    assert!(said.contains("hone train --resume run") && output.stdout.is_empty(), "{said}");
    // Everything but the pictures is in the run's folder.
    fs::remove_file(weights).unwrap();
    assert!(command(&["train", "--resume", text(&dir.path().join("run"))]).output().unwrap().status.success());
    assert!(remains(&dir.path().join("run")) == remains(&dir.path().join("whole")));
}

#[cfg(unix)]
#[test]
fn when_the_disk_is_full_the_last_checkpoint_survives() {
    let dir = TempDir::new().unwrap();
    let run = dir.path().join("run");
    let mut child = command(&arguments(&run, &["--train", "layer4", "--epochs", "500"])).spawn().unwrap();
    let mut stdout = std::io::BufReader::new(child.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut stdout, &mut String::new()).unwrap();
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(130));
    let checkpoint = run.join("checkpoint.safetensors");
    let before = fs::read(&checkpoint).unwrap();
    // A limit on the size of files makes writes fail as a full disk does.
    let script = "trap '' XFSZ; ulimit -f 2000; exec \"$0\" train --resume \"$1\" --checkpoint-seconds 0";
    let output = Command::new("bash")
        .args(["-c", script, env!("CARGO_BIN_EXE_hone"), text(&run)])
        .env("HONE_WEIGHTS", bundled())
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("cannot write") && stderr.matches("hone: ").count() == 1, "{stderr}");
    assert!(fs::read(&checkpoint).unwrap() == before);
    assert!(fs::read_dir(&run).unwrap().all(|e| !e.unwrap().file_name().to_string_lossy().ends_with(".partial")));
}

#[test]
fn other_pictures_are_not_taken_for_the_runs_own() {
    let dir = TempDir::new().unwrap();
    let data = dir.path().join("data");
    write_pictures(&data, 4, 2, 64, 3).unwrap();
    let run = dir.path().join("run");
    let args = ["train", text(&data), "--out", text(&run), "--image-size", "64", "--epochs", "1"];
    assert!(command(&args).output().unwrap().status.success());
    // An unfinished run, by its own record.
    let finished = run.join("checkpoint.safetensors");
    let bytes = fs::read(&finished).unwrap();
    let open = String::from_utf8_lossy(&bytes).replace("\\\"finished\\\":true", "\\\"finished\\\":false");
    let header = open.trim_end_matches(' ')[8..].to_string();
    let framed = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
    fs::write(&finished, framed).unwrap();
    fs::rename(data.join("train/wood/wood-000.jpg"), data.join("train/wood/another.jpg")).unwrap();
    let output = command(&["train", "--resume", text(&run)]).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && stderr.contains("not those"), "{stderr}");
    let missing = command(&["train", "--resume", "no/run"]).output().unwrap();
    assert!(String::from_utf8_lossy(&missing.stderr).contains("no/run/config.json"));
}
