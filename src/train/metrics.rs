//! Counting right and wrong.

/// Sums over pictures, of which means are taken at the end.
#[derive(Clone, Copy, Debug, Default)]
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Confusion {
    /// `counts[true class][predicted class]`.
    pub counts: Vec<Vec<usize>>,
}

impl Confusion {
    /// All zero.
    pub fn new(classes: usize) -> Self {
        Confusion { counts: vec![vec![0; classes]; classes] }
    }

    /// Adds a batch of logits `[N, classes]`.
    pub fn add(&mut self, logits: &[f32], labels: &[i64]) {
        let classes = self.counts.len();
        for (row, &label) in logits.chunks_exact(classes).zip(labels) {
            self.counts[label as usize][argmax(row)] += 1;
        }
    }
}
