//! A row of windows of a max pooling: values by their order, and the greatest of each window with or without its place.

use super::PoolShape;
use crate::cpu::simd::{Simd, Task};

/// The first three of what a window covers, the last again where there are fewer: most windows have as many, and their greatest takes one
/// pass.
#[inline(always)]
fn three<T: Copy>(mut covered: impl Iterator<Item = T>) -> [T; 3] {
    let first = covered.next().expect("a window covers something");
    let second = covered.next().unwrap_or(first);
    [first, second, covered.next().unwrap_or(second)]
}

/// Values by their order, as which they are compared: f32 are their own, and the bits of bf16 become integers that 32 lanes compare.
pub trait Ordered: bytemuck::Pod + Send + Sync {
    /// NaN is greater than any number.
    fn order(self) -> Self;
    /// The value of an order.
    fn value(self) -> Self;
    /// The greater of two orders.
    fn greater(self, other: Self) -> Self;
    /// Whether an order is greater than another; no NaN than another.
    fn exceeds(self, other: Self) -> bool;
    /// What [`Ordered::order_of`] takes for 1 or -1.
    fn sign(sign: f32) -> Self;
    /// The order of the value times a sign, the same for both zeros.
    fn order_of(self, sign: Self) -> Self;
    /// A place, as something as wide as a value, so that as many are chosen at once.
    fn of_place(place: u8) -> Self;
    /// Back again.
    fn place(self) -> u8;
}

impl Ordered for f32 {
    #[inline(always)]
    fn order(self) -> f32 {
        self
    }
    #[inline(always)]
    fn value(self) -> f32 {
        self
    }
    #[inline(always)]
    fn greater(self, other: f32) -> f32 {
        if self > other || self.is_nan() { self } else { other }
    }
    #[inline(always)]
    fn exceeds(self, other: f32) -> bool {
        (self > other) | (self.is_nan() & !other.is_nan())
    }
    #[inline(always)]
    fn sign(sign: f32) -> f32 {
        sign
    }
    #[inline(always)]
    fn order_of(self, sign: f32) -> f32 {
        self * sign
    }
    #[inline(always)]
    fn of_place(place: u8) -> f32 {
        f32::from_bits(u32::from(place))
    }
    #[inline(always)]
    fn place(self) -> u8 {
        self.to_bits() as u8
    }
}

/// The bits of a bf16: a sign, and what grows with the magnitude from 0 up to infinity and NaN.
impl Ordered for i16 {
    #[inline(always)]
    fn order(self) -> i16 {
        // Negative infinity becomes the least, and negative NaNs, which would be less, wrap round to the greatest.
        turned(self).wrapping_sub(NANS)
    }
    #[inline(always)]
    fn value(self) -> i16 {
        turned(self.wrapping_add(NANS))
    }
    #[inline(always)]
    fn greater(self, other: i16) -> i16 {
        self.max(other)
    }
    #[inline(always)]
    fn exceeds(self, other: i16) -> bool {
        self > other
    }
    #[inline(always)]
    fn sign(sign: f32) -> i16 {
        if sign < 0.0 { i16::MIN } else { 0 }
    }
    #[inline(always)]
    fn order_of(self, sign: i16) -> i16 {
        let signed = self ^ sign;
        if signed == i16::MIN { 0i16.order() } else { signed.order() }
    }
    #[inline(always)]
    fn of_place(place: u8) -> i16 {
        i16::from(place)
    }
    #[inline(always)]
    fn place(self) -> u8 {
        self as u8
    }
}

/// NaNs of either sign.
const NANS: i16 = 0x7f;

/// Negative ones so that they grow with their value; done twice it is nothing.
#[inline(always)]
fn turned(bits: i16) -> i16 {
    bits ^ (bits >> 15 & i16::MAX)
}

/// A row of windows from the rows that they cover, with room for the greatest of those; the compiler vectorises the loops by itself.
pub struct PoolRow<'a, K> {
    pub x: &'a [K],
    pub shape: &'a PoolShape,
    pub rows: usize,
    pub greatest: &'a mut [K],
    pub y: &'a mut [K],
}

impl<K: Ordered> Task for PoolRow<'_, K> {
    type Output = ();
    const BF16: bool = false;

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        let PoolRow { x, shape, rows, greatest, y } = self;
        let c = shape.c;
        // First along the columns of a window's rows, whole rows at a time.
        let mut rows = x.chunks_exact(shape.w * c).take(rows);
        let [first, second, third] = three(&mut rows);
        for (((y, a), b), c) in greatest.iter_mut().zip(first).zip(second).zip(third) {
            *y = c.order().greater(b.order().greater(a.order()));
        }
        for row in rows {
            for (y, x) in greatest.iter_mut().zip(row) {
                *y = x.order().greater(*y);
            }
        }
        for (window, y) in y.chunks_exact_mut(c).enumerate() {
            let mut covered = shape.covered(window, shape.w).map(|ix| &greatest[ix * c..][..c]);
            let [first, second, third] = three(&mut covered);
            for (((y, a), b), c) in y.iter_mut().zip(first).zip(second).zip(third) {
                *y = c.greater(b.greater(*a));
            }
            for pixel in covered {
                for (y, x) in y.iter_mut().zip(pixel) {
                    *y = x.greater(*y);
                }
            }
        }
        y.iter_mut().for_each(|y| *y = y.value());
    }
}

/// A row of windows as [`super::signed_max_pool`] has it, from the rows that they cover, the first of which `x` begins with.
pub struct PoolRowWithPlaces<'a, K> {
    pub x: &'a [K],
    /// One a channel.
    pub signs: &'a [K],
    pub shape: &'a PoolShape,
    pub row: usize,
    pub y: &'a mut [K],
    pub places: &'a mut [u8],
}

impl<'a, K: Ordered> Task for PoolRowWithPlaces<'a, K> {
    type Output = ();
    const BF16: bool = false;

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        let PoolRowWithPlaces { x, signs, shape, row, y, places } = self;
        let (c, kernel) = (shape.c, shape.kernel);
        let rows = || shape.covered_places(row, shape.h).map(|(ky, _)| ky).zip(x.chunks_exact(shape.w * c));
        let of_rows = three(&mut rows());
        // Windows of up to three by three at once, as far as there are enough channels.
        let at_once = if kernel <= 3 { c / CHANNELS * CHANNELS } else { 0 };
        for (window, (y, places)) in y.chunks_exact_mut(c).zip(places.chunks_exact_mut(c)).enumerate() {
            let columns = || shape.covered_places(window, shape.w);
            let pixel = |(ky, row): (usize, &'a [K]), (kx, ix)| Pixel {
                place: K::of_place((ky * kernel + kx) as u8),
                x: &row[ix * c..(ix + 1) * c],
            };
            if at_once > 0 {
                let columns = three(&mut columns());
                let mut pixels = [pixel(of_rows[0], columns[0]); 9];
                for (i, of_all) in pixels.iter_mut().enumerate() {
                    *of_all = pixel(of_rows[i / 3], columns[i % 3]);
                }
                let (y, places) = (y.chunks_exact_mut(CHANNELS), places.chunks_exact_mut(CHANNELS));
                for (i, (y, places)) in y.zip(places).enumerate() {
                    take_greatest(&pixels, i * CHANNELS, signs, y, places);
                }
            }
            if at_once == c {
                continue;
            }
            let (signs, y, places) = (&signs[at_once..], &mut y[at_once..], &mut places[at_once..]);
            for (i, (row, column)) in rows().flat_map(|row| columns().map(move |column| (row, column))).enumerate() {
                let Pixel { place, x } = pixel(row, column);
                take_greater(i == 0, place, &x[at_once..], signs, y, places);
            }
            y.iter_mut().for_each(|y| *y = y.value());
        }
    }
}

/// The channels of a pixel and its place in a window.
#[derive(Clone, Copy)]
struct Pixel<'a, K> {
    place: K,
    x: &'a [K],
}

/// Channels whose windows are pooled at once.
const CHANNELS: usize = 32;

/// The greatest orders of three by three pixels and their places, of equals the first, for some channels.
#[inline(always)]
fn take_greatest<K: Ordered>(pixels: &[Pixel<K>; 9], channel: usize, signs: &[K], y: &mut [K], places: &mut [u8]) {
    // Names, and arrays of a constant length of which those that are written are this function's: else the compiler does not vectorise the loop.
    fn some<K>(x: &[K], channel: usize) -> &[K; CHANNELS] {
        x[channel..][..CHANNELS].try_into().expect("as long")
    }
    let signs = some(signs, channel);
    macro_rules! name {
        ($($name:ident $i:literal)*) => { $(let $name = (pixels[$i].place, some(pixels[$i].x, channel));)* };
    }
    name!(first 0 second 1 third 2 fourth 3 fifth 4 sixth 5 seventh 6 eighth 7 ninth 8);
    let (mut greatest, mut found) = ([first.0; CHANNELS], [first.0; CHANNELS]);
    for i in 0..CHANNELS {
        let mut of_all = (first.1[i].order_of(signs[i]), first.0);
        macro_rules! take_later {
            ($($pixel:ident)*) => { $(of_all = later(of_all, ($pixel.1[i].order_of(signs[i]), $pixel.0));)* };
        }
        take_later!(second third fourth fifth sixth seventh eighth ninth);
        (greatest[i], found[i]) = of_all;
    }
    y.iter_mut().zip(greatest).for_each(|(y, greatest)| *y = greatest.value());
    places.iter_mut().zip(found).for_each(|(place, found)| *place = found.place());
}

/// The orders of a pixel and its place: the first's, or where they exceed those that there are.
#[inline(always)]
fn take_greater<K: Ordered>(first: bool, place: K, x: &[K], signs: &[K], y: &mut [K], places: &mut [u8]) {
    for (((y, place_of_y), &x), &sign) in y.iter_mut().zip(places).zip(x).zip(signs) {
        let of_pixel = (x.order_of(sign), place);
        let greatest = if first { of_pixel } else { later((*y, K::of_place(*place_of_y)), of_pixel) };
        (*y, *place_of_y) = (greatest.0, greatest.1.place());
    }
}

/// Of two orders and their places the second, if it exceeds the first.
#[inline(always)]
fn later<K: Ordered>(first: (K, K), second: (K, K)) -> (K, K) {
    let is = second.0.exceeds(first.0);
    (if is { second.0 } else { first.0 }, if is { second.1 } else { first.1 })
}
