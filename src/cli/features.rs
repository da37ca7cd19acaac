//! `hone features`.

use super::args;
use super::report::{self, Report};
use crate::data::expand_inputs;
use crate::error::{Error, Result};
use crate::nn::{FEATURES, MIN_IMAGE_SIZE};
use crate::tensor::layout;
use crate::train::{Features, Model, features_of};
use crate::weights::{self, Data, NamedTensor, WeightsFile};
use serde_json::json;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Images of a tensor that are computed together.
const BATCH: usize = 32;

pub fn run(args: args::Features) -> Result<()> {
    let model = Model::load_on(&args.model, args.common.placement()?)?;
    let is_tensor = |path: &PathBuf| path.extension().is_some_and(|e| e.eq_ignore_ascii_case("safetensors"));
    let (tensors, pictures): (Vec<_>, Vec<_>) = args.inputs.into_iter().partition(is_tensor);
    if !tensors.is_empty() && !pictures.is_empty() {
        let hint = "run the command once for each kind";
        return Err(Error::config("pictures and safetensors files cannot be mixed", hint));
    }
    let mut report = Report::new(args.common.json);
    let mut all = Features::default();
    for path in &tensors {
        add_tensor(&model, path, &mut all)?;
    }
    if !pictures.is_empty() {
        all = features_of(&model, expand_inputs(&pictures)?, &mut report)?;
    }
    save(&args.out, &model, &all)?;
    let rows = all.features.len() / FEATURES;
    if args.common.json {
        report::json_line(
            &json!({ "images": rows, "classes": model.classes.len(), "out": args.out.to_string_lossy() }),
        );
    } else {
        let out = args.out.display();
        report::line(&format!("features [{rows}, {FEATURES}] and logits [{rows}, {}]: {out}", model.classes.len()));
    }
    Ok(())
}

/// Adds the images of `input` `[N, 3, H, W]` in the file, taken as they are.
fn add_tensor(model: &Model, path: &Path, all: &mut Features) -> Result<()> {
    let hint = "give a file that holds `input` [N, 3, H, W] in F32, of 32 pixels a side or more";
    let file = WeightsFile::open(path)?;
    let entry = file.get("input").ok_or_else(|| Error::file(path, "it holds no tensor named `input`", hint))?;
    let &[n, 3, h, w] = &entry.shape[..] else {
        return Err(Error::file(path, format!("`input` has the shape {:?}", entry.shape), hint));
    };
    if h < MIN_IMAGE_SIZE || w < MIN_IMAGE_SIZE || n == 0 {
        return Err(Error::file(path, format!("`input` has the shape {:?}", entry.shape), hint));
    }
    let values = file.f32("input")?;
    for batch in values.chunks(BATCH * 3 * h * w) {
        all.add(model, &layout::from_channels_first(batch, &[batch.len() / (3 * h * w), 3, h, w])?)?;
    }
    all.files.extend(std::iter::repeat_n(path.to_path_buf(), n));
    Ok(())
}

fn save(out: &Path, model: &Model, all: &Features) -> Result<()> {
    let rows = all.features.len() / FEATURES;
    let tensor = |name: &str, columns: usize, values: &'_ [f32]| NamedTensor {
        name: name.to_string(),
        shape: vec![rows, columns],
        data: Data::F32(Cow::Owned(values.to_vec())),
    };
    let files: Vec<_> = all.files.iter().map(|f| f.to_string_lossy()).collect();
    let metadata = BTreeMap::from([
        ("format".to_string(), "pt".to_string()),
        ("files".to_string(), json!(files).to_string()),
        ("classes".to_string(), json!(model.classes).to_string()),
    ]);
    let tensors = [tensor("features", FEATURES, &all.features), tensor("logits", model.classes.len(), &all.logits)];
    weights::save(out, &tensors, &metadata)
}
