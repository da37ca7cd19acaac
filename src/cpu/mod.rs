//! CPU kernels: plain functions over slices and a parameter struct, parallel on rayon's current pool.
//!
//! Work is cut by problem size, never by the number of threads, and sums of parts are added in a fixed order, so that the
//! bits of a result do not depend on how many threads there are.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod conv;
pub mod conv_norm;
pub mod elementwise;
pub mod float;
pub mod gather;
pub mod gemm;
pub mod gemm_transposed;
mod isa;
pub mod loss;
#[cfg(target_arch = "aarch64")]
mod neon;
pub mod norm;
pub mod norm_backward;
pub mod norm_pool;
pub mod optim;
pub mod parallel;
pub mod peak;
pub mod pool;
mod portable;
mod simd;
pub mod tiles;
pub mod winograd;

pub use float::Float;
pub use isa::Isa;
