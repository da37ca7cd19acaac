//! Recycled, cache-line-aligned memory.
//!
//! A training step asks for the same sizes again and again. Blocks that are dropped go to a free list and are handed out
//! again, so that after the first step nothing is allocated and no page is touched for the first time. Memory from the
//! pool is initialised but holds whatever its last user left: kernels write every element of their output. Where the system has
//! no more of it, a panic carries [`Error::OutOfMemory`], which [`or_out_of_memory`] turns into an error.

use crate::error::{Error, Result};
use bytemuck::{Pod, Zeroable};
use memmap2::MmapMut;
use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::{Mutex, MutexGuard};

/// A cache line, the unit of allocation: its alignment keeps 64-byte vector loads from straddling two lines.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// A request is served by a free block of up to this many times its size, so that a smaller last batch reuses the blocks
/// of the full ones; anything larger would be wasted on it.
const MAX_WASTE: usize = 4;

/// What is at least so large is asked for in huge pages: each is touched for the first time once instead of 512 times, and
/// takes one entry of the translation buffers.
const HUGE_PAGE: usize = 2 << 20;

/// Memory of the operating system.
enum Memory {
    /// From the allocator.
    Lines(Vec<Line>),
    /// Pages of its own.
    Pages(MmapMut),
}

impl Memory {
    fn zeroed(lines: usize) -> Memory {
        let bytes = lines * size_of::<Line>();
        if bytes >= HUGE_PAGE
            && let Ok(pages) = MmapMut::map_anon(bytes)
        {
            // Where the system has none, pages of the usual size do.
            #[cfg(target_os = "linux")]
            pages.advise(memmap2::Advice::HugePage).ok();
            return Memory::Pages(pages);
        }
        match bytemuck::allocation::try_zeroed_vec(lines) {
            Ok(lines) => Memory::Lines(lines),
            // Every operation asks for memory, and none could go on without.
            Err(()) => std::panic::resume_unwind(Box::new(Error::OutOfMemory { needed: bytes })),
        }
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Memory::Lines(lines) => bytemuck::cast_slice(lines),
            Memory::Pages(pages) => pages,
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Memory::Lines(lines) => bytemuck::cast_slice_mut(lines),
            Memory::Pages(pages) => pages,
        }
    }
}

/// Free blocks by size in bytes.
type Free = BTreeMap<usize, Vec<Memory>>;

/// Free blocks of every thread that computes, after those of all other threads. A thread takes what it has itself let go if it can: that
/// is still in its caches, whereas lines that another core has written last must first be brought from there.
static FREE: Mutex<Vec<Free>> = Mutex::new(Vec::new());

/// Which of the lists is this thread's.
fn own_list() -> usize {
    rayon::current_thread_index().map_or(0, |index| index + 1)
}

fn free_blocks() -> MutexGuard<'static, Vec<Free>> {
    FREE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The smallest block of `sizes`, of those let go last.
fn pop(free: &mut Free, sizes: RangeInclusive<usize>) -> Option<Memory> {
    let (&size, blocks) = free.range_mut(sizes).next()?;
    let block = blocks.pop();
    if blocks.is_empty() {
        free.remove(&size);
    }
    block
}

/// A block of memory that returns to the pool when dropped.
pub struct Block(Memory);

impl Block {
    /// At least `bytes` bytes of unspecified content, aligned to 64.
    pub fn take(bytes: usize) -> Block {
        let lines = bytes.div_ceil(size_of::<Line>());
        let least = lines.saturating_mul(size_of::<Line>());
        let sizes = least..=least.saturating_mul(MAX_WASTE);
        let (own, mut free) = (own_list(), free_blocks());
        let recycled = free.get_mut(own).and_then(|free| pop(free, sizes.clone()));
        let recycled = recycled.or_else(|| {
            let smallest = |free: &&mut Free| free.range(sizes.clone()).next().map_or(usize::MAX, |(&size, _)| size);
            pop(free.iter_mut().min_by_key(smallest)?, sizes.clone())
        });
        drop(free);
        Block(recycled.unwrap_or_else(|| Memory::zeroed(lines)))
    }

    /// The first `len` elements.
    pub fn as_slice<T: Pod>(&self, len: usize) -> &[T] {
        &bytemuck::cast_slice(self.0.bytes())[..len]
    }

    /// The first `len` elements, to write to.
    pub fn as_mut_slice<T: Pod>(&mut self, len: usize) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(self.0.bytes_mut())[..len]
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let memory = std::mem::replace(&mut self.0, Memory::Lines(Vec::new()));
        let size = memory.bytes().len();
        if size > 0 {
            let (own, mut free) = (own_list(), free_blocks());
            if free.len() <= own {
                free.resize_with(own + 1, Free::new);
            }
            free[own].entry(size).or_default().push(memory);
        }
    }
}

/// What `body` returns, or the error if the system had no memory for its tensors.
pub fn or_out_of_memory<R>(body: impl FnOnce() -> Result<R>) -> Result<R> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).unwrap_or_else(|payload| {
        match payload.downcast::<Error>() {
            Ok(error) => Err(*error),
            Err(payload) => std::panic::resume_unwind(payload),
        }
    })
}

/// Gives every free block back to the operating system: call it between phases whose sizes differ.
pub fn release_unused() {
    let blocks = std::mem::take(&mut *free_blocks());
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
