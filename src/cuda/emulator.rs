//! The device that is this machine: kernels compiled by the host's C++ compiler against `kernels/emulator/emulator.h`, where a
//! block's threads are fibers and every access is checked. It is slow and merciless; a wrong access is an error, not a crash.

use super::backend::{Address, Backend, Extents, Function, Graph, Mark};
use super::cache;
use super::source::Unit;
use crate::error::{Error, Result};
use libloading::Library;
use rayon::prelude::*;
use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_void};
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, RwLock};
use std::time::Instant;

const HEADERS: [(&str, &str); 2] = [
    ("emulator.h", include_str!("../../kernels/emulator/emulator.h")),
    ("fiber.h", include_str!("../../kernels/emulator/fiber.h")),
];
/// Optimised, since it is slow enough; without the contraction of `a * b + c` that x86 would otherwise differ in by machine.
const FLAGS: [&str; 8] = ["-std=c++17", "-O2", "-w", "-fPIC", "-shared", "-ffp-contract=off", "-x", "c++"];
const ADDRESS_BITS: u32 = 48;
/// The last tag is that of shared memory.
const MAX_ALLOCATIONS: usize = 0xffff;

/// `emulator::Allocation`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Allocation {
    base: u64,
    bytes: u64,
    written: *mut u8,
}

/// `emulator::Launch`.
#[repr(C)]
struct Launch {
    allocations: *const Allocation,
    allocation_count: u64,
    grid: [u32; 3],
    block: [u32; 3],
    dynamic_shared: u32,
    first: u64,
    last: u64,
    message: *mut c_char,
    message_bytes: u64,
}

type Entry = unsafe extern "C" fn(*const Launch, *const c_void, usize) -> c_int;

/// Memory of an allocation: the data, and a byte for each that says whether it was ever written.
struct Block {
    data: Vec<u128>,
    written: Vec<u8>,
}

#[derive(Default)]
struct Memory {
    /// By tag; tag 0 is null.
    table: Vec<Allocation>,
    blocks: HashMap<u64, Block>,
    free_tags: Vec<u64>,
}

// SAFETY: the pointers are to memory that `blocks` owns.
unsafe impl Send for Memory {}
// SAFETY: as above; launches write through them, one at a time.
unsafe impl Sync for Memory {}

/// What a captured graph consists of.
enum Recorded {
    Launch(Function, Extents, Vec<u8>),
    Copy(Address, Address, usize),
}

/// The emulated grid.
pub struct Emulator {
    libraries: Mutex<HashMap<Unit, Library>>,
    memory: RwLock<Memory>,
    capture: Mutex<Option<Vec<Recorded>>>,
    compiler: String,
    version: String,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn problem(text: impl Into<String>) -> Error {
    Error::Device { problem: text.into() }
}

impl Emulator {
    /// Needs a C++ compiler: `$CXX`, or c++.
    pub fn new() -> Result<Emulator> {
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
        let output = Command::new(&compiler).arg("--version").output();
        let output = output.map_err(|e| problem(format!("the emulated grid needs a C++ compiler, {compiler}: {e}")))?;
        let version = String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_string();
        let memory = Memory {
            table: vec![Allocation { base: 0, bytes: 0, written: std::ptr::null_mut() }],
            ..Memory::default()
        };
        Ok(Emulator {
            libraries: Mutex::default(),
            memory: RwLock::new(memory),
            capture: Mutex::default(),
            compiler,
            version,
        })
    }

    fn compile(&self, source: &str, name: &str) -> Result<Vec<u8>> {
        let folder = tempfile::tempdir().map_err(Error::io("create a folder in", std::env::temp_dir()))?;
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).map_err(Error::io("write", &path)).map(|()| path)
        };
        for (name, text) in HEADERS {
            write(name, text)?;
        }
        let (input, output) = (write(name, source)?, folder.path().join("kernels.so"));
        let header = folder.path().join("emulator.h");
        let run = Command::new(&self.compiler)
            .args(FLAGS)
            .arg("-include")
            .args([&header, &input])
            .arg("-o")
            .arg(&output)
            .output()
            .map_err(|e| problem(format!("{}: {e}", self.compiler)))?;
        if !run.status.success() {
            let errors = String::from_utf8_lossy(&run.stderr);
            let first = errors.lines().find(|line| line.contains("error")).unwrap_or("no message").to_string();
            return Err(problem(format!("{name} does not compile for the emulated grid: {first}")));
        }
        std::fs::read(&output).map_err(Error::io("read", &output))
    }

    fn load(&self, name: &str, source: &str) -> Result<Library> {
        let headers: String = HEADERS.iter().map(|(_, text)| *text).collect();
        let key = cache::key(name, "so", &[source, &headers, &FLAGS.join(" "), &self.version]);
        let image = cache::get_or_make(cache::folder().as_deref(), &key, || self.compile(source, name))?;
        // A library is loaded from a file of its own, so that a cache being rewritten disturbs nobody.
        let file = tempfile::Builder::new().suffix(".so").tempfile().map_err(Error::io("write", Path::new(name)))?;
        std::fs::write(file.path(), &image).map_err(Error::io("write", file.path()))?;
        // SAFETY: the library is what the compiler made of our sources, whole; it has no initialisers.
        unsafe { Library::new(file.path()) }.map_err(|e| problem(format!("{name} does not load: {e}")))
    }

    /// Compiles and launches a kernel of a source that is not one of hone's but may include its headers: for tests of the
    /// emulator itself.
    pub fn launch_source(&self, source: &str, name: &str, extents: Extents, params: &[u8]) -> Result<()> {
        let source = &super::source::expand_includes(source);
        let library = self.load("test.cu", source)?;
        // SAFETY: every kernel's entry has this signature.
        let entry: Entry = *unsafe { library.get(name.as_bytes()) }.map_err(|e| problem(e.to_string()))?;
        self.run(entry, extents, params)
    }

    fn run(&self, entry: Entry, extents: Extents, params: &[u8]) -> Result<()> {
        let memory = self.memory.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        let [x, y, z] = extents.grid.map(u64::from);
        let blocks = x * y * z;
        // A block must be worth the task; which thread runs which block changes nothing.
        let share = blocks.div_ceil(4 * rayon::current_num_threads() as u64).max(1);
        let shares: Vec<u64> = (0..blocks).step_by(share as usize).collect();
        let outcome = shares.into_par_iter().find_map_first(|first| {
            let mut message = vec![0u8; 512];
            let launch = Launch {
                allocations: memory.table.as_ptr(),
                allocation_count: memory.table.len() as u64,
                grid: extents.grid,
                block: [extents.threads, 1, 1],
                dynamic_shared: extents.shared,
                first,
                last: (first + share).min(blocks),
                message: message.as_mut_ptr().cast(),
                message_bytes: message.len() as u64,
            };
            // SAFETY: `launch` and `params` outlive the call; the kernel reaches memory through checked pointers alone,
            // into allocations that the read lock keeps.
            let status = unsafe { entry(&launch, params.as_ptr().cast(), params.len()) };
            (status != 0).then(|| {
                let end = message.iter().position(|&b| b == 0).unwrap_or(message.len());
                String::from_utf8_lossy(&message[..end]).into_owned()
            })
        });
        match outcome {
            None => Ok(()),
            Some(message) => Err(problem(message)),
        }
    }

    /// The memory at an address, if `bytes` of it belong to one buffer.
    fn locate(memory: &Memory, address: Address, bytes: usize) -> Result<(Allocation, usize)> {
        let allocation = memory.table.get((address >> ADDRESS_BITS) as usize).filter(|a| a.base != 0);
        let allocation = *allocation.ok_or_else(|| problem("copy at an address of no buffer"))?;
        let offset = (address & ((1 << ADDRESS_BITS) - 1)).wrapping_sub(allocation.base);
        if offset > allocation.bytes || bytes as u64 > allocation.bytes - offset {
            return Err(problem(format!(
                "copy of {bytes} bytes at {offset} of a buffer of {} bytes",
                allocation.bytes
            )));
        }
        Ok((allocation, offset as usize))
    }

    fn copy_now(&self, target: Address, source: Address, bytes: usize) -> Result<()> {
        let memory = self.memory.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        let (to, to_offset) = Self::locate(&memory, target, bytes)?;
        let (from, from_offset) = Self::locate(&memory, source, bytes)?;
        // SAFETY: `locate` has checked both ranges, and the write lock makes this the only access.
        unsafe {
            let copy = |a: *const u8, b: *mut u8| std::ptr::copy(a.add(from_offset), b.add(to_offset), bytes);
            copy(from.base as *const u8, to.base as *mut u8);
            copy(from.written, to.written);
        }
        Ok(())
    }
}

impl Backend for Emulator {
    fn name(&self) -> &str {
        "emulated grid"
    }

    fn is_emulated(&self) -> bool {
        true
    }

    fn architecture(&self) -> (u32, u32) {
        (8, 0)
    }

    fn versions(&self) -> String {
        self.version.clone()
    }

    fn memory(&self) -> Result<(usize, usize)> {
        let limit = std::env::var("HONE_EMULATOR_MEMORY").ok().and_then(|v| v.parse().ok()).unwrap_or(4usize << 30);
        let memory = self.memory.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        let used: u64 = memory.table.iter().map(|a| a.bytes).sum();
        Ok((limit.saturating_sub(used as usize), limit))
    }

    fn function(&self, unit: Unit, name: &str) -> Result<Function> {
        let mut libraries = lock(&self.libraries);
        if let std::collections::hash_map::Entry::Vacant(e) = libraries.entry(unit) {
            e.insert(self.load(unit.name(), &unit.expand())?);
        }
        // SAFETY: every kernel's entry has this signature, and the library is never unloaded while `self` lives.
        let entry: Entry = *unsafe { libraries[&unit].get(name.as_bytes()) }.map_err(|e| problem(e.to_string()))?;
        Ok(Function(entry as usize))
    }

    fn allocate(&self, bytes: usize) -> Result<Option<Address>> {
        if bytes > self.memory()?.0 {
            return Ok(None);
        }
        let mut memory = self.memory.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        let tag = match memory.free_tags.pop() {
            Some(tag) => tag,
            None if memory.table.len() < MAX_ALLOCATIONS => {
                memory.table.push(Allocation { base: 0, bytes: 0, written: std::ptr::null_mut() });
                memory.table.len() as u64 - 1
            }
            None => return Err(problem("the emulated grid has no more than 65534 allocations")),
        };
        let mut block = Block { data: vec![0; bytes.div_ceil(16).max(1)], written: vec![0; bytes] };
        let base = block.data.as_mut_ptr() as u64;
        memory.table[tag as usize] = Allocation { base, bytes: bytes as u64, written: block.written.as_mut_ptr() };
        memory.blocks.insert(tag, block);
        Ok(Some(tag << ADDRESS_BITS | base))
    }

    fn free(&self, address: Address) {
        let mut memory = self.memory.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        let tag = address >> ADDRESS_BITS;
        memory.table[tag as usize] = Allocation { base: 0, bytes: 0, written: std::ptr::null_mut() };
        memory.blocks.remove(&tag);
        memory.free_tags.push(tag);
    }

    fn forget(&self, address: Address, bytes: usize) {
        let memory = self.memory.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Ok((allocation, offset)) = Self::locate(&memory, address, bytes) {
            // SAFETY: `locate` has checked the range; the write lock makes this the only access.
            unsafe { std::ptr::write_bytes(allocation.written.add(offset), 0, bytes) };
        }
    }

    fn upload(&self, target: Address, bytes: &[u8]) -> Result<()> {
        if lock(&self.capture).is_some() {
            return Err(problem("a copy from the host cannot be captured"));
        }
        let memory = self.memory.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        let (allocation, offset) = Self::locate(&memory, target, bytes.len())?;
        // SAFETY: `locate` has checked the range; the write lock makes this the only access.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), (allocation.base as *mut u8).add(offset), bytes.len());
            std::ptr::write_bytes(allocation.written.add(offset), 1, bytes.len());
        }
        Ok(())
    }

    fn download(&self, source: Address, bytes: &mut [u8]) -> Result<()> {
        if lock(&self.capture).is_some() {
            return Err(problem("a copy to the host cannot be captured"));
        }
        let memory = self.memory.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        let (allocation, offset) = Self::locate(&memory, source, bytes.len())?;
        // SAFETY: `locate` has checked the range.
        let written = unsafe { std::slice::from_raw_parts(allocation.written.add(offset), bytes.len()) };
        if let Some(at) = written.iter().position(|&w| w == 0) {
            return Err(problem(format!("copy to the host of byte {at}, which nothing was written to")));
        }
        // SAFETY: `locate` has checked the range.
        unsafe {
            std::ptr::copy_nonoverlapping((allocation.base as *const u8).add(offset), bytes.as_mut_ptr(), bytes.len())
        };
        Ok(())
    }

    fn copy(&self, target: Address, source: Address, bytes: usize) -> Result<()> {
        if let Some(recorded) = &mut *lock(&self.capture) {
            recorded.push(Recorded::Copy(target, source, bytes));
            return Ok(());
        }
        self.copy_now(target, source, bytes)
    }

    fn launch(&self, function: Function, extents: Extents, params: &[u8]) -> Result<()> {
        if let Some(recorded) = &mut *lock(&self.capture) {
            recorded.push(Recorded::Launch(function, extents, params.to_vec()));
            return Ok(());
        }
        // SAFETY: the address was made from an `Entry` by `function`.
        let entry = unsafe { std::mem::transmute::<usize, Entry>(function.0) };
        self.run(entry, extents, params)
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn begin_capture(&self) -> Result<()> {
        *lock(&self.capture) = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&self) -> Result<Graph> {
        Ok(Graph(Box::new(lock(&self.capture).take().unwrap_or_default())))
    }

    fn replay(&self, graph: &Graph) -> Result<()> {
        let Some(recorded) = graph.0.downcast_ref::<Vec<Recorded>>() else { unreachable!("a graph of this backend") };
        recorded.iter().try_for_each(|step| match step {
            Recorded::Launch(function, extents, params) => self.launch(*function, *extents, params),
            Recorded::Copy(target, source, bytes) => self.copy_now(*target, *source, *bytes),
        })
    }

    fn mark(&self) -> Result<Mark> {
        Ok(Mark(Box::new(Instant::now())))
    }

    fn seconds_between(&self, start: &Mark, end: &Mark) -> Result<f64> {
        match (start.0.downcast_ref::<Instant>(), end.0.downcast_ref::<Instant>()) {
            (Some(start), Some(end)) => Ok(end.duration_since(*start).as_secs_f64()),
            _ => unreachable!("marks of this backend"),
        }
    }
}
