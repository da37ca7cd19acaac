//! The arguments of every command.

use crate::error::Result;
use crate::train::{BnMode, CacheMode, Weights};
use crate::weights::locate_default;
use clap::builder::{NonEmptyStringValueParser, TypedValueParser};
use clap::{Parser, Subcommand, ValueEnum, value_parser};
use std::path::PathBuf;

/// Fine-tunes a pretrained ResNet-18 on a folder of photographs.
#[derive(Parser)]
#[command(name = "hone", version, arg_required_else_help = true)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Train a new head for the classes of a folder of pictures
    Train(Train),
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
            Command::Inspect(_) => None,
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
}

#[derive(clap::Args)]
pub struct Common {
    /// Where to compute
    #[arg(long, value_enum, default_value = "auto")]
    pub device: DeviceChoice,
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
}

/// A path, which may not be empty.
fn path() -> impl TypedValueParser<Value = PathBuf> {
    NonEmptyStringValueParser::new().map(PathBuf::from)
}

#[derive(clap::Args)]
pub struct Train {
    /// Folder with train/CLASS/* and val/CLASS/*, or CLASS/* alone
    pub data: PathBuf,
    /// Pretrained weights, a safetensors file with torchvision's names; "none" for random ones [default: the bundled file]
    #[arg(long, value_name = "FILE", value_parser = path())]
    weights: Option<PathBuf>,
    /// Folder for the model and the record of the run [default: runs/DATE-NAME]
    #[arg(long, value_name = "DIR", value_parser = path())]
    pub out: Option<PathBuf>,
    /// Passes over the training pictures
    #[arg(long, value_name = "N", default_value = "10", value_parser = value_parser!(u32).range(1..))]
    pub epochs: u32,
    /// Pictures a step
    #[arg(long, value_name = "N", default_value = "32", value_parser = value_parser!(u32).range(1..=65536))]
    pub batch_size: u32,
    /// Learning rate of Adam
    #[arg(long, value_name = "RATE", default_value = "1e-3", value_parser = positive)]
    pub lr: f64,
    /// Batch norm of the frozen layers: stored statistics, or the batch's (as PyTorch's model.train())
    #[arg(long, value_enum, default_value = "frozen")]
    pub bn: BnChoice,
    /// Decides the new head, the split and the order of pictures
    #[arg(long, value_name = "N", default_value = "0")]
    pub seed: u64,
    /// Compute once what is the same in every epoch, or do not
    #[arg(long, value_enum, default_value = "auto")]
    pub cache: CacheChoice,
    /// Share of each class held out if DATA has no val folder
    #[arg(long, value_name = "SHARE", default_value = "0.2", value_parser = share)]
    pub val_split: f64,
    /// Side of the centre crop; the short side is resized to 256/224 of it
    #[arg(long, value_name = "PX", default_value = "224", value_parser = value_parser!(u32).range(32..=4096))]
    pub image_size: u32,
    /// Turn pictures as their EXIF data says (torchvision does not)
    #[arg(long)]
    pub exif: bool,
    #[command(flatten)]
    pub common: Common,
}

impl Train {
    /// The weights that were asked for, or the bundled ones.
    pub fn weights(&self) -> Result<Weights> {
        match &self.weights {
            Some(none) if none.as_os_str() == "none" => Ok(Weights::Random),
            Some(path) => Ok(Weights::File(path.clone())),
            None => locate_default(std::env::var_os("HONE_WEIGHTS")).map(Weights::File),
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
pub enum BnChoice {
    Frozen,
    Batch,
}

impl From<BnChoice> for BnMode {
    fn from(choice: BnChoice) -> Self {
        match choice {
            BnChoice::Frozen => BnMode::Frozen,
            BnChoice::Batch => BnMode::Batch,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
pub enum CacheChoice {
    Auto,
    Off,
}

impl From<CacheChoice> for CacheMode {
    fn from(choice: CacheChoice) -> Self {
        match choice {
            CacheChoice::Auto => CacheMode::Auto,
            CacheChoice::Off => CacheMode::Off,
        }
    }
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
    #[arg(long, value_name = "PX", default_value = "224", value_parser = value_parser!(u32).range(32..=4096))]
    pub size: u32,
    /// How long to measure, at least three steps
    #[arg(long, default_value = "6", value_parser = positive)]
    pub seconds: f64,
    #[command(flatten)]
    pub common: Common,
}

#[derive(clap::Args)]
pub struct Demo {
    /// Folder for the pictures and the run [default: runs/DATE-demo]
    #[arg(long, value_name = "DIR", value_parser = path())]
    pub out: Option<PathBuf>,
    #[command(flatten)]
    pub common: Common,
}

fn positive(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x.is_finite() && x > 0.0 => Ok(x),
        _ => Err("expected a positive number".into()),
    }
}

fn share(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x > 0.0 && x < 1.0 => Ok(x),
        _ => Err("expected a share between 0 and 1".into()),
    }
}
