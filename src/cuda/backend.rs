//! What a device must be able to do.

use super::source::Unit;
use crate::error::Result;

/// An address on the device; 0 is null.
pub type Address = u64;

/// A kernel ready to be launched, as its backend identifies it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function(pub(super) usize);

/// The extents of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extents {
    /// Blocks along x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared: u32,
}

/// A captured sequence of launches and copies.
pub struct Graph(pub(super) Box<dyn std::any::Any + Send + Sync>);

/// A device, or something that behaves like one. Work is done in the order in which it is given; copies to the host wait
/// for it.
pub trait Backend: Send + Sync {
    /// What to call it: the card's name.
    fn name(&self) -> &str;
    /// Compute capability, such as (9, 0).
    fn architecture(&self) -> (u32, u32);
    /// Whether it is no card but a program that behaves like one.
    fn is_emulated(&self) -> bool {
        false
    }
    /// One line on the driver and the compiler.
    fn versions(&self) -> String;
    /// Bytes that are free, and bytes there are.
    fn memory(&self) -> Result<(usize, usize)>;
    /// A kernel of a source file, compiled if need be.
    fn function(&self, unit: Unit, name: &str) -> Result<Function>;
    /// New memory, or `None` if there is not enough of it.
    fn allocate(&self, bytes: usize) -> Result<Option<Address>>;
    /// Gives memory back, once what has been launched is done with it.
    fn free(&self, address: Address);
    /// Declares the contents of memory worthless: what reads it before it is written is wrong, and the emulator says so.
    fn forget(&self, _address: Address, _bytes: usize) {}
    /// Copies to the device. `bytes` may be reused at once.
    fn upload(&self, target: Address, bytes: &[u8]) -> Result<()>;
    /// Copies from the device, when it has done what it was given.
    fn download(&self, source: Address, bytes: &mut [u8]) -> Result<()>;
    /// Copies within the device.
    fn copy(&self, target: Address, source: Address, bytes: usize) -> Result<()>;
    /// Launches a kernel with the bytes of its parameter struct.
    fn launch(&self, function: Function, extents: Extents, params: &[u8]) -> Result<()>;
    /// Waits until everything is done.
    fn synchronize(&self) -> Result<()>;
    /// From here on launches and copies within the device are recorded, not run.
    fn begin_capture(&self) -> Result<()>;
    /// Ends what [`Backend::begin_capture`] began.
    fn end_capture(&self) -> Result<Graph>;
    /// Runs what was captured.
    fn replay(&self, graph: &Graph) -> Result<()>;
    /// A point in time on the device, for [`Backend::seconds_between`].
    fn mark(&self) -> Result<Mark>;
    /// Seconds between two marks, when the device has passed both.
    fn seconds_between(&self, start: &Mark, end: &Mark) -> Result<f64>;
}

/// A point in time on the device.
pub struct Mark(pub(super) Box<dyn std::any::Any + Send + Sync>);
