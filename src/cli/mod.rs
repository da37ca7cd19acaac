//! The command line: arguments in, lines out. Everything it prints goes through `report`.

mod args;
mod bench;
mod bench_kernels;
mod bench_sweep;
mod demo;
mod doctor;
mod features;
mod inspect;
mod report;
mod train;
mod using;

use crate::error::{Error, Result};
use crate::tensor::pool::or_out_of_memory;
use args::{Args, Command};
use std::process::ExitCode;

/// Runs the program: 0 if all went well, 1 with one line on stderr if not, 2 for a wrong command line, 130 after Ctrl-C.
pub fn main() -> ExitCode {
    let args = Args::of_program();
    match or_out_of_memory(|| run(args.command)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report::error(&error);
            match error {
                Error::Interrupted { .. } => ExitCode::from(train::INTERRUPTED),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn run(command: Command) -> Result<()> {
    set_threads(command.threads())?;
    match command {
        Command::Train(args) => train::run(*args),
        Command::Eval(args) => using::eval(args),
        Command::Predict(args) => using::predict(args),
        Command::Features(args) => features::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Demo(args) => demo::run(args),
        Command::Doctor(args) => doctor::run(args),
    }
}

fn set_threads(threads: Option<usize>) -> Result<()> {
    let Some(threads) = threads else { return Ok(()) };
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
        .map_err(|e| Error::config(format!("cannot start {threads} threads ({e})"), "give a smaller --threads"))
}
