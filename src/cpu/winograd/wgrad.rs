//! Winograd's algorithm for the gradient to a 3x3 filter: a fifth or a quarter of the multiplications, as in [`super`].
//!
//! Forward, a tile's outputs are `A^T [(G g G^T) * (B^T d B)] A`. That is linear in the filter `g`, so its gradient is the
//! transposed map of the outputs' gradient: `dg = G^T [sum over tiles of (A dy A^T) * (B^T d B)] G`. The sum, for every
//! pair of channels at each position, is a matrix product over the tiles.

use super::Algorithm;
use super::axes::*;
use super::parts::{Place, TileGrid, spread};
use super::transforms::*;
use super::window::Window;
use crate::cpu::conv::ConvShape;
use crate::cpu::float::Float;
use crate::cpu::gemm::Output;
use crate::cpu::gemm_transposed::{SLICE, multiply_runs};
use crate::cpu::simd::{Isa, Simd, Task, dispatch};
use crate::tensor::pool::Scratch;
use rayon::prelude::*;
use std::marker::PhantomData;
use std::ops::Range;

/// Bytes of transformed tiles that are multiplied together; they are read once, from the last cache. As many as the sums take, if
/// that is more: otherwise adding to these would take longer.
const TRANSFORMED: usize = 8 << 20;
/// Filters whose sums at all positions a task computes, where there are enough such tasks: they stay in L2.
const BLOCK_FILTERS: usize = 32;
const TASKS: usize = 8;
/// Words of tiles a task transforms.
const BLOCK_WORDS: usize = 8;

/// With more channels than these, of input or output, sums take longer to transform than few tiles take to multiply; and where
/// few pixels are summed, what is exactly zero should stay so: an optimiser that divides by the size of a gradient would make steps
/// of rounding errors.
const MAX_CHANNELS_OF_FEW: usize = 256;
/// Pixels that are enough for more channels.
const MANY_PIXELS: usize = 512;

/// Whether the gradient to the filter of this convolution is taken by this algorithm.
pub fn suits<T: Float>(isa: Isa, shape: &ConvShape) -> bool {
    // Rounding errors of bf16 are large enough to matter to such an optimiser in any layer.
    let exact = T::PER_WORD == 1 || !super::multiplies::<T>(isa);
    let few = exact && shape.c.max(shape.o) <= MAX_CHANNELS_OF_FEW;
    let enough = few || shape.n * shape.output().iter().product::<usize>() >= MANY_PIXELS;
    shape.stride == [1, 1] && enough && super::algorithm(isa, shape, shape.c, shape.o) != Algorithm::Direct
}

/// Gradient to filters `[o, 3, 3, c]`, for what [`suits`] accepts.
pub fn backward_filter<T: Float>(isa: Isa, x: &[T], dy: &[T], shape: &ConvShape, dfilter: &mut [f32]) {
    match super::multiplies::<T>(isa) {
        true => backward_filter_by::<T, T>(isa, x, dy, shape, dfilter),
        false => backward_filter_by::<T, f32>(isa, x, dy, shape, dfilter),
    }
}

/// [`backward_filter`] with products of type `W`.
pub fn backward_filter_by<T: Float, W: Float>(isa: Isa, x: &[T], dy: &[T], shape: &ConvShape, dfilter: &mut [f32]) {
    match const { axis::<W>(1).outputs } {
        7 if takes_sevens(shape) => backward_filter_of::<T, W, 7>(isa, x, dy, shape, dfilter),
        _ => backward_filter_of::<T, W, 4>(isa, x, dy, shape, dfilter),
    }
}

/// Tiles at an edge are filled up: where whole ones would be much larger than the image, smaller ones take fewer products.
fn takes_sevens(shape: &ConvShape) -> bool {
    let products = |outputs: usize| -> usize {
        shape.output().map(|extent| extent.div_ceil(outputs) * (outputs + TAPS - 1)).iter().product()
    };
    products(7) <= products(4)
}

/// [`backward_filter_by`] tiles of `M` outputs.
fn backward_filter_of<T: Float, W: Float, const M: usize>(
    isa: Isa,
    x: &[T],
    dy: &[T],
    shape: &ConvShape,
    dfilter: &mut [f32],
) {
    let (c, o) = (shape.c, shape.o);
    shape.check(x.len(), dy.len());
    assert_eq!(dfilter.len(), o * 9 * c);
    let (grid, sums) = (TileGrid::new(shape, M), Sums::<W, M>::new(isa, c, o));
    let (all, panels, width) = (slots_of::<M>().pow(2), sums.layout.panels, sums.layout.width);
    let part = sums.tiles_of(TRANSFORMED.max(all * panels * o * width * size_of::<f32>())).min(grid.count().max(1));
    let out = &Output::new(dfilter);
    let blocks = o.div_ceil(BLOCK_FILTERS);
    if c * o >= 2 * grid.count() * (c + o) && part >= grid.count() && panels * blocks >= TASKS {
        // More sums than tiles, and all tiles at once: some sums of all positions at a time, which need not go to memory.
        let tiles = sums.transform(x, dy, shape, 0..grid.count());
        (0..panels * blocks).into_par_iter().for_each(|task| {
            let (panel, block) = (task / blocks, task % blocks);
            let filters = block * BLOCK_FILTERS..o.min((block + 1) * BLOCK_FILTERS);
            // [position][o][column]
            let position_len = spread(filters.len() * width);
            let mut some = Scratch::<f32>::take(all * position_len);
            for (position, some) in some.chunks_exact_mut(position_len).enumerate() {
                sums.multiply(&tiles, [position, panel], filters.clone(), true, some);
            }
            for (i, filter) in filters.enumerate() {
                sums.finish(&some[i * width..], position_len, [filter, panel], out);
            }
        });
        return;
    }
    let mut total = Scratch::<f32>::take(sums.len());
    if grid.count() == 0 {
        total.fill(0.0);
    }
    // Whole words of tiles.
    let part = part.next_multiple_of(W::PER_WORD);
    for start in (0..grid.count()).step_by(part) {
        let tiles = sums.transform(x, dy, shape, start..grid.count().min(start + part));
        sums.add(&tiles, start == 0, &mut total);
    }
    sums.finish_all(&total, out);
}

/// Groups of pictures at most; each has sums of its own.
const GROUPS: usize = 8;

/// Whether [`backward_filter_by_pictures`] is for this convolution: a picture's tiles take more room than the sums.
pub fn suits_pictures<T: Float>(isa: Isa, shape: &ConvShape) -> bool {
    let outputs = if T::PER_WORD == 1 || !super::multiplies::<T>(isa) { axis::<f32>(1) } else { axis::<T>(1) }.outputs;
    let tiles = TileGrid::new(&ConvShape { n: 1, ..*shape }, outputs).count();
    suits::<T>(isa, shape) && shape.c * shape.o <= tiles * (shape.c + shape.o)
}

/// [`backward_filter`] where the outputs' gradients are made picture by picture: `make(picture, dy)` is to fill one's. What is made
/// of it stays in cache.
pub fn backward_filter_by_pictures<T: Float>(
    isa: Isa,
    x: &[T],
    shape: &ConvShape,
    make: &(dyn Fn(usize, &mut [T]) + Sync),
    dfilter: &mut [f32],
) {
    match (super::multiplies::<T>(isa), T::PER_WORD) {
        (true, 2) => by_pictures_of::<T, T, 4>(isa, x, shape, make, dfilter),
        _ if takes_sevens(shape) => by_pictures_of::<T, f32, 7>(isa, x, shape, make, dfilter),
        _ => by_pictures_of::<T, f32, 4>(isa, x, shape, make, dfilter),
    }
}

/// [`backward_filter_by_pictures`] with products of type `W` and tiles of `M` outputs.
fn by_pictures_of<T: Float, W: Float, const M: usize>(
    isa: Isa,
    x: &[T],
    shape: &ConvShape,
    make: &(dyn Fn(usize, &mut [T]) + Sync),
    dfilter: &mut [f32],
) {
    let image = ConvShape { n: 1, ..*shape };
    let [x_len, dy_len] = [image.h * image.w * image.c, image.output().iter().product::<usize>() * image.o];
    assert!(x.len() == shape.n * x_len && dfilter.len() == shape.o * 9 * shape.c);
    let (sums, tiles) = (Sums::<W, M>::new(isa, shape.c, shape.o), TileGrid::new(&image, M).count());
    // Two threads' tiles stay in the last cache together.
    let part = sums.tiles_of(TRANSFORMED / 2).min(tiles.max(1)).next_multiple_of(W::PER_WORD);
    let pictures = shape.n.div_ceil(GROUPS).max(1);
    let groups = shape.n.div_ceil(pictures).max(1);
    let mut totals = Scratch::<f32>::take(groups * sums.len());
    if shape.n == 0 {
        totals.fill(0.0);
    }
    totals.par_chunks_exact_mut(sums.len()).enumerate().with_max_len(1).for_each(|(group, total)| {
        let mut dy = Scratch::<T>::take(dy_len);
        for picture in group * pictures..shape.n.min((group + 1) * pictures) {
            make(picture, &mut dy);
            for start in (0..tiles).step_by(part) {
                let some = start..tiles.min(start + part);
                let some = sums.transform(&x[picture * x_len..][..x_len], &dy, &image, some);
                sums.add(&some, picture == group * pictures && start == 0, total);
            }
        }
    });
    let (total, rest) = totals.split_at_mut(sums.len());
    total.par_chunks_mut(SUMMED).enumerate().for_each(|(i, total)| {
        for rest in rest.chunks_exact(sums.len()) {
            total.iter_mut().zip(&rest[i * SUMMED..]).for_each(|(total, x)| *total += x);
        }
    });
    sums.finish_all(total, &Output::new(dfilter));
}

/// Values of groups' sums that are added together.
const SUMMED: usize = 1 << 12;

/// Sums over tiles of the products of inputs and gradients, `[position][panel][o][column]`, and how they come to be and are used.
struct Sums<W, const M: usize> {
    isa: Isa,
    c: usize,
    o: usize,
    layout: Layout,
    products: PhantomData<W>,
}

/// Some transformed tiles.
struct Transformed<W> {
    inputs: Scratch<W>,
    gradients: Scratch<W>,
    words: usize,
}

impl<W: Float, const M: usize> Sums<W, M> {
    fn new(isa: Isa, c: usize, o: usize) -> Self {
        let width = isa.tile_columns();
        let layout = Layout {
            width,
            panels: c.div_ceil(width),
            word_of_inputs: width * W::PER_WORD,
            word_of_gradients: spread(o * W::PER_WORD),
        };
        Sums { isa, c, o, layout, products: PhantomData }
    }

    /// Values of a position, and of them those that are used.
    fn position_len(&self) -> [usize; 2] {
        let used = self.layout.panels * self.o * self.layout.width;
        [spread(used), used]
    }

    fn len(&self) -> usize {
        slots_of::<M>().pow(2) * self.position_len()[0]
    }

    /// How many tiles take so many bytes when they are transformed, but one at least.
    fn tiles_of(&self, bytes: usize) -> usize {
        (bytes / (slots_of::<M>().pow(2) * (self.c + self.o) * size_of::<W>())).max(1)
    }

    fn transform<T: Float>(&self, x: &[T], dy: &[T], shape: &ConvShape, tiles: Range<usize>) -> Transformed<W> {
        let (all, layout, words) = (slots_of::<M>().pow(2), self.layout, tiles.len().div_ceil(W::PER_WORD));
        let mut inputs = Scratch::<W>::take(all * layout.inputs(words));
        let mut gradients = Scratch::<W>::take(all * layout.gradients(words));
        let (to_inputs, to_gradients) = (&Output::new(&mut inputs), &Output::new(&mut gradients));
        (0..words.div_ceil(BLOCK_WORDS)).into_par_iter().for_each(|block| {
            let block = block * BLOCK_WORDS..words.min((block + 1) * BLOCK_WORDS);
            let (tiles, grid) = (tiles.clone(), TileGrid::new(shape, M));
            let (inputs, gradients) = (to_inputs, to_gradients);
            dispatch(
                self.isa,
                TransformTiles::<T, W, M> { x, dy, shape, grid, tiles, block, words, layout, inputs, gradients },
            );
        });
        Transformed { inputs, gradients, words }
    }

    /// Adds the products of some filters at a position for a panel, or begins with them.
    fn multiply(
        &self,
        Transformed { inputs, gradients, words }: &Transformed<W>,
        [position, panel]: [usize; 2],
        filters: Range<usize>,
        first: bool,
        sums: &mut [f32],
    ) {
        let Layout { word_of_inputs, word_of_gradients: word, .. } = self.layout;
        let panel_len = words * word_of_inputs;
        let inputs = &inputs[position * self.layout.inputs(*words) + panel * panel_len..][..panel_len];
        let gradients = &gradients[position * self.layout.gradients(*words)..][..words * word];
        dispatch(self.isa, Multiply { gradients, inputs, word, filters, first, sums });
    }

    /// [`Sums::multiply`] of all.
    fn add(&self, tiles: &Transformed<W>, first: bool, sums: &mut [f32]) {
        let [position_len, used] = self.position_len();
        let positions = sums.par_chunks_exact_mut(position_len).map(|sums| &mut sums[..used]).enumerate();
        let panel_len = self.o * self.layout.width;
        let tasks = positions.flat_map(|(position, sums)| {
            sums.par_chunks_exact_mut(panel_len).enumerate().map(move |(panel, sums)| (position, panel, sums))
        });
        tasks.for_each(|(position, panel, sums)| self.multiply(tiles, [position, panel], 0..self.o, first, sums));
    }

    /// The gradient of a filter for a panel of channels, from the first of its sums on; `position_len` values from one position to the next.
    fn finish(&self, sums: &[f32], position_len: usize, [filter, panel]: [usize; 2], out: &Output<f32>) {
        let channels = panel * self.layout.width..self.c.min((panel + 1) * self.layout.width);
        let (position, c) = (position_len, self.c);
        dispatch(self.isa, ToFilter::<W, M> { sums, position, filter, channels, c, out, products: PhantomData });
    }

    /// [`Sums::finish`] of all.
    fn finish_all(&self, sums: &[f32], out: &Output<f32>) {
        let Layout { panels, width, .. } = self.layout;
        (0..self.o * panels).into_par_iter().for_each(|i| {
            let (filter, panel) = (i / panels, i % panels);
            self.finish(&sums[(panel * self.o + filter) * width..], self.position_len()[0], [filter, panel], out);
        });
    }
}

/// Slots along an axis of a tile of `M` outputs.
const fn slots_of<const M: usize>() -> usize {
    M + TAPS - 1
}

/// How transformed tiles lie: inputs `[position][panel][word][column]`, gradients `[position][word][o]`.
#[derive(Clone, Copy)]
struct Layout {
    /// Columns of a panel, and panels.
    width: usize,
    panels: usize,
    /// Values from one word to the next. Those of gradients are spread: a product takes a few of each.
    word_of_inputs: usize,
    word_of_gradients: usize,
}

impl Layout {
    /// Values from one position to the next of so many words, spread: a tile has a vector at each.
    fn inputs(&self, words: usize) -> usize {
        spread(self.panels * words * self.word_of_inputs)
    }

    fn gradients(&self, words: usize) -> usize {
        spread(words * self.word_of_gradients)
    }
}

/// Some words of tiles of the input and of the output's gradient, transformed.
struct TransformTiles<'a, T, W, const M: usize> {
    x: &'a [T],
    dy: &'a [T],
    shape: &'a ConvShape,
    grid: TileGrid,
    tiles: Range<usize>,
    block: Range<usize>,
    /// All words of the tiles.
    words: usize,
    layout: Layout,
    inputs: &'a Output<W>,
    gradients: &'a Output<W>,
}

impl<T: Float, W: Float, const M: usize> Task for TransformTiles<'_, T, W, M> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let ConvShape { c, o, .. } = *self.shape;
        let Layout { width, word_of_inputs, word_of_gradients, .. } = self.layout;
        let (inputs_len, gradients_len) = (self.layout.inputs(self.words), self.layout.gradients(self.words));
        let mut rooms = [Room::new(), Room::new()];
        let inputs_of =
            |word: usize| self.tiles_of(word).map(|tile| tile.map_or(Window::empty(), |tile| self.inputs_of(tile)));
        let gradients_of =
            |word: usize| self.tiles_of(word).map(|tile| tile.map_or(Window::empty(), |tile| self.gradients_of(tile)));
        let (mut next_inputs, mut next_gradients) = (inputs_of(self.block.start), gradients_of(self.block.start));
        for word in self.block.clone() {
            let next = self.block.end.min(word + 2) - 1;
            let inputs = std::mem::replace(&mut next_inputs, inputs_of(next));
            let gradients = std::mem::replace(&mut next_gradients, gradients_of(next));
            let pixels = |i: usize, channel: usize| Pixels {
                window: &inputs[i],
                next: (&next_inputs[i], slots_of::<M>()),
                channel,
            };
            let outputs =
                |i: usize, channel: usize| Pixels { window: &gradients[i], next: (&next_gradients[i], M), channel };
            for channel in (0..c).step_by(S::LANES) {
                let at = (channel / width * self.words + word) * word_of_inputs + channel % width * W::PER_WORD;
                // SAFETY: pixels have `c` values; there is room for each word at each position, and this is this task's.
                unsafe {
                    let first = self.inputs.pointer().add(at);
                    let words = Plane { first, steps: [slots_of::<M>() * inputs_len, inputs_len] };
                    let tiles = [pixels(0, channel), pixels(1, channel)];
                    transform_words::<Input<W, 1, M>, S, W>(simd, tiles, &mut rooms, words);
                }
            }
            for channel in (0..o).step_by(S::LANES) {
                // SAFETY: as above, of `o` values.
                unsafe {
                    let first = self.gradients.pointer().add(word * word_of_gradients + channel * W::PER_WORD);
                    let words = Plane { first, steps: [slots_of::<M>() * gradients_len, gradients_len] };
                    let tiles = [outputs(0, channel), outputs(1, channel)];
                    transform_words::<Gradient<W, M>, S, W>(simd, tiles, &mut rooms, words);
                }
            }
        }
    }
}

impl<T: Float, W: Float, const M: usize> TransformTiles<'_, T, W, M> {
    /// The first tile of a word, and the last where that is another; there is none beyond the last of all.
    #[inline(always)]
    fn tiles_of(&self, word: usize) -> [Option<usize>; 2] {
        let tile = |i: usize| Some(self.tiles.start + word * W::PER_WORD + i).filter(|tile| *tile < self.tiles.end);
        [tile(0), if W::PER_WORD > 1 { tile(W::PER_WORD - 1) } else { None }]
    }

    /// What a tile sees of the input.
    #[inline(always)]
    fn inputs_of(&self, tile: usize) -> Window<'_, T> {
        let (ConvShape { h, w, c, .. }, Place { image, top, left }) = (*self.shape, self.grid.place(tile));
        let first = [top, left].map(|at| at as isize - 1);
        Window::new(self.x, image, [h, w, c], first, slots_of::<M>())
    }

    /// The gradients of a tile's outputs.
    #[inline(always)]
    fn gradients_of(&self, tile: usize) -> Window<'_, T> {
        let ([oh, ow], o, Place { image, top, left }) = (self.shape.output(), self.shape.o, self.grid.place(tile));
        Window::new(self.dy, image, [oh, ow, o], [top as isize, left as isize], M)
    }
}

/// `sums [filters, width] (+)= gradients [words, o]^T inputs [words, width]` of some filters.
struct Multiply<'a, W> {
    gradients: &'a [W],
    inputs: &'a [W],
    /// Values from one word of gradients to the next.
    word: usize,
    filters: Range<usize>,
    first: bool,
    sums: &'a mut [f32],
}

impl<W: Float> Task for Multiply<'_, W> {
    type Output = ();

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
            multiply_runs(simd, &runs, 0..self.filters.len(), inputs, self.first && i == 0, self.sums, width);
        }
    }
}

/// `G^T m G` of some channels of a filter.
struct ToFilter<'a, W, const M: usize> {
    /// From the first of the filter's sums on, `[position][..][column]`.
    sums: &'a [f32],
    /// Values of a position.
    position: usize,
    filter: usize,
    channels: Range<usize>,
    /// All channels.
    c: usize,
    /// Filters `[o, 3, 3, c]`.
    out: &'a Output<f32>,
    products: PhantomData<W>,
}

impl<W: Float, const M: usize> Task for ToFilter<'_, W, M> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (steps, columns) = ([slots_of::<M>() * self.position, self.position], self.channels.len());
        assert!(columns.is_multiple_of(S::LANES) && self.channels.end <= self.c);
        assert!(self.sums.len() >= (slots_of::<M>().pow(2) - 1) * self.position + columns);
        let mut room = Room::new();
        for column in (0..columns).step_by(S::LANES) {
            // SAFETY: as asserted, a vector from `column` on is there at every position; these channels of the filter, of which each
            // tap has `c`, are this task's alone.
            unsafe {
                let sums = Plane { first: self.sums.as_ptr().add(column).cast_mut(), steps };
                let first = self.out.pointer().add(self.filter * TAPS * TAPS * self.c + self.channels.start + column);
                let out = Plane { first, steps: [TAPS * self.c, self.c] };
                along_both::<FilterGradient<W, M>, S>(simd, &mut room, sums, out);
            }
        }
    }
}
