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

/// A row of windows as [`super::signed_max_pool`] has it, from the rows that they cover, the first of which `x` begins with; with room for the
/// greatest of those and their places.
pub struct PoolRowWithPlaces<'a, K> {
    pub x: &'a [K],
    pub signs: &'a [K],
    pub shape: &'a PoolShape,
    pub row: usize,
    pub rows: (&'a mut [K], &'a mut [K]),
    pub y: &'a mut [K],
    pub places: &'a mut [u8],
}

impl<K: Ordered> Task for PoolRowWithPlaces<'_, K> {
    type Output = ();
    const BF16: bool = false;

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        let PoolRowWithPlaces { x, signs, shape, row, rows: (greatest, found), y, places } = self;
        let (c, len) = (shape.c, shape.w * shape.c);
        let (signs, greatest, found) = (&signs[..len], &mut greatest[..len], &mut found[..len]);
        // First along the columns of a window's rows, whole rows at a time.
        let of_row = |ky: usize| K::of_place((ky * shape.kernel) as u8);
        let mut rows =
            shape.covered_places(row, shape.h).zip(x.chunks_exact(len)).map(|((ky, _), x)| (of_row(ky), &x[..len]));
        let [first, second, third] = three(&mut rows);
        for i in 0..len {
            let greater = later(order_at(first, signs, i), order_at(second, signs, i));
            (greatest[i], found[i]) = later(greater, order_at(third, signs, i));
        }
        for row in rows {
            for i in 0..len {
                (greatest[i], found[i]) = later((greatest[i], found[i]), order_at(row, signs, i));
            }
        }
        for (window, (y, places)) in y.chunks_exact_mut(c).zip(places.chunks_exact_mut(c)).enumerate() {
            let mut columns = shape.covered_places(window, shape.w).map(|(kx, ix)| {
                let pixel = ix * c..(ix + 1) * c;
                (kx as u8, &greatest[pixel.clone()], &found[pixel])
            });
            let [first, second, third] = three(&mut columns);
            for i in 0..c {
                let greatest = first_of_greatest(at(first, i), at(second, i));
                (y[i], places[i]) = first_of_greatest(greatest, at(third, i));
            }
            for column in columns {
                for i in 0..c {
                    (y[i], places[i]) = first_of_greatest((y[i], places[i]), at(column, i));
                }
            }
            y.iter_mut().for_each(|y| *y = y.value());
        }
    }
}

/// The order of a value times its sign, and the place that the row begins with.
#[inline(always)]
fn order_at<K: Ordered>((place, x): (K, &[K]), signs: &[K], i: usize) -> (K, K) {
    (x[i].order_of(signs[i]), place)
}

/// A channel's order and place in the window, of a window's column.
#[inline(always)]
fn at<K: Ordered>((kx, x, found): (u8, &[K], &[K]), i: usize) -> (K, u8) {
    (x[i], found[i].place().wrapping_add(kx))
}

/// Of two orders and their places the second, if it exceeds the first.
#[inline(always)]
fn later<K: Ordered, P: Copy>(first: (K, P), second: (K, P)) -> (K, P) {
    let is = second.0.exceeds(first.0);
    (if is { second.0 } else { first.0 }, if is { second.1 } else { first.1 })
}

/// The greater of two orders and its place, of equals the first place.
#[inline(always)]
fn first_of_greatest<K: Ordered>(a: (K, u8), b: (K, u8)) -> (K, u8) {
    let is = b.0.exceeds(a.0) | (!a.0.exceeds(b.0) & (b.1 < a.1));
    (if is { b.0 } else { a.0 }, if is { b.1 } else { a.1 })
}
