//! Optimisers and learning-rate schedules.

mod optimizer;
mod schedule;

pub use optimizer::{Algorithm, Optimizer, ParamGroup, SavedState};
pub use schedule::{Schedule, ScheduleKind};
