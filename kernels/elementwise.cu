// Maps over elements, conversions, and reductions to one number. A thread strides over the array by the grid's size.
#include "common.cuh"

template <class T> struct MapParams {
    In<T> a;
    In<T> b;
    Out<T> y;
    In<float> scalar;  // (1) or null: multiplied into the factor
    float factor;
    int unused;
    i64 n;
};

#define EACH(i, n)                                                                                     \
    for (i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; i < (n);                     \
         i += static_cast<i64>(gridDim.x) * blockDim.x)

// y may be a: each element is read and then written by one thread.
#define MAP(name, T)                                                                                               \
    KERNEL(add_##name, MapParams<T>, 256) { EACH(i, p.n) p.y[i] = from_float<T>(to_float(p.a[i]) + to_float(p.b[i])); } \
    KERNEL(relu_##name, MapParams<T>, 256) {                                                                       \
        EACH(i, p.n) {                                                                                             \
            const float x = to_float(p.a[i]);                                                                      \
            p.y[i] = from_float<T>(x < 0.0f ? 0.0f : x);                                                           \
        }                                                                                                          \
    }                                                                                                              \
    KERNEL(relu_backward_##name, MapParams<T>, 256) {                                                              \
        EACH(i, p.n) p.y[i] = from_float<T>(to_float(p.b[i]) <= 0.0f ? 0.0f : to_float(p.a[i]));                   \
    }                                                                                                              \
    KERNEL(scale_##name, MapParams<T>, 256) {                                                                      \
        const float factor = p.scalar ? p.scalar[0] * p.factor : p.factor;                                         \
        EACH(i, p.n) p.y[i] = from_float<T>(to_float(p.a[i]) * factor);                                            \
    }                                                                                                              \
    KERNEL(fill_##name, MapParams<T>, 256) {                                                                       \
        const float value = p.scalar ? p.scalar[0] * p.factor : p.factor;                                          \
        EACH(i, p.n) p.y[i] = from_float<T>(value);                                                                \
    }
MAP(f32, float)
MAP(bf16, bf16)

struct NarrowParams {
    In<float> x;
    Out<bf16> y;
    i64 n;
};
KERNEL(f32_to_bf16, NarrowParams, 256) { EACH(i, p.n) p.y[i] = from_float<bf16>(p.x[i]); }

struct WidenParams {
    In<bf16> x;
    Out<float> y;
    i64 n;
};
KERNEL(bf16_to_f32, WidenParams, 256) { EACH(i, p.n) p.y[i] = to_float(p.x[i]); }

struct ReduceParams {
    In<float> x;
    Out<float> parts;  // (blocks)
    i64 n;
    int squares, blocks;
    float factor;
    int unused;
};

// The sum of a block's share, of squares if asked for.
KERNEL(reduce, ReduceParams, 256) {
    SHARED(float, warps, 8);
    float sum = 0.0f;
    EACH(i, p.n) {
        const float x = p.x[i];
        sum += p.squares ? x * x : x;
    }
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int i = 1; i < 8; i++) sum += warps[i];
    p.parts[blockIdx.x] = sum;
}

// The sum of the parts times the factor, by one warp. parts is x here.
KERNEL(reduce_parts, ReduceParams, 32) {
    float sum = 0.0f;
    for (i64 i = threadIdx.x; i < p.n; i += WARP) sum += p.x[i];
    sum = warp_sum(sum);
    if (threadIdx.x == 0) p.parts[0] = sum * p.factor;
}
