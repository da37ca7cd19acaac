//! `hone bench kernels`: every convolution of the network, each pass on its own, under the roof this machine has.

use super::args::Bench;
use super::report;
use crate::cpu::conv::{self, ConvShape, PackedFilter, Purpose};
use crate::cpu::gemm::Epilogue;
use crate::cpu::{self, Isa};
use crate::cuda;
use crate::error::Result;
use crate::nn::ResNet18;
use crate::tensor::{DType, Device, Tensor, with_float};
use crate::train::{Placement, Precision};
use serde_json::json;
use std::time::Instant;

/// Extents of the measurements of the roof on a card.
const PEAK_BLOCKS: usize = 132 * 16;
const PEAK_ROUNDS: usize = 4096;
const PEAK_BYTES: usize = 512 << 20;
/// The emulated grid has no speed to speak of: its roof is measured for the sake of running the kernels.
const EMULATED: (usize, usize, usize) = (1, 2, 1 << 16);

/// Best rates of the machine: operations and bytes a second.
struct Roof {
    operations: f64,
    bytes: f64,
}

impl Roof {
    fn measure(placement: Placement) -> Result<Roof> {
        if placement.device == Device::Cpu {
            return Ok(Roof {
                operations: with_float!(placement.dtype(), T => cpu::peak::operations_per_second::<T>(Isa::current())),
                bytes: cpu::peak::bytes_per_second(),
            });
        }
        let unit = match placement.precision {
            Precision::F32 => cuda::peak::Unit::F32,
            Precision::Tf32 => cuda::peak::Unit::Tf32,
            Precision::Bf16 => cuda::peak::Unit::Bf16,
        };
        let emulated = cuda::context()?.backend().is_emulated();
        let (blocks, rounds, bytes) = if emulated { EMULATED } else { (PEAK_BLOCKS, PEAK_ROUNDS, PEAK_BYTES) };
        Ok(Roof {
            operations: cuda::peak::operations_per_second(unit, blocks, rounds)?,
            bytes: cuda::peak::bytes_per_second(bytes)?,
        })
    }

    /// The least time that so much can take.
    fn seconds(&self, operations: f64, bytes: f64) -> f64 {
        (operations / self.operations).max(bytes / self.bytes)
    }
}

/// Seconds of one call of `run`, from as many as fill `seconds`.
fn time(device: Device, seconds: f64, mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    run()?;
    let mut times = Vec::new();
    let start = Instant::now();
    while times.len() < 3 || start.elapsed().as_secs_f64() < seconds {
        times.push(match device {
            Device::Cpu => {
                let start = Instant::now();
                run()?;
                start.elapsed().as_secs_f64()
            }
            Device::Cuda => {
                let backend = cuda::context()?.backend();
                let start = backend.mark()?;
                run()?;
                backend.seconds_between(&start, &backend.mark()?)?
            }
        });
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

/// A pass of a convolution.
type Pass<'a> = (&'static str, Box<dyn FnMut() -> Result<()> + 'a>);

fn passes<'a>(shape: &'a ConvShape, first: bool, tensors: &'a [Tensor; 3], device: Device) -> Result<Vec<Pass<'a>>> {
    let [x, w, y] = tensors;
    let mut passes: Vec<Pass> = Vec::new();
    match device {
        Device::Cpu => with_float!(x.dtype(), T => {
            let isa = Isa::current();
            let packed = conv::pack_filter::<T>(isa, w.as_slice(), shape, Purpose::Inference);
            // What another algorithm than the direct product gains.
            if !matches!(packed, PackedFilter::Direct(_) | PackedFilter::Tiles(..)) {
                let packed = conv::pack_filter_directly::<T>(isa, w.as_slice(), shape);
                let mut out = y.to_vec::<T>();
                passes.push((
                    "direct",
                    Box::new(move || {
                        conv::forward_directly(x.as_slice(), &packed, shape, Epilogue::default(), &mut out);
                        Ok(())
                    }),
                ));
            }
            let mut out = y.to_vec::<T>();
            passes.push((
                "forward",
                Box::new(move || {
                    conv::forward(x.as_slice(), &packed, shape, Epilogue::default(), &mut out);
                    Ok(())
                }),
            ));
            if !first {
                let mut dx = x.to_vec::<T>();
                passes.push((
                    "dgrad",
                    Box::new(move || {
                        conv::backward_input(isa, y.as_slice(), w.as_slice(), shape, &mut dx, false);
                        Ok(())
                    }),
                ));
            }
            let mut dw = w.to_vec::<f32>();
            passes.push((
                "wgrad",
                Box::new(move || {
                    conv::backward_filter::<T>(isa, x.as_slice(), y.as_slice(), shape, &mut dw);
                    Ok(())
                }),
            ));
        }),
        Device::Cuda => {
            let packed = cuda::conv::pack_filter(w, shape, x.dtype())?;
            passes.push((
                "forward",
                Box::new(move || {
                    cuda::conv::forward(x, &packed, shape, cuda::conv::Epilogue::default(), false).map(drop)
                }),
            ));
            if !first {
                passes.push(("dgrad", Box::new(move || cuda::conv::backward_input(y, w, shape).map(drop))));
            }
            passes.push(("wgrad", Box::new(move || cuda::conv::backward_filter(x, y, shape).map(drop))));
        }
    }
    Ok(passes)
}

pub fn run(args: &Bench, placement: Placement) -> Result<()> {
    let roof = Roof::measure(placement)?;
    let (json, device, dtype) = (args.common.json, placement.device, placement.dtype());
    let precision = placement.precision.to_string();
    let say = |text: String| {
        if !json {
            report::line(&text)
        }
    };
    if json {
        report::json_line(&json!({
            "bench": "roof", "device": device.to_string(), "precision": precision,
            "gflops": roof.operations / 1e9, "gbytes_per_second": roof.bytes / 1e9,
        }));
    }
    say(format!(
        "measured roof: {:.0} GFLOP/s {precision}, {:.1} GB/s copied",
        roof.operations / 1e9,
        roof.bytes / 1e9
    ));
    say(format!("{:<24} {:<8} {:>10} {:>10} {:>9} {:>8}", "convolution", "pass", "ms", "GFLOP/s", "GB/s", "% roof"));
    let mut seen: Vec<ConvShape> = Vec::new();
    let size = args.size as usize;
    for shape in ResNet18::without_values(1, 0).conv_shapes(args.batch as usize, size, size) {
        if seen.contains(&shape) {
            continue;
        }
        seen.push(shape);
        let [oh, ow] = shape.output();
        let name =
            format!("{}x{}x{}-{}x{}x{}-s{}", shape.h, shape.w, shape.c, shape.o, shape.kh, shape.kw, shape.stride[0]);
        let tensor = |dims: &[usize], value: f32, dtype: DType| -> Result<Tensor> {
            Tensor::full_on(device, dims, value)?.to_dtype(dtype)
        };
        let tensors = [
            tensor(&[shape.n, shape.h, shape.w, shape.c], 0.5, dtype)?,
            tensor(&[shape.o, shape.kh, shape.kw, shape.c], 0.1, DType::F32)?,
            tensor(&[shape.n, oh, ow, shape.o], 0.25, dtype)?,
        ];
        let operations = 2.0 * shape.multiply_adds() as f64;
        let bytes = ((tensors[0].numel() + tensors[2].numel()) * dtype.size() + tensors[1].numel() * 4) as f64;
        for (pass, mut run) in passes(&shape, seen.len() == 1, &tensors, device)? {
            let seconds = time(device, args.seconds / 20.0, &mut run)?;
            let share = roof.seconds(operations, bytes) / seconds * 100.0;
            if json {
                report::json_line(&json!({
                    "bench": "kernel", "convolution": name, "pass": pass, "device": device.to_string(),
                    "precision": precision, "batch": args.batch, "median_ms": seconds * 1e3,
                    "gflops": operations / seconds / 1e9, "gbytes_per_second": bytes / seconds / 1e9,
                    "percent_of_roof": share,
                }));
            }
            say(format!(
                "{name:<24} {pass:<8} {:>10.3} {:>10.1} {:>9.1} {share:>8.1}",
                seconds * 1e3,
                operations / seconds / 1e9,
                bytes / seconds / 1e9
            ));
        }
    }
    Ok(())
}
