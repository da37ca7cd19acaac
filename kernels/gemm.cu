// C = A B + bias for dense matrices, as a ladder from the plain kernel to the tensor cores. The first rungs are there to be
// read and measured against; the last two are what runs.
//
// 1. gemm_plain: a thread an element; every operand comes from global memory, K times over.
// 2. gemm_tiled: a block shares a 32 x 32 tile of both operands, so each is read from global memory 32 times less.
// 3. gemm_f32: a thread holds 8 x 8 (or 4 x 4) sums in registers, so each value read from shared memory is used 8 times;
//    packs of four, and the next tile is loaded while this one is multiplied (SimtEngine).
// 4. gemm_tf32, gemm_bf16: tensor cores fed by ldmatrix, copies three tiles ahead by cp.async (MmaEngine).
//
// Every rung takes the three layouts: nn (A (m, k), B (k, n)), nt (B (n, k)), tn (A (k, m)).
#include "tile.cuh"

template <class T> struct GemmParams {
    In<T> a;
    In<T> b;
    In<float> bias;  // (n) or null
    Out<float> c;    // (m, n)
    int m, n, k;
    int a_transposed, b_transposed;  // for the plain rungs: A is (k, m), B is (n, k)
    int packed_a, packed_b;
};

template <class T> DEVICE float a_element(const GemmParams<T>& p, int row, int k) {
    return to_float(p.a[p.a_transposed ? static_cast<i64>(k) * p.m + row : static_cast<i64>(row) * p.k + k]);
}

template <class T> DEVICE float b_element(const GemmParams<T>& p, int k, int column) {
    return to_float(p.b[p.b_transposed ? static_cast<i64>(column) * p.k + k : static_cast<i64>(k) * p.n + column]);
}

KERNEL(gemm_plain, GemmParams<float>, 256) {
    const int row = blockIdx.y * 16 + threadIdx.x / 16, column = blockIdx.x * 16 + threadIdx.x % 16;
    if (row >= p.m || column >= p.n) return;
    float sum = p.bias ? float(p.bias[column]) : 0.0f;
    for (int k = 0; k < p.k; k++) sum += a_element(p, row, k) * b_element(p, k, column);
    p.c[static_cast<i64>(row) * p.n + column] = sum;
}

KERNEL(gemm_tiled, GemmParams<float>, 1024) {
    const int TILE = 32;
    SHARED(float, as, TILE * TILE);
    SHARED(float, bs, TILE * TILE);
    const int y = threadIdx.x / TILE, x = threadIdx.x % TILE;
    const int row = blockIdx.y * TILE + y, column = blockIdx.x * TILE + x;
    float sum = 0.0f;
    for (int k = 0; k < p.k; k += TILE) {
        as[y * TILE + x] = row < p.m && k + x < p.k ? a_element(p, row, k + x) : 0.0f;
        bs[y * TILE + x] = column < p.n && k + y < p.k ? b_element(p, k + y, column) : 0.0f;
        __syncthreads();
        for (int i = 0; i < TILE; i++) sum += as[y * TILE + i] * bs[i * TILE + x];
        __syncthreads();
    }
    if (row < p.m && column < p.n) p.c[static_cast<i64>(row) * p.n + column] = sum + (p.bias ? float(p.bias[column]) : 0.0f);
}

template <class Engine, class T> DEVICE void gemm_store(const GemmParams<T>& p, Shared<float> tile) {
    const int PER_ROW = Engine::COLUMNS / 4;
    for (int q = threadIdx.x; q < Engine::ROWS * PER_ROW; q += Engine::THREADS) {
        const int in_row = q / PER_ROW, in_column = q % PER_ROW * 4;
        const int row = blockIdx.x * Engine::ROWS + in_row, column = blockIdx.y * Engine::COLUMNS + in_column;
        if (row >= p.m) continue;
        float v[4];
        load_floats<4>(tile + (in_row * Engine::PITCH + in_column), v);
        for (int i = 0; i < 4 && column + i < p.n; i++) {
            p.c[static_cast<i64>(row) * p.n + column + i] = v[i] + (p.bias ? float(p.bias[column + i]) : 0.0f);
        }
    }
}

template <class Engine, class A, class B, class T> DEVICE void gemm(const GemmParams<T>& p) {
    DYNAMIC_SHARED(float, memory);
    A a{p.a, p.m, p.k, A::ALONG_K ? p.k : p.m, p.packed_a != 0};
    B b{p.b, p.n, p.k, B::ALONG_K ? p.k : p.n, p.packed_b != 0};
    const int depth = Engine::K_TILE;
    Engine::run(a, b, blockIdx.x * Engine::ROWS, blockIdx.y * Engine::COLUMNS, 0, (p.k + depth - 1) / depth, memory);
    gemm_store<Engine>(p, memory);
}

#define GEMM(name, T, Engine)                                                                                      \
    KERNEL(gemm_##name##_nn, GemmParams<T>, 256) {                                                                 \
        gemm<Engine, MatrixAlongK<T, Engine::A_SLOTS>, MatrixAcrossK<T, Engine::B_SLOTS>>(p);                      \
    }                                                                                                              \
    KERNEL(gemm_##name##_nt, GemmParams<T>, 256) {                                                                 \
        gemm<Engine, MatrixAlongK<T, Engine::A_SLOTS>, MatrixAlongK<T, Engine::B_SLOTS>>(p);                       \
    }                                                                                                              \
    KERNEL(gemm_##name##_tn, GemmParams<T>, 256) {                                                                 \
        gemm<Engine, MatrixAcrossK<T, Engine::A_SLOTS>, MatrixAcrossK<T, Engine::B_SLOTS>>(p);                     \
    }

typedef SimtEngine<128, 128, 8, 8> Simt128;
typedef SimtEngine<64, 64, 16, 4> Simt64;
GEMM(f32_128x128, float, Simt128)
GEMM(f32_64x64, float, Simt64)

#if defined(HONE_EMULATOR) || __CUDA_ARCH__ >= 800
typedef MmaEngine<float, 128, 128, 2, 4, 4> Tf32;
typedef MmaEngine<bf16, 128, 128, 2, 4, 4> Bf16;
GEMM(tf32_128x128, float, Tf32)
GEMM(bf16_128x128, bf16, Bf16)
#endif
