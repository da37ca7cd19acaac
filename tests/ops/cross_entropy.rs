use crate::support::*;
use hone::Tensor;
use hone::ops::{CrossEntropy, Reduction, cross_entropy};
use proptest::prelude::*;

fn labels(rows: usize, classes: usize) -> Vec<i64> {
    (0..rows).map(|i| ((i * 7 + 3) % classes) as i64).collect()
}

/// PyTorch's definition, term by term: (1 - e) * w[y] * nll + e / C * sum of w[c] * nll[c], over the weights of the labels.
fn reference(x: &[f32], y: &[i64], classes: usize, weights: &[f32], smoothing: f64, reduction: Reduction) -> f64 {
    let mut total = 0.0;
    for (row, &label) in x.chunks_exact(classes).zip(y) {
        let log_sum = row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
        let nll = |c: usize| (log_sum - f64::from(row[c])) * f64::from(weights[c]);
        let spread: f64 = (0..classes).map(nll).sum::<f64>() / classes as f64;
        total += (1.0 - smoothing) * nll(label as usize) + smoothing * spread;
    }
    match reduction {
        Reduction::Sum => total,
        Reduction::Mean => total / y.iter().map(|&y| f64::from(weights[y as usize])).sum::<f64>(),
    }
}

proptest! {
    #[test]
    fn equals_the_definition(rows in 1usize..20, classes in 1usize..70, smoothing in prop_oneof![Just(0.0f32), 0.0f32..1.0],
                             weighted: bool, mean: bool) {
        let x: Vec<f32> = values(rows * classes, 1).iter().map(|x| x * 8.0).collect();
        let y = labels(rows, classes);
        let weights: Vec<f32> = values(classes, 2).iter().map(|w| if weighted { w + 1.1 } else { 1.0 }).collect();
        let reduction = if mean { Reduction::Mean } else { Reduction::Sum };
        let options = CrossEntropy {
            reduction,
            label_smoothing: smoothing,
            class_weights: weighted.then(|| Tensor::from_slice(&weights, [classes]).unwrap()),
        };
        let logits = Tensor::from_slice(&x, [rows, classes]).unwrap();
        let got = cross_entropy(&logits, &Tensor::from_slice(&y, [rows]).unwrap(), &options).unwrap().item().unwrap();
        assert_close(&[got], &[reference(&x, &y, classes, &weights, f64::from(smoothing), reduction)], 1e-5, "loss");
    }
}

#[test]
fn gradients() {
    let y = Tensor::from_slice(&labels(4, 3), [4]).unwrap();
    let weights = Tensor::from_slice(&[0.5f32, 2.0, 1.5], [3]).unwrap();
    for reduction in [Reduction::Mean, Reduction::Sum] {
        for (label_smoothing, class_weights) in [(0.0, None), (0.1, None), (0.3, Some(weights.clone()))] {
            let options = CrossEntropy { reduction, label_smoothing, class_weights };
            check_gradients(&[tensor(&[4, 3], 1)], 1e-2, 1e-3, |x| cross_entropy(&x[0], &y, &options));
        }
    }
}

#[test]
fn extremes() {
    let y = Tensor::from_slice(&[0i64], [1]).unwrap();
    let loss = |x: &[f32]| {
        let x = Tensor::from_slice(x, [1, x.len()]).unwrap();
        cross_entropy(&x, &y, &CrossEntropy::default()).unwrap().item().unwrap()
    };
    assert_eq!(loss(&[1000.0, -1000.0]), 0.0);
    assert_eq!(loss(&[-1000.0, 1000.0]), 2000.0);
    assert!(loss(&[0.0, f32::NAN]).is_nan(), "a NaN logit is not hidden");
}

#[test]
fn wrong_arguments() {
    let x = tensor(&[2, 3], 1);
    let labels = |y: &[i64]| Tensor::from_slice(y, [y.len()]).unwrap();
    let default = CrossEntropy::default();
    assert!(cross_entropy(&x, &labels(&[0, 3]), &default).unwrap_err().to_string().contains("label 3"));
    assert!(cross_entropy(&x, &labels(&[0, -1]), &default).is_err());
    assert!(cross_entropy(&x, &labels(&[0]), &default).is_err());
    assert!(cross_entropy(&x, &tensor(&[2], 1), &default).is_err(), "labels are integers");
    assert!(cross_entropy(&x, &labels(&[0, 1]), &CrossEntropy { label_smoothing: f32::NAN, ..default }).is_err());
}
