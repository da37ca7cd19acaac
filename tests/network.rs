//! The whole network: how it divides pictures among threads changes nothing.

use hone::autograd::no_grad;
use hone::nn::{ResNet18, Stage};
use hone::tensor::{DType, Tensor};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use std::ops::Range;

/// However many pictures go together, and on however many threads: the same bits as one alone, stage by stage.
#[test]
fn pictures_do_not_depend_on_their_company() {
    let network = ResNet18::new(3, 1);
    let mut random = ChaCha8Rng::seed_from_u64(2);
    let noise: Vec<f32> = (0..35 * 33 * 40 * 3).map(|_| random.sample(StandardNormal)).collect();
    let some = |pictures: Range<usize>, dtype: DType| {
        let values = &noise[pictures.start * 33 * 40 * 3..pictures.end * 33 * 40 * 3];
        Tensor::from_slice(values, [pictures.len(), 33, 40, 3]).unwrap().to_dtype(dtype).unwrap()
    };
    for dtype in [DType::F32, DType::BF16] {
        // Of each picture what comes before each cut.
        let cuts = [Stage::Stem, Stage::Layer1, Stage::Layer2, Stage::Layer3, Stage::Layer4, Stage::Head];
        let alone: Vec<_> = (0..35)
            .map(|i| {
                let mut all = vec![some(i..i + 1, dtype)];
                for stage in &cuts[..cuts.len() - 1] {
                    all.push(no_grad(|| network.stage(*stage, all.last().unwrap(), false)).unwrap());
                }
                all.iter().map(values).collect::<Vec<_>>()
            })
            .collect();
        for (threads, pictures) in [1, 2, 5].into_iter().flat_map(|threads| [1, 2, 5, 35].map(|n| (threads, n))) {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let backbone =
                |x: &Tensor, first, end| pool.install(|| no_grad(|| network.backbone(x, first, end, false))).unwrap();
            let of_all = |cut: usize| alone[..pictures].iter().flat_map(|all| all[cut].clone()).collect::<Vec<f32>>();
            let x = some(0..pictures, dtype);
            for (i, cut) in cuts.into_iter().enumerate() {
                let case = format!("{pictures} on {threads} threads, cut before {cut:?}, in {dtype:?}");
                let before = backbone(&x, Stage::Stem, cut);
                assert!(values(&before) == of_all(i), "{case}: the stages before it");
                let features = backbone(&before, cut, Stage::Head);
                assert!(values(&features) == of_all(cuts.len() - 1), "{case}: those from it on");
            }
        }
    }
}

fn values(x: &Tensor) -> Vec<f32> {
    x.to_f32_vec().unwrap()
}
