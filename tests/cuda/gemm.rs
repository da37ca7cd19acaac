use crate::support::{assert_close, random, require_device, rounded};
use hone::cuda::gemm::{Layout, Rung, run};
use hone::{DType, Device, Tensor, ops};
use proptest::prelude::*;

fn transposed(x: &Tensor) -> Tensor {
    let (rows, columns) = (x.dims()[0], x.dims()[1]);
    let values = x.as_slice::<f32>();
    let out: Vec<f32> = (0..rows * columns).map(|i| values[i % rows * columns + i / rows]).collect();
    Tensor::from_slice(&out, [columns, rows]).unwrap()
}

/// A rung's product in a layout, with a bias, against the CPU's.
fn check(rung: Rung, [m, n, k]: [usize; 3], dtype: DType, tolerance: f64) {
    let (mut a, mut b, bias) = (random(&[m, k], 1), random(&[k, n], 2), random(&[n], 3));
    if dtype == DType::BF16 {
        (a, b) = (rounded(&a), rounded(&b));
    }
    let want = ops::linear(&a, &transposed(&b), Some(&bias)).unwrap();
    let to_cuda = |x: &Tensor, dtype| x.to_device(Device::Cuda).unwrap().to_dtype(dtype).unwrap();
    for layout in [Layout::Nn, Layout::Nt, Layout::Tn] {
        let a = if layout == Layout::Tn { transposed(&a) } else { a.clone() };
        let b = if layout == Layout::Nt { transposed(&b) } else { b.clone() };
        let bias = to_cuda(&bias, DType::F32);
        let got = run(rung, &to_cuda(&a, dtype), &to_cuda(&b, dtype), layout, Some(&bias)).unwrap();
        assert_close(&format!("{rung:?} {layout:?} {m}x{n}x{k}"), &got, &want, tolerance);
    }
}

/// Around the edges of a tile.
fn near(tile: usize) -> impl Strategy<Value = usize> {
    prop_oneof![Just(1), Just(tile - 1), Just(tile), Just(tile + 1), 1..2 * tile]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10, ..ProptestConfig::default() })]

    #[test]
    fn plain(m in near(16), n in near(16), k in near(16)) {
        require_device!(Ok(()));
        check(Rung::Plain, [m, n, k], DType::F32, 5e-6);
    }

    #[test]
    fn tiled(m in near(32), n in near(32), k in near(32)) {
        require_device!(Ok(()));
        check(Rung::Tiled, [m, n, k], DType::F32, 5e-6);
    }

    #[test]
    fn registers_4(m in near(64), n in near(64), k in near(16)) {
        require_device!(Ok(()));
        check(Rung::Registers4, [m, n, k], DType::F32, 5e-6);
    }

    #[test]
    fn registers_8(m in near(128), n in near(128), k in near(8)) {
        require_device!(Ok(()));
        check(Rung::Registers8, [m, n, k], DType::F32, 5e-6);
    }

    // Tensor cores need rows of whole packs of 16 bytes.
    #[test]
    fn tf32(m in near(32), n in near(32), k in near(8)) {
        require_device!(Ok(()));
        check(Rung::TensorCores, [m * 4, n * 4, k * 4], DType::F32, 2e-3);
    }

    #[test]
    fn bf16(m in near(16), n in near(16), k in near(10)) {
        require_device!(Ok(()));
        check(Rung::TensorCores, [m * 8, n * 8, k * 8], DType::BF16, 5e-6);
    }
}
