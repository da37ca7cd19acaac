//! The program; see `hone::cli`.

fn main() -> std::process::ExitCode {
    hone::cli::main()
}
