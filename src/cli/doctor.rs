//! `hone doctor`: what this machine has, and whether hone computes rightly on it.

use super::args::Doctor;
use super::report;
use crate::cpu::Isa;
use crate::cuda;
use crate::doctor::{Check, check_cpu, check_cuda};
use crate::error::{Error, Result};
use crate::nn::ResNet18;
use crate::weights::{WeightsFile, locate_default};
use serde_json::json;

pub fn run(args: Doctor) -> Result<()> {
    let mut problems: Vec<String> = Vec::new();
    let mut facts = vec![("hone", env!("CARGO_PKG_VERSION").to_string())];
    let has: Vec<String> = Isa::supported().map(|isa| isa.to_string()).collect();
    facts.push((
        "cpu",
        format!("{} in use, of {}; {} threads", Isa::current(), has.join(", "), rayon::current_num_threads()),
    ));
    let card = cuda::context();
    match &card {
        Ok(context) => {
            let backend = context.backend();
            let ((major, minor), (free, total)) = (backend.architecture(), backend.memory()?);
            let memory = format!("{} of {} MiB free", free >> 20, total >> 20);
            facts.push(("card", format!("{}, compute capability {major}.{minor}, {memory}", backend.name())));
            facts.push(("compilers", backend.versions()));
        }
        Err(Error::Config { problem, .. }) => {
            facts.push(("card", format!("none in use: {problem}")));
            // No card is no fault; a card that cannot be used is.
            if cuda::card_is_present() {
                problems.push(problem.clone());
            }
        }
        Err(other) => problems.push(other.to_string()),
    }
    facts.push((
        "kernel cache",
        match cuda::cache_folder() {
            Some(folder) => folder.display().to_string(),
            None => "none: set HONE_CACHE to a folder".to_string(),
        },
    ));
    let weights = locate_default(std::env::var_os("HONE_WEIGHTS"));
    match weights.and_then(|path| ResNet18::load(&WeightsFile::open(&path)?).map(|_| path)) {
        Ok(path) => facts.push(("weights", path.display().to_string())),
        Err(e) => problems.push(e.to_string()),
    }
    if !args.json {
        facts.iter().for_each(|(name, value)| report::line(&format!("{name:<14}{value}")));
        report::line(&format!("\n{:<54} {:>10} {:>10}", "check", "error", "at most"));
    }
    let mut checks = Vec::new();
    let mut tell = |check: Check| {
        let mark = if check.passes() { "" } else { "   WRONG" };
        if !args.json {
            report::line(&format!("{:<54} {:>10.1e} {:>10.0e}{mark}", check.name, check.error, check.tolerance));
        }
        checks.push(check);
    };
    check_cpu(&mut tell)?;
    if card.is_ok() {
        check_cuda(&mut tell)?;
    }
    problems.extend(checks.iter().filter(|c| !c.passes()).map(|c| format!("{} is wrong by {:e}", c.name, c.error)));
    if args.json {
        let facts: serde_json::Map<_, _> =
            facts.into_iter().map(|(name, value)| (name.to_string(), json!(value))).collect();
        report::json_line(&json!({
            "machine": facts,
            "checks": checks.iter().map(|c| json!({
                "name": c.name, "error": c.error, "tolerance": c.tolerance, "passes": c.passes(),
            })).collect::<Vec<_>>(),
            "problems": problems,
        }));
    }
    match problems.is_empty() {
        true if args.json => Ok(()),
        true => {
            report::line(&format!("\nall {} checks passed", checks.len()));
            Ok(())
        }
        false => Err(Error::config(problems.join("; "), "see the table above")),
    }
}
