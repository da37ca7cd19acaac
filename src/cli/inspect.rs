//! `hone inspect`.

use super::args::Inspect;
use super::report;
use crate::error::Result;
use crate::nn::ResNet18;
use crate::weights::WeightsFile;
use serde_json::json;

/// Longer metadata is cut in the table for people.
const MAX_VALUE: usize = 100;

pub fn run(args: Inspect) -> Result<()> {
    let file = WeightsFile::open(&args.file)?;
    let verdict = ResNet18::load(&file);
    let elements = |shape: &[usize]| shape.iter().product::<usize>();
    let total: usize = file.entries().iter().map(|e| elements(&e.shape)).sum();
    let bytes: usize = file.entries().iter().map(|e| e.bytes).sum();
    if args.json {
        report::json_line(&json!({
            "file": args.file.to_string_lossy(),
            "tensors": file.entries().iter().map(|e| {
                json!({ "name": e.name, "dtype": e.dtype.to_string(), "shape": e.shape, "bytes": e.bytes })
            }).collect::<Vec<_>>(),
            "elements": total,
            "bytes": bytes,
            "metadata": file.metadata(),
            "resnet18": verdict.is_ok(),
            "classes": verdict.as_ref().ok().map(ResNet18::classes),
            "problem": verdict.as_ref().err().map(|e| e.to_string()),
        }));
        return Ok(());
    }
    let width = file.entries().iter().map(|e| e.name.chars().count()).max().unwrap_or(0);
    for entry in file.entries() {
        report::line(&format!("{:<width$}  {:<4}  {:?}", entry.name, entry.dtype.to_string(), entry.shape));
    }
    report::line(&format!("{} tensors, {total} elements, {bytes} bytes", file.entries().len()));
    for (key, value) in file.metadata() {
        let cut: String = value.chars().take(MAX_VALUE).collect();
        let more = if cut.len() < value.len() { " ..." } else { "" };
        report::line(&format!("metadata {key}: {cut}{more}"));
    }
    match verdict {
        Ok(network) => report::line(&format!("a ResNet-18 that hone can load, with {} classes", network.classes())),
        Err(error) => report::line(&format!("not a ResNet-18 that hone can load: {error}")),
    }
    Ok(())
}
