//! The arguments of every command.

mod train;

use super::report;
use crate::cuda;
use crate::error::Result;
use crate::nn::{MAX_IMAGE_SIZE, MIN_IMAGE_SIZE};
use crate::tensor::Device;
use crate::train::{Placement, Precision};
use clap::builder::{NonEmptyStringValueParser, RangedI64ValueParser, TypedValueParser};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum, value_parser};
use std::path::PathBuf;
pub use train::Train;

/// Fine-tunes a pretrained ResNet-18 on a folder of photographs.
#[derive(Parser)]
#[command(name = "hone", version, arg_required_else_help = true)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

impl Args {
    /// Those that the program was called with; what is wrong about them ends it.
    pub fn of_program() -> Args {
        let command = Args::command().mut_subcommand("train", Train::refuse_settings_on_resume);
        Args::from_arg_matches(&command.get_matches()).unwrap_or_else(|error| error.exit())
    }
}

#[derive(Subcommand)]
pub enum Command {
    /// Train a new head for the classes of a folder of pictures
    Train(Box<Train>),
    /// Accuracy, loss and confusion of a model on labelled pictures
    Eval(Eval),
    /// What a model takes pictures for
    Predict(Predict),
    /// The 512 features and the logits of pictures or of a tensor, into a file
    Features(Features),
    /// The tensors and metadata of a safetensors file
    Inspect(Inspect),
    /// How fast this machine computes
    Bench(Bench),
    /// The whole job on pictures the program draws itself
    Demo(Demo),
    /// What this machine has, and whether convolutions, and on a card every kernel, compute rightly on it
    Doctor(Doctor),
}

impl Command {
    pub fn threads(&self) -> Option<usize> {
        match self {
            Command::Train(args) => args.common.threads(),
            Command::Eval(args) => args.common.threads(),
            Command::Predict(args) => args.common.threads(),
            Command::Features(args) => args.common.threads(),
            Command::Bench(args) => args.common.threads(),
            Command::Demo(args) => args.common.threads(),
            Command::Inspect(_) | Command::Doctor(_) => None,
        }
    }
}

/// Where to compute.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DeviceChoice {
    /// The fastest there is
    Auto,
    /// The processor
    Cpu,
    /// The first NVIDIA card
    Cuda,
}

#[derive(clap::Args)]
pub struct Common {
    /// Where to compute
    #[arg(long, value_enum, default_value = "auto")]
    pub device: DeviceChoice,
    /// f32, or bf16: less precise, and faster; on cuda also tf32
    #[arg(long, value_enum, default_value = "f32")]
    pub precision: Precision,
    /// Threads to compute and decode with [default: one a core]
    #[arg(long, value_name = "N", value_parser = value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// One JSON object a line on stdout
    #[arg(long)]
    pub json: bool,
}

impl Common {
    fn threads(&self) -> Option<usize> {
        self.threads.map(usize::from)
    }

    /// The device; if the choice is left to hone and there is a reason against the card, it is told to the user.
    pub fn device(&self) -> Result<Device> {
        match self.device {
            DeviceChoice::Cpu => Ok(Device::Cpu),
            DeviceChoice::Cuda => cuda::context().map(|_| Device::Cuda),
            DeviceChoice::Auto => match cuda::probe() {
                None => Ok(Device::Cuda),
                Some(reason) => {
                    report::note(&format!("on the CPU: {reason}"));
                    Ok(Device::Cpu)
                }
            },
        }
    }

    pub fn placement(&self) -> Result<Placement> {
        Placement::new(self.device()?, self.precision)
    }
}

/// A path, which may not be empty.
fn path() -> impl TypedValueParser<Value = PathBuf> {
    NonEmptyStringValueParser::new().map(PathBuf::from)
}

#[derive(clap::Args)]
pub struct Eval {
    /// A model that hone has written
    pub model: PathBuf,
    /// Folder with val/CLASS/*, or CLASS/*
    pub data: PathBuf,
    #[command(flatten)]
    pub common: Common,
}

#[derive(clap::Args)]
pub struct Predict {
    /// A model that hone has written
    pub model: PathBuf,
    /// Pictures, or folders of them
    #[arg(required = true, value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    /// Classes to show for each picture
    #[arg(long, value_name = "N", default_value = "5", value_parser = value_parser!(u32).range(1..))]
    pub top: u32,
    #[command(flatten)]
    pub common: Common,
}

#[derive(clap::Args)]
pub struct Features {
    /// A model, or pretrained weights
    pub model: PathBuf,
    /// Pictures, folders of them, or safetensors files that hold `input` [N, 3, H, W]
    #[arg(required = true, value_name = "INPUT")]
    pub inputs: Vec<PathBuf>,
    /// Where to write `features` [N, 512] and `logits` [N, classes]
    #[arg(long, value_name = "FILE", value_parser = path())]
    pub out: PathBuf,
    #[command(flatten)]
    pub common: Common,
}

#[derive(clap::Args)]
pub struct Inspect {
    /// A safetensors file
    pub file: PathBuf,
    /// One JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum BenchKind {
    /// Inference of the whole network
    Forward,
    /// A training step of the whole network: forward, backward, Adam
    Train,
    /// Every convolution of the network, each pass on its own
    Kernels,
    /// Inference over batches of 1 to 256 and sizes of 64 to 512 pixels
    Sweep,
}

#[derive(clap::Args)]
pub struct Bench {
    /// What to time
    #[arg(value_enum)]
    pub what: BenchKind,
    /// Pictures a step
    #[arg(long, value_name = "N", default_value = "32", value_parser = value_parser!(u32).range(1..=65536))]
    pub batch: u32,
    /// Side of the pictures
    #[arg(long, value_name = "PX", default_value = "224", value_parser = side())]
    pub size: u32,
    /// How long to measure, at least three steps
    #[arg(long, default_value = "6", value_parser = positive)]
    pub seconds: f64,
    /// Where `sweep` draws its figures, as SVG
    #[arg(long, value_name = "FILE", value_parser = path())]
    pub plot: Option<PathBuf>,
    #[command(flatten)]
    pub common: Common,
}

#[derive(clap::Args)]
pub struct Doctor {
    /// One JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

#[derive(clap::Args)]
pub struct Demo {
    /// Folder for the pictures and the run [default: runs/DATE-demo]
    #[arg(long, value_name = "DIR", value_parser = path())]
    pub out: Option<PathBuf>,
    #[command(flatten)]
    pub common: Common,
}

/// The side of a picture that the network takes, in pixels.
fn side() -> RangedI64ValueParser<u32> {
    value_parser!(u32).range(MIN_IMAGE_SIZE as i64..=MAX_IMAGE_SIZE as i64)
}

fn positive(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x.is_finite() && x > 0.0 => Ok(x),
        _ => Err("expected a positive number".into()),
    }
}
