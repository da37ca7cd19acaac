//! Learning rates over the steps of a run, as factors of the peak rate.

use serde::{Deserialize, Serialize};
use std::f64::consts::PI;

/// PyTorch's `OneCycleLR`: the first rate is the peak over this, the last is the first over [`FINAL_DIVISOR`].
const START_DIVISOR: f64 = 25.0;
const FINAL_DIVISOR: f64 = 1e4;
/// Share of a one-cycle run that rises, unless a warm-up is given.
const RISE: f64 = 0.3;
/// Where a linear warm-up starts, as in torchvision's training scripts.
const WARM_UP_START: f64 = 0.01;

/// The course after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// The peak rate throughout.
    Constant,
    /// Times `gamma` after every so many steps: `StepLR`.
    Step {
        /// Steps between reductions.
        every: usize,
        /// Factor of each.
        gamma: f64,
    },
    /// Half a cosine down to zero: `CosineAnnealingLR`.
    Cosine,
    /// Up along a cosine and down along another (Smith and Topin, "Super-convergence", 2018): `OneCycleLR` without its
    /// cycle of momentum. The warm-up is its rise.
    OneCycle,
}

/// The rate of each step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// The course.
    pub kind: ScheduleKind,
    /// Steps of linear warm-up before it.
    pub warm_up: usize,
    /// Steps in all.
    pub total: usize,
}

impl Schedule {
    /// What the peak rate is multiplied with at `step`, counted from 0.
    pub fn factor(&self, step: usize) -> f64 {
        if self.kind == ScheduleKind::OneCycle {
            return self.one_cycle(step);
        }
        if step < self.warm_up {
            return WARM_UP_START + (1.0 - WARM_UP_START) * step as f64 / self.warm_up as f64;
        }
        let (step, total) = (step - self.warm_up, self.total.saturating_sub(self.warm_up).max(1));
        match self.kind {
            ScheduleKind::Step { every, gamma } => gamma.powi((step / every.max(1)) as i32),
            ScheduleKind::Cosine => 0.5 * (1.0 + (PI * step.min(total) as f64 / total as f64).cos()),
            ScheduleKind::Constant | ScheduleKind::OneCycle => 1.0,
        }
    }

    fn one_cycle(&self, step: usize) -> f64 {
        let rise = if self.warm_up > 0 { self.warm_up as f64 } else { RISE * self.total as f64 };
        let (top, end) = (rise.min(self.total as f64) - 1.0, self.total as f64 - 1.0);
        let anneal = |from: f64, to: f64, share: f64| to + (from - to) / 2.0 * (1.0 + (PI * share).cos());
        let (start, last) = (1.0 / START_DIVISOR, 1.0 / START_DIVISOR / FINAL_DIVISOR);
        let step = step as f64;
        // A run too short to rise or to fall stands at the top then.
        if step < top {
            anneal(start, 1.0, step / top)
        } else if step <= top || end <= top {
            1.0
        } else {
            anneal(1.0, last, ((step - top) / (end - top)).min(1.0))
        }
    }
}
