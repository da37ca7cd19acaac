//! The sums over tiles that a filter's gradient is made of, and the transforms before and after them.

use super::super::axes::*;
use super::super::parts::{Extents, Part, TileGrid, spread};
use super::super::tiles::{OfInputs, Side};
use super::super::transforms::*;
use super::tiles::{Layout, OfGradients, TransformTiles};
use crate::cpu::conv::ConvShape;
use crate::cpu::elementwise;
use crate::cpu::float::Float;
use crate::cpu::gemm::{Far, Output, Stream};
use crate::cpu::gemm_transposed::{SLICE, TILE_ROWS, multiply_runs};
use crate::cpu::parallel::for_each;
use crate::cpu::simd::{Isa, Simd, Task, dispatch};
use crate::tensor::pool::Scratch;
use rayon::prelude::*;
use std::marker::PhantomData;
use std::ops::Range;

/// Words of tiles a task transforms.
const BLOCK_WORDS: usize = 16;

/// Sums over tiles of the products of inputs and gradients at the slots of each value of a filter, `[value][panel][o][column]`, and how they
/// come to be and are used.
pub(super) struct Sums<W, const STRIDE: usize> {
    isa: Isa,
    c: usize,
    o: usize,
    /// Columns of a panel, and panels.
    pub(super) width: usize,
    pub(super) panels: usize,
    inputs: Layout,
    gradients: Layout,
    products: PhantomData<W>,
}

/// Some transformed tiles.
pub(super) struct Transformed<W> {
    inputs: Scratch<W>,
    gradients: Scratch<W>,
    /// Whole words of tiles in the order of their extents: some have fewer slots than others.
    part: Part,
}

impl<W: Float> Transformed<W> {
    /// The words of tiles that have a slot.
    fn having<const STRIDE: usize>(&self, [i, j]: [usize; 2]) -> Range<usize> {
        // Of the tile in the corner.
        let [.., [down, across]] = self.part.outputs;
        let tiles = self.part.tiles_having([Slots::<W, STRIDE>::has(down, i), Slots::<W, STRIDE>::has(across, j)]);
        tiles.start / W::PER_WORD..tiles.end / W::PER_WORD
    }
}

impl<W: Float, const STRIDE: usize> Sums<W, STRIDE> {
    /// Along an axis, slots of a tile, positions of its gradients, and values of a filter.
    const SLOTS: usize = OfInputs::<W, STRIDE>::RESULTS;
    const POSITIONS: usize = OfGradients::<W, STRIDE>::RESULTS;
    const VALUES: usize = FilterGradient::<W, STRIDE>::VALUES;
    /// Values of a filter along both.
    pub(super) const ALL_VALUES: usize = Self::VALUES.pow(2);

    pub(super) fn new(isa: Isa, c: usize, o: usize) -> Self {
        let width = isa.tile_columns();
        let panels = c.div_ceil(width);
        let inputs = Layout { channels: width, panels, word: width * W::PER_WORD };
        // Spread: a product takes a few of each word.
        let gradients = Layout { channels: o, panels: 1, word: spread(o * W::PER_WORD) };
        Sums { isa, c, o, width, panels, inputs, gradients, products: PhantomData }
    }

    /// Tiles that a convolution has.
    pub(super) fn tiles(shape: &ConvShape) -> usize {
        TileGrid::new(Extents::of(shape), axis::<W>(STRIDE).outputs).count()
    }

    /// Sums of a value, and of them those that are used.
    pub(super) fn value_len(&self) -> [usize; 2] {
        let used = self.panels * self.o * self.width;
        [spread(used), used]
    }

    pub(super) fn len(&self) -> usize {
        Self::ALL_VALUES * self.value_len()[0]
    }

    /// How many tiles take so many bytes when they are transformed, but one at least.
    pub(super) fn tiles_of(&self, bytes: usize) -> usize {
        (bytes / (self.transformed() * size_of::<W>())).max(1)
    }

    /// Values that a tile has when it is transformed.
    pub(super) fn transformed(&self) -> usize {
        Self::SLOTS.pow(2) * self.c + Self::POSITIONS.pow(2) * self.o
    }

    /// The slots, down and across, whose products are summed for a value.
    fn slots_of(value: usize) -> impl Iterator<Item = [usize; 2]> {
        let along = |value: usize| (0..Self::SLOTS).filter(move |&slot| Slots::<W, STRIDE>::value(slot) == value);
        along(value / Self::VALUES).flat_map(move |i| along(value % Self::VALUES).map(move |j| [i, j]))
    }

    /// Some of its tiles, transformed.
    pub(super) fn transform<T: Float>(
        &self,
        x: &[T],
        dy: &[T],
        shape: &ConvShape,
        tiles: Range<usize>,
    ) -> Transformed<W> {
        let Extents { images: n, input, output } = Extents::of(shape);
        let part = Part::new(Extents::of(shape), axis::<W>(STRIDE), tiles, W::PER_WORD);
        let count = part.places.len() / W::PER_WORD;
        let mut inputs = Scratch::<W>::take(Self::SLOTS.pow(2) * self.inputs.result(count));
        let mut gradients = Scratch::<W>::take(Self::POSITIONS.pow(2) * self.gradients.result(count));
        let [to_inputs, to_gradients] = [Output::new(&mut inputs), Output::new(&mut gradients)];
        for_each(count.div_ceil(BLOCK_WORDS), |block| {
            let words = block * BLOCK_WORDS..count.min((block + 1) * BLOCK_WORDS);
            let (part, of_inputs) = (&part, words.clone());
            let (to, layout, side) = (&to_inputs, self.inputs, PhantomData::<OfInputs<W, STRIDE>>);
            dispatch(
                self.isa,
                TransformTiles { pictures: x, n, extents: input, part, words: of_inputs, to, layout, side },
            );
            let (to, layout, side) = (&to_gradients, self.gradients, PhantomData::<OfGradients<W, STRIDE>>);
            dispatch(self.isa, TransformTiles { pictures: dy, n, extents: output, part, words, to, layout, side });
        });
        Transformed { inputs, gradients, part }
    }

    /// Adds the products of some filters at the slots of a value for a panel, or begins with them.
    pub(super) fn multiply(
        &self,
        tiles: &Transformed<W>,
        [value, panel]: [usize; 2],
        filters: Range<usize>,
        first: bool,
        sums: &mut [f32],
    ) {
        let (words, word) = (tiles.part.places.len() / W::PER_WORD, self.gradients.word);
        let [panel_len, slot_len] = [words * self.inputs.word, self.inputs.result(words)];
        let position_len = self.gradients.result(words);
        let mut first = first;
        for slot @ [i, j] in Self::slots_of(value) {
            let words = tiles.having::<STRIDE>(slot);
            let position = slot.map(Slots::<W, STRIDE>::position);
            let position = position[0] * Self::POSITIONS + position[1];
            let inputs = &tiles.inputs[(i * Self::SLOTS + j) * slot_len + panel * panel_len..][..panel_len];
            let gradients = &tiles.gradients[position * position_len..][..position_len];
            let inputs = &inputs[words.start * self.inputs.word..words.end * self.inputs.word];
            let gradients = &gradients[words.start * word..words.end * word];
            let filters = filters.clone();
            dispatch(self.isa, Multiply { gradients, inputs, word, position_len, filters, first, sums: &mut *sums });
            first &= words.is_empty();
        }
        if first {
            sums.fill(0.0);
        }
    }

    /// [`Sums::multiply`] of all.
    pub(super) fn add(&self, tiles: &Transformed<W>, first: bool, sums: &mut [f32]) {
        let [value_len, used] = self.value_len();
        // The last value has most slots where values share them.
        let values = sums.par_chunks_exact_mut(value_len).map(|sums| &mut sums[..used]).enumerate().rev();
        let panel_len = self.o * self.width;
        let tasks = values.flat_map(|(value, sums)| {
            sums.par_chunks_exact_mut(panel_len).enumerate().map(move |(panel, sums)| (value, panel, sums))
        });
        tasks.for_each(|(value, panel, sums)| self.multiply(tiles, [value, panel], 0..self.o, first, sums));
    }

    /// The gradient of a filter for a panel of channels, from the first of its sums on; `value_len` of them from one value to the next.
    pub(super) fn finish(&self, sums: &[f32], value_len: usize, [filter, panel]: [usize; 2], out: &Output<f32>) {
        let channels = panel * self.width..self.c.min((panel + 1) * self.width);
        let c = self.c;
        dispatch(self.isa, ToFilter::<W, STRIDE> { sums, value_len, filter, channels, c, out, products: PhantomData });
    }

    /// The gradient of which `work` makes the sums of each group.
    pub(super) fn in_groups(&self, groups: usize, out: &Output<f32>, work: impl Fn(usize, &mut [f32]) + Sync) {
        let mut totals = Scratch::<f32>::take(groups * self.len());
        let of_groups = totals.par_chunks_exact_mut(self.len()).enumerate().with_max_len(1);
        of_groups.for_each(|(group, total)| work(group, total));
        let (total, others) = totals.split_at_mut(self.len());
        elementwise::add_parts(total, others);
        self.finish_all(total, out);
    }

    /// [`Sums::finish`] of all.
    fn finish_all(&self, sums: &[f32], out: &Output<f32>) {
        let (panels, width) = (self.panels, self.width);
        for_each(self.o * panels, |i| {
            let (filter, panel) = (i / panels, i % panels);
            self.finish(&sums[(panel * self.o + filter) * width..], self.value_len()[0], [filter, panel], out);
        });
    }
}

/// `sums [filters, width] (+)= gradients [words, o]^T inputs [words, width]` of some filters.
struct Multiply<'a, W> {
    gradients: &'a [W],
    inputs: &'a [W],
    /// Values from one word of gradients to the next, and from one position to the next.
    word: usize,
    position_len: usize,
    filters: Range<usize>,
    first: bool,
    sums: &'a mut [f32],
}

impl<W: Float> Task for Multiply<'_, W> {
    type Output = ();
    const BF16: bool = W::PER_WORD > 1;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = S::LANES * S::VECTORS;
        assert!(self.filters.end * W::PER_WORD <= self.word);
        let mut runs: Vec<*const f32> = Vec::with_capacity(SLICE);
        let inputs = self.inputs.chunks(SLICE * width * W::PER_WORD);
        for (i, (gradients, inputs)) in self.gradients.chunks(SLICE * self.word).zip(inputs).enumerate() {
            runs.clear();
            let rows = gradients.chunks_exact(self.word);
            runs.extend(rows.map(|row| row[self.filters.start * W::PER_WORD..].as_ptr().cast()));
            // The next slice, or what lies after the last: the next panel or position.
            let next = inputs.as_ptr_range().end.cast();
            let ahead =
                Far([Stream::new(next, runs.len() * width, runs.len() * self.filters.len().div_ceil(TILE_ROWS))]);
            // After the last of the filters come the first in the next slice, or at the next position.
            let last = (i + 1) * SLICE * self.word >= self.gradients.len();
            let next = if last { self.position_len - i * SLICE * self.word } else { SLICE * self.word };
            let (filters, first) = (0..self.filters.len(), self.first && i == 0);
            let beyond = next / W::PER_WORD - filters.len();
            multiply_runs(simd, &runs, filters, beyond, inputs, first, self.sums, width, ahead);
        }
    }
}

/// `G^T m G` of some channels of a filter.
struct ToFilter<'a, W, const STRIDE: usize> {
    /// From the first of the filter's sums on, `[value][..][column]`.
    sums: &'a [f32],
    /// Sums from one value to the next.
    value_len: usize,
    filter: usize,
    channels: Range<usize>,
    /// All channels.
    c: usize,
    /// Filters `[o, 3, 3, c]`.
    out: &'a Output<f32>,
    products: PhantomData<W>,
}

impl<W: Float, const STRIDE: usize> Task for ToFilter<'_, W, STRIDE> {
    type Output = ();
    const BF16: bool = W::PER_WORD > 1;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (steps, columns) =
            ([FilterGradient::<W, STRIDE>::VALUES * self.value_len, self.value_len], self.channels.len());
        assert!(columns.is_multiple_of(S::LANES) && self.channels.end <= self.c);
        assert!(self.sums.len() >= (FilterGradient::<W, STRIDE>::VALUES.pow(2) - 1) * self.value_len + columns);
        let mut room = [Room::new()];
        for column in (0..columns).step_by(S::LANES) {
            // SAFETY: as asserted, a vector from `column` on is there at every value; these channels of the filter, of which each
            // tap has `c`, are this task's alone.
            unsafe {
                let sums = Plane { first: self.sums.as_ptr().add(column).cast_mut(), steps };
                let first = self.out.pointer().add(self.filter * TAPS * TAPS * self.c + self.channels.start + column);
                let out = Plane { first, steps: [TAPS * self.c, self.c] };
                let along = Along::<FilterGradient<W, STRIDE>, FilterGradient<W, STRIDE>>::new();
                along.apply(simd, &mut room, [sums], out);
            }
        }
    }
}
