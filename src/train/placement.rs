//! Where a network runs, and in which precision.

use crate::cuda;
use crate::error::{Error, Result};
use crate::nn::ResNet18;
use crate::tensor::{DType, Device, Tensor};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// What activations are kept in and multiplied as. Parameters, statistics and losses are f32 always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 24 bits of mantissa throughout.
    #[default]
    F32,
    /// f32, multiplied with 11 bits on tensor cores; on CUDA.
    Tf32,
    /// 8 bits of mantissa, summed in f32.
    Bf16,
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Precision::F32 => "f32",
            Precision::Tf32 => "tf32",
            Precision::Bf16 => "bf16",
        })
    }
}

/// A device and a precision.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// Where.
    pub device: Device,
    /// How precisely.
    pub precision: Precision,
}

impl Placement {
    /// Checks that the device works and can do it, and makes it ready.
    pub fn new(device: Device, precision: Precision) -> Result<Placement> {
        match device {
            Device::Cpu if precision == Precision::Tf32 => {
                return Err(Error::config(
                    "tf32 is for tensor cores",
                    "give --precision f32 or bf16, or --device cuda",
                ));
            }
            Device::Cpu => {}
            Device::Cuda => {
                let context = cuda::context()?;
                if precision != Precision::F32 && context.backend().architecture().0 < 8 {
                    let problem = format!("{} has no tensor cores for {precision:?}", context.backend().name());
                    return Err(Error::config(problem, "give --precision f32"));
                }
                context.allow_tf32(precision == Precision::Tf32);
            }
        }
        Ok(Placement { device, precision })
    }

    /// The type of activations.
    pub fn dtype(self) -> DType {
        if self.precision == Precision::Bf16 { DType::BF16 } else { DType::F32 }
    }

    /// A network's input, where and as it is needed. Features, which the head takes, stay f32.
    pub fn place(self, x: &Tensor) -> Result<Tensor> {
        let x = x.to_device(self.device)?;
        if x.dims().len() == 4 { x.to_dtype(self.dtype()) } else { Ok(x) }
    }

    /// Moves a network there.
    pub fn move_network(self, network: &ResNet18) -> Result<()> {
        if network.device() != self.device { network.to_device(self.device) } else { Ok(()) }
    }
}
