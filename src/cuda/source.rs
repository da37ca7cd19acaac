//! The kernel sources, embedded in the program.

/// A kernel file with all it includes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Unit(&'static str);

macro_rules! sources {
    ($($name:literal),* $(,)?) => {
        /// Name and text of every source file.
        const SOURCES: &[(&str, &str)] = &[$(($name, include_str!(concat!("../../kernels/", $name)))),*];
    };
}

sources!(
    "common.cuh",
    "mma.cuh",
    "tile.cuh",
    "conv.cu",
    "gemm.cu",
    "batch_norm.cu",
    "pool.cu",
    "elementwise.cu",
    "loss.cu",
    "optim.cu",
    "image.cu",
    "peak.cu",
);

/// Convolutions.
pub const CONV: Unit = Unit("conv.cu");
/// Matrix products.
pub const GEMM: Unit = Unit("gemm.cu");
/// Batch norm and sums over rows.
pub const BATCH_NORM: Unit = Unit("batch_norm.cu");
/// Pooling.
pub const POOL: Unit = Unit("pool.cu");
/// Maps and reductions.
pub const ELEMENTWISE: Unit = Unit("elementwise.cu");
/// Cross-entropy.
pub const LOSS: Unit = Unit("loss.cu");
/// Optimisers.
pub const OPTIM: Unit = Unit("optim.cu");
/// Pictures.
pub const IMAGE: Unit = Unit("image.cu");

/// Measurements of the card itself.
pub const PEAK: Unit = Unit("peak.cu");

/// All files that hold kernels.
pub const UNITS: [Unit; 9] = [CONV, GEMM, BATCH_NORM, POOL, ELEMENTWISE, LOSS, OPTIM, IMAGE, PEAK];

fn text(name: &str) -> &'static str {
    SOURCES.iter().find(|(n, _)| *n == name).map(|(_, text)| *text).expect("every included file is embedded")
}

impl Unit {
    /// Its file's name.
    pub fn name(self) -> &'static str {
        self.0
    }

    /// The source with every include replaced by the file, each file once. Line numbers stay those of the files.
    pub fn expand(self) -> String {
        let mut out = String::new();
        expand(self.0, &mut Vec::new(), &mut out);
        out
    }
}

/// Another source with its includes expanded.
#[cfg(feature = "emulator")]
pub(super) fn expand_includes(source: &str) -> String {
    let mut out = String::new();
    expand_text("source", source, &mut Vec::new(), &mut out);
    out
}

fn expand(name: &'static str, seen: &mut Vec<&'static str>, out: &mut String) {
    if !seen.contains(&name) {
        seen.push(name);
        expand_text(name, text(name), seen, out);
    }
}

fn expand_text(name: &str, text: &str, seen: &mut Vec<&'static str>, out: &mut String) {
    out.push_str(&format!("#line 1 \"{name}\"\n"));
    for (number, line) in text.lines().enumerate() {
        if line.starts_with("#pragma once") {
            out.push('\n');
        } else if let Some(included) = line.strip_prefix("#include \"").and_then(|rest| rest.strip_suffix('"')) {
            let included = SOURCES.iter().find(|(n, _)| *n == included).map(|(n, _)| *n);
            expand(included.expect("every included file is embedded"), seen, out);
            out.push_str(&format!("#line {} \"{name}\"\n", number + 2));
        } else {
            out.push_str(line);
            out.push('\n');
        }
    }
}
