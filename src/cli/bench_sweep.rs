//! `hone bench sweep`: what a picture costs, over the batch and over the size of the pictures.

use super::args::Bench;
use super::bench;
use super::report;
use crate::cuda;
use crate::error::{Error, Result};
use crate::nn::ResNet18;
use crate::tensor::Device;
use crate::train::Placement;
use crate::weights::write_atomically;
use plotters::prelude::*;
use serde_json::json;
use std::path::Path;

const BATCHES: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];
/// In ascending order; the odd ones are awkward for tiles.
const SIZES: [usize; 18] = [64, 65, 96, 97, 128, 129, 160, 191, 224, 225, 256, 257, 320, 321, 384, 447, 511, 512];
/// The largest size is not measured with more pictures than fit beside each other in the memory of a small machine.
const PIXELS: usize = 64 * 224 * 224;

/// A measured point.
struct Point {
    batch: usize,
    size: usize,
    images_per_second: f64,
    gflops: f64,
}

/// Measures both series, prints them, and draws them to `--plot`.
pub fn run(args: &Bench, placement: Placement) -> Result<()> {
    // Not after a minute of measuring.
    if let Some(path) = args.plot.as_deref().filter(|path| path.is_dir()) {
        return Err(Error::file(path, "this is a folder", "give --plot a file in it"));
    }
    if let Some(folder) = args.plot.as_deref().and_then(Path::parent).filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::read_dir(folder).map_err(Error::io("write to", folder))?;
    }
    let network = ResNet18::new(bench::CLASSES, 0);
    placement.move_network(&network)?;
    let size = args.size as usize;
    let over_batches = series(args, &network, placement, BATCHES.map(|batch| (batch, size)).as_slice())?;
    let batch = args.batch as usize;
    let fitting = |size: usize| batch.min(PIXELS / (size * size)).max(1);
    let over_sizes = series(args, &network, placement, SIZES.map(|size| (fitting(size), size)).as_slice())?;
    match &args.plot {
        Some(path) => plot(path, &over_batches, &over_sizes),
        None => Ok(()),
    }
}

fn series(args: &Bench, network: &ResNet18, placement: Placement, points: &[(usize, usize)]) -> Result<Vec<Point>> {
    let mut measured = Vec::with_capacity(points.len());
    for &(batch, size) in points {
        let images = bench::random_images(batch, size, placement)?;
        let seconds = bench::forward_seconds(network, &images, placement.device, args.seconds)
            .map_err(|e| e.with_batch(batch))?;
        drop(images);
        release(placement.device)?;
        let images_per_second = batch as f64 / seconds;
        let gflops = 2.0 * network.multiply_adds(batch, size, size) as f64 / seconds / 1e9;
        let point = Point { batch, size, images_per_second, gflops };
        let precision = placement.precision.to_string();
        if args.common.json {
            report::json_line(&json!({
                "bench": "sweep", "device": placement.device.to_string(), "precision": precision, "batch": batch, "size": size,
                "threads": rayon::current_num_threads(), "median_ms": seconds * 1e3,
                "images_per_second": images_per_second, "gflops": gflops,
            }));
        } else {
            report::line(&format!(
                "batch {batch:>3}, {size:>3} px: {:>9.2} ms, {images_per_second:>8.1} images/s, {gflops:>6.0} GFLOP/s",
                seconds * 1e3
            ));
        }
        measured.push(point);
    }
    Ok(measured)
}

/// Gives back the memory of sizes that will not come again.
fn release(device: Device) -> Result<()> {
    crate::tensor::pool::release_unused();
    match device {
        Device::Cpu => Ok(()),
        Device::Cuda => cuda::context()?.synchronize(),
    }
}

/// Images a second over the batch, and, so that linear cost is a level line, GFLOP/s over the size.
fn plot(path: &Path, over_batches: &[Point], over_sizes: &[Point]) -> Result<()> {
    let mut svg = String::new();
    draw(&mut svg, over_batches, over_sizes)
        .map_err(|e| Error::io("draw", path)(std::io::Error::other(e.to_string())))?;
    write_atomically(path, |file| file.write_all(svg.as_bytes()))
}

fn draw(
    svg: &mut String,
    over_batches: &[Point],
    over_sizes: &[Point],
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::with_string(svg, (960, 400)).into_drawing_area();
    area.fill(&WHITE)?;
    let (left, right) = area.split_horizontally(480);
    let best = |points: &[Point], value: fn(&Point) -> f64| points.iter().map(value).fold(0.0, f64::max) * 1.1;

    let (first, last) = (BATCHES[0] as f64, BATCHES[BATCHES.len() - 1] as f64);
    let mut chart = ChartBuilder::on(&left)
        .caption(format!("{} pixels", over_batches[0].size), ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d((first..last).log_scale().base(2.0), 0.0..best(over_batches, |p| p.images_per_second))?;
    chart.configure_mesh().x_desc("batch").y_desc("images/s").x_label_formatter(&|x| format!("{x:.0}")).draw()?;
    let places = || over_batches.iter().map(|p| (p.batch as f64, p.images_per_second));
    chart.draw_series(LineSeries::new(places(), &BLUE))?;
    chart.draw_series(places().map(|place| Circle::new(place, 3, BLUE.filled())))?;

    let (smallest, largest) = (SIZES[0] as f64, SIZES[SIZES.len() - 1] as f64);
    let mut chart = ChartBuilder::on(&right)
        .caption(format!("batch {}, as memory allows", over_sizes[0].batch), ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(smallest..largest, 0.0..best(over_sizes, |p| p.gflops))?;
    chart
        .configure_mesh()
        .x_desc("side in pixels")
        .y_desc("GFLOP/s")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .draw()?;
    let places = || over_sizes.iter().map(|p| (p.size as f64, p.gflops));
    chart.draw_series(LineSeries::new(places(), &BLUE))?;
    chart.draw_series(places().map(|place| Circle::new(place, 3, BLUE.filled())))?;
    area.present()?;
    Ok(())
}
