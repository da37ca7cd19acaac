//! Softmax cross-entropy: `-sum over c of t[n, c] * log softmax(logits[n])[c]`, with PyTorch's targets `t`: the label's
//! class, smoothed towards all classes alike, each class times its weight. Its gradient is
//! `softmax(logits[n]) * sum(t[n]) - t[n]`.

use super::{require_f32, require_vector};
use crate::autograd::record;
use crate::cpu::loss::{self, Targets};
use crate::cuda;
use crate::error::{Error, Result};
use crate::tensor::{DType, Device, Tensor};

/// What becomes of the losses of the rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reduction {
    /// Their sum over the sum of the weights of their labels.
    #[default]
    Mean,
    /// Their sum.
    Sum,
}

/// Options of [`cross_entropy`], all off by default.
#[derive(Clone, Debug, Default)]
pub struct CrossEntropy {
    /// Mean or sum.
    pub reduction: Reduction,
    /// Share of the target spread over all classes, in `[0, 1]`.
    pub label_smoothing: f32,
    /// One factor a class, `[classes]`.
    pub class_weights: Option<Tensor>,
}

/// The loss of `logits` `[N, classes]` for `labels` `[N]` (I64), a scalar.
pub fn cross_entropy(logits: &Tensor, labels: &Tensor, options: &CrossEntropy) -> Result<Tensor> {
    require_f32("cross_entropy", &[logits])?;
    let (rows, classes) = match (logits.dims(), labels.dims(), labels.dtype()) {
        (&[n, classes], &[labels], DType::I64) if n == labels && n > 0 && classes > 0 => (n, classes),
        _ => {
            let expected = "logits [N, classes] and I64 labels [N]";
            return Err(Error::shape("cross_entropy", expected, &[logits.dims(), labels.dims()]));
        }
    };
    // Labels on the card were checked before they went there, or the kernel makes the loss NaN.
    let known = if labels.device() == Device::Cpu { labels.as_slice::<i64>() } else { &[] };
    if let Some(label) = known.iter().find(|label| !(0..classes as i64).contains(label)) {
        let problem = format!("label {label}, expected 0 to {}", classes - 1);
        return Err(Error::Argument { op: "cross_entropy", problem });
    }
    if !(0.0..=1.0).contains(&options.label_smoothing) {
        let problem = format!("label smoothing {}, expected 0 to 1", options.label_smoothing);
        return Err(Error::Argument { op: "cross_entropy", problem });
    }
    if let Some(weights) = &options.class_weights {
        require_vector("cross_entropy", weights, classes)?;
    }
    if logits.device() == Device::Cuda {
        return on_cuda(logits, labels, options);
    }
    let (labels, weights) = (labels.detach(), options.class_weights.as_ref().map(Tensor::detach));
    let smoothing = options.label_smoothing;
    let targets =
        Targets { labels: labels.as_slice(), class_weights: weights.as_ref().map(|w| w.as_slice()), smoothing };
    let factor = match options.reduction {
        Reduction::Mean => 1.0 / targets.total_weight(),
        Reduction::Sum => 1.0,
    };
    let mut losses = vec![0.0; rows];
    let log_probabilities = Tensor::build([rows, classes], |log_p| {
        loss::forward(logits.as_slice(), &targets, log_p, &mut losses);
    });
    let total: f64 = losses.iter().map(|&x| f64::from(x)).sum();
    let value = Tensor::full([], (total * f64::from(factor)) as f32);
    Ok(record("cross_entropy", value, &[logits], |_| {
        Box::new(move |dloss, _| {
            let targets =
                Targets { labels: labels.as_slice(), class_weights: weights.as_ref().map(|w| w.as_slice()), smoothing };
            let factor = factor * dloss.item()?;
            Ok(vec![Some(Tensor::build([rows, classes], |dlogits| {
                loss::backward(log_probabilities.as_slice(), &targets, factor, dlogits);
            }))])
        })
    }))
}

fn on_cuda(logits: &Tensor, labels: &Tensor, options: &CrossEntropy) -> Result<Tensor> {
    let targets = cuda::loss::Targets {
        labels: labels.to_device(Device::Cuda)?,
        class_weights: options.class_weights.as_ref().map(|weights| weights.to_device(Device::Cuda)).transpose()?,
        smoothing: options.label_smoothing,
    };
    let loss = cuda::loss::forward(logits, &targets, options.reduction == Reduction::Mean)?;
    let (log_p, factor) = (loss.log_p, loss.factor);
    Ok(record("cross_entropy", loss.value, &[logits], |_| {
        Box::new(move |dloss, _| Ok(vec![Some(cuda::loss::backward(&log_p, &factor, &targets, &dloss)?)]))
    }))
}
