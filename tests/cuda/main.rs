//! The CUDA backend against the CPU's: on the emulated grid with the feature `emulator`, on a card without it. Where there is
//! neither, every test skips, saying so.

#[cfg(feature = "emulator")]
mod cli;
#[cfg(feature = "emulator")]
mod emulator;
mod gemm;
mod network;
mod ops;
mod optim;
mod support;
