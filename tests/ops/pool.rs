use crate::support::*;
use half::bf16;
use hone::ops::{Conv2dParams, FusedConv2d, fused_conv2d, fused_conv2d_max_pool, global_avg_pool, max_pool2d};
use hone::{DType, Tensor};
use proptest::prelude::*;

/// Maximum, and the index in `x` of the first place that holds it, of every window.
fn reference(x: &[f32], [n, h, w, c]: [usize; 4], k: usize, s: usize, p: usize) -> Vec<(f32, usize)> {
    let (oh, ow) = ((h + 2 * p - k) / s + 1, (w + 2 * p - k) / s + 1);
    let mut out = Vec::new();
    for i in 0..n * oh * ow * c {
        let (b, y, xo, ch) = (i / (oh * ow * c), i / (ow * c) % oh, i / c % ow, i % c);
        let mut best: Option<(f32, usize)> = None;
        for (ky, kx) in (0..k).flat_map(|y| (0..k).map(move |x| (y, x))) {
            let (iy, ix) = ((y * s + ky).wrapping_sub(p), (xo * s + kx).wrapping_sub(p));
            if iy < h && ix < w {
                let at = ((b * h + iy) * w + ix) * c + ch;
                if best.is_none_or(|(value, _)| x[at] > value) {
                    best = Some((x[at], at));
                }
            }
        }
        out.push(best.unwrap());
    }
    out
}

proptest! {
    #[test]
    fn max_pool_and_its_gradient(
        n in 1usize..3, h in 1usize..10, w in 1usize..10, c in 1usize..70, k in 1usize..5, s in 1usize..4, p in 0usize..3,
        bf16 in any::<bool>(),
    ) {
        prop_assume!(p <= k / 2 && h + 2 * p >= k && w + 2 * p >= k);
        let (dtype, tolerance) = if bf16 { (DType::BF16, 1e-2) } else { (DType::F32, 1e-6) };
        // A few distinct values, so that windows have ties.
        let x: Vec<f32> = values(n * h * w * c, 1).iter().map(|x| (x * 3.0).round()).collect();
        let want = reference(&x, [n, h, w, c], k, s, p);
        let leaf = Tensor::from_slice(&x, [n, h, w, c]).unwrap().to_dtype(dtype).unwrap().leaf();
        let y = max_pool2d(&leaf, k, s, p).unwrap();
        prop_assert_eq!(y.to_f32_vec().unwrap(), want.iter().map(|w| w.0).collect::<Vec<_>>());
        let dy = tensor(y.dims(), 2).to_dtype(dtype).unwrap();
        let mut dx = vec![0.0f64; x.len()];
        for (&(_, at), dy) in want.iter().zip(dy.to_f32_vec().unwrap()) {
            dx[at] += f64::from(dy);
        }
        let gradients = y.backward_with(dy).unwrap();
        assert_close(&gradients.get(&leaf).unwrap().to_f32_vec().unwrap(), &dx, tolerance, "dx");
    }

    /// Pooling the first layer as it is computed, to the same bits; more rows than are computed together, and in several parts.
    #[test]
    fn first_layer_is_pooled(
        n in 1usize..3, h in 7usize..90, w in 7usize..40, o in prop::sample::select(vec![16, 64, 10]), bf16 in any::<bool>(),
        k in 1usize..11, s in 1usize..5, relu in any::<bool>(),
    ) {
        let dtype = if bf16 { DType::BF16 } else { DType::F32 };
        let x = tensor(&[n, h, w, 3], 1).to_dtype(dtype).unwrap();
        let (filter, params) = (tensor(&[o, 7, 7, 3], 2), Conv2dParams::new(2, 3));
        let conv = FusedConv2d::new(&filter, &values(o, 3), &values(o, 4), params, dtype).unwrap();
        let y = fused_conv2d(&x, &conv, None, relu).unwrap();
        let p = k / 2;
        match max_pool2d(&y, k, s, p) {
            Ok(want) => {
                let got = fused_conv2d_max_pool(&x, &conv, relu, [k, s, p]).unwrap();
                prop_assert_eq!(got.dims(), want.dims());
                prop_assert_eq!(got.to_f32_vec().unwrap(), want.to_f32_vec().unwrap());
            }
            Err(_) => prop_assert!(fused_conv2d_max_pool(&x, &conv, relu, [k, s, p]).is_err()),
        }
    }

    #[test]
    fn average(n in 1usize..4, h in 1usize..6, w in 1usize..6, c in 1usize..70) {
        let x = tensor(&[n, h, w, c], 1);
        let v = x.to_vec::<f32>();
        let want: Vec<f64> = (0..n * c).map(|i| {
            (0..h * w).map(|p| f64::from(v[(i / c * h * w + p) * c + i % c])).sum::<f64>() / (h * w) as f64
        }).collect();
        assert_close(global_avg_pool(&x).unwrap().as_slice(), &want, 1e-6, "mean");
    }
}

#[test]
fn negative_and_infinite_windows() {
    let x = Tensor::from_slice(&[f32::NEG_INFINITY, -3.0, -5.0, f32::NEG_INFINITY], [1, 2, 2, 1]).unwrap();
    assert_eq!(max_pool2d(&x, 3, 2, 1).unwrap().to_vec::<f32>(), [-3.0], "padding is never the maximum");
    let x = Tensor::full([1, 2, 2, 1], f32::NEG_INFINITY).leaf();
    let y = max_pool2d(&x, 2, 2, 0).unwrap();
    let gradients = y.backward_with(Tensor::full([1, 1, 1, 1], 1.0f32)).unwrap();
    assert_eq!(gradients.get(&x).unwrap().to_vec::<f32>(), [1.0, 0.0, 0.0, 0.0]);
    let x = Tensor::from_slice(&[1.0, f32::NAN, 3.0, 2.0], [1, 2, 2, 1]).unwrap();
    assert!(max_pool2d(&x, 2, 2, 0).unwrap().item().unwrap().is_nan());
}

#[test]
fn bf16_are_ordered_as_f32() {
    // Numbers of either sign, infinities, zeros of either sign, and NaN as processors and files have it, of either sign.
    let numbers = [f32::NEG_INFINITY, -3.0e38, -2.0, -1.0e-40, -0.0, 0.0, 1.0e-40, 0.5, 3.0e38, f32::INFINITY];
    let nans = [0x7f80_8000, 0x7fc0_0000, 0xff81_0000, 0xffc0_0000, 0xffff_0000].map(f32::from_bits);
    let values: Vec<f32> = numbers.into_iter().chain(nans).collect();
    for (i, &first) in values.iter().enumerate() {
        for (j, &second) in values.iter().enumerate() {
            // Both orders, in vectors and what is left of them.
            // Made here: some processors round the smallest numbers to zero.
            let pair: Vec<bf16> = [first, second].into_iter().flat_map(|x| [bf16::from_f32(x); 70]).collect();
            let x = Tensor::from_slice(&pair, [1, 1, 2, 70]).unwrap();
            let y: Vec<f32> = max_pool2d(&x, 2, 1, 1).unwrap().to_vec::<bf16>().into_iter().map(bf16::to_f32).collect();
            // Three windows a row: of the first, of both, and of the second.
            for row in y.chunks_exact(3 * 70) {
                for (window, want) in [(0, i..i + 1), (1, i.min(j)..i.max(j) + 1), (2, j..j + 1)] {
                    let nan = values[i].is_nan() && window < 2 || values[j].is_nan() && window > 0;
                    // Of numbers the later in the list is the greater, or as great.
                    let want = bf16::from_f32(values[want.end - 1]).to_f32();
                    for &got in &row[window * 70..][..70] {
                        assert!(
                            if nan { got.is_nan() } else { got == want },
                            "{first} and {second}, window {window}: {got}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn gradients() {
    check_gradients(&[tensor(&[2, 3, 2, 5], 1)], 0.5, 1e-4, |x| global_avg_pool(&x[0]));
    check_gradients(&[tensor(&[1, 5, 4, 2], 1)], 1e-4, 1e-2, |x| max_pool2d(&x[0], 3, 2, 1));
}

#[test]
fn wrong_parameters() {
    let x = tensor(&[1, 4, 4, 1], 1);
    for (k, s, p) in [(0, 1, 0), (3, 0, 1), (3, 1, 2), (16, 1, 0)] {
        assert!(max_pool2d(&x, k, s, p).is_err(), "{k} {s} {p}");
    }
    assert!(max_pool2d(&tensor(&[4, 4], 1), 2, 2, 0).is_err());
    assert!(global_avg_pool(&tensor(&[1, 0, 4, 2], 1)).is_err());
}
