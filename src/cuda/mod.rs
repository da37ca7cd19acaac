//! The CUDA backend: kernels of `kernels/*.cu`, compiled for the card at hand, and their launches.
//!
//! Everything goes through one small interface, [`backend::Backend`]: load a module, allocate, copy, launch, capture,
//! synchronise. Two things implement it: the driver (`driver`), and an emulated grid on the CPU (`emulator`, behind the
//! feature of that name), so that the whole backend runs where there is no card.
//!
//! There is one [`Context`] in a process, made when it is first asked for. Nothing of CUDA is touched before [`probe`] has
//! found every library and symbol: what is missing is a typed reason, never a panic.

pub mod backend;
mod cache;
pub mod conv;
mod driver;
pub mod elementwise;
#[cfg(feature = "emulator")]
pub mod emulator;
pub mod engine;
pub mod gemm;
pub mod image;
mod launch;
pub mod loss;
mod memory;
pub mod norm;
mod nvrtc;
pub mod optim;
pub mod peak;
pub mod pool;
mod source;

pub use backend::{Backend, Graph};
pub use launch::{Divider, Kernel};
pub use memory::{Arena, CudaBuffer};
pub use nvrtc::{Compiled, Nvrtc};
pub use source::{UNITS, Unit};

use crate::error::{Error, Result};
use crate::tensor::DType;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock};

/// Names the emulated grid to [`context`] if its value is "emulator" and the feature is built in.
pub const BACKEND_VARIABLE: &str = "HONE_CUDA";

/// Copies to the card that wait for the end of a capture.
type Deferred = Vec<(backend::Address, Vec<u8>)>;

/// A card, or the emulated grid, with what has been loaded and allocated on it.
pub struct Context {
    backend: Box<dyn Backend>,
    memory: memory::Pool,
    kernels: launch::Kernels,
    tf32: AtomicBool,
    /// While a step is captured: copies to the card that have been asked for. They are constants of the step, and done once,
    /// when it is.
    deferred: Mutex<Option<Deferred>>,
}

impl Context {
    /// Copies to the card, or, while a step is captured, notes that it must be done.
    fn upload(&self, target: backend::Address, bytes: &[u8]) -> Result<()> {
        if let Some(deferred) = &mut *self.deferred() {
            deferred.push((target, bytes.to_vec()));
            return Ok(());
        }
        self.backend.upload(target, bytes)
    }

    fn deferred(&self) -> MutexGuard<'_, Option<Deferred>> {
        self.deferred.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Records what `body` launches, to be run by [`Backend::replay`]. Nothing of it is run now, so `body` must not ask for
    /// results; what it returns holds the tensors that replays will write. The arena keeps the memory they use.
    pub fn capture<T>(&self, body: impl FnOnce() -> Result<T>) -> Result<(Graph, Arena, T)> {
        let arena = Arena::begin()?;
        self.backend.begin_capture()?;
        *self.deferred() = Some(Vec::new());
        let result = body();
        let deferred = self.deferred().take().unwrap_or_default();
        let graph = self.backend.end_capture();
        arena.end();
        let (result, graph) = (result?, graph?);
        for (target, bytes) in deferred {
            self.backend.upload(target, &bytes)?;
        }
        Ok((graph, arena, result))
    }

    /// The device.
    pub fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    /// Whether f32 convolutions and products may run as TF32 on tensor cores, with 10 bits of mantissa. Off at first.
    pub fn allow_tf32(&self, allow: bool) {
        self.tf32.store(allow, Ordering::Relaxed);
    }

    /// Whether the engine for this type is the tensor cores.
    fn uses_tensor_cores(&self, dtype: DType) -> bool {
        let capable = self.backend.architecture().0 >= 8;
        capable && (dtype == DType::BF16 || self.tf32.load(Ordering::Relaxed))
    }

    /// Waits for everything that has been launched.
    pub fn synchronize(&self) -> Result<()> {
        self.backend.synchronize()
    }

    /// Bytes that tensors hold now.
    pub fn bytes_in_use(&self) -> usize {
        self.memory.in_use()
    }

    /// How often memory has been asked of the device; a step after the first must not raise it.
    pub fn allocations(&self) -> usize {
        self.memory.allocations()
    }

    /// Gives every free block back to the device.
    pub fn release_unused(&self) {
        self.memory.release_unused(&*self.backend);
    }
}

/// The context, or why there is none.
pub fn context() -> Result<&'static Context> {
    static CONTEXT: OnceLock<Result<Context, String>> = OnceLock::new();
    let made = CONTEXT.get_or_init(|| {
        let backend = open()?;
        Ok(Context {
            backend,
            memory: memory::Pool::default(),
            kernels: launch::Kernels::default(),
            tf32: AtomicBool::new(false),
            deferred: Mutex::default(),
        })
    });
    made.as_ref().map_err(|reason| Error::config(reason.clone(), "give --device cpu"))
}

/// Where compiled kernels are kept.
pub fn cache_folder() -> Option<std::path::PathBuf> {
    cache::folder()
}

/// Whether the machine has a card, be it usable or not.
pub fn card_is_present() -> bool {
    driver::card_is_present()
}

/// Why [`context`] would fail; `None` if it works.
pub fn probe() -> Option<String> {
    context().err().map(|e| match e {
        Error::Config { problem, .. } => problem,
        other => other.to_string(),
    })
}

#[cfg(feature = "emulator")]
static EMULATE: AtomicBool = AtomicBool::new(false);

/// Makes [`context`] the emulated grid; to be called before it is first asked for.
#[cfg(feature = "emulator")]
pub fn emulate() {
    EMULATE.store(true, Ordering::Relaxed);
}

fn open() -> Result<Box<dyn Backend>, String> {
    #[cfg(feature = "emulator")]
    if EMULATE.load(Ordering::Relaxed) {
        return Ok(Box::new(emulator::Emulator::new().map_err(|e| e.to_string())?));
    }
    match std::env::var(BACKEND_VARIABLE).as_deref() {
        #[cfg(feature = "emulator")]
        Ok("emulator") => Ok(Box::new(emulator::Emulator::new().map_err(|e| e.to_string())?)),
        #[cfg(not(feature = "emulator"))]
        Ok("emulator") => Err("this build has no emulated grid; build with --features emulator".into()),
        _ => driver::Driver::open().map(|driver| Box::new(driver) as Box<dyn Backend>),
    }
}
