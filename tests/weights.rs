//! Weights files: round trips, types, and files that are not what they should be.

use hone::nn::ResNet18;
use hone::weights::{Data, NamedTensor, WeightsFile, locate_default, save, write_atomically};
use proptest::prelude::*;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A safetensors file of this header and data.
fn raw(dir: &TempDir, header: &str, data: &[u8]) -> PathBuf {
    let path = dir.path().join("x.safetensors");
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat();
    fs::write(&path, bytes).unwrap();
    path
}

fn error(path: &Path) -> String {
    let text = WeightsFile::open(path).err().expect("the file is refused").to_string();
    assert!(text.contains(path.file_name().unwrap().to_str().unwrap()) && !text.contains('\n'), "{text}");
    text
}

fn small() -> Vec<NamedTensor<'static>> {
    vec![
        NamedTensor {
            name: "a".into(),
            shape: vec![2, 2],
            data: Data::F32(Cow::Owned(vec![1.0, -0.0, f32::NAN, 3.5])),
        },
        NamedTensor { name: "n".into(), shape: vec![], data: Data::I64(Cow::Owned(vec![-7])) },
        NamedTensor { name: "bytes".into(), shape: vec![3], data: Data::U8(Cow::Owned(vec![1, 2, 255])) },
    ]
}

#[test]
fn round_trip() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("m.safetensors");
    let metadata = BTreeMap::from([("classes".to_string(), "[\"ä\", \"b\\\"\"]".to_string())]);
    save(&path, &small(), &metadata).unwrap();
    let file = WeightsFile::open(&path).unwrap();
    let a: Vec<u32> = file.f32("a").unwrap().iter().map(|x| x.to_bits()).collect();
    assert_eq!(a, [1.0f32, -0.0, f32::NAN, 3.5].map(f32::to_bits));
    assert_eq!((file.i64("n").unwrap(), file.u8("bytes").unwrap()), (vec![-7], &[1u8, 2, 255][..]));
    assert_eq!(file.get("n").unwrap().shape, [0usize; 0]);
    assert_eq!(file.metadata(), &metadata);
    let first = fs::read(&path).unwrap();
    save(&path, &small(), &metadata).unwrap();
    assert_eq!(fs::read(&path).unwrap(), first, "the same content gives the same bytes");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside it");
}

#[test]
fn wrong_content_is_not_written() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("m.safetensors");
    let mut tensors = small();
    tensors[0].shape = vec![5];
    assert!(save(&path, &tensors, &BTreeMap::new()).unwrap_err().to_string().contains("[5]"));
    let twice = [small(), small()].concat();
    assert!(save(&path, &twice, &BTreeMap::new()).unwrap_err().to_string().contains("two tensors"));
    assert!(!path.exists());
}

#[test]
fn every_half_is_widened_exactly() {
    let dir = TempDir::new().unwrap();
    let bits: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    for (dtype, widen) in [
        ("F16", (|b| half::f16::from_bits(b).to_f32()) as fn(u16) -> f32),
        ("BF16", |b| half::bf16::from_bits(b).to_f32()),
    ] {
        // A header of odd length: nothing in the file is aligned.
        let header = format!(r#"{{"h":{{"dtype":"{dtype}","shape":[65536],"data_offsets":[0,131072]}}}} "#);
        let header = if header.len() % 2 == 0 { header + " " } else { header };
        let file = WeightsFile::open(&raw(&dir, &header, &bits)).unwrap();
        for (b, got) in (0..=u16::MAX).zip(file.f32("h").unwrap()) {
            let want = widen(b);
            assert!(got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()), "{dtype} {b:#x}");
        }
    }
}

#[test]
fn other_types() {
    let dir = TempDir::new().unwrap();
    let header = r#"{"d":{"dtype":"F64","shape":[1],"data_offsets":[0,8]},"i":{"dtype":"I32","shape":[1],"data_offsets":[8,12]}}"#;
    let data = [&2.5f64.to_le_bytes()[..], &(-3i32).to_le_bytes()].concat();
    let file = WeightsFile::open(&raw(&dir, header, &data)).unwrap();
    assert_eq!((file.f32("d").unwrap(), file.i64("i").unwrap()), (vec![2.5], vec![-3]));
    assert!(file.f32("i").unwrap_err().to_string().contains("i is I32"));
    assert!(file.i64("d").is_err() && file.u8("d").is_err() && file.f32("nothing").is_err());
}

#[test]
fn headers_that_lie() {
    let dir = TempDir::new().unwrap();
    let one = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"t":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    for (header, data) in [
        (one("F32", "[2]", "[0,8]"), 4),
        (one("F32", "[2]", "[0,8]"), 12),
        (one("F32", "[3]", "[0,8]"), 8),
        (one("F32", "[2]", "[4,12]"), 12),
        (one("F32", "[2]", "[8,0]"), 8),
        (one("F32", "[4611686018427387904,4]", "[0,8]"), 8),
        (one("F32", "[18446744073709551615]", "[0,18446744073709551615]"), 8),
        (one("F33", "[2]", "[0,8]"), 8),
        (one("F32", "[-2]", "[0,8]"), 8),
        ("[]".into(), 0),
        ("{".into(), 0),
        ("".into(), 0),
    ] {
        error(&raw(&dir, &header, &vec![0; data]));
    }
    let path = dir.path().join("huge.safetensors");
    for length in [u64::MAX, u64::MAX - 7, 1 << 40, 100_000_001] {
        fs::write(&path, [&length.to_le_bytes()[..], b"{}"].concat()).unwrap();
        error(&path);
    }
}

#[test]
fn files_of_other_kinds_are_named() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("model.safetensors");
    for (content, word) in [
        (&b"PK\x03\x04 and then a zip archive"[..], "pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"", "0 bytes"),
        (b"1234567", "7 bytes"),
    ] {
        fs::write(&path, content).unwrap();
        assert!(error(&path).contains(word), "{}", error(&path));
    }
    assert!(error(dir.path()).contains("folder"));
    assert!(error(&dir.path().join("absent.safetensors")).contains("open"));
}

#[test]
fn every_truncation_is_refused() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("m.safetensors");
    save(&path, &small(), &BTreeMap::new()).unwrap();
    let whole = fs::read(&path).unwrap();
    for length in 0..whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        error(&path);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn damage_never_panics(flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("m.safetensors");
        save(&path, &small(), &BTreeMap::new()).unwrap();
        let mut bytes = fs::read(&path).unwrap();
        for (index, value) in flips {
            let i = index.index(bytes.len());
            bytes[i] = value;
        }
        fs::write(&path, bytes).unwrap();
        if let Ok(file) = WeightsFile::open(&path) {
            for entry in file.entries() {
                let _ = (file.f32(&entry.name), file.i64(&entry.name), file.u8(&entry.name));
            }
        }
    }
}

#[test]
fn failed_writes_leave_the_old_file() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("file");
    fs::write(&path, "old").unwrap();
    let result = write_atomically(&path, |out| {
        out.write_all(&[0; 4096])?;
        Err(std::io::Error::other("no space left"))
    });
    let text = result.unwrap_err().to_string();
    assert!(text.contains("file") && text.contains("no space left"), "{text}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "old");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "the unfinished file is gone");
    assert!(write_atomically(&dir.path().join("no/such/folder/x"), |_| Ok(())).is_err());
    assert!(write_atomically(dir.path(), |_| Ok(())).unwrap_err().to_string().contains("is a folder"));
}

#[cfg(unix)]
#[test]
fn written_files_are_as_readable_as_others() {
    use std::os::unix::fs::PermissionsExt;
    let dir = TempDir::new().unwrap();
    let [ours, plain] = ["ours", "plain"].map(|name| dir.path().join(name));
    write_atomically(&ours, |out| out.write_all(b"x")).unwrap();
    fs::write(&plain, b"x").unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
    assert_eq!(mode(&ours), mode(&plain));
}

fn bundled() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("weights/resnet18-tinyimagenet.safetensors")
}

/// The bundled tensors, to be changed and saved again.
fn network_tensors() -> Vec<NamedTensor<'static>> {
    let file = WeightsFile::open(&bundled()).unwrap();
    let tensors = file.entries().iter().map(|entry| {
        let data = match entry.name.ends_with("num_batches_tracked") {
            true => Data::I64(Cow::Owned(file.i64(&entry.name).unwrap())),
            false => Data::F32(Cow::Owned(file.f32(&entry.name).unwrap())),
        };
        NamedTensor { name: entry.name.clone(), shape: entry.shape.clone(), data }
    });
    tensors.collect()
}

#[test]
fn one_error_lists_all_that_does_not_fit() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("other.safetensors");
    let mut tensors = network_tensors();
    tensors.retain(|t| t.name != "bn1.weight" && t.name != "layer2.0.conv1.weight");
    let misshapen = tensors.iter_mut().find(|t| t.name == "layer4.1.bn2.bias").unwrap();
    misshapen.shape = vec![16, 32];
    tensors.push(NamedTensor { name: "layer5.weight".into(), shape: vec![1], data: Data::F32(Cow::Owned(vec![0.0])) });
    save(&path, &tensors, &BTreeMap::new()).unwrap();
    let text = ResNet18::load(&WeightsFile::open(&path).unwrap()).err().unwrap().to_string();
    for part in ["2 missing: bn1.weight, layer2.0.conv1.weight", "1 extra: layer5.weight", "layer4.1.bn2.bias [16, 32]"]
    {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert!(!text.contains('\n'));
}

#[test]
fn saved_networks_load_again_bit_for_bit() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("again.safetensors");
    let network = ResNet18::load(&WeightsFile::open(&bundled()).unwrap()).unwrap();
    save(&path, &network.snapshot().tensors().unwrap(), &BTreeMap::new()).unwrap();
    let (old, new) = (WeightsFile::open(&bundled()).unwrap(), WeightsFile::open(&path).unwrap());
    assert_eq!(old.entries().len(), new.entries().len());
    for entry in old.entries() {
        assert_eq!(new.get(&entry.name).unwrap().shape, entry.shape, "{}", entry.name);
        if entry.name.ends_with("num_batches_tracked") {
            assert_eq!(old.i64(&entry.name).unwrap(), new.i64(&entry.name).unwrap());
        } else {
            assert_eq!(old.f32(&entry.name).unwrap(), new.f32(&entry.name).unwrap(), "{}", entry.name);
        }
    }
}

#[test]
fn prefixes_of_wrappers_and_missing_counters_are_accepted() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("wrapped.safetensors");
    let mut tensors = network_tensors();
    tensors.retain(|t| !t.name.ends_with("num_batches_tracked"));
    tensors.iter_mut().for_each(|t| t.name = format!("module.{}", t.name));
    save(&path, &tensors, &BTreeMap::new()).unwrap();
    assert_eq!(ResNet18::load(&WeightsFile::open(&path).unwrap()).unwrap().classes(), 200);
}

#[test]
fn the_bundled_file_is_looked_for_where_the_error_says() {
    let dir = TempDir::new().unwrap();
    let text = locate_default(Some(dir.path().as_os_str().to_owned())).unwrap_err().to_string();
    assert!(text.contains("HONE_WEIGHTS") && text.contains("--weights"), "{text}");
    assert_eq!(locate_default(Some(bundled().into_os_string())).unwrap(), bundled());
    let folder = bundled().parent().unwrap().as_os_str().to_owned();
    assert_eq!(locate_default(Some(folder)).unwrap(), bundled());
    assert!(locate_default(None).unwrap().ends_with("weights/resnet18-tinyimagenet.safetensors"));
}
