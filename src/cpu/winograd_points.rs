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
//! - One of the points is infinity, where a polynomial's value is its leading coefficient.
//!
//! A *slot* is a phase and a point: a value of the transformed input and filter. A *position* is a point: a value of the
//! transformed output.

/// Outputs of a whole tile.
pub(super) const OUTPUTS: usize = 4;
/// Taps of the filter.
pub(super) const TAPS: usize = 3;
/// At most, over the strides: slots, inputs that a tile sees.
pub(super) const MAX_SLOTS: usize = 9;
pub(super) const MAX_INPUTS: usize = 9;

/// The points in the order in which tiles take them, but for infinity, which is the second.
const FINITE: [f32; 5] = [0.0, 1.0, -1.0, 2.0, -2.0];

/// Taps of a phase.
const fn phase_taps(stride: usize, phase: usize) -> usize {
    (TAPS - phase).div_ceil(stride)
}

/// Slots of the phases before `phase`.
const fn first_slot(stride: usize, phase: usize) -> usize {
    let (mut slots, mut before) = (0, 0);
    while before < phase {
        slots += OUTPUTS + phase_taps(stride, before) - 1;
        before += 1;
    }
    slots
}

/// Slots of a whole tile.
pub(super) const fn slots(stride: usize) -> usize {
    first_slot(stride, stride)
}

/// Phase and point of a slot.
const fn phase_and_point(stride: usize, slot: usize) -> (usize, usize) {
    let mut phase = stride - 1;
    while first_slot(stride, phase) > slot {
        phase -= 1;
    }
    (phase, slot - first_slot(stride, phase))
}

/// The position that a slot's products are summed at.
pub(super) const fn position_of(stride: usize, slot: usize) -> usize {
    phase_and_point(stride, slot).1
}

/// Whether a tile of `m` outputs has the slot.
pub(super) const fn has_slot(stride: usize, m: usize, slot: usize) -> bool {
    let (phase, point) = phase_and_point(stride, slot);
    point + 1 < m + phase_taps(stride, phase)
}

/// Positions of a tile of `m` outputs.
pub(super) const fn positions(stride: usize, m: usize) -> usize {
    m + phase_taps(stride, 0) - 1
}

/// Inputs that a tile of `m` outputs sees.
pub(super) const fn inputs(stride: usize, m: usize) -> usize {
    stride * (m - 1) + TAPS
}

/// Point number `k`, or none for infinity.
const fn point(k: usize) -> Option<f32> {
    match k {
        0 => Some(FINITE[0]),
        1 => None,
        _ => Some(FINITE[k - 1]),
    }
}

/// The product of `point k - b` over the other finite points `b` of the first `count`; 1 for infinity.
const fn normaliser(k: usize, count: usize) -> f32 {
    let Some(a) = point(k) else { return 1.0 };
    let (mut product, mut other) = (1.0, 0);
    while other < count {
        if other != k
            && let Some(b) = point(other)
        {
            product *= a - b;
        }
        other += 1;
    }
    product
}

/// Powers 0, 1, ... of point `k`; of infinity, 1 for the last and 0 for the others.
const fn power(k: usize, exponent: usize, count: usize) -> f32 {
    let Some(a) = point(k) else { return if exponent + 1 == count { 1.0 } else { 0.0 } };
    let (mut power, mut i) = (1.0, 0);
    while i < exponent {
        power *= a;
        i += 1;
    }
    power
}

/// Values that a filter has along an axis: one for each slot, but a phase of one tap has the same at every point.
pub(super) const VALUES: usize = 6;

/// The value of a slot.
pub(super) const fn value_of(slot: usize) -> usize {
    if slot < VALUES { slot } else { VALUES - 1 }
}

/// `G`: what each value takes of the taps.
pub(super) const fn filter_matrix(stride: usize) -> [[f32; TAPS]; VALUES] {
    let mut matrix = [[0.0; TAPS]; VALUES];
    let mut value = 0;
    while value < VALUES {
        let (phase, k) = phase_and_point(stride, value);
        let taps = phase_taps(stride, phase);
        let mut tap = 0;
        while tap < taps {
            matrix[value][stride * tap + phase] = power(k, tap, taps);
            tap += 1;
        }
        value += 1;
    }
    matrix
}

/// `B^T` of a tile of `m` outputs: what each slot takes of the inputs.
pub(super) const fn input_matrix(stride: usize, m: usize) -> [[f32; MAX_INPUTS]; MAX_SLOTS] {
    let mut matrix = [[0.0; MAX_INPUTS]; MAX_SLOTS];
    let mut slot = 0;
    while slot < slots(stride) {
        let (phase, k) = phase_and_point(stride, slot);
        let taps = phase_taps(stride, phase);
        let count = m + taps - 1;
        if k < count {
            // The polynomial that is zero at the other finite points and one at this.
            let mut polynomial = [0.0; MAX_INPUTS];
            polynomial[0] = 1.0 / normaliser(k, count);
            let (mut degree, mut other) = (0, 0);
            while other < count {
                if other != k
                    && let Some(b) = point(other)
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
                matrix[slot][stride * i + phase] = polynomial[i];
                i += 1;
            }
        }
        slot += 1;
    }
    matrix
}

/// `A^T` of a tile of `m` outputs: what each output takes of the positions.
pub(super) const fn output_matrix(stride: usize, m: usize) -> [[f32; MAX_INPUTS]; MAX_INPUTS] {
    let mut matrix = [[0.0; MAX_INPUTS]; MAX_INPUTS];
    let mut output = 0;
    while output < m {
        let mut k = 0;
        while k < positions(stride, m) {
            matrix[output][k] = power(k, output, m);
            k += 1;
        }
        output += 1;
    }
    matrix
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every tile against the sum it stands for.
    #[test]
    fn every_tile_is_a_convolution() {
        for (stride, m) in [1, 2].into_iter().flat_map(|stride| (1..=OUTPUTS).map(move |m| (stride, m))) {
            let (filter, input, output) = (filter_matrix(stride), input_matrix(stride, m), output_matrix(stride, m));
            let taps: [f32; TAPS] = [0.7, -1.3, 0.4];
            let values: [f32; MAX_INPUTS] = [0.3, -0.8, 1.1, 0.6, -0.2, 0.9, -1.4, 0.5, 0.1];
            let mut sums = [0.0f32; MAX_INPUTS];
            for slot in 0..slots(stride) {
                let dot = |row: &[f32], x: &[f32]| row.iter().zip(x).map(|(a, b)| a * b).sum::<f32>();
                let product = dot(&filter[value_of(slot)], &taps) * dot(&input[slot], &values);
                assert!(has_slot(stride, m, slot) || input[slot] == [0.0; MAX_INPUTS]);
                sums[position_of(stride, slot)] += product;
            }
            for (i, row) in output.iter().enumerate().take(m) {
                let got: f32 = row.iter().zip(&sums).map(|(a, b)| a * b).sum();
                let want: f32 = taps.iter().zip(&values[stride * i..]).map(|(a, b)| a * b).sum();
                assert!((got - want).abs() <= 1e-5, "stride {stride}, {m} outputs, output {i}: {got}, not {want}");
            }
        }
    }

    #[test]
    fn extents_of_tiles() {
        assert_eq!([slots(1), positions(1, 4), inputs(1, 4)], [6, 6, 6]);
        assert_eq!([slots(2), positions(2, 4), inputs(2, 4)], [9, 5, 9]);
        assert_eq!([positions(1, 3), positions(2, 3), inputs(2, 3)], [5, 4, 7]);
        let count = |stride, m| (0..slots(stride)).filter(|&slot| has_slot(stride, m, slot)).count();
        assert_eq!([count(1, 4), count(1, 3), count(2, 4), count(2, 3), count(2, 1)], [6, 5, 9, 7, 3]);
    }
}
