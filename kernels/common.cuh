// What every kernel file includes: types, checked-or-plain pointers, packs, and the KERNEL macro. NVRTC compiles this as it
// is, without any toolkit or standard header. The emulator (emulator/emulator.h) is included in front of it and then gives
// the same names a checked meaning.
#pragma once

#ifndef HONE_EMULATOR

// A kernel takes one parameter, a struct that the host side declares field by field in the same order. One parameter makes
// launching uniform; the struct lies in constant memory either way.
#define KERNEL(name, Params, threads) extern "C" __global__ void __launch_bounds__(threads) name(const Params p)
#define DEVICE __device__ __forceinline__

// Global memory, read or written; Shared is a pointer into the block's shared memory. On the emulator these are fat
// pointers that know the allocation they came from.
template <class T> using In = const T*;
template <class T> using Out = T*;
template <class T> using Shared = T*;

#define SHARED(T, name, count) __shared__ T name[count]
// All of the shared memory asked for at launch, as T; 16-byte aligned.
#define DYNAMIC_SHARED(T, name)                                   \
    extern __shared__ __align__(16) unsigned char name##_bytes[]; \
    T* const name = reinterpret_cast<T*>(name##_bytes)

#define LAUNCH_SYNC() __syncthreads()

#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// The upper half of an f32: 8 bits of mantissa with the hidden one.
struct bf16 {
    u16 bits;
};

DEVICE float bits_to_float(u32 bits) {
#ifdef HONE_EMULATOR
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
#else
    return __uint_as_float(bits);
#endif
}

DEVICE u32 float_to_bits(float x) {
#ifdef HONE_EMULATOR
    u32 bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
#else
    return __float_as_uint(x);
#endif
}

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return bits_to_float(static_cast<u32>(x.bits) << 16); }

// To the nearest, ties to even; NaN stays NaN.
template <class T> DEVICE T from_float(float x);
template <> DEVICE float from_float<float>(float x) { return x; }
template <> DEVICE bf16 from_float<bf16>(float x) {
    bf16 y;
#if !defined(HONE_EMULATOR) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
    u32 bits = float_to_bits(x);
    bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    y.bits = nan ? static_cast<u16>(bits >> 16 | 0x40u) : static_cast<u16>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
#endif
    return y;
}

// N neighbouring elements that move in one instruction; their address must be a multiple of their size.
template <class T, int N> struct alignas(sizeof(T) * N) Pack {
    T v[N];
};

#ifndef HONE_EMULATOR
template <int N, class T> DEVICE Pack<T, N> load_pack(const T* p) { return *reinterpret_cast<const Pack<T, N>*>(p); }
template <int N, class T> DEVICE void store_pack(T* p, const Pack<T, N>& x) { *reinterpret_cast<Pack<T, N>*>(p) = x; }
#endif

// N elements as floats.
template <int N, class P> DEVICE void load_floats(P p, float* x) {
    const auto pack = load_pack<N>(p);
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = to_float(pack.v[i]);
}

template <class T, int N> DEVICE void store_floats(Out<T> p, const float* x) {
    Pack<T, N> pack;
#pragma unroll
    for (int i = 0; i < N; i++) pack.v[i] = from_float<T>(x[i]);
    store_pack<N>(p, pack);
}

// Division by a number the host knows, as a multiplication (Granlund and Montgomery, 1994): exact for dividends below 2^31.
struct Divider {
    u32 divisor, magic, shift;
};

DEVICE u32 operator/(u32 x, const Divider& d) { return (__umulhi(x, d.magic) + x) >> d.shift; }

const int WARP = 32;

template <class F> DEVICE float warp_reduce(float x, F combine) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) x = combine(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}

struct Add {
    DEVICE float operator()(float a, float b) const { return a + b; }
};
struct Max {
    // NaN wins, as in PyTorch.
    DEVICE float operator()(float a, float b) const { return a > b || a != a ? a : b; }
};

DEVICE float warp_sum(float x) { return warp_reduce(x, Add()); }
DEVICE float warp_max(float x) { return warp_reduce(x, Max()); }
