//! Which outputs are computed at a time.
//!
//! A block is two tiles of 16 positions. Tiles follow one another through a plane, positions between its rows included. Of pictures in turn
//! they begin with each row, and a tap that both of a block's see nothing but padding through is left out.

use super::HALF;
use super::amx::{STEP, TILE};
use super::planes::{Arrangement, NONE, Part};

/// The outputs of a part, two tiles at a time.
pub(super) struct Blocks {
    /// First position of either tile, and which of `steps` the block takes.
    pub tiles: Vec<([usize; 2], usize)>,
    /// The row of the target of each of a block's rows, [`NONE`] where it is no output.
    pub targets: Vec<usize>,
    /// Steps of the depth: where the left side of each begins for the first position, and which it is.
    pub steps: Vec<Vec<(usize, usize)>>,
}

/// Positions one after the other, as many as a tile has rows or the depth of a step has values, of which those up to `end` count.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub start: usize,
    end: usize,
    /// The taps they see something through, as bits.
    taps: u64,
}

impl Tile {
    /// Whether a tap sees something.
    pub fn sees(&self, tap: usize) -> bool {
        sees(self.taps, tap)
    }

    /// The targets of its `len` positions.
    pub fn targets(&self, of_positions: &[usize], len: usize) -> impl Iterator<Item = usize> {
        let there = of_positions[self.start..of_positions.len().min(self.end)].iter().copied();
        there.chain(std::iter::repeat(NONE)).take(len)
    }
}

/// Whether a tap is among these, as are all for which there is no bit.
fn sees(taps: u64, tap: usize) -> bool {
    tap >= u64::BITS as usize || taps >> tap & 1 == 1
}

impl Blocks {
    /// Of a part whose targets begin after `before`.
    pub fn new(arrangement: &Arrangement, part: &Part, before: usize) -> Self {
        let pairs = pairs(arrangement, part);
        let of_target = arrangement.targets(part, before);
        let offsets = arrangement.offsets(part);
        let mut sets: Vec<u64> = Vec::new();
        let tiles = pairs.iter().map(|pair| {
            let taps = pair[0].taps | pair[1].taps;
            let set = sets.iter().position(|&set| set == taps).unwrap_or_else(|| {
                sets.push(taps);
                sets.len() - 1
            });
            (pair.map(|tile| tile.start), set)
        });
        let tiles = tiles.collect();
        let steps_of = |&set: &u64| {
            let kept = offsets.iter().enumerate().filter(|(_, (tap, _))| sees(set, *tap));
            kept.map(|(step, (_, offset))| (*offset, step)).collect()
        };
        let steps = sets.iter().map(steps_of).collect();
        let targets = match part.in_turn {
            true => pairs.iter().flatten().flat_map(|tile| tile.targets(&of_target, HALF)).collect(),
            // Tiles follow one another as positions do.
            false => of_target,
        };
        Blocks { tiles, targets, steps }
    }
}

/// Two tiles at a time, those of pictures in turn by what they see.
fn pairs(arrangement: &Arrangement, part: &Part) -> Vec<[Tile; 2]> {
    if part.in_turn {
        return paired(tiles(arrangement, part, HALF, true));
    }
    through(arrangement, part, TILE).map(|tile| [tile, Tile { start: tile.start + HALF, ..tile }]).collect()
}

/// Positions that hold outputs, a step's depth at a time and beginning at even ones.
pub(super) fn depth(arrangement: &Arrangement, part: &Part) -> Vec<Tile> {
    if !part.in_turn {
        return through(arrangement, part, STEP).collect();
    }
    let by_row = tiles(arrangement, part, STEP, true);
    let through = tiles(arrangement, part, STEP, false);
    let cost = |tiles: &[Tile]| tiles.iter().map(|tile| tile.taps.count_ones()).sum::<u32>();
    if arrangement.row_len(part).is_multiple_of(2) && cost(&by_row) < cost(&through) { by_row } else { through }
}

/// Positions one after the other.
fn through(arrangement: &Arrangement, part: &Part, len: usize) -> impl Iterator<Item = Tile> {
    (0..arrangement.positions(part)).step_by(len).map(move |start| Tile { start, end: start + len, taps: u64::MAX })
}

/// Tiles of `len` positions that hold outputs, through a plane or from the beginning of each of its rows.
fn tiles(arrangement: &Arrangement, part: &Part, len: usize, by_row: bool) -> Vec<Tile> {
    let [rows, columns] = arrangement.seen();
    let mut tiles: Vec<Tile> = Vec::new();
    let (starts, row_len) = arrangement.rows_of_outputs(part);
    for (first, row) in starts {
        let mut at = first;
        while at < first + row_len {
            let start = if by_row { at } else { at / len * len };
            let end = (first + row_len).min(start + len);
            let within = (at - first) / part.together()..(end - first).div_ceil(part.together());
            let taps = columns[within].iter().fold(0, |taps, column| taps | column) & rows[row];
            match tiles.last_mut() {
                Some(last) if last.start == start => (last.taps, last.end) = (last.taps | taps, end),
                _ => tiles.push(Tile { start, end, taps }),
            }
            at = start + len;
        }
    }
    tiles
}

/// Tiles two by two: of those that see through the same taps first, then what is left over by how little either adds.
fn paired(mut tiles: Vec<Tile>) -> Vec<[Tile; 2]> {
    tiles.sort_by_key(|tile| std::cmp::Reverse(tile.taps.count_ones()));
    let mut pairs = Vec::with_capacity(tiles.len().div_ceil(2));
    let mut left: Vec<Tile> = Vec::new();
    for tile in tiles {
        match left.iter().rposition(|other| other.taps == tile.taps) {
            Some(other) => pairs.push([left.remove(other), tile]),
            None => left.push(tile),
        }
    }
    while let Some(tile) = left.pop() {
        let added = |other: &Tile| (other.taps | tile.taps).count_ones();
        let nearest = (0..left.len()).min_by_key(|&i| added(&left[i]));
        // A tile alone is computed twice, and once of no use.
        pairs.push(nearest.map_or([tile, Tile { end: tile.start, ..tile }], |i| [tile, left.remove(i)]));
    }
    pairs
}
