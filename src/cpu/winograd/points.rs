//! The matrices of Winograd's algorithm along one axis, from the points they interpolate at.
//!
//! `m` outputs of a filter of `r` taps are a product of polynomials with `m + r - 1` coefficients, transposed: `A^T [(G g) *
//! (B^T d)]`, one product for each of as many points (Toom and Cook; Winograd, "Arithmetic complexity of computations", 1980;
//! Blahut, "Fast algorithms for signal processing", 2010, chapter 5). Three things make it fit a network:
//!
//! - Tiles of fewer outputs use the first of the same points, and the filter's values there are the same: what depends on
//!   the set of points is multiplied into the inputs. So an extent that four does not divide ends in a smaller tile instead
//!   of a padded one: seven outputs take 6 + 5 products along an axis instead of 6 + 6.
//! - With a stride, outputs are a sum of convolutions of stride one, one for each *phase* of the input: inputs 0, s, 2s... with
//!   taps 0, s, 2s..., inputs 1, s + 1... with taps 1, s + 1... . `A` depends on the points and `m` alone, so products of different
//!   phases at one point are summed before it: three taps with a stride of two take 5 + 4 products for four outputs
//!   instead of 12, and sums at 5 points. A phase of one tap has the same value at every point.
//! - The gradient to the input of a stride of two is the transpose of the forward map: of its outputs every second is a convolution of the
//!   gradient with taps 0 and 2, and every other one the gradient times tap 1. That is an axis with two outputs for each input, *spread*:
//!   the two phases share the inputs, and their slots alternate, so that smaller tiles have the first of them as well.
//! - One of the points is infinity, where a polynomial's value is its leading coefficient.
//!
//! A *slot* is a phase and a point: a value of the transformed input and filter. A *position* is a point: a value of the
//! transformed output.

/// A filter along an axis, and the tiles it is applied to.
#[derive(Clone, Copy)]
pub(super) struct Axis {
    /// Values of the filter.
    pub taps: usize,
    /// Inputs between outputs, or where these are spread outputs between inputs.
    pub stride: usize,
    /// Whether it is the transpose of such a convolution: of three taps with a stride of two.
    pub spread: bool,
    /// Outputs of a whole tile.
    pub outputs: usize,
    /// Points in the order in which tiles take them.
    pub points: &'static [Point],
}

/// Where polynomials are evaluated; infinity is none.
pub(super) type Point = Option<f64>;

/// Taps of a phase.
const fn phase_taps(axis: Axis, phase: usize) -> usize {
    (axis.taps - phase).div_ceil(axis.stride)
}

/// Slots of the phases before `phase`.
pub(super) const fn first_slot(axis: Axis, phase: usize) -> usize {
    let (mut slots, mut before) = (0, 0);
    while before < phase {
        slots += phase_slots(axis, before);
        before += 1;
    }
    slots
}

/// Slots of a phase of a whole tile.
pub(super) const fn phase_slots(axis: Axis, phase: usize) -> usize {
    let outputs = if axis.spread { axis.outputs / axis.stride } else { axis.outputs };
    outputs + phase_taps(axis, phase) - 1
}

/// Outputs of either phase of a spread tile of `m` outputs. The last may be beyond the tile.
const fn pairs(axis: Axis, m: usize) -> usize {
    m.div_ceil(axis.stride)
}

/// Slots of a whole tile.
pub(super) const fn slots(axis: Axis) -> usize {
    first_slot(axis, axis.stride)
}

/// Phase and point of a slot.
pub(super) const fn phase_and_point(axis: Axis, slot: usize) -> (usize, usize) {
    // Two points of the phase of two taps, and then one of either in turn.
    if axis.spread {
        return if slot % 2 == 1 || slot == 0 { (0, slot.div_ceil(2)) } else { (1, slot / 2 - 1) };
    }
    let mut phase = axis.stride - 1;
    while first_slot(axis, phase) > slot {
        phase -= 1;
    }
    (phase, slot - first_slot(axis, phase))
}

/// The position that a slot's products are summed at.
pub(super) const fn position_of(axis: Axis, slot: usize) -> usize {
    if axis.spread { slot } else { phase_and_point(axis, slot).1 }
}

/// The slots whose products are summed at a position, one for each phase that has it.
pub(super) fn slots_at(axis: Axis, position: usize) -> impl Iterator<Item = usize> + Clone {
    (0..slots(axis)).filter(move |&slot| position_of(axis, slot) == position)
}

/// Whether a tile of `m` outputs has the slot.
pub(super) const fn has_slot(axis: Axis, m: usize, slot: usize) -> bool {
    if axis.spread {
        return slot < positions(axis, m);
    }
    let (phase, point) = phase_and_point(axis, slot);
    point + 1 < m + phase_taps(axis, phase)
}

/// Positions of a tile of `m` outputs.
pub(super) const fn positions(axis: Axis, m: usize) -> usize {
    if axis.spread {
        return 2 * pairs(axis, m) + 1;
    }
    m + phase_taps(axis, 0) - 1
}

/// Inputs that a tile of `m` outputs sees.
pub(super) const fn inputs(axis: Axis, m: usize) -> usize {
    if axis.spread {
        return pairs(axis, m) + 1;
    }
    axis.stride * (m - 1) + axis.taps
}

/// The first input that a tile sees whose first output is `first`, with a padding of one where the filter has three taps.
pub(super) const fn first_input(axis: Axis, first: usize) -> isize {
    if axis.spread { (first / axis.stride) as isize } else { (axis.stride * first) as isize - 1 }
}

/// The product of `point k - b` over the other finite points `b` of the first `count`; 1 for infinity.
const fn normaliser(axis: Axis, k: usize, count: usize) -> f64 {
    let Some(a) = axis.points[k] else { return 1.0 };
    let (mut product, mut other) = (1.0, 0);
    while other < count {
        if other != k
            && let Some(b) = axis.points[other]
        {
            product *= a - b;
        }
        other += 1;
    }
    product
}

/// Powers 0, 1, ... of point `k`; of infinity, 1 for the last and 0 for the others.
const fn power(axis: Axis, k: usize, exponent: usize, count: usize) -> f64 {
    let Some(a) = axis.points[k] else { return if exponent + 1 == count { 1.0 } else { 0.0 } };
    let (mut power, mut i) = (1.0, 0);
    while i < exponent {
        power *= a;
        i += 1;
    }
    power
}

/// `G`: what each slot takes of the taps, `N` of either at least.
pub(super) const fn filter_matrix<const N: usize>(axis: Axis) -> [[f32; N]; N] {
    let mut matrix = [[0.0; N]; N];
    let mut slot = 0;
    while slot < slots(axis) {
        let (phase, k) = phase_and_point(axis, slot);
        let taps = phase_taps(axis, phase);
        let mut tap = 0;
        while tap < taps {
            matrix[slot][axis.stride * tap + phase] = power(axis, k, tap, taps) as f32;
            tap += 1;
        }
        slot += 1;
    }
    matrix
}

/// `B^T` of a tile of `m` outputs: what each slot takes of the inputs, `N` of either at least.
pub(super) const fn input_matrix<const N: usize>(axis: Axis, m: usize) -> [[f32; N]; N] {
    let mut matrix = [[0.0; N]; N];
    let mut slot = 0;
    while slot < slots(axis) {
        let (phase, k) = phase_and_point(axis, slot);
        let taps = phase_taps(axis, phase);
        let count = if axis.spread { pairs(axis, m) + taps - 1 } else { m + taps - 1 };
        if axis.spread && taps == 1 {
            // The only tap's products are outputs.
            if k < count {
                matrix[slot][k] = 1.0;
            }
        } else if k < count {
            // The polynomial that is zero at the other finite points and one at this.
            let mut polynomial = [0.0f64; N];
            polynomial[0] = 1.0 / normaliser(axis, k, count);
            let (mut degree, mut other) = (0, 0);
            while other < count {
                if other != k
                    && let Some(b) = axis.points[other]
                {
                    degree += 1;
                    let mut i = degree;
                    while i > 0 {
                        polynomial[i] = polynomial[i - 1] - b * polynomial[i];
                        i -= 1;
                    }
                    polynomial[0] *= -b;
                }
                other += 1;
            }
            let mut i = 0;
            while i < count {
                let input = if axis.spread { i } else { axis.stride * i + phase };
                matrix[slot][input] = polynomial[i] as f32;
                i += 1;
            }
        }
        slot += 1;
    }
    matrix
}

/// `A^T` of a tile of `m` outputs: what each output takes of the positions, `N` at least.
pub(super) const fn output_matrix<const N: usize>(axis: Axis, m: usize) -> [[f32; N]; N] {
    let mut matrix = [[0.0; N]; N];
    let mut output = 0;
    while output < m {
        let mut position = 0;
        while position < positions(axis, m) {
            matrix[output][position] = match (axis.spread, phase_and_point(axis, position)) {
                (false, _) => power(axis, position, output, m) as f32,
                // Even outputs are products of the one tap, odd ones come from the points of two.
                (true, (0, k)) if output % 2 == 1 => power(axis, k, output / 2, pairs(axis, m)) as f32,
                (true, (1, k)) if output == 2 * k => 1.0,
                (true, _) => 0.0,
            };
            position += 1;
        }
        output += 1;
    }
    matrix
}

#[cfg(test)]
mod tests {
    use super::super::transforms::{HALF, axis, row_axis};
    use super::*;
    use half::bf16;

    /// Every tile against the sum it stands for.
    fn check<const SLOTS: usize>(axis: Axis) {
        let Axis { taps: count, stride, outputs, .. } = axis;
        assert_eq!(slots(axis), SLOTS);
        let values: Vec<f32> = (0..SLOTS + count).map(|i| ((i * 37 + 11) % 23) as f32 / 11.0 - 1.0).collect();
        let taps: Vec<f32> = (0..count).map(|i| ((i * 29 + 5) % 17) as f32 / 8.0 - 1.0).collect();
        let dot = |row: &[f32], x: &[f32]| row.iter().zip(x).map(|(a, b)| a * b).sum::<f32>();
        for m in 1..=outputs {
            let (filter, input) = (filter_matrix::<SLOTS>(axis), input_matrix::<SLOTS>(axis, m));
            let mut sums = [0.0f32; SLOTS];
            for slot in 0..SLOTS {
                assert!(has_slot(axis, m, slot) || input[slot] == [0.0; SLOTS]);
                sums[position_of(axis, slot)] += dot(&filter[slot], &taps) * dot(&input[slot], &values);
            }
            for (i, row) in output_matrix::<SLOTS>(axis, m).iter().enumerate().take(m) {
                let want =
                    if axis.spread { spread_output(&taps, &values, i) } else { dot(&taps, &values[stride * i..]) };
                let got = dot(row, &sums);
                let what = format!("{count} taps, stride {stride}, {m} outputs, output {i}");
                assert!((got - want).abs() <= 2e-5, "{what}: {got}, not {want}");
            }
        }
    }

    /// Output `i` of the transpose of a stride of two.
    fn spread_output(taps: &[f32], values: &[f32], i: usize) -> f32 {
        match i % 2 {
            0 => taps[1] * values[i / 2],
            _ => taps[0] * values[i / 2] + taps[2] * values[i / 2 + 1],
        }
    }

    #[test]
    fn every_tile_is_a_convolution() {
        check::<9>(axis::<f32>(1));
        check::<6>(axis::<bf16>(1));
        check::<9>(axis::<f32>(2));
        check::<9>(axis::<bf16>(2));
        check::<9>(axis::<f32>(HALF));
        check::<9>(axis::<bf16>(HALF));
        check::<19>(row_axis::<f32>());
        check::<13>(row_axis::<bf16>());
    }

    #[test]
    fn extents_of_tiles() {
        let [one, two, wide, seven] = [axis::<bf16>(1), axis::<f32>(2), row_axis::<bf16>(), axis::<f32>(1)];
        assert_eq!([slots(one), positions(one, 4), inputs(one, 4)], [6, 6, 6]);
        assert_eq!([slots(two), positions(two, 4), inputs(two, 4)], [9, 5, 9]);
        assert_eq!([slots(wide), positions(wide, 4), inputs(wide, 4)], [13, 7, 13]);
        assert_eq!([slots(seven), positions(seven, 7), inputs(seven, 7)], [9, 9, 9]);
        assert_eq!([positions(one, 3), positions(two, 3), inputs(two, 3)], [5, 4, 7]);
        let count = |axis, m| (0..slots(axis)).filter(|&slot| has_slot(axis, m, slot)).count();
        assert_eq!([count(one, 4), count(one, 3), count(two, 4), count(two, 3), count(two, 1)], [6, 5, 9, 7, 3]);
        assert_eq!([count(seven, 7), count(seven, 4), count(seven, 1)], [9, 6, 3]);
        let half = axis::<f32>(HALF);
        assert_eq!([slots(half), positions(half, 8), inputs(half, 8)], [9, 9, 5]);
        assert_eq!([count(half, 8), count(half, 6), count(half, 5), count(half, 1)], [9, 7, 7, 3]);
        assert_eq!([first_input(half, 8), first_input(two, 4), first_input(one, 4)], [4, 7, 3]);
    }
}
