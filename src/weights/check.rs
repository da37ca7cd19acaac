//! Whether a file holds what a network needs, told all at once.

use super::file::WeightsFile;
use crate::error::{Error, Result};
use safetensors::Dtype;
use std::collections::HashSet;
use std::path::Path;

/// What elements must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// F32, F16, BF16 or F64.
    Float,
    /// I64, I32 or U8.
    Integer,
}

impl Kind {
    fn accepts(self, dtype: Dtype) -> bool {
        match self {
            Kind::Float => matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F64),
            Kind::Integer => matches!(dtype, Dtype::I64 | Dtype::I32 | Dtype::U8),
        }
    }
}

/// A tensor that a network needs.
#[derive(Clone, Copy, Debug)]
pub struct Expected<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its extents.
    pub shape: &'a [usize],
    /// What its elements must be.
    pub kind: Kind,
    /// Whether the network can do without.
    pub optional: bool,
}

/// Everything about a file that does not fit.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Names that the file lacks.
    pub missing: Vec<String>,
    /// Names that nothing needs.
    pub extra: Vec<String>,
    /// Names, with the shape that was found and the one that is needed.
    pub misshapen: Vec<String>,
    /// Names, with the type that was found.
    pub wrong_type: Vec<String>,
}

/// Compares the file with `expected`; names in `ignored` may be there in any form, or not.
pub fn check(file: &WeightsFile, expected: &[Expected], ignored: &[&str]) -> Report {
    let mut report = Report::default();
    for want in expected {
        match file.get(want.name) {
            None if want.optional => {}
            None => report.missing.push(want.name.to_string()),
            Some(found) if found.shape != want.shape => {
                report.misshapen.push(format!("{} {:?} instead of {:?}", want.name, found.shape, want.shape));
            }
            Some(found) if !want.kind.accepts(found.dtype) => {
                report.wrong_type.push(format!("{} {}", want.name, found.dtype));
            }
            Some(_) => {}
        }
    }
    let known: HashSet<&str> = expected.iter().map(|e| e.name).chain(ignored.iter().copied()).collect();
    let names = file.entries().iter().map(|entry| &entry.name);
    report.extra = names.filter(|name| !known.contains(name.as_str())).cloned().collect();
    report
}

impl Report {
    /// One error that lists all that does not fit, if anything does not.
    pub fn into_result(self, path: &Path) -> Result<()> {
        let parts: Vec<String> = [
            ("missing", self.missing),
            ("extra", self.extra),
            ("misshapen", self.misshapen),
            ("of the wrong type", self.wrong_type),
        ]
        .into_iter()
        .filter(|(_, names)| !names.is_empty())
        .map(|(what, names)| format!("{} {what}: {}", names.len(), names.join(", ")))
        .collect();
        if parts.is_empty() {
            return Ok(());
        }
        let problem = format!("not the tensors of a ResNet-18; {}", parts.join("; "));
        Err(Error::file(path, problem, "use a file with torchvision's resnet18 names and shapes"))
    }
}
