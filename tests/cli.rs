//! The program as a user runs it, on pictures it draws itself.

mod common;

use common::{PICTURES, bundled, text};
use hone::data::Preprocess;
use hone::data::demo::write_pictures;
use hone::nn::ResNet18;
use hone::train::model;
use hone::weights::{Data, NamedTensor, WeightsFile, save};
use serde_json::Value;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use tempfile::TempDir;

fn hone(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hone"));
    command.args(args).env("HONE_WEIGHTS", bundled()).env_remove("HONE_ISA").output().unwrap()
}

/// Runs and expects success; the JSON objects on stdout.
fn ok(args: &[&str]) -> Vec<Value> {
    let output = hone(args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {stderr}");
    let stdout = String::from_utf8(output.stdout).unwrap();
    stdout.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}"))).collect()
}

/// Runs and expects failure with this exit code and one line on stderr, which is returned.
fn fails(args: &[&str], code: i32) -> String {
    let output = hone(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    if code == 1 {
        let errors = stderr.lines().filter(|line| line.starts_with("hone: ")).count();
        assert_eq!(errors, 1, "one line: {stderr}");
    }
    stderr
}

/// Trains at 64 pixels and returns the printed objects and the run folder.
fn train(extra: &[&str]) -> (Vec<Value>, TempDir) {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("run");
    let fixed = ["train", text(PICTURES.path()), "--out", text(&out), "--image-size", "64", "--json", "--epochs", "3"];
    let lines = ok(&[&fixed, extra].concat());
    (lines, dir)
}

/// The figures of every epoch that do not depend on the clock.
fn figures(lines: &[Value]) -> Vec<[Value; 4]> {
    let epochs = lines.iter().filter(|line| line["event"] == "epoch");
    epochs.map(|e| ["train_loss", "train_accuracy", "val_loss", "val_accuracy"].map(|key| e[key].clone())).collect()
}

#[test]
fn train_eval_predict_inspect() {
    let (lines, dir) = train(&["--batch-size", "8", "--lr", "3e-3"]);
    let run = dir.path().join("run");
    assert_eq!(lines.len(), 4, "three epochs and the end: {lines:?}");
    for (i, epoch) in lines[..3].iter().enumerate() {
        assert_eq!((&epoch["epoch"], &epoch["epochs"]), (&Value::from(i + 1), &Value::from(3)));
        assert!(epoch["train_loss"].as_f64().unwrap() > 0.0 && epoch["images_per_second"].as_f64().unwrap() > 0.0);
        assert!(epoch["seconds"].as_f64().unwrap() > 0.0);
    }
    assert!(lines[2]["train_loss"].as_f64() < lines[0]["train_loss"].as_f64(), "it learns");
    let done = &lines[3];
    assert_eq!((done["event"].as_str(), &done["skipped"]), (Some("done"), &Value::Array(vec![])));
    let model = run.join("model.safetensors");
    assert_eq!(done["model"].as_str(), Some(text(&model)));
    for file in ["model.safetensors", "last.safetensors", "config.json", "metrics.csv", "checkpoint.safetensors"] {
        assert!(run.join(file).is_file(), "{file}");
    }
    assert_eq!(fs::read_dir(&run).unwrap().count(), 5, "nothing else");
    let record = fs::metadata(run.join("checkpoint.safetensors")).unwrap().len();
    assert!(record < 100_000, "of a finished run just the record is left, not {record} bytes");
    let csv = fs::read_to_string(run.join("metrics.csv")).unwrap();
    assert_eq!(csv.lines().count(), 4, "{csv}");
    let config: Value = serde_json::from_slice(&fs::read(run.join("config.json")).unwrap()).unwrap();
    assert_eq!((&config["settings"]["image_size"], &config["settings"]["lr"]), (&Value::from(64), &Value::from(3e-3)));

    // eval on the validation pictures gives what training said of the best epoch.
    let eval = &ok(&["eval", text(&model), text(PICTURES.path()), "--json"])[0];
    assert_eq!(eval["accuracy"], done["best_val_accuracy"]);
    let best = &lines[done["best_epoch"].as_u64().unwrap() as usize - 1];
    assert!((eval["loss"].as_f64().unwrap() - best["val_loss"].as_f64().unwrap()).abs() <= 1e-6);
    assert_eq!(eval["images"], 16);
    assert_eq!(eval["classes"], serde_json::json!(["bricks", "pebbles", "scales", "wood"]));
    let cells: Vec<u64> = eval["confusion"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|r| r.as_array().unwrap())
        .map(|c| c.as_u64().unwrap())
        .collect();
    assert_eq!((cells.len(), cells.iter().sum::<u64>()), (16, 16));
    let hits: u64 = cells.iter().step_by(5).sum();
    assert!((hits as f64 / 16.0 - eval["accuracy"].as_f64().unwrap()).abs() <= 1e-9);

    let wood = PICTURES.path().join("val/wood");
    let predictions = ok(&["predict", text(&model), text(&wood), "--top", "2", "--json"]);
    assert_eq!(predictions.len(), 4);
    for line in &predictions {
        let ranked = line["predictions"].as_array().unwrap();
        let p: Vec<f64> = ranked.iter().map(|r| r["probability"].as_f64().unwrap()).collect();
        assert!(
            line["file"].as_str().unwrap().contains("wood-") && p.len() == 2 && p[0] >= p[1] && p[0] + p[1] <= 1.0001
        );
    }

    let inspect = &ok(&["inspect", text(&model), "--json"])[0];
    assert_eq!((&inspect["resnet18"], &inspect["classes"]), (&Value::Bool(true), &Value::from(4)));
    let tensors = inspect["tensors"].as_array().unwrap();
    assert_eq!(tensors.len(), 122, "torchvision's state dict");
    for tensor in tensors {
        let counts = tensor["name"].as_str().unwrap().ends_with("num_batches_tracked");
        assert_eq!(tensor["dtype"], if counts { "I64" } else { "F32" });
    }
    assert_eq!(inspect["metadata"]["image_size"], "64");
    assert_eq!(inspect["metadata"]["resize"], "73");
    let people = String::from_utf8(hone(&["inspect", text(&model)]).stdout).unwrap();
    assert!(people.contains("layer4.1.bn2.running_var") && people.contains("can load, with 4 classes"));

    // Where a run already is, no other begins.
    let again = fails(&["train", text(PICTURES.path()), "--out", text(&run)], 1);
    assert!(again.contains("already holds"), "{again}");
}

#[test]
fn caching_changes_no_bit() {
    for bn in ["frozen", "batch"] {
        let (cached, a) = train(&["--bn", bn, "--batch-size", "12"]);
        let (plain, b) = train(&["--bn", bn, "--batch-size", "12", "--cache", "off"]);
        assert_eq!(figures(&cached).len(), 3);
        assert_eq!(figures(&cached), figures(&plain), "--bn {bn}");
        let model = |dir: &TempDir| fs::read(dir.path().join("run/last.safetensors")).unwrap();
        assert!(model(&a) == model(&b), "the same model, --bn {bn}");
    }
}

#[test]
fn threads_change_no_bit_but_seeds_do() {
    let run = |threads: &str, seed: &str| {
        let (lines, dir) = train(&["--threads", threads, "--seed", seed, "--bn", "batch"]);
        (figures(&lines), fs::read(dir.path().join("run/last.safetensors")).unwrap())
    };
    let one = run("1", "5");
    assert!(one == run("2", "5") && one == run("3", "5"), "1, 2 and 3 threads agree");
    assert_ne!(one.0, run("2", "6").0);
}

#[test]
fn stored_statistics_stay_and_batch_statistics_move() {
    let statistics = |dir: &TempDir| {
        let file = WeightsFile::open(&dir.path().join("run/last.safetensors")).unwrap();
        (file.f32("layer3.0.bn1.running_var").unwrap(), file.i64("bn1.num_batches_tracked").unwrap()[0])
    };
    let old = WeightsFile::open(&bundled()).unwrap();
    let stored = old.f32("layer3.0.bn1.running_var").unwrap();
    let tracked = old.i64("bn1.num_batches_tracked").unwrap()[0];
    let (_, frozen) = train(&["--bn", "frozen"]);
    assert!(statistics(&frozen) == (stored.clone(), tracked));
    let (_, batch) = train(&["--bn", "batch"]);
    assert_ne!(statistics(&batch).0, stored);
    assert_eq!(statistics(&batch).1, tracked + 3, "one batch an epoch");
}

/// A copy of a part of the pictures, to be damaged.
fn copied_pictures(classes: &[&str]) -> TempDir {
    let dir = TempDir::new().unwrap();
    for class in classes {
        let target = dir.path().join(class);
        fs::create_dir_all(&target).unwrap();
        for entry in fs::read_dir(PICTURES.path().join("train").join(class)).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), target.join(entry.file_name())).unwrap();
        }
    }
    dir
}

#[test]
fn unreadable_pictures_are_named_skipped_and_counted() {
    let data = copied_pictures(&["wood", "scales"]);
    fs::write(data.path().join("wood/bad.jpg"), b"no picture").unwrap();
    let cut = fs::read(data.path().join("scales/scales-000.jpg")).unwrap();
    fs::write(data.path().join("scales/cut.jpg"), &cut[..cut.len() / 2]).unwrap();
    let mut all = Vec::new();
    for cache in ["auto", "off"] {
        let out = data.path().join(format!("../run-{cache}-{}", data.path().file_name().unwrap().to_str().unwrap()));
        let args = ["train", text(data.path()), "--out", text(&out), "--image-size", "64", "--epochs", "2", "--json"];
        let output = hone(&[&args[..], &["--cache", cache]].concat());
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{stderr}");
        assert_eq!(stderr.matches("skipped: ").count(), 2, "each once: {stderr}");
        let lines: Vec<Value> =
            String::from_utf8(output.stdout).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        let skipped = lines.last().unwrap()["skipped"].as_array().unwrap().clone();
        assert!(skipped.len() == 2 && skipped.iter().all(|s| stderr.contains(s.as_str().unwrap())));
        all.push(figures(&lines));
        fs::remove_dir_all(out).unwrap();
    }
    assert_eq!(all[0], all[1], "skipping and caching get along");
}

#[test]
fn a_class_of_unreadable_pictures_is_an_error() {
    let data = copied_pictures(&["wood", "scales"]);
    for entry in fs::read_dir(data.path().join("wood")).unwrap() {
        fs::write(entry.unwrap().path(), b"damaged").unwrap();
    }
    for cache in ["auto", "off"] {
        let out = TempDir::new().unwrap();
        let message = fails(
            &["train", text(data.path()), "--out", text(&out.path().join("r")), "--image-size", "64", "--cache", cache],
            1,
        );
        assert!(message.contains("wood: none of the"), "{message}");
    }
}

#[test]
fn unreadable_validation_pictures_are_skipped_unless_all_are() {
    let dir = TempDir::new().unwrap();
    let data = dir.path().join("data");
    write_pictures(&data, 4, 2, 64, 3).unwrap();
    let damage = |class: &str| {
        for entry in fs::read_dir(data.join("val").join(class)).unwrap() {
            fs::write(entry.unwrap().path(), b"damaged").unwrap();
        }
    };
    let run = |name: &str| dir.path().join(name);
    damage("wood");
    for cache in ["auto", "off"] {
        let out = run(cache);
        let args = ["train", text(&data), "--out", text(&out), "--image-size", "64", "--epochs", "1", "--json"];
        let lines = ok(&[&args[..], &["--cache", cache]].concat());
        assert_eq!(lines.last().unwrap()["skipped"].as_array().unwrap().len(), 2, "--cache {cache}");
    }
    ["bricks", "pebbles", "scales"].into_iter().for_each(damage);
    let message = fails(&["train", text(&data), "--out", text(&run("none")), "--image-size", "64"], 1);
    assert!(message.contains("none of the validation pictures"), "{message}");
}

#[test]
fn a_network_that_the_last_update_has_spoilt_is_not_kept() {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("run");
    let fixed = ["--out", text(&out), "--image-size", "64", "--epochs", "1"];
    let message =
        fails(&[&["train", text(PICTURES.path()), "--optimizer", "sgd", "--lr", "1e38"][..], &fixed].concat(), 1);
    assert!(message.contains("validation loss") && message.contains("--lr"), "{message}");
    assert!(!out.join("model.safetensors").exists());
    // Without validation pictures.
    let data = dir.path().join("data");
    for class in ["wood", "scales"] {
        fs::create_dir_all(data.join(class)).unwrap();
        let picture = PICTURES.path().join(format!("train/{class}/{class}-000.jpg"));
        fs::copy(picture, data.join(class).join("a.jpg")).unwrap();
    }
    let other = dir.path().join("other");
    let fixed = ["--out", text(&other), "--image-size", "64", "--epochs", "1"];
    let message = fails(&[&["train", text(&data), "--lr", "1e300"][..], &fixed].concat(), 1);
    assert!(message.contains("not finite"), "{message}");
}

#[test]
fn a_part_of_a_step_too_small_for_statistics_is_refused_at_once() {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("run");
    let fixed = ["train", text(PICTURES.path()), "--out", text(&out), "--image-size", "32", "--train", "layer4"];
    for extra in [&["--batch-size", "31"][..], &["--batch-size", "8", "--accumulate", "8"]] {
        let message = fails(&[&fixed[..], extra].concat(), 1);
        assert!(message.contains("--image-size 64") && !out.exists(), "{message}");
    }
    ok(&[&fixed[..], &["--batch-size", "30", "--epochs", "1", "--json"]].concat());
}

#[cfg(unix)]
#[test]
fn too_little_memory_is_one_line() {
    let script = "ulimit -v 4000000; exec \"$0\" bench forward --batch 4096 --size 1024 --seconds 0.01 --threads 2";
    let output = Command::new("bash").args(["-c", script, env!("CARGO_BIN_EXE_hone")]).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("hone: out of memory") && !stderr.contains("panicked"), "{stderr}");
}

#[test]
fn features_of_tensors_and_pictures() {
    let dir = TempDir::new().unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden/forward_odd.safetensors");
    let out = dir.path().join("f.safetensors");
    ok(&["features", text(&bundled()), text(&golden), "--out", text(&out), "--json"]);
    let (got, want) = (WeightsFile::open(&out).unwrap(), WeightsFile::open(&golden).unwrap());
    for name in ["features", "logits"] {
        let (got, want) = (got.f32(name).unwrap(), want.f32(name).unwrap());
        assert_eq!(got.len(), want.len());
        assert!(got.iter().zip(&want).all(|(g, w)| (g - w).abs() <= 1e-3), "{name}");
    }
    assert_eq!(got.get("features").unwrap().shape, [3, 512]);

    let pictures = PICTURES.path().join("val/bricks");
    ok(&["features", text(&bundled()), text(&pictures), "--out", text(&out), "--json"]);
    let file = WeightsFile::open(&out).unwrap();
    assert_eq!(
        (&file.get("features").unwrap().shape[..], &file.get("logits").unwrap().shape[..]),
        (&[4, 512][..], &[4, 200][..])
    );
    let files: Vec<String> = serde_json::from_str(&file.metadata()["files"]).unwrap();
    assert!(files.len() == 4 && files[0].ends_with("bricks-000.jpg"));

    let small = dir.path().join("small.safetensors");
    let input =
        NamedTensor { name: "input".into(), shape: vec![1, 3, 31, 40], data: Data::F32(Cow::Owned(vec![0.0; 3720])) };
    save(&small, &[input], &BTreeMap::new()).unwrap();
    assert!(fails(&["features", text(&bundled()), text(&small), "--out", text(&out)], 1).contains("[1, 3, 31, 40]"));
}

#[test]
fn wrong_input_is_one_line_that_names_it() {
    let dir = TempDir::new().unwrap();
    let data = text(PICTURES.path());
    let out = dir.path().join("run");
    let message = fails(&["train", "no/such/data", "--out", text(&out)], 1);
    assert!(message.contains("no/such/data") && message.contains("CLASS"), "{message}");
    assert!(!out.exists(), "nothing is made for a run that cannot begin");
    assert!(
        fails(&["train", data, "--weights", "absent.safetensors", "--out", text(&out)], 1)
            .contains("absent.safetensors")
    );
    let cut = dir.path().join("cut.safetensors");
    fs::write(&cut, &fs::read(bundled()).unwrap()[..1_000_000]).unwrap();
    assert!(fails(&["train", data, "--weights", text(&cut), "--out", text(&out)], 1).contains("truncated"));
    assert!(fails(&["eval", text(&cut), data], 1).contains("cut.safetensors"));
    assert!(fails(&["eval", text(&bundled()), data], 1).contains("bricks"), "not among the 200 classes");
    assert!(fails(&["predict", text(&bundled()), "nothing.jpg"], 1).contains("nothing.jpg"));
    assert!(fails(&["inspect", data], 1).contains("folder"));
    // A model whose metadata asks for pictures of no sane size.
    let file = WeightsFile::open(&bundled()).unwrap();
    let (network, classes) = (ResNet18::load(&file).unwrap(), (0..200).map(|i| i.to_string()).collect::<Vec<_>>());
    let huge = dir.path().join("huge.safetensors");
    let extra = [("image_size", "4294967295".to_string())];
    model::save(&huge, &network.snapshot(), &classes, &Preprocess::imagenet(64), &extra).unwrap();
    assert!(fails(&["predict", text(&huge), data], 1).contains("image_size"));
    // Settings that are no settings.
    let damaged = dir.path().join("damaged");
    fs::create_dir(&damaged).unwrap();
    for text_of in ["[]", "\"settings\"", "{}"] {
        fs::write(damaged.join("config.json"), text_of).unwrap();
        assert!(fails(&["train", "--resume", text(&damaged)], 1).contains("config.json"));
    }
    // A file where the run folder should be.
    fs::write(dir.path().join("file"), b"").unwrap();
    assert!(fails(&["train", data, "--out", text(&dir.path().join("file"))], 1).contains("file"));
}

#[test]
fn wrong_usage_exits_with_two() {
    for args in [
        &["train"][..],
        &["train", "x", "--epochs", "0"],
        &["train", "x", "--lr", "nan"],
        &["train", "x", "--lr", "-1"],
        &["train", "x", "--val-split", "1"],
        &["train", "x", "--image-size", "31"],
        &["train", "x", "--threads", "0"],
        &["train", "x", "--bn", "maybe"],
        &["train", "--resume", "x", "--precision", "bf16"],
        &["polish"],
        &[],
    ] {
        fails(args, 2);
    }
    let message = fails(&["train", "--resume", "x", "--epochs", "3"], 2);
    assert!(message.contains("--epochs") && !message.contains("--seed"), "{message}");
    assert!(hone(&["--help"]).status.success() && hone(&["train", "--help"]).status.success());
}

#[test]
fn bench_reports_its_figures() {
    for what in ["forward", "train"] {
        let line =
            &ok(&["bench", what, "--batch", "2", "--size", "64", "--seconds", "0.01", "--threads", "1", "--json"])[0];
        assert_eq!(
            (&line["bench"], &line["batch"], &line["size"], &line["threads"]),
            (&what.into(), &2.into(), &64.into(), &1.into())
        );
        assert_eq!((line["device"].as_str(), line["precision"].as_str()), (Some("cpu"), Some("f32")));
        assert!(["median_ms", "images_per_second", "gflops"].iter().all(|key| line[key].as_f64().unwrap() > 0.0));
    }
}

#[test]
fn a_sweep_draws_what_it_prints() {
    let dir = TempDir::new().unwrap();
    let plot = dir.path().join("sweep.svg");
    let args =
        ["bench", "sweep", "--batch", "1", "--size", "32", "--seconds", "0.001", "--json", "--plot", text(&plot)];
    let lines = ok(&args);
    let points: Vec<_> = lines.iter().map(|line| (line["batch"].as_u64(), line["size"].as_u64())).collect();
    assert!(points.contains(&(Some(256), Some(32))) && points.contains(&(Some(1), Some(511))), "{points:?}");
    assert!(lines.iter().all(|line| line["images_per_second"].as_f64().unwrap() > 0.0));
    let svg = std::fs::read_to_string(&plot).unwrap();
    assert!(svg.starts_with("<svg") && svg.matches("<circle").count() == points.len(), "{svg}");
    let error =
        fails(&["bench", "sweep", "--batch", "1", "--size", "32", "--seconds", "0.001", "--plot", "/nowhere/x.svg"], 1);
    assert!(error.contains("/nowhere"), "{error}");
}

#[test]
fn runs_go_to_a_dated_folder_by_default() {
    let dir = TempDir::new().unwrap();
    let run = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hone"));
        let args = ["train", text(PICTURES.path()), "--image-size", "64", "--epochs", "1"];
        command.args(args).current_dir(dir.path()).env("HONE_WEIGHTS", bundled()).output().unwrap()
    };
    assert!(run().status.success() && run().status.success());
    let mut runs: Vec<String> =
        fs::read_dir(dir.path().join("runs")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    runs.sort();
    assert!(runs.len() == 2 && runs[0].starts_with("20") && runs[1].ends_with("-2"), "{runs:?}");
}

/// Under every instruction set of the machine; on a card, if there is one, as well.
#[test]
fn doctor_finds_every_kernel_right() {
    for isa in ["portable", "avx2", "avx512", "avx512bf16", "amx-emulated"] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hone"));
        let output = command.arg("doctor").env("HONE_ISA", isa).output().unwrap();
        let lines = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{isa}: {lines}{}", String::from_utf8_lossy(&output.stderr));
        assert!(lines.contains("cpu bf16 gradient to the filter, 3x3") && !lines.contains("WRONG"), "{isa}: {lines}");
    }
}
