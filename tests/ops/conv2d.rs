use crate::support::*;
use half::bf16;
use hone::DType;
use hone::cpu::conv::{self, ConvShape, Purpose};
use hone::cpu::gemm::Epilogue;
use hone::cpu::winograd::blocks::{self, BlockFilter};
use hone::cpu::winograd::strips::{self, StripFilter};
use hone::cpu::winograd::{self, Algorithm, wgrad};
use hone::cpu::{Float, Isa};
use hone::ops::{Conv2dParams, FusedConv2d, conv2d, fused_conv2d};
use hone::{Error, Tensor};
use proptest::prelude::*;

/// Visits every product of the convolution: (input index, filter index, output index).
fn visit(s: &ConvShape, mut f: impl FnMut(usize, usize, usize)) {
    let [oh, ow] = s.output();
    for n in 0..s.n {
        for (p, q) in (0..oh).flat_map(|p| (0..ow).map(move |q| (p, q))) {
            for (r, t) in (0..s.kh).flat_map(|r| (0..s.kw).map(move |t| (r, t))) {
                let y = (p * s.stride[0] + r).wrapping_sub(s.padding[0]);
                let x = (q * s.stride[1] + t).wrapping_sub(s.padding[1]);
                if y >= s.h || x >= s.w {
                    continue;
                }
                for (o, c) in (0..s.o).flat_map(|o| (0..s.c).map(move |c| (o, c))) {
                    f(
                        ((n * s.h + y) * s.w + x) * s.c + c,
                        ((o * s.kh + r) * s.kw + t) * s.c + c,
                        ((n * oh + p) * ow + q) * s.o + o,
                    );
                }
            }
        }
    }
}

struct Case {
    shape: ConvShape,
    x: Vec<f32>,
    w: Vec<f32>,
    dy: Vec<f32>,
    /// y, dx, dw
    want: [Vec<f64>; 3],
}

fn case<T: Float>(shape: ConvShape) -> Case {
    let [oh, ow] = shape.output();
    let values = |len: usize, seed: u64| -> Vec<f32> {
        values(len, seed).into_iter().map(|x| T::from_f32(x).to_f32()).collect()
    };
    let x = values(shape.n * shape.h * shape.w * shape.c, 1);
    let w = values(shape.o * shape.kh * shape.kw * shape.c, 2);
    let dy = values(shape.n * oh * ow * shape.o, 3);
    let mut want = [vec![0.0; dy.len()], vec![0.0; x.len()], vec![0.0; w.len()]];
    visit(&shape, |i, f, o| {
        want[0][o] += f64::from(x[i]) * f64::from(w[f]);
        want[1][i] += f64::from(dy[o]) * f64::from(w[f]);
        want[2][f] += f64::from(dy[o]) * f64::from(x[i]);
    });
    Case { shape, x, w, dy, want }
}

/// What Winograd's algorithm may make of bf16, of the largest result: rounding transformed inputs and filters costs outputs in the
/// corner of a tile 1.7 % of their usual size, four or five times as much now and then.
const BF16_TRANSFORMED: f64 = 4e-2;
/// And of f32: sums lose 6e-6 of their usual size in tiles of seven outputs, those in the corner ten times as much.
const F32_TRANSFORMED: f64 = 1e-4;

/// All three passes under every instruction set of the machine.
fn check(shape: ConvShape) {
    check_in::<f32>(shape, 1e-5, F32_TRANSFORMED);
    check_in::<bf16>(shape, 5e-3, BF16_TRANSFORMED);
}

/// `tolerance` is for sums of products as they are, `transformed` for what Winograd's algorithm may have computed.
fn check_in<T: Float>(shape: ConvShape, tolerance: f64, transformed: f64) {
    let Case { shape, x, w, dy, want } = case::<T>(shape);
    let narrow = |values: &[f32]| values.iter().map(|&x| T::from_f32(x)).collect::<Vec<T>>();
    let wide = |values: &[T]| values.iter().map(|x| x.to_f32()).collect::<Vec<f32>>();
    let (x, dy) = (narrow(&x), narrow(&dy));
    for isa in Isa::supported() {
        let name = |pass: &str| format!("{pass} {isa} {} {shape:?}", std::any::type_name::<T>());
        // What a kernel forgets to write shows as NaN.
        let mut y = vec![T::from_f32(f32::NAN); dy.len()];
        let packed = conv::pack_filter_directly(isa, &w, &shape);
        conv::forward_directly(&x, &packed, &shape, Epilogue::default(), &mut y);
        assert_close(&wide(&y), &want[0], tolerance, &name("direct forward"));
        for purpose in [Purpose::Inference, Purpose::Training] {
            y.fill(T::from_f32(f32::NAN));
            let packed = conv::pack_filter(isa, &w, &shape, purpose);
            conv::forward(&x, &packed, &shape, Epilogue::default(), &mut y);
            assert_close(&wide(&y), &want[0], transformed, &name(&format!("forward {purpose:?}")));
        }
        let mut dx = vec![T::from_f32(f32::NAN); x.len()];
        conv::backward_input_directly(isa, &dy, &w, &shape, &mut dx, false);
        assert_close(&wide(&dx), &want[1], tolerance, &name("direct backward_input"));
        dx.fill(T::from_f32(f32::NAN));
        conv::backward_input(isa, &dy, &w, &shape, &mut dx, false);
        assert_close(&wide(&dx), &want[1], transformed, &name("backward_input"));
        // The input stands for what is there already.
        let sum: Vec<f64> = want[1].iter().zip(&x).map(|(dx, x)| dx + f64::from(x.to_f32())).collect();
        dx.copy_from_slice(&x);
        conv::backward_input_directly(isa, &dy, &w, &shape, &mut dx, true);
        assert_close(&wide(&dx), &sum, tolerance, &name("direct backward_input, added"));
        dx.copy_from_slice(&x);
        conv::backward_input(isa, &dy, &w, &shape, &mut dx, true);
        assert_close(&wide(&dx), &sum, transformed, &name("backward_input, added"));
        let mut dw = vec![f32::NAN; w.len()];
        conv::backward_filter_directly(isa, &x, &dy, &shape, &mut dw);
        assert_close(&dw, &want[2], tolerance, &name("direct backward_filter"));
        dw.fill(f32::NAN);
        conv::backward_filter(isa, &x, &dy, &shape, &mut dw);
        assert_close(&dw, &want[2], transformed, &name("backward_filter"));
    }
}

fn shape(nhwc: [usize; 4], okk: [usize; 3], stride: [usize; 2], padding: [usize; 2]) -> ConvShape {
    let ([n, h, w, c], [o, kh, kw]) = (nhwc, okk);
    ConvShape { n, h, w, c, o, kh, kw, stride, padding }
}

/// A loss of 2^-18 of each value would show as 4e-6.
#[test]
fn the_first_layer_is_exact_in_training() {
    let shape = shape([2, 63, 37, 3], [64, 7, 7], [2, 2], [3, 3]);
    let Case { x, w, dy, want, .. } = case::<f32>(shape);
    for isa in Isa::supported() {
        let mut y = vec![f32::NAN; dy.len()];
        let packed = conv::pack_filter(isa, &w, &shape, Purpose::Training);
        conv::forward(&x, &packed, &shape, Epilogue::default(), &mut y);
        assert_close(&y, &want[0], 1e-6, &format!("first layer {isa}"));
    }
}

#[test]
fn layers_of_the_network() {
    // conv1, a 3x3 of either stride, and the shortcut of ResNet-18, at sizes that keep the naive loops quick.
    check(shape([2, 21, 18, 3], [64, 7, 7], [2, 2], [3, 3]));
    check(shape([2, 7, 9, 64], [64, 3, 3], [1, 1], [1, 1]));
    check(shape([1, 9, 8, 64], [128, 3, 3], [2, 2], [1, 1]));
    check(shape([1, 8, 7, 64], [128, 1, 1], [2, 2], [0, 0]));
    check(shape([1, 3, 3, 300], [70, 3, 3], [1, 1], [1, 1]));
}

#[test]
fn no_pictures() {
    check(shape([0, 21, 18, 3], [64, 7, 7], [2, 2], [3, 3]));
    check(shape([0, 28, 28, 64], [64, 3, 3], [1, 1], [1, 1]));
    check(shape([0, 7, 7, 256], [256, 3, 3], [1, 1], [1, 1]));
    check(shape([0, 9, 8, 64], [128, 3, 3], [2, 2], [1, 1]));
    check(shape([0, 8, 7, 64], [128, 1, 1], [2, 2], [0, 0]));
    check(shape([0, 3, 3, 5], [7, 3, 3], [1, 1], [1, 1]));
}

#[test]
fn many_rows_are_split_into_parts() {
    // More than 4096 rows of dy, so that the filter's gradient is summed from several parts.
    check(shape([3, 41, 40, 4], [5, 3, 3], [1, 1], [1, 1]));
    check(shape([1, 80, 80, 17], [3, 1, 1], [1, 1], [0, 0]));
}

#[test]
fn pictures_rows_and_channels_around_tiles() {
    // Rows shorter and longer than what takes a plane for each column of the filter; channels beyond those of a task, and beside whole steps.
    check(shape([3, 5, 15, 33], [129, 3, 3], [1, 1], [1, 1]));
    check(shape([3, 5, 16, 32], [160, 3, 3], [1, 1], [1, 1]));
    check(shape([5, 6, 34, 65], [31, 3, 3], [2, 2], [1, 1]));
    check(shape([4, 7, 7, 64], [32, 1, 1], [2, 2], [0, 0]));
    // Taps merged where a position is as long as a step.
    check(shape([3, 6, 9, 15], [5, 2, 2], [1, 2], [1, 0]));
    // A gradient to the filter in several parts, and slices of them.
    check(shape([9, 33, 33, 33], [34, 3, 3], [1, 1], [1, 1]));
    // A picture in strips of rows.
    check(shape([1, 131, 131, 3], [64, 7, 7], [2, 2], [3, 3]));
}

fn tile_edge() -> impl Strategy<Value = usize> {
    prop_oneof![1usize..=8, Just(15), Just(16), Just(17), Just(31), Just(33), Just(63), Just(64), Just(65)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]
    #[test]
    fn any_shape(
        n in 1usize..=2, h in 1usize..=9, w in 1usize..=9, c in tile_edge(), o in tile_edge(),
        kh in 1usize..=4, kw in 1usize..=4, sh in 1usize..=3, sw in 1usize..=3, ph in 0usize..=3, pw in 0usize..=3,
    ) {
        prop_assume!(h + 2 * ph >= kh && w + 2 * pw >= kw);
        check(shape([n, h, w, c], [o, kh, kw], [sh, sw], [ph, pw]));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    /// Enough of them that tiles take them in turn.
    #[test]
    fn many_small_pictures(
        n in 14usize..=36, h in 1usize..=7, w in 1usize..=7, c in prop::sample::select(vec![8, 32, 33, 64]),
        o in prop::sample::select(vec![5, 32, 40, 64]), k in 1usize..=3, s in 1usize..=2, p in 0usize..=2,
    ) {
        prop_assume!(h + 2 * p >= k && w + 2 * p >= k);
        check(shape([n, h, w, c], [o, k, k], [s, s], [p, p]));
    }
}

#[test]
fn many_pictures_in_strips_of_rows() {
    // For the product, and for the gradient to the filter.
    check(shape([17, 7, 7, 512], [8, 3, 3], [1, 1], [1, 1]));
    check(shape([32, 28, 28, 32], [64, 3, 1], [1, 1], [1, 0]));
}

#[test]
fn deep_inner_extents_around_the_depth_block() {
    for c in [127, 128, 129, 255, 256, 257, 385] {
        check(shape([1, 3, 2, c], [9, 2, 1], [1, 1], [1, 0]));
    }
}

#[test]
fn gradients_of_the_recorded_operation() {
    let inputs = [tensor(&[2, 5, 4, 3], 1), tensor(&[4, 3, 2, 3], 2), tensor(&[4], 3)];
    let params = Conv2dParams { stride: [2, 1], padding: [1, 0] };
    check_gradients(&inputs, 0.5, 1e-4, |x| conv2d(&x[0], &x[1], Some(&x[2]), params));
    check_gradients(&inputs[..2], 0.5, 1e-4, |x| conv2d(&x[0], &x[1], None, params));
}

#[test]
fn frozen_operands_get_no_gradient() {
    let (x, w) = (tensor(&[1, 4, 4, 2], 1), tensor(&[3, 3, 3, 2], 2));
    let leaf = w.clone().leaf();
    let y = conv2d(&x, &leaf, None, Conv2dParams::new(1, 1)).unwrap();
    let gradients = y.backward_with(tensor(y.dims(), 3)).unwrap();
    assert!(gradients.get(&leaf).is_some() && gradients.get(&x).is_none());
    assert!(!conv2d(&x, &w, None, Conv2dParams::new(1, 1)).unwrap().requires_grad());
}

#[test]
fn fused_equals_its_parts() {
    for (c, o) in [(3, 64), (64, 64), (16, 10), (5, 33)] {
        let (x, w) = (tensor(&[2, 7, 6, c], 1), tensor(&[o, 3, 3, c], 2));
        let (scale, shift) = (values(o, 3), values(o, 4));
        let params = Conv2dParams::new(2, 1);
        let conv = FusedConv2d::new(&w, &scale, &shift, params, DType::F32).unwrap();
        let plain = conv2d(&x, &w, None, params).unwrap();
        let residual = tensor(plain.dims(), 5);
        for (with_residual, relu) in [(false, false), (false, true), (true, false), (true, true)] {
            let got = fused_conv2d(&x, &conv, with_residual.then_some(&residual), relu).unwrap();
            let want: Vec<f64> = (0..plain.numel())
                .map(|i| {
                    let y = f64::from(plain.as_slice::<f32>()[i]) * f64::from(scale[i % o]) + f64::from(shift[i % o]);
                    let y = if with_residual { y + f64::from(residual.as_slice::<f32>()[i]) } else { y };
                    if relu { y.max(0.0) } else { y }
                })
                .collect();
            assert_close(got.as_slice(), &want, 1e-5, "fused");
        }
    }
}

#[test]
fn nan_is_not_hidden() {
    let mut x = values(3 * 3 * 2, 1);
    x[9] = f32::NAN;
    let x = Tensor::from_slice(&x, [1, 3, 3, 2]).unwrap();
    let conv =
        FusedConv2d::new(&tensor(&[4, 3, 3, 2], 2), &[1.0; 4], &[0.0; 4], Conv2dParams::new(1, 1), DType::F32).unwrap();
    let y = fused_conv2d(&x, &conv, None, true).unwrap();
    assert!(y.as_slice::<f32>().iter().all(|y| y.is_nan()));
}

#[test]
fn wrong_shapes_are_errors_that_show_them() {
    let x = tensor(&[1, 4, 4, 2], 1);
    let params = Conv2dParams::new(1, 0);
    let error = conv2d(&x, &tensor(&[3, 3, 3, 5], 2), None, params).unwrap_err();
    assert!(matches!(error, Error::Shape { op: "conv2d", .. }));
    assert!(error.to_string().contains("[1, 4, 4, 2]") && error.to_string().contains("[3, 3, 3, 5]"), "{error}");
    assert!(conv2d(&x, &tensor(&[3, 5, 5, 2], 2), None, params).is_err());
    assert!(conv2d(&x, &tensor(&[3, 3, 3, 2], 2), Some(&tensor(&[4], 3)), params).is_err());
    assert!(conv2d(&x, &tensor(&[3, 3, 3, 2], 2), None, Conv2dParams::new(0, 0)).is_err());
}

/// Winograd's algorithms against the naive sum, with products of f32 and of bf16.
fn check_winograd(stride: usize, extents: [usize; 3], c: usize, o: usize) {
    check_winograd_in::<f32>(stride, extents, c, o, if stride == 1 { F32_TRANSFORMED } else { 2e-5 });
    check_winograd_in::<bf16>(stride, extents, c, o, BF16_TRANSFORMED);
}

/// With bias, residual and ReLU, under every instruction set, all of which can do with products of either type.
fn check_winograd_in<W: Float>(stride: usize, [n, h, w]: [usize; 3], c: usize, o: usize, tolerance: f64) {
    let shape = shape([n, h, w, c], [o, 3, 3], [stride; 2], [1, 1]);
    let Case { x, w, dy, want: [want, want_dx, want_dw], .. } = case::<W>(shape);
    let (bias, residual) = (values(o, 4), values(want.len(), 5));
    let finished: Vec<f64> =
        want.iter().enumerate().map(|(i, y)| (y + f64::from(bias[i % o]) + f64::from(residual[i])).max(0.0)).collect();
    let epilogue = Epilogue { bias: Some(&bias), residual: Some(&residual), relu: true, ..Default::default() };
    for isa in Isa::supported().filter(|isa| winograd::algorithm(*isa, &shape, c, o) != Algorithm::Direct) {
        let name = |what: &str| format!("winograd's {what} {isa} {} {shape:?}", std::any::type_name::<W>());
        let check = |what: &str, forward: &dyn Fn(Epilogue, &mut [f32])| {
            let mut y = vec![f32::NAN; want.len()];
            forward(Epilogue::default(), &mut y);
            assert_close(&y, &want, tolerance, &name(what));
            y.fill(f32::NAN);
            forward(epilogue, &mut y);
            assert_close(&y, &finished, tolerance, &name(&format!("{what} with epilogue")));
        };
        let filter = StripFilter::<W>::new(isa, &w, o, c);
        check("strips", &|epilogue, y| strips::forward(&x, &filter, &shape, epilogue, y));
        let mut dw = vec![f32::NAN; w.len()];
        wgrad::backward_filter_by::<f32, W>(isa, &x, &dy, &shape, &mut dw);
        // It has far more values than the others, each a sum over a few tiles, of which rounding does not average out.
        assert_close(&dw, &want_dw, 2.0 * tolerance, &name("gradient to the filter"));
        if stride != 1 {
            let mut dx = vec![f32::NAN; x.len()];
            let filter = StripFilter::<W>::for_backward_input(isa, &w, o, c);
            strips::backward_input(&dy, &filter, &shape, Epilogue::default(), &mut dx);
            assert_close(&dx, &want_dx, tolerance, &name("gradient to the input in strips"));
            continue;
        }
        let filter = BlockFilter::<W>::new(isa, &w, o, c);
        check("blocks", &|epilogue, y| blocks::forward(&x, &filter, &shape, epilogue, y));
        // Both gradients.
        let turned = ConvShape { c: o, o: c, ..shape };
        let mut dx = vec![f32::NAN; x.len()];
        let filter = BlockFilter::<W>::for_backward_input(isa, &w, o, c);
        blocks::forward(&dy, &filter, &turned, Epilogue::default(), &mut dx);
        assert_close(&dx, &want_dx, tolerance, &name("gradient to the input in blocks"));
        dx.fill(f32::NAN);
        let filter = StripFilter::<W>::for_backward_input(isa, &w, o, c);
        strips::forward(&dy, &filter, &turned, Epilogue::default(), &mut dx);
        assert_close(&dx, &want_dx, tolerance, &name("gradient to the input in strips"));
    }
}

#[test]
fn winograd_on_layers_of_the_network() {
    for stride in [1, 2] {
        check_winograd(stride, [2, 14, 15], 64, 64);
        check_winograd(stride, [1, 9, 7], 128, 128);
        check_winograd(stride, [1, 7, 7], 256, 512);
        check_winograd(stride, [1, 5, 4], 256, 256);
        // More blocks, parts and groups of parts than one.
        check_winograd(stride, [3, 41, 42], 16, 80);
    }
    check_winograd(2, [2, 90, 91], 64, 16);
    // Enough tiles that tasks transform their own.
    check_winograd(2, [3, 122, 123], 64, 16);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn winograd_on_any_size(
        stride in 1usize..=2, n in 1usize..=3, h in 1usize..=17, w in 1usize..=17, c in 1usize..=9, o in 1usize..=9
    ) {
        check_winograd(stride, [n, h, w], 16 * c, 16 * o);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn rows_of_seven_taps(
        n in 1usize..=2, h in 1usize..=40, w in 1usize..=25, c in 1usize..=5, o in 1usize..=5,
        kh in 1usize..=7, sh in 1usize..=3, ph in 0usize..=3, pw in 0usize..=3,
    ) {
        prop_assume!(h + 2 * ph >= kh && w + 2 * pw >= 7);
        check(shape([n, h, w, c], [16 * o, kh, 7], [sh, 2], [ph, pw]));
    }
}

#[test]
fn winograd_is_for_what_it_suits() {
    let isa = Isa::supported().filter(|isa| !isa.has_tiles()).last().unwrap();
    let algorithm = |[o, k, c]: [usize; 3], stride: usize, padding: usize| {
        let shape = shape([1, 9, 9, c], [o, k, k], [stride; 2], [padding; 2]);
        winograd::algorithm(isa, &shape, c, o)
    };
    assert_eq!(algorithm([64, 3, 64], 1, 1), Algorithm::Blocks);
    assert_eq!(algorithm([512, 3, 512], 1, 1), Algorithm::Strips);
    assert_eq!(algorithm([128, 3, 64], 2, 1), Algorithm::Strips);
    for (dims, stride, padding) in
        [([64, 3, 64], 3, 1), ([64, 3, 64], 1, 0), ([64, 1, 64], 1, 0), ([528, 3, 64], 1, 1), ([64, 3, 3], 1, 1)]
    {
        assert_eq!(algorithm(dims, stride, padding), Algorithm::Direct, "{dims:?} {stride} {padding}");
    }
}

/// A picture's outputs are the same bits alone and in company, whatever the algorithm and however many threads there are.
#[test]
fn company_changes_no_bit() {
    let pools = [1, 2, 5].map(|threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap());
    for (c, o, h, stride) in [
        (64, 64, 9, 1),
        (64, 64, 21, 1),
        (128, 64, 15, 1),
        (3, 64, 20, 1),
        (512, 64, 3, 1),
        (512, 80, 7, 1),
        (256, 64, 14, 1),
        (512, 64, 9, 1),
        (64, 128, 14, 2),
        (64, 128, 56, 2),
        (256, 64, 13, 2),
        (256, 64, 7, 2),
    ] {
        for dtype in [DType::F32, DType::BF16] {
            let params = Conv2dParams::new(stride, 1);
            let conv =
                FusedConv2d::new(&tensor(&[o, 3, 3, c], 2), &vec![1.0; o], &vec![0.0; o], params, dtype).unwrap();
            let run = |x: Tensor| {
                let y = fused_conv2d(&x.to_dtype(dtype).unwrap(), &conv, None, false).unwrap();
                y.to_dtype(DType::F32).unwrap().to_vec::<f32>()
            };
            let batch = tensor(&[9, h, h, c], 1);
            let all = run(batch.clone());
            for n in 1..=2 {
                let pictures = &batch.as_slice::<f32>()[3 * h * h * c..][..n * h * h * c];
                for pool in &pools {
                    let few = pool.install(|| run(Tensor::from_slice(pictures, [n, h, h, c]).unwrap()));
                    let (outputs, threads) = (few.len() / n, pool.current_num_threads());
                    let what = format!("{c} channels, stride {stride}, {n} pictures in {dtype:?} on {threads} threads");
                    assert!(few == all[3 * outputs..][..n * outputs], "{what}");
                }
            }
        }
    }
}
