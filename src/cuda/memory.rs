//! Device memory, recycled as on the CPU: a step after the first asks the device for none.
//!
//! All work is on one stream, so a block may be handed out as soon as the host has dropped it: whatever uses it next comes
//! after what used it last. A captured graph is the exception, since it uses its blocks again in every replay: what is
//! taken between [`Arena::begin`] and [`Arena::end`] returns to the arena, not to everybody.

use super::backend::{Address, Backend};
use super::{Context, context};
use crate::error::{Error, Result};
use crate::tensor::{DType, Element};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

/// Sizes are multiples of this, which also aligns every block for the widest access.
const GRANULE: usize = 512;
/// A request is served by a free block of up to this many times its size.
const MAX_WASTE: usize = 2;

#[derive(Default)]
struct Free {
    blocks: BTreeMap<usize, Vec<Address>>,
    /// Blocks that hold a graph's constants: not handed out while the graph lives.
    constants: Vec<(Address, usize)>,
    /// Of an arena: whether its graph is gone, so that what comes back belongs to everybody.
    closed: bool,
}

impl Free {
    fn take(&mut self, bytes: usize) -> Option<(Address, usize)> {
        let size = *self.blocks.range(bytes..=bytes.saturating_mul(MAX_WASTE)).next()?.0;
        let list = self.blocks.get_mut(&size)?;
        let address = list.pop()?;
        if list.is_empty() {
            self.blocks.remove(&size);
        }
        Some((address, size))
    }

    fn put(&mut self, address: Address, size: usize) {
        self.blocks.entry(size).or_default().push(address);
    }
}

#[derive(Default)]
struct State {
    free: Free,
    /// Where blocks are taken from and return to while a graph is captured.
    arena: Option<Arc<Mutex<Free>>>,
    in_use: usize,
    allocations: usize,
}

/// The free blocks of a device.
#[derive(Default)]
pub(super) struct Pool(Mutex<State>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Pool {
    /// `constant`: what is put there now, before a graph's first replay, must outlast what the graph did before it was asked
    /// for; no block that the graph has used already will do.
    fn take(&self, backend: &dyn Backend, bytes: usize, constant: bool) -> Result<Block> {
        let size = bytes.max(1).div_ceil(GRANULE) * GRANULE;
        let mut state = lock(&self.0);
        let arena = state.arena.clone();
        // What everybody has left behind becomes the arena's, so that capturing a step that has run asks for nothing.
        let own = arena.as_ref().filter(|_| !constant).and_then(|arena| lock(arena).take(size));
        let recycled = own.or_else(|| state.free.take(size));
        let (address, size) = match recycled {
            Some(found) => found,
            None => {
                state.allocations += 1;
                (Self::allocate(&mut state, backend, size)?, size)
            }
        };
        state.in_use += size;
        backend.forget(address, size);
        Ok(Block { address, size, arena, constant })
    }

    fn allocate(state: &mut State, backend: &dyn Backend, size: usize) -> Result<Address> {
        if let Some(address) = backend.allocate(size)? {
            return Ok(address);
        }
        // Blocks of other sizes may be all that is in the way.
        Self::release(state, backend);
        match backend.allocate(size)? {
            Some(address) => Ok(address),
            None => Err(Error::Memory { needed: size, free: backend.memory()?.0, in_use: state.in_use, batch: None }),
        }
    }

    fn release(state: &mut State, backend: &dyn Backend) {
        for address in std::mem::take(&mut state.free.blocks).into_values().flatten() {
            backend.free(address);
        }
    }

    pub fn release_unused(&self, backend: &dyn Backend) {
        Self::release(&mut lock(&self.0), backend);
    }

    pub fn in_use(&self) -> usize {
        lock(&self.0).in_use
    }

    pub fn allocations(&self) -> usize {
        lock(&self.0).allocations
    }
}

struct Block {
    address: Address,
    size: usize,
    arena: Option<Arc<Mutex<Free>>>,
    /// Whether a graph's replays read what was put there while it was captured.
    constant: bool,
}

impl Drop for Block {
    fn drop(&mut self) {
        let Ok(context) = context() else { return };
        let mut state = lock(&context.memory.0);
        state.in_use -= self.size;
        match &self.arena {
            Some(arena) if lock(arena).closed => state.free.put(self.address, self.size),
            Some(arena) if self.constant => {
                lock(arena).constants.push((self.address, self.size));
            }
            Some(arena) => lock(arena).put(self.address, self.size),
            None => state.free.put(self.address, self.size),
        }
    }
}

/// The blocks that a captured graph uses. Dropping it gives them to everybody.
pub struct Arena(Arc<Mutex<Free>>);

impl Arena {
    /// From here on blocks come from a new arena and return to it.
    pub fn begin() -> Result<Arena> {
        let arena = Arc::new(Mutex::new(Free::default()));
        lock(&context()?.memory.0).arena = Some(arena.clone());
        Ok(Arena(arena))
    }

    /// Ends what [`Arena::begin`] began; the blocks stay reserved for as long as this value lives.
    pub fn end(&self) {
        if let Ok(context) = context() {
            lock(&context.memory.0).arena = None;
        }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        let Ok(context) = context() else { return };
        let mut state = lock(&context.memory.0);
        if state.arena.as_ref().is_some_and(|active| Arc::ptr_eq(active, &self.0)) {
            state.arena = None;
        }
        let closed = Free { closed: true, ..Free::default() };
        let Free { blocks, constants, .. } = std::mem::replace(&mut *lock(&self.0), closed);
        for (size, list) in blocks {
            list.into_iter().for_each(|address| state.free.put(address, size));
        }
        constants.into_iter().for_each(|(address, size)| state.free.put(address, size));
    }
}

/// A typed, contiguous buffer on the device.
pub struct CudaBuffer {
    block: Block,
    dtype: DType,
    len: usize,
}

impl CudaBuffer {
    /// `len` elements of unspecified content, for a kernel to fill.
    pub fn take(dtype: DType, len: usize) -> Result<Self> {
        Self::take_for(dtype, len, false)
    }

    fn take_for(dtype: DType, len: usize, constant: bool) -> Result<Self> {
        let context = context()?;
        let bytes = len.checked_mul(dtype.size()).unwrap_or(usize::MAX - GRANULE);
        Ok(CudaBuffer { block: context.memory.take(&*context.backend, bytes, constant)?, dtype, len })
    }

    /// A copy of `values`.
    pub fn from_slice<T: Element>(values: &[T]) -> Result<Self> {
        let buffer = Self::take_for(T::DTYPE, values.len(), true)?;
        buffer.upload(values)?;
        Ok(buffer)
    }

    /// Replaces the elements by `values`, as many.
    pub fn upload<T: Element>(&self, values: &[T]) -> Result<()> {
        assert_eq!((T::DTYPE, values.len()), (self.dtype, self.len), "type and length of a buffer");
        self.context().upload(self.block.address, bytemuck::cast_slice(values))
    }

    /// A copy of the elements. Waits for the device.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        assert_eq!(T::DTYPE, self.dtype, "element type of a buffer");
        let mut values = vec![T::zeroed(); self.len];
        self.context().backend.download(self.block.address, bytemuck::cast_slice_mut(&mut values))?;
        Ok(values)
    }

    /// Another buffer with the same elements.
    pub fn duplicate(&self) -> Result<Self> {
        let copy = Self::take(self.dtype, self.len)?;
        copy.copy_from(self)?;
        Ok(copy)
    }

    /// A copy of `len` elements from `start` on.
    pub fn part(&self, start: usize, len: usize) -> Result<Self> {
        assert!(start + len <= self.len, "a part lies inside its buffer");
        let (size, part) = (self.dtype.size(), Self::take(self.dtype, len)?);
        let source = self.block.address + (start * size) as u64;
        self.context().backend.copy(part.block.address, source, len * size)?;
        Ok(part)
    }

    /// Overwrites the elements with those of `source`, of the same type and length.
    pub fn copy_from(&self, source: &CudaBuffer) -> Result<()> {
        assert_eq!((source.dtype, source.len), (self.dtype, self.len), "type and length of a buffer");
        self.context().backend.copy(self.block.address, source.block.address, self.len * self.dtype.size())
    }

    /// Where it lies on the device.
    pub fn address(&self) -> Address {
        self.block.address
    }

    /// The type of its elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn context(&self) -> &'static Context {
        context().expect("a buffer was made in it")
    }
}
