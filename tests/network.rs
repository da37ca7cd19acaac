//! The whole network: how it divides pictures among threads changes nothing.

use hone::autograd::no_grad;
use hone::nn::{ResNet18, Stage};
use hone::ops::global_avg_pool;
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
    let cuts = [Stage::Layer1, Stage::Layer2, Stage::Layer3, Stage::Layer4, Stage::Head];
    for dtype in [DType::F32, DType::BF16] {
        // Of each picture what comes before each cut, and its logits.
        let alone: Vec<[Vec<f32>; 6]> = (0..35)
            .map(|i| {
                let mut x = some(i..i + 1, dtype);
                let mut stages = [Stage::Stem, Stage::Layer1, Stage::Layer2, Stage::Layer3, Stage::Layer4].into_iter();
                let before = cuts.map(|cut| {
                    x = no_grad(|| network.stage(stages.next().unwrap(), &x, false)).unwrap();
                    if cut == Stage::Head { values(&global_avg_pool(&x).unwrap()) } else { values(&x) }
                });
                let logits = values(&no_grad(|| network.stage(Stage::Head, &x, false)).unwrap());
                let [a, b, c, d, e] = before;
                [a, b, c, d, e, logits]
            })
            .collect();
        for (threads, pictures) in [1, 2, 5].into_iter().flat_map(|threads| [1, 2, 5, 35].map(|n| (threads, n))) {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let x = some(0..pictures, dtype);
            let of_all =
                |at: usize| alone[..pictures].iter().flat_map(|picture| picture[at].clone()).collect::<Vec<f32>>();
            for (i, cut) in cuts.into_iter().enumerate() {
                let prefix = pool.install(|| no_grad(|| network.prefix(&x, cut, false))).unwrap();
                let case = format!("{pictures} on {threads} threads, cut before {cut:?}, in {dtype:?}");
                assert!(values(&prefix) == of_all(i), "{case}: the stages before it");
                let logits = pool.install(|| no_grad(|| network.suffix(&prefix, cut, false))).unwrap();
                assert!(values(&logits) == of_all(cuts.len()), "{case}: those after it");
            }
        }
    }
}

fn values(x: &Tensor) -> Vec<f32> {
    x.to_f32_vec().unwrap()
}
