//! Counting right and wrong.

use serde::{Deserialize, Serialize};

/// Sums over pictures, of which means are taken at the end.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tally {
    /// Sum of losses.
    pub loss: f64,
    /// Pictures classified rightly.
    pub correct: usize,
    /// Pictures.
    pub count: usize,
}

impl Tally {
    /// Adds a batch: its mean loss and its logits `[N, classes]`.
    pub fn add(&mut self, mean_loss: f32, logits: &[f32], labels: &[i64]) {
        let classes = logits.len() / labels.len().max(1);
        self.loss += f64::from(mean_loss) * labels.len() as f64;
        self.count += labels.len();
        self.correct += logits.chunks_exact(classes).zip(labels).filter(|(row, l)| argmax(row) == **l as usize).count();
    }

    /// Mean loss; none of nothing.
    pub fn mean_loss(&self) -> Option<f64> {
        (self.count > 0).then(|| self.loss / self.count as f64)
    }

    /// Share classified rightly; none of nothing.
    pub fn accuracy(&self) -> Option<f64> {
        (self.count > 0).then(|| self.correct as f64 / self.count as f64)
    }
}

/// Index of the largest value, the first of equals; NaN counts as smallest.
pub fn argmax(row: &[f32]) -> usize {
    let mut best = 0;
    for (i, &x) in row.iter().enumerate() {
        if x > row[best] || row[best].is_nan() {
            best = i;
        }
    }
    best
}

/// How often each class was taken for each.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confusion {
    /// `counts[true class][predicted class]`.
    pub counts: Vec<Vec<usize>>,
    /// Pictures whose class was among the five most probable.
    pub top5: usize,
}

/// How well one class is told from the others.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ClassMetrics {
    /// Of the pictures taken for it, the share that are; none if no picture was.
    pub precision: Option<f64>,
    /// Of its pictures, the share taken for it; none if there are no pictures.
    pub recall: Option<f64>,
    /// Harmonic mean of the two.
    pub f1: Option<f64>,
    /// Its pictures.
    pub support: usize,
}

impl Confusion {
    /// All zero.
    pub fn new(classes: usize) -> Self {
        Confusion { counts: vec![vec![0; classes]; classes], top5: 0 }
    }

    /// Adds a batch of logits `[N, classes]`.
    pub fn add(&mut self, logits: &[f32], labels: &[i64]) {
        let classes = self.counts.len();
        for (row, &label) in logits.chunks_exact(classes).zip(labels) {
            let label = label as usize;
            self.counts[label][argmax(row)] += 1;
            let above = row.iter().enumerate().filter(|&(i, &x)| x > row[label] || (x == row[label] && i < label));
            self.top5 += usize::from(above.count() < 5 && !row[label].is_nan());
        }
    }

    /// Share of pictures whose class is among the five most probable; none where five classes or fewer make it 1.
    pub fn top5_accuracy(&self) -> Option<f64> {
        let total: usize = self.counts.iter().flatten().sum();
        (self.counts.len() > 5 && total > 0).then(|| self.top5 as f64 / total as f64)
    }

    /// Precision, recall and F1 of every class.
    pub fn class_metrics(&self) -> Vec<ClassMetrics> {
        let share = |part: usize, whole: usize| (whole > 0).then(|| part as f64 / whole as f64);
        (0..self.counts.len())
            .map(|class| {
                let hits = self.counts[class][class];
                let support = self.counts[class].iter().sum();
                let predicted = self.counts.iter().map(|row| row[class]).sum::<usize>();
                ClassMetrics {
                    precision: share(hits, predicted),
                    recall: share(hits, support),
                    f1: share(2 * hits, support + predicted),
                    support,
                }
            })
            .collect()
    }
}
