//! Recycled, cache-line-aligned memory.
//!
//! A training step asks for the same sizes again and again. Blocks that are dropped go to a free list and are handed out
//! again, so that after the first step nothing is allocated and no page is touched for the first time. Memory from the
//! pool is initialised but holds whatever its last user left: kernels write every element of their output.

use bytemuck::{Pod, Zeroable};
use std::collections::BTreeMap;
use std::sync::Mutex;

/// A cache line, the unit of allocation: its alignment keeps 64-byte vector loads from straddling two lines.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// A request is served by a free block of up to this many times its size, so that a smaller last batch reuses the blocks
/// of the full ones; anything larger would be wasted on it.
const MAX_WASTE: usize = 4;

/// Free blocks by size in lines.
static FREE: Mutex<BTreeMap<usize, Vec<Vec<Line>>>> = Mutex::new(BTreeMap::new());

/// A block of memory that returns to the pool when dropped.
pub struct Block(Vec<Line>);

impl Block {
    /// At least `bytes` bytes of unspecified content, aligned to 64.
    pub fn take(bytes: usize) -> Block {
        let lines = bytes.div_ceil(size_of::<Line>());
        let mut free = FREE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let size = free.range(lines..=lines.saturating_mul(MAX_WASTE)).next().map(|(&size, _)| size);
        let recycled = size.and_then(|size| {
            let blocks = free.get_mut(&size)?;
            let block = blocks.pop();
            if blocks.is_empty() {
                free.remove(&size);
            }
            block
        });
        drop(free);
        Block(recycled.unwrap_or_else(|| bytemuck::allocation::zeroed_vec(lines)))
    }

    /// The first `len` elements.
    pub fn as_slice<T: Pod>(&self, len: usize) -> &[T] {
        &bytemuck::cast_slice(&self.0)[..len]
    }

    /// The first `len` elements, to write to.
    pub fn as_mut_slice<T: Pod>(&mut self, len: usize) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(&mut self.0)[..len]
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.0);
        if !lines.is_empty() {
            let mut free = FREE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            free.entry(lines.len()).or_default().push(lines);
        }
    }
}

/// Gives every free block back to the operating system: call it between phases whose sizes differ.
pub fn release_unused() {
    let blocks = std::mem::take(&mut *FREE.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
    drop(blocks);
}

/// Scratch memory for kernels: `len` elements of unspecified content.
pub struct Scratch<T> {
    block: Block,
    len: usize,
    element: std::marker::PhantomData<T>,
}

impl<T: Pod> Scratch<T> {
    /// `len` elements of unspecified content.
    pub fn take(len: usize) -> Self {
        Scratch { block: Block::take(len * size_of::<T>()), len, element: std::marker::PhantomData }
    }
}

impl<T: Pod> std::ops::Deref for Scratch<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        self.block.as_slice(self.len)
    }
}

impl<T: Pod> std::ops::DerefMut for Scratch<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        self.block.as_mut_slice(self.len)
    }
}
