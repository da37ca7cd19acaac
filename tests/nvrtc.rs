//! Every kernel compiles for every architecture, with the run-time compiler that NVIDIA ships. Skips, saying so, where there is
//! none; `$HONE_REQUIRE_NVRTC` makes that a failure.

use hone::cuda::{Nvrtc, UNITS};

/// From Turing to Blackwell.
const TARGETS: [&str; 7] = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"];

#[test]
fn kernels_compile_for_every_architecture() {
    let compiler = match Nvrtc::find() {
        Ok(compiler) => compiler,
        Err(reason) if std::env::var_os("HONE_REQUIRE_NVRTC").is_none() => return println!("skipped: {reason}"),
        Err(reason) => panic!("{reason}"),
    };
    println!("{}", compiler.describe());
    for target in TARGETS {
        for unit in UNITS {
            let compiled = compiler.compile(unit, target).unwrap_or_else(|e| panic!("{e}"));
            assert!(!compiled.image.is_empty());
            // ptxas says of each kernel what it keeps outside of registers, on the lines after its name.
            let mut kernel = "";
            for line in compiled.log.lines() {
                if let Some((_, rest)) = line.split_once("Compiling entry function '") {
                    kernel = rest.split('\'').next().unwrap_or_default();
                } else if line.contains("bytes stack frame") && !line.contains(" 0 bytes stack frame") {
                    println!("warning: {kernel} for {target}:{}", line.replace("ptxas", "").replace(" .", ""));
                } else if line.contains(" registers") && std::env::var_os("HONE_PTXAS").is_some() {
                    println!("{target} {kernel}: {}", line.split("Used ").nth(1).unwrap_or(line));
                }
            }
        }
    }
}

#[test]
fn newer_cards_get_portable_code_and_older_ones_a_reason() {
    let Ok(compiler) = Nvrtc::find() else { return println!("skipped: no NVRTC") };
    assert_eq!(compiler.target((9, 0)), Ok("sm_90".into()));
    assert!(compiler.target((99, 0)).unwrap().starts_with("compute_"));
    assert!(compiler.target((3, 0)).is_err());
}
