//! The filters there are along an axis and the tiles that they are applied to, by stride and by the type whose products are taken.

use super::points::*;
use crate::cpu::float::Float;
use std::marker::PhantomData;

/// Taps of a filter along an axis.
pub(super) const TAPS: usize = 3;
/// Slots along an axis, and inputs of a tile, at most.
pub(super) const MAX: usize = 10;
/// What a vector has at most.
pub(super) const LANES: usize = 16;

/// Seven outputs of a tile: 81 products instead of 441, 1.65 for an output where four have 2.25, and what ResNet's images of
/// 56, 28, 14 and 7 pixels are multiples of. Sums lose 2e-6 to 1e-5, five times as much as with four.
const OF_SEVEN: [Point; 9] =
    [Some(1.0), Some(-1.0), None, Some(0.25), Some(-0.25), Some(2.0), Some(-2.0), Some(0.65625), Some(-0.65625)];
/// Four outputs in f32, with the simplest powers.
const OF_FOUR: [Point; 6] = [Some(0.0), None, Some(1.0), Some(-1.0), Some(2.0), Some(-2.0)];
/// Four outputs in bf16: where the rounding of values costs least, 1.1 % of a sum and not 2.5 %, for then they are all of
/// about the same size.
const ROUNDED: [Point; 6] = [Some(0.0), None, Some(0.6875), Some(-0.6875), Some(1.5), Some(-1.5)];

/// Stands for a stride of one half: two outputs for each input, as has the gradient to the input of a stride of two.
pub(super) const HALF: usize = 0;

/// The filter along an axis, and its tiles where products are of type `W`.
pub(super) const fn axis<W: Float>(stride: usize) -> Axis {
    let (outputs, points): (usize, &'static [Point]) = match (W::PER_WORD, stride) {
        (1, 1) => (7, &OF_SEVEN),
        (1, _) => (4, &OF_FOUR),
        _ => (4, &ROUNDED),
    };
    match stride {
        HALF => Axis { taps: TAPS, stride: 2, spread: true, outputs: 2 * outputs, points },
        _ => Axis { taps: TAPS, stride, spread: false, outputs, points },
    }
}

/// Taps along the rows of [`super::rows`], and their phases.
pub(super) const ROW_TAPS: usize = 7;
pub(super) const PHASES: usize = 2;
/// Slots of these at most.
pub(super) const ROW_SLOTS: usize = 19;

/// Seven outputs of a row in f32: sums lose 1.4e-6.
const ROW_OF_SEVEN: [Point; 10] = [
    None,
    Some(0.375),
    Some(-0.375),
    Some(0.75),
    Some(-0.75),
    Some(1.25),
    Some(-1.25),
    Some(2.0),
    Some(-2.0),
    Some(0.0),
];
/// Four in bf16.
const ROW_OF_FOUR: [Point; 7] = [Some(0.0), None, Some(1.0), Some(-1.0), Some(2.0), Some(-2.0), Some(0.5)];

/// The filter of [`super::rows`] along a row, and its tiles where products are of type `W`.
pub(super) const fn row_axis<W: Float>() -> Axis {
    let (outputs, points): (usize, &'static [Point]) =
        if W::PER_WORD == 1 { (7, &ROW_OF_SEVEN) } else { (4, &ROW_OF_FOUR) };
    Axis { taps: ROW_TAPS, stride: PHASES, spread: false, outputs, points }
}

/// Positions of a whole tile along a row.
pub(super) const fn all_positions<W: Float>() -> usize {
    positions(row_axis::<W>(), row_axis::<W>().outputs)
}

/// Whether a tile of `m` outputs has the slot, which may be beyond the last of all.
pub(super) const fn has<W: Float>(stride: usize, m: usize, slot: usize) -> bool {
    let axis = axis::<W>(stride);
    slot < slots(axis) && has_slot(axis, m, slot)
}

/// Values of a filter along an axis.
pub(super) const fn values<W: Float>(stride: usize) -> usize {
    value_of::<W>(stride, slots(axis::<W>(stride)) - 1) + 1
}

/// The value of a slot.
pub(super) const fn value_of<W: Float>(stride: usize, slot: usize) -> usize {
    let axis = axis::<W>(stride);
    match phase_and_point(axis, slot) {
        (0, point) => point,
        // The second phase of a filter of three taps has one.
        _ => phase_slots(axis, 0),
    }
}

/// What there is to know about slots, computed with the code: for numbers that are known only when it runs.
pub(super) struct Slots<W, const STRIDE: usize>(PhantomData<W>);

impl<W: Float, const STRIDE: usize> Slots<W, STRIDE> {
    /// Whether a tile of so many outputs has a slot.
    const HAS: [[bool; MAX]; MAX] = {
        let (mut out, mut i) = ([[false; MAX]; MAX], 0);
        while i < MAX * MAX {
            out[i / MAX][i % MAX] = i / MAX > 0 && has::<W>(STRIDE, i / MAX, i % MAX);
            i += 1;
        }
        out
    };
    /// The position and the value of each.
    const AT: [[usize; 2]; MAX] = {
        let (mut out, mut slot) = ([[MAX; 2]; MAX], 0);
        while slot < slots(axis::<W>(STRIDE)) {
            out[slot] = [position_of(axis::<W>(STRIDE), slot), value_of::<W>(STRIDE, slot)];
            slot += 1;
        }
        out
    };

    /// Whether a tile of `m` outputs has the slot.
    #[inline(always)]
    pub(super) fn has(m: usize, slot: usize) -> bool {
        Self::HAS[m][slot]
    }

    #[inline(always)]
    pub(super) fn position(slot: usize) -> usize {
        Self::AT[slot][0]
    }

    #[inline(always)]
    pub(super) fn value(slot: usize) -> usize {
        Self::AT[slot][1]
    }
}
