//! The device that is a card: the CUDA driver through cudarc.
//!
//! cudarc panics where a library or a symbol is missing, so [`Driver::open`] looks for all of them first.

use super::backend::{Address, Backend, Extents, Function, Graph, Mark};
use super::cache;
use super::nvrtc::Nvrtc;
use super::source::Unit;
use crate::error::{Error, Result};
use cudarc::driver::{result, sys};
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Mutex, MutexGuard};

/// Every function of the driver that is called here, by the name cudarc loads.
const SYMBOLS: [&str; 37] = [
    "cuInit",
    "cuDriverGetVersion",
    "cuDeviceGet",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDeviceGetAttribute",
    "cuDevicePrimaryCtxRetain",
    "cuCtxSetCurrent",
    "cuCtxGetCurrent",
    "cuStreamCreate",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuStreamBeginCapture_v2",
    "cuStreamEndCapture",
    "cuGraphInstantiateWithFlags",
    "cuGraphExecDestroy",
    "cuGraphDestroy",
    "cuGraphLaunch",
    "cuMemGetInfo_v2",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuModuleLoadData",
    "cuModuleGetFunction",
    "cuFuncSetAttribute",
    "cuLaunchKernel",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuEventElapsedTime",
    "cuEventDestroy_v2",
    "cuGetErrorName",
    "cuGetErrorString",
];

/// Copies to the card go through pairs of blocks of this size, one page-locked, one on the card, in turn: the way there has
/// a stream of its own, so that the next batch travels while this one is computed, and only the copy from the block on the
/// card to its place waits for that.
const STAGING_BYTES: usize = 8 << 20;
const STAGING_BLOCKS: usize = 16;

/// A card.
pub struct Driver {
    name: String,
    architecture: (u32, u32),
    version: i32,
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// On which data comes to the card.
    arrivals: sys::CUstream,
    compiler: Result<Nvrtc, String>,
    modules: Mutex<HashMap<Unit, usize>>,
    staging: Mutex<Staging>,
}

// SAFETY: the driver's handles may be used from any thread; `current` makes the context that of the calling one, and what
// is changed on the host side lies behind mutexes.
unsafe impl Send for Driver {}
// SAFETY: as above.
unsafe impl Sync for Driver {}

/// The ring of blocks on the way to the card.
#[derive(Default)]
struct Staging {
    blocks: Vec<StagingBlock>,
    next: usize,
}

#[derive(Clone, Copy)]
struct StagingBlock {
    /// Page-locked.
    host: *mut u8,
    /// On the card.
    device: Address,
    /// After which the card has the data.
    arrived: sys::CUevent,
    /// After which the pair is free again.
    placed: sys::CUevent,
}

fn failed(action: &'static str) -> impl FnOnce(result::DriverError) -> Error {
    move |e| Error::Device { problem: format!("{action} failed: {e:?}") }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Whether there is a driver that knows of a card.
pub fn card_is_present() -> bool {
    // SAFETY: as in `open`, of which these are the first steps.
    let loads = unsafe {
        sys::is_culib_present()
            && ["cuInit", "cuDeviceGetCount"].iter().all(|n| sys::culib().get::<*const c_void>(n.as_bytes()).is_ok())
    };
    loads && result::init().is_ok() && result::device::get_count().is_ok_and(|count| count > 0)
}

impl Driver {
    /// The first card, or why there is none.
    pub fn open() -> std::result::Result<Driver, String> {
        // SAFETY: loads the driver's library, which has no requirements, and looks names up in it.
        unsafe {
            if !sys::is_culib_present() {
                return Err("no NVIDIA driver is installed (libcuda was not found)".into());
            }
            let library = sys::culib();
            if let Some(name) = SYMBOLS.iter().find(|name| library.get::<*const c_void>(name.as_bytes()).is_err()) {
                return Err(format!("the NVIDIA driver is too old: it has no {name}; CUDA 12 is needed"));
            }
        }
        let reason = |action: &'static str| move |e: result::DriverError| format!("{action} failed: {e:?}");
        result::init().map_err(reason("starting the NVIDIA driver"))?;
        if result::device::get_count().map_err(reason("counting the cards"))? == 0 {
            return Err("there is no NVIDIA card in this machine, or none is visible".into());
        }
        let device = result::device::get(0).map_err(reason("opening the first card"))?;
        let name = result::device::get_name(device).map_err(reason("naming the card"))?;
        use sys::CUdevice_attribute as Attribute;
        // SAFETY: `device` comes from the driver, and the context is made current before the stream is created in it.
        let (major, minor, context, stream, arrivals) = unsafe {
            let attribute = |which| result::device::get_attribute(device, which).map_err(reason("asking the card"));
            let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
            let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
            let context = result::primary_ctx::retain(device).map_err(reason("making a context on the card"))?;
            result::ctx::set_current(context).map_err(reason("making a context on the card"))?;
            let kind = result::stream::StreamKind::NonBlocking;
            let stream = result::stream::create(kind).map_err(reason("making a stream"))?;
            let kind = result::stream::StreamKind::NonBlocking;
            let arrivals = result::stream::create(kind).map_err(reason("making a stream"))?;
            (major, minor, context, stream, arrivals)
        };
        if (major, minor) < (7, 5) {
            return Err(format!("{name} has compute capability {major}.{minor}; 7.5 or more is needed"));
        }
        let mut version = 0;
        // SAFETY: writes one integer.
        unsafe { sys::cuDriverGetVersion(&mut version) };
        let compiler = Nvrtc::find();
        if let Err(reason) = &compiler {
            return Err(format!("{name} is there, but its kernels cannot be compiled: {reason}"));
        }
        Ok(Driver {
            name,
            architecture: (major as u32, minor as u32),
            version,
            context,
            stream,
            arrivals,
            compiler: compiler.map_err(|e| e.to_string()),
            modules: Mutex::default(),
            staging: Mutex::default(),
        })
    }

    /// Makes the context that of the calling thread: every method begins with it.
    fn current(&self) -> Result<()> {
        // SAFETY: the context was retained in `open` and is never released.
        unsafe { result::ctx::set_current(self.context) }.map_err(failed("making the card current"))
    }

    fn module(&self, unit: Unit) -> Result<sys::CUmodule> {
        let mut modules = lock(&self.modules);
        if let Some(&module) = modules.get(&unit) {
            return Ok(module as sys::CUmodule);
        }
        let device_error = |problem: String| Error::Device { problem };
        let compiler = self.compiler.as_ref().map_err(|e| device_error(e.clone()))?;
        let target = compiler.target(self.architecture).map_err(device_error)?;
        let key = cache::key(unit.name(), "cubin", &[&unit.expand(), &target, &compiler.version()]);
        let image = cache::get_or_make(cache::folder().as_deref(), &key, || {
            compiler.compile(unit, &target).map(|compiled| compiled.image)
        });
        let mut image = image.map_err(device_error)?;
        // PTX must end with a zero; after a cubin it does no harm.
        image.push(0);
        // SAFETY: the image is what the compiler made, whole, which the cache's checksum has made sure of.
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) };
        let module = module.map_err(failed("loading kernels"))?;
        modules.insert(unit, module as usize);
        Ok(module)
    }

    /// Kept until the process ends.
    fn staging_block() -> Result<StagingBlock> {
        // SAFETY: plain memory, written before it is read.
        let (host, device) = unsafe {
            let host = result::malloc_host(STAGING_BYTES, 0).map_err(failed("locking memory"))?;
            (host.cast(), result::malloc_sync(STAGING_BYTES).map_err(failed("allocating memory"))?)
        };
        let event = || Self::event(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
        Ok(StagingBlock { host, device, arrived: event()?, placed: event()? })
    }

    fn event(flags: sys::CUevent_flags) -> Result<sys::CUevent> {
        result::event::create(flags).map_err(failed("making an event"))
    }
}

struct DriverGraph(sys::CUgraphExec);
// SAFETY: a handle that any thread may launch or destroy.
unsafe impl Send for DriverGraph {}
// SAFETY: as above.
unsafe impl Sync for DriverGraph {}

impl Drop for DriverGraph {
    fn drop(&mut self) {
        // SAFETY: made by `end_capture` and owned by this value alone.
        let _ = unsafe { result::graph::exec_destroy(self.0) };
    }
}

struct DriverMark(sys::CUevent);
// SAFETY: a handle that any thread may use.
unsafe impl Send for DriverMark {}
// SAFETY: as above.
unsafe impl Sync for DriverMark {}

impl Drop for DriverMark {
    fn drop(&mut self) {
        // SAFETY: made by `mark` and owned by this value alone.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}

impl Backend for Driver {
    fn name(&self) -> &str {
        &self.name
    }

    fn architecture(&self) -> (u32, u32) {
        self.architecture
    }

    fn versions(&self) -> String {
        let compiler = self.compiler.as_ref().map_or_else(String::clone, Nvrtc::describe);
        format!("driver for CUDA {}.{}, {compiler}", self.version / 1000, self.version % 1000 / 10)
    }

    fn memory(&self) -> Result<(usize, usize)> {
        self.current()?;
        result::mem_get_info().map_err(failed("asking for free memory"))
    }

    fn function(&self, unit: Unit, name: &str) -> Result<Function> {
        self.current()?;
        let module = self.module(unit)?;
        let symbol = CString::new(name).map_err(|e| Error::Device { problem: e.to_string() })?;
        // SAFETY: the module is loaded and stays so.
        let function =
            unsafe { result::module::get_function(module, symbol) }.map_err(failed("looking up a kernel"))?;
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // Allow what the largest tile needs; kernels that ask for less are not affected, cards that have less refuse, and
        // then launch what fits.
        for bytes in [96 << 10, 64 << 10] {
            // SAFETY: the function is valid.
            if unsafe { result::function::set_function_attribute(function, attribute, bytes) }.is_ok() {
                break;
            }
        }
        Ok(Function(function as usize))
    }

    fn allocate(&self, bytes: usize) -> Result<Option<Address>> {
        self.current()?;
        // SAFETY: the memory is used through kernels and copies alone, which write before they read.
        match unsafe { result::malloc_sync(bytes) } {
            Ok(address) => Ok(Some(address)),
            Err(e) if e.0 == sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY => Ok(None),
            Err(e) => Err(failed("allocating memory")(e)),
        }
    }

    fn free(&self, address: Address) {
        if self.current().is_ok() {
            // SAFETY: `address` comes from `allocate` and is given back once. The driver waits for work that uses it.
            let _ = unsafe { result::free_sync(address) };
        }
    }

    fn upload(&self, target: Address, bytes: &[u8]) -> Result<()> {
        self.current()?;
        let mut staging = lock(&self.staging);
        for (i, chunk) in bytes.chunks(STAGING_BYTES).enumerate() {
            if staging.blocks.len() < STAGING_BLOCKS && staging.next == staging.blocks.len() {
                staging.blocks.push(Self::staging_block()?);
            }
            let StagingBlock { host, device, arrived, placed } = staging.blocks[staging.next % STAGING_BLOCKS];
            staging.next += 1;
            let target = target + (i * STAGING_BYTES) as u64;
            // SAFETY: `placed` says that what went through the pair before has left it; either block holds STAGING_BYTES, of
            // which the chunk takes no more; the copy to its place is queued behind the event of its arrival.
            unsafe {
                result::event::synchronize(placed).map_err(failed("waiting for a copy"))?;
                std::ptr::copy_nonoverlapping(chunk.as_ptr(), host, chunk.len());
                let source = std::slice::from_raw_parts(host, chunk.len());
                result::memcpy_htod_async(device, source, self.arrivals).map_err(failed("copying to the card"))?;
                result::event::record(arrived, self.arrivals).map_err(failed("copying to the card"))?;
                let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
                result::stream::wait_event(self.stream, arrived, flags).map_err(failed("copying to the card"))?;
                result::memcpy_dtod_async(target, device, chunk.len(), self.stream)
                    .map_err(failed("copying to the card"))?;
                result::event::record(placed, self.stream).map_err(failed("copying to the card"))?;
            }
        }
        Ok(())
    }

    fn download(&self, source: Address, bytes: &mut [u8]) -> Result<()> {
        self.current()?;
        // SAFETY: `bytes` stays borrowed until the stream is done with it.
        unsafe {
            result::memcpy_dtoh_async(bytes, source, self.stream).map_err(failed("copying from the card"))?;
            result::stream::synchronize(self.stream).map_err(failed("computing on the card"))
        }
    }

    fn copy(&self, target: Address, source: Address, bytes: usize) -> Result<()> {
        self.current()?;
        // SAFETY: both ranges belong to live buffers of that size, which the callers in `memory` see to.
        unsafe { result::memcpy_dtod_async(target, source, bytes, self.stream) }.map_err(failed("copying on the card"))
    }

    fn launch(&self, function: Function, extents: Extents, params: &[u8]) -> Result<()> {
        self.current()?;
        let [x, y, z] = extents.grid;
        // The driver reads as much as the kernel's parameter is large, at its alignment.
        let mut aligned = vec![0u64; params.len().div_ceil(8)];
        bytemuck::cast_slice_mut(&mut aligned)[..params.len()].copy_from_slice(params);
        let mut pointers = [aligned.as_mut_ptr().cast::<c_void>()];
        // SAFETY: the function comes from `function`; its one parameter is a struct of these bytes, whose layout the
        // emulated grid has checked against the kernel's; addresses in it are of buffers that outlive the launch on this
        // stream, since freed blocks are reused on it alone.
        unsafe {
            result::launch_kernel(
                function.0 as sys::CUfunction,
                (x, y, z),
                (extents.threads, 1, 1),
                extents.shared,
                self.stream,
                &mut pointers,
            )
        }
        .map_err(failed("launching a kernel"))
    }

    fn synchronize(&self) -> Result<()> {
        self.current()?;
        // SAFETY: the stream lives as long as `self`.
        unsafe { result::stream::synchronize(self.stream) }.map_err(failed("computing on the card"))
    }

    fn begin_capture(&self) -> Result<()> {
        self.current()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: as above.
        unsafe { result::stream::begin_capture(self.stream, mode) }.map_err(failed("capturing a step"))
    }

    fn end_capture(&self) -> Result<Graph> {
        self.current()?;
        // SAFETY: the graph is used here alone, and destroyed once it is instantiated.
        unsafe {
            let graph = result::stream::end_capture(self.stream).map_err(failed("capturing a step"))?;
            let executable = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            let _ = result::graph::destroy(graph);
            Ok(Graph(Box::new(DriverGraph(executable.map_err(failed("capturing a step"))?))))
        }
    }

    fn replay(&self, graph: &Graph) -> Result<()> {
        self.current()?;
        let Some(DriverGraph(executable)) = graph.0.downcast_ref() else { unreachable!("a graph of this backend") };
        // SAFETY: the graph is alive, and so is the memory it uses, which its arena holds.
        unsafe { result::graph::launch(*executable, self.stream) }.map_err(failed("replaying a step"))
    }

    fn mark(&self) -> Result<Mark> {
        self.current()?;
        let event = Self::event(sys::CUevent_flags::CU_EVENT_DEFAULT)?;
        // SAFETY: both handles are alive.
        unsafe { result::event::record(event, self.stream) }.map_err(failed("taking the time"))?;
        Ok(Mark(Box::new(DriverMark(event))))
    }

    fn seconds_between(&self, start: &Mark, end: &Mark) -> Result<f64> {
        self.current()?;
        let (Some(DriverMark(start)), Some(DriverMark(end))) = (start.0.downcast_ref(), end.0.downcast_ref()) else {
            unreachable!("marks of this backend")
        };
        // SAFETY: both events have been recorded.
        unsafe {
            result::event::synchronize(*end).map_err(failed("computing on the card"))?;
            let milliseconds = result::event::elapsed(*start, *end).map_err(failed("taking the time"))?;
            Ok(f64::from(milliseconds) / 1e3)
        }
    }
}
