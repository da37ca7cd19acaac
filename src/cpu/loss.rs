//! Softmax cross-entropy over the rows of `[rows, classes]`.

use rayon::prelude::*;

/// How a class index becomes a distribution over the classes, and how much each class counts.
#[derive(Clone, Copy, Debug)]
pub struct Targets<'a> {
    /// One class a row.
    pub labels: &'a [i64],
    /// One factor a class, or all 1.
    pub class_weights: Option<&'a [f32]>,
    /// Share of the target that is spread over all classes.
    pub smoothing: f32,
}

impl Targets<'_> {
    fn weight(&self, class: usize) -> f32 {
        self.class_weights.map_or(1.0, |weights| weights[class])
    }

    /// Weight of `class` in the target of `row`: PyTorch's `weight` and `label_smoothing` together.
    fn at(&self, row: usize, class: usize, classes: usize) -> f32 {
        let hit = if self.labels[row] as usize == class { 1.0 - self.smoothing } else { 0.0 };
        (hit + self.smoothing / classes as f32) * self.weight(class)
    }

    /// What the mean over rows divides by: the weights of their labels.
    pub fn total_weight(&self) -> f32 {
        self.labels.iter().map(|&label| self.weight(label as usize)).sum()
    }
}

/// Writes `log_softmax(logits)` to `log_probabilities` and each row's loss to `losses`.
pub fn forward(logits: &[f32], targets: &Targets, log_probabilities: &mut [f32], losses: &mut [f32]) {
    let classes = logits.len() / losses.len();
    let rows = logits.par_chunks(classes).zip(log_probabilities.par_chunks_mut(classes));
    rows.zip(losses.par_iter_mut()).enumerate().for_each(|(row, ((logits, log_p), loss))| {
        // f32::max skips NaN; the sum below does not, so a NaN logit still gives a NaN loss.
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let log_sum = logits.iter().map(|&x| (x - max).exp()).sum::<f32>().ln();
        log_p.iter_mut().zip(logits).for_each(|(log_p, &x)| *log_p = x - max - log_sum);
        // Without smoothing the other classes have no part, whatever their probability: 0 * -inf would be NaN.
        *loss = if targets.smoothing == 0.0 {
            let label = targets.labels[row] as usize;
            -log_p[label] * targets.weight(label)
        } else {
            log_p.iter().enumerate().map(|(class, &p)| -p * targets.at(row, class, classes)).sum()
        };
    });
}

/// Gradient to the logits of `factor` times the sum of the losses.
pub fn backward(log_probabilities: &[f32], targets: &Targets, factor: f32, dlogits: &mut [f32]) {
    let classes = dlogits.len() / targets.labels.len();
    dlogits.par_chunks_mut(classes).zip(log_probabilities.par_chunks(classes)).enumerate().for_each(
        |(row, (dlogits, log_p))| {
            let total: f32 = (0..classes).map(|class| targets.at(row, class, classes)).sum();
            for (class, (dlogit, &log_p)) in dlogits.iter_mut().zip(log_p).enumerate() {
                *dlogit = factor * (log_p.exp() * total - targets.at(row, class, classes));
            }
        },
    );
}
