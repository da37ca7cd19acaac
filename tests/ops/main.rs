//! Every operation against a naive reference in f64, its gradients against finite differences, and shapes around the
//! edges of the kernels' tiles.

mod batch_norm;
mod conv2d;
mod conv_norm;
mod cross_entropy;
mod elementwise;
mod matmul;
mod optim;
mod pool;
mod support;
mod tape;
