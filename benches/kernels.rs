//! Criterion benches: every distinct convolution of ResNet-18, its three passes, and the whole network.
//!
//! `cargo bench -- forward/layer3` runs some of them.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use hone::autograd::no_grad;
use hone::cpu::Isa;
use hone::cpu::conv::{self, ConvShape, Purpose};
use hone::cpu::gemm::Epilogue;
use hone::nn::ResNet18;
use hone::ops::{CrossEntropy, cross_entropy};
use hone::{DType, Device, Tensor, cuda};
use std::hint::black_box;

const BATCH: usize = 8;
const SIZE: usize = 224;

/// The network's convolutions, each shape once.
fn layers() -> Vec<ConvShape> {
    let mut shapes: Vec<ConvShape> = Vec::new();
    for shape in ResNet18::new(10, 0).conv_shapes(BATCH, SIZE, SIZE) {
        if !shapes.contains(&shape) {
            shapes.push(shape);
        }
    }
    shapes
}

fn name(s: &ConvShape) -> String {
    format!("{}x{}x{}-{}x{}x{}-s{}", s.h, s.w, s.c, s.o, s.kh, s.kw, s.stride[0])
}

fn convolutions(c: &mut Criterion) {
    let isa = Isa::current();
    for shape in layers() {
        let [oh, ow] = shape.output();
        let x = vec![0.5f32; shape.n * shape.h * shape.w * shape.c];
        let w = vec![0.1f32; shape.o * shape.kh * shape.kw * shape.c];
        let mut y = vec![0.5f32; shape.n * oh * ow * shape.o];
        let (mut dx, mut dw) = (vec![0.0f32; x.len()], vec![0.0f32; w.len()]);
        let packed = conv::pack_filter::<f32>(isa, &w, &shape, Purpose::Inference);
        let mut group = c.benchmark_group("convolution");
        group.sample_size(10).throughput(Throughput::Elements(2 * shape.multiply_adds() as u64));
        group.bench_function(BenchmarkId::new("forward", name(&shape)), |b| {
            b.iter(|| conv::forward(black_box(&x), &packed, &shape, Epilogue::default(), &mut y));
        });
        group.bench_function(BenchmarkId::new("backward_input", name(&shape)), |b| {
            b.iter(|| conv::backward_input(isa, black_box(&y), &w, &shape, &mut dx, false));
        });
        group.bench_function(BenchmarkId::new("backward_filter", name(&shape)), |b| {
            b.iter(|| conv::backward_filter(isa, black_box(&x), &y, &shape, &mut dw));
        });
    }
}

/// The same on a card, if there is one; each call waits for its end.
fn convolutions_on_cuda(c: &mut Criterion) {
    let Ok(context) = cuda::context() else { return };
    for (precision, dtype) in [("f32", DType::F32), ("bf16", DType::BF16)] {
        for shape in layers() {
            let [oh, ow] = shape.output();
            let tensor = |dims: &[usize], dtype: DType| {
                Tensor::full_on(Device::Cuda, dims, 0.5).and_then(|x| x.to_dtype(dtype)).unwrap()
            };
            let x = tensor(&[shape.n, shape.h, shape.w, shape.c], dtype);
            let w = tensor(&[shape.o, shape.kh, shape.kw, shape.c], DType::F32);
            let y = tensor(&[shape.n, oh, ow, shape.o], dtype);
            let packed = cuda::conv::pack_filter(&w, &shape, dtype).unwrap();
            let mut group = c.benchmark_group(format!("convolution-cuda-{precision}"));
            group.sample_size(10).throughput(Throughput::Elements(2 * shape.multiply_adds() as u64));
            let mut bench = |pass: &str, run: &dyn Fn() -> hone::Result<Tensor>| {
                group.bench_function(BenchmarkId::new(pass, name(&shape)), |b| {
                    b.iter(|| run().and_then(|y| context.synchronize().map(|()| y)).unwrap());
                });
            };
            let epilogue = cuda::conv::Epilogue::default;
            bench("forward", &|| cuda::conv::forward(&x, &packed, &shape, epilogue(), false).map(|(y, _)| y));
            bench("backward_input", &|| cuda::conv::backward_input(&y, &w, &shape));
            bench("backward_filter", &|| cuda::conv::backward_filter(&x, &y, &shape));
        }
    }
}

fn network(c: &mut Criterion) {
    let network = ResNet18::new(1000, 0);
    let mut group = c.benchmark_group("network");
    group.sample_size(10);
    for batch in [1, BATCH] {
        let x = Tensor::full([batch, SIZE, SIZE, 3], 0.5f32);
        group.throughput(Throughput::Elements(batch as u64));
        group.bench_function(BenchmarkId::new("forward", batch), |b| {
            b.iter(|| no_grad(|| network.forward(&x, false)).unwrap());
        });
    }
    network.set_trainable(|_| true);
    network.use_batch_statistics(|_| true);
    let x = Tensor::full([BATCH, SIZE, SIZE, 3], 0.5f32);
    let labels = Tensor::full([BATCH], 1i64);
    group.bench_function(BenchmarkId::new("gradients", BATCH), |b| {
        b.iter(|| {
            let logits = network.forward(&x, true).unwrap();
            cross_entropy(&logits, &labels, &CrossEntropy::default()).unwrap().backward().unwrap()
        });
    });
}

criterion_group!(benches, convolutions, convolutions_on_cuda, network);
criterion_main!(benches);
