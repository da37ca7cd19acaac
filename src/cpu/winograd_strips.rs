//! Winograd's algorithm for 3x3 filters of many channels, with a stride of one or two.
//!
//! Transformed filters are four times as large as filters. Where there are many channels they do not fit a cache, and reading
//! them would take longer than making them: so they are made when they are used. All inputs are transformed first. Then a task
//! takes a strip of output channels; for some input channels after others it transforms the filters, which stay in L2, and adds
//! the products at all positions; and it transforms the sums back.
//!
//! Tiles at the bottom and at the right end where the image does (`winograd_points.rs`). Tiles of a task are ordered by their
//! extents, so that those that have a position lie together.

use super::conv::ConvShape;
use super::float::Float;
use super::gemm::{Epilogue, Output, TILE_ROWS, Tile, ZEROS, narrowed};
use super::simd::{Isa, Simd, Task, dispatch};
use super::winograd::pixel;
use super::winograd_parts::{CLASSES, Part, Place, spread};
use super::winograd_points::*;
use super::winograd_transforms::*;
use crate::tensor::pool::Scratch;
use rayon::prelude::*;
use std::ops::Range;

/// Output channels of a task; a whole number of the micro-kernel's panels.
const STRIP: usize = 64;
/// Tiles of a task, about: the more, the less the transforms of filters matter, but sums of a strip should stay in L2.
const PART: usize = 96;
/// Bytes of transformed inputs that are used before more are made: they stay in the last cache.
const TRANSFORMED: usize = 5 << 20;
/// Input channels whose filters are transformed together, in words: their filters at a position stay in L1 while the tiles pass,
/// and those of all positions in L2.
const CHANNELS: usize = 64;
/// Tiles whose inputs a task transforms.
const TOGETHER: usize = 4;
/// Bytes of a cache line.
const LINE_BYTES: usize = 64;
/// Input channels at most: what a pixel of padding can stand for.
pub(super) const MAX_CHANNELS: usize = 512;

/// Filters in the order in which they are transformed: `[strip][word of input channels][tap][STRIP][channel of the word]`,
/// zero-padded. `W` is the type whose products are taken.
pub struct StripFilter<W> {
    isa: Isa,
    taps: Scratch<W>,
    c: usize,
    o: usize,
}

impl<W: Float> StripFilter<W> {
    /// Values of a word's tap, and of all its taps.
    const TAP: usize = STRIP * W::PER_WORD;
    const WORD: usize = TAPS * TAPS * Self::TAP;

    /// From filters `[o, 3, 3, c]`.
    pub fn new(isa: Isa, filter: &[f32], o: usize, c: usize) -> Self {
        let filter = &*narrowed::<W>(filter);
        Self::pack(isa, filter, c, o, |channels, columns, out| {
            for (i, column) in columns.enumerate() {
                for tap in 0..TAPS * TAPS {
                    let values = &filter[(column * TAPS * TAPS + tap) * c..][channels.clone()];
                    let words = out[tap * Self::TAP + i * W::PER_WORD..].chunks_mut(Self::WORD);
                    for (out, values) in words.zip(values.chunks_exact(W::PER_WORD)) {
                        out[..W::PER_WORD].copy_from_slice(values);
                    }
                }
            }
        })
    }

    /// From filters `[o, 3, 3, c]`, for the gradient to the input: the convolution of the output's gradient with the filters
    /// turned by half a turn and their channels exchanged.
    pub fn for_backward_input(isa: Isa, filter: &[f32], o: usize, c: usize) -> Self {
        let filter = &*narrowed::<W>(filter);
        Self::pack(isa, filter, o, c, |channels, columns, out| {
            for (i, channel) in channels.enumerate() {
                let (word, lane) = (i / W::PER_WORD, i % W::PER_WORD);
                for (tap, out) in out[word * Self::WORD..].chunks_exact_mut(Self::TAP).take(TAPS * TAPS).enumerate() {
                    let start = (channel * TAPS * TAPS + TAPS * TAPS - 1 - tap) * c;
                    let values = &filter[start..][columns.clone()];
                    let out = out[lane..].iter_mut().step_by(W::PER_WORD);
                    out.zip(values).for_each(|(out, &value)| *out = value);
                }
            }
        })
    }

    /// From `c` to `o` channels; `copy(channels, columns, out)` fills some channels of a strip.
    fn pack(
        isa: Isa,
        filter: &[W],
        c: usize,
        o: usize,
        copy: impl Fn(Range<usize>, Range<usize>, &mut [W]) + Sync,
    ) -> Self {
        // What is written together stays in L1.
        const CHANNELS: usize = 8;
        assert_eq!(filter.len(), o * TAPS * TAPS * c);
        assert!(c.is_multiple_of(W::PER_WORD), "channels are whole words");
        let mut taps = Scratch::take(o.div_ceil(STRIP) * c * TAPS * TAPS * STRIP);
        taps.par_chunks_exact_mut(c * TAPS * TAPS * STRIP).enumerate().for_each(|(strip, out)| {
            let columns = strip * STRIP..o.min((strip + 1) * STRIP);
            if columns.len() < STRIP {
                out.fill(W::default());
            }
            for (i, out) in out.chunks_mut(CHANNELS * TAPS * TAPS * STRIP).enumerate() {
                copy(i * CHANNELS..c.min((i + 1) * CHANNELS), columns.clone(), out);
            }
        });
        StripFilter { isa, taps, c, o }
    }
}

/// `y = epilogue(conv(x, filter))` for a 3x3 filter of padding one and stride one or two.
pub fn forward<T: Float, W: Float>(
    x: &[T],
    filter: &StripFilter<W>,
    shape: &ConvShape,
    epilogue: Epilogue<T>,
    y: &mut [T],
) {
    assert_eq!((shape.c, shape.o), (filter.c, filter.o), "the filter's channels");
    shape.check(x.len(), y.len());
    epilogue.check(shape.o, y.len());
    assert!([shape.kh, shape.kw] == [TAPS; 2] && shape.padding == [1, 1] && shape.c <= MAX_CHANNELS);
    match shape.stride {
        [1, 1] => forward_strided::<T, W, 1>(x, filter, shape, epilogue, y),
        [2, 2] => forward_strided::<T, W, 2>(x, filter, shape, epilogue, y),
        stride => panic!("strides {stride:?} have no tiles"),
    }
}

fn forward_strided<T: Float, W: Float, const STRIDE: usize>(
    x: &[T],
    filter: &StripFilter<W>,
    shape: &ConvShape,
    epilogue: Epilogue<T>,
    y: &mut [T],
) {
    let values_of_tile = slots(axis(STRIDE)).pow(2) * shape.c;
    let values_of = |part: &Part| slots(axis(STRIDE)).pow(2) * part.slot_len(shape.c);
    let tiles = shape.output().map(|extent| extent.div_ceil(OUTPUTS)).iter().product::<usize>() * shape.n;
    let groups = (tiles * values_of_tile * size_of::<W>()).div_ceil(TRANSFORMED);
    let parts_of_group = (tiles.div_ceil(groups.max(1))).div_ceil(PART);
    let parts = Part::all(shape, groups * parts_of_group);
    let strips = shape.o.div_ceil(STRIP);
    let out = Output::new(y);
    for parts in parts.chunks(parts_of_group.max(1)) {
        let mut inputs: Vec<Scratch<W>> = parts.iter().map(|part| Scratch::take(values_of(part))).collect();
        let pieces: Vec<(&Part, Range<usize>, Output<W>)> = parts
            .iter()
            .zip(&mut inputs)
            .flat_map(|(part, inputs)| {
                let tiles = part.places.len();
                let starts = (0..tiles).step_by(TOGETHER);
                starts.map(move |start| (part, start..tiles.min(start + TOGETHER), Output::new(inputs)))
            })
            .collect();
        pieces.par_iter().for_each(|(part, tiles, inputs)| {
            dispatch(filter.isa, Inputs::<T, W, STRIDE> { x, shape, part, tiles: tiles.clone(), inputs });
        });
        (0..parts.len() * strips).into_par_iter().for_each(|task| {
            let (part, strip) = (task / strips, task % strips);
            let (part, inputs) = (&parts[part], &inputs[part]);
            dispatch(filter.isa, Strip::<T, W, STRIDE> { part, inputs, filter, strip, shape, epilogue, y: &out });
        });
    }
}

/// `B^T d B` of some tiles of a part, to `inputs[slot down][slot across][tile][channel]`.
struct Inputs<'a, T, W, const STRIDE: usize> {
    x: &'a [T],
    shape: &'a ConvShape,
    part: &'a Part,
    tiles: Range<usize>,
    inputs: &'a Output<W>,
}

impl<T: Float, W: Float, const STRIDE: usize> Task for Inputs<'_, T, W, STRIDE> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let mut room = Room::new();
        for tile in self.tiles.clone() {
            let [down, across] = self.part.outputs[self.part.class_of(tile)];
            let pixels = self.pixels(tile);
            for channel in (0..self.shape.c).step_by(S::LANES) {
                with_outputs!(down, M => self.transform_columns::<S, M>(simd, &pixels, channel, across, &mut room));
                with_outputs!(across, M => self.transform_rows::<S, M>(simd, tile, channel, down, &mut room));
            }
        }
    }
}

impl<T: Float, W: Float, const STRIDE: usize> Inputs<'_, T, W, STRIDE> {
    /// Where the pixels begin that a tile sees, column by column; those on the padding read zeros.
    #[inline(always)]
    fn pixels(&self, tile: usize) -> [[&[T]; MAX]; MAX] {
        let Place { image, top, left } = self.part.places[tile];
        let at = |i, j| pixel(self.x, self.shape, image, [STRIDE * top + i, STRIDE * left + j]);
        std::array::from_fn(|j| std::array::from_fn(|i| at(i, j)))
    }

    /// Along the columns of a tile of `M` outputs down, to the room.
    #[inline(always)]
    fn transform_columns<S: Simd, const M: usize>(
        &self,
        simd: S,
        pixels: &[[&[T]; MAX]; MAX],
        channel: usize,
        across: usize,
        room: &mut Room,
    ) {
        for (j, pixels) in pixels.iter().enumerate().take(inputs(axis(STRIDE), across)) {
            // SAFETY: a vector of the channels of a pixel, as whole vectors of channels are asked for.
            let column = vectors!(simd, inputs(axis(STRIDE), M), I => unsafe {
                T::load(simd, pixels[I].as_ptr().add(channel))
            });
            let values = transform_input::<S, W, STRIDE, M>(simd, &column);
            let room = room.at::<S>(0, j);
            unrolled!(SLOT => {
                if const { SLOT < slots(axis(STRIDE)) && has_slot(axis(STRIDE), M, SLOT) } {
                    // SAFETY: vectors `[slot, j]` of the room.
                    unsafe { simd.store(room.add(SLOT * MAX * S::LANES), values[SLOT]) };
                }
            });
        }
    }

    /// Along the rows that the room has of a tile of `M` outputs across.
    #[inline(always)]
    fn transform_rows<S: Simd, const M: usize>(
        &self,
        simd: S,
        tile: usize,
        channel: usize,
        down: usize,
        room: &mut Room,
    ) {
        let (slot_len, c) = (self.part.slot_len(self.shape.c), self.shape.c);
        for row in (0..slots(axis(STRIDE))).filter(|&slot| has_slot(axis(STRIDE), down, slot)) {
            let room = room.at::<S>(row, 0);
            // SAFETY: the columns have stored a vector for each row that the tile has and each input across.
            let row_of_room =
                vectors!(simd, inputs(axis(STRIDE), M), I => unsafe { simd.load(room.add(I * S::LANES)) });
            let values = transform_input::<S, W, STRIDE, M>(simd, &row_of_room);
            let at = row * slots(axis(STRIDE)) * slot_len + tile * c + channel;
            unrolled!(SLOT => {
                if const { SLOT < slots(axis(STRIDE)) && has_slot(axis(STRIDE), M, SLOT) } {
                    // SAFETY: there is room for the channels of each tile at each pair of slots, and this tile is this task's.
                    unsafe { W::store(simd, self.inputs.pointer().add(at + SLOT * slot_len), values[SLOT]) };
                }
            });
        }
    }
}

/// The outputs of a strip of channels in all tiles of a part.
struct Strip<'a, T, W, const STRIDE: usize> {
    part: &'a Part,
    /// `[slot down][slot across][tile][channel]`
    inputs: &'a [W],
    filter: &'a StripFilter<W>,
    strip: usize,
    shape: &'a ConvShape,
    epilogue: Epilogue<'a, T>,
    y: &'a Output<T>,
}

impl<T: Float, W: Float, const STRIDE: usize> Task for Strip<'_, T, W, STRIDE> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = S::LANES * S::VECTORS;
        let columns = STRIP.min(self.shape.o - self.strip * STRIP);
        let panels = columns.div_ceil(width);
        let across = positions(axis(STRIDE), OUTPUTS);
        let position_len = spread(panels * self.part.room() * width);
        // [position down][position across][panel][tile][column], tiles that have the position alone.
        let mut sums = Scratch::<f32>::take(across * across * position_len);
        let c = self.shape.c;
        let together = CHANNELS * W::PER_WORD;
        let mut filters = Scratch::<W>::take(VALUES * VALUES * spread(panels * together.min(c) * width));
        for start in (0..c).step_by(together) {
            let channels = start..c.min(start + together);
            self.transform_filters(simd, channels.clone(), panels, &mut filters);
            for (position, sums) in sums.chunks_exact_mut(position_len).enumerate() {
                let position = [position / across, position % across];
                self.multiply(simd, position, channels.clone(), &filters, columns, sums);
            }
        }
        let first: Vec<[usize; CLASSES]> =
            (0..across * across).map(|p| self.part.first_of_classes::<STRIDE>([p / across, p % across])).collect();
        let mut room = Room::new();
        for tile in 0..self.part.places.len() {
            let [down, right] = self.part.outputs[self.part.class_of(tile)];
            // Where the positions have the tile.
            let class = self.part.class_of(tile);
            let row = tile - self.part.classes[class].start;
            let starts: [usize; VALUES * VALUES] = std::array::from_fn(|position| {
                let first = first.get(position).map_or(0, |first| first[class]);
                position * position_len + (first + row) * width
            });
            for column in (0..columns).step_by(S::LANES) {
                let sums = &sums[column / width * self.part.room() * width + column % width..];
                with_outputs!(down, M => self.transform_columns::<S, M>(simd, sums, &starts, right, &mut room));
                with_outputs!(right, M => self.transform_rows::<S, M>(simd, tile, column, down, &mut room));
            }
        }
    }
}

impl<T: Float, W: Float, const STRIDE: usize> Strip<'_, T, W, STRIDE> {
    /// `G g G^T` of the filters of some channels: `[value down][value across][panel][word of channels][column]`.
    #[inline(always)]
    fn transform_filters<S: Simd>(&self, simd: S, channels: Range<usize>, panels: usize, filters: &mut [W]) {
        let (tap_len, word_len) = (StripFilter::<W>::TAP, StripFilter::<W>::WORD);
        // Values of a panel's row, and of a panel.
        let row = S::LANES * S::VECTORS * W::PER_WORD;
        let panel = channels.len() / W::PER_WORD * row;
        let value_len = spread(panels * panel);
        let first = (self.strip * self.shape.c + channels.start) * TAPS * TAPS * STRIP;
        let taps = &self.filter.taps[first..][..channels.len() * TAPS * TAPS * STRIP];
        assert!(filters.len() >= VALUES * VALUES * value_len && panels * row <= tap_len);
        let line = LINE_BYTES / size_of::<W>();
        for (word, taps) in taps.chunks_exact(word_len).enumerate() {
            // The channels after these come next, or those of the next strip.
            let ahead = taps.as_ptr().wrapping_add(channels.len() * TAPS * TAPS * STRIP);
            (0..word_len).step_by(line).for_each(|at| simd.prefetch(ahead.wrapping_add(at).cast()));
            for column in (0..panels * row).step_by(S::LANES) {
                let at = column / row * panel + word * row + column % row;
                // SAFETY: a vector of the strip's columns at each tap.
                let load = |tap: usize| unsafe { W::load(simd, taps.as_ptr().add(tap * tap_len + column)) };
                transform_filter::<S, W, STRIDE>(simd, load, |value, vector| {
                    // SAFETY: a vector of a row within the value's panel, as asserted.
                    unsafe { W::store(simd, filters.as_mut_ptr().add(value * value_len + at), vector) };
                });
            }
        }
    }

    /// Adds the products at a position, over some channels and the slots that meet there: `[panel][tile][column]`.
    #[inline(always)]
    fn multiply<S: Simd>(
        &self,
        simd: S,
        [i, j]: [usize; 2],
        channels: Range<usize>,
        filters: &[W],
        columns: usize,
        sums: &mut [f32],
    ) {
        let (c, depth, width) = (self.shape.c, channels.len(), S::LANES * S::VECTORS);
        let words = depth / W::PER_WORD;
        let panels = columns.div_ceil(width);
        // The tiles that have the position, with their class.
        let mut tiles: Vec<[usize; 2]> = Vec::with_capacity(self.part.places.len());
        for (class, range) in self.part.at::<STRIDE>([i, j]) {
            tiles.extend(range.map(|tile| [class, tile]));
        }
        let meet =
            |position: usize| (0..slots(axis(STRIDE))).filter(move |&slot| position_of(axis(STRIDE), slot) == position);
        for (row, slot) in meet(i).flat_map(|row| meet(j).map(move |slot| (row, slot))) {
            let value = value_of(row) * VALUES + value_of(slot);
            let filters = &filters[value * spread(panels * depth * width)..][..panels * depth * width];
            // For each class, where the inputs begin, or zeros if it lacks one of the slots.
            let starts = self.part.outputs.map(|[down, across]| {
                let has = has_slot(axis(STRIDE), down, row) && has_slot(axis(STRIDE), across, slot);
                has.then(|| (row * slots(axis(STRIDE)) + slot) * self.part.slot_len(c) + channels.start)
            });
            let first = channels.start == 0 && [row, slot] == [i, j];
            for (panel, sums) in sums.chunks_exact_mut(self.part.room() * width).take(panels).enumerate() {
                let b = &filters[panel * depth * width..][..depth * width];
                for start in (0..tiles.len()).step_by(TILE_ROWS) {
                    let sums = sums[start * width..][..TILE_ROWS * width].as_mut_ptr();
                    let runs: [[*const f32; TILE_ROWS]; 1] = [std::array::from_fn(|lane| {
                        let [class, tile] = tiles[(start + lane).min(tiles.len() - 1)];
                        match starts[class] {
                            Some(start) => self.inputs[start + tile * c..][..depth].as_ptr().cast(),
                            None => ZEROS[..words].as_ptr(),
                        }
                    })];
                    let extents = [TILE_ROWS.min(tiles.len() - start), width.min(columns - panel * width)];
                    let tile =
                        Tile { before: (!first).then_some(sums), ..Tile::of_sums(&runs, words, b, extents, sums) };
                    // SAFETY: runs are readable for `words`, `b` has as many full rows, and there is a full tile of sums.
                    unsafe { tile.compute(simd) };
                }
            }
        }
    }

    /// `A^T m` along the columns of a tile of `M` outputs down, to the room; `starts` says where in `sums` each position has it.
    #[inline(always)]
    fn transform_columns<S: Simd, const M: usize>(
        &self,
        simd: S,
        sums: &[f32],
        starts: &[usize; VALUES * VALUES],
        across: usize,
        room: &mut Room,
    ) {
        let all = positions(axis(STRIDE), OUTPUTS);
        for j in 0..positions(axis(STRIDE), across) {
            // SAFETY: checked by the slice.
            let column = vectors!(simd, positions(axis(STRIDE), M), I => unsafe {
                simd.load(sums[starts[I * all + j]..][..S::LANES].as_ptr())
            });
            let outputs = transform_output::<S, W, STRIDE, M>(simd, &column);
            let room = room.at::<S>(0, j);
            unrolled!(I => {
                if I < M {
                    // SAFETY: vectors `[output, j]` of the room.
                    unsafe { simd.store(room.add(I * MAX * S::LANES), outputs[I]) };
                }
            });
        }
    }

    /// `A^T m A` with the epilogue, of a tile of `M` outputs across, from the room to the result.
    #[inline(always)]
    fn transform_rows<S: Simd, const M: usize>(
        &self,
        simd: S,
        tile: usize,
        column: usize,
        down: usize,
        room: &mut Room,
    ) {
        let (Place { image, top, left }, [oh, ow], o) = (self.part.places[tile], self.shape.output(), self.shape.o);
        let channel = self.strip * STRIP + column;
        // SAFETY: a bias has as many values as there are channels, and a vector of them begins here.
        let bias = self.epilogue.bias.map(|bias| unsafe { simd.load(bias[channel..][..S::LANES].as_ptr()) });
        for i in 0..down {
            let room = room.at::<S>(i, 0);
            // SAFETY: the columns have stored a vector for each row of outputs and each position across.
            let row = vectors!(simd, positions(axis(STRIDE), M), J => unsafe { simd.load(room.add(J * S::LANES)) });
            let outputs = transform_output::<S, W, STRIDE, M>(simd, &row);
            let first = ((image * oh + top + i) * ow + left) * o + channel;
            unrolled!(J => {
                if J < M {
                    // SAFETY: outputs of the tile lie inside the image and are this task's alone; the residual is as long.
                    unsafe { self.epilogue.store(simd, outputs[J], bias, self.y.pointer(), first + J * o) };
                }
            });
        }
    }
}
