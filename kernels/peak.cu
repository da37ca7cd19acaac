// How fast a card can multiply when nothing else holds it up: chains of products in registers. The roof under which
// `hone bench kernels` sees the other kernels.
#include "mma.cuh"

struct PeakParams {
    Out<float> y;  // (blocks * 256)
    int rounds, unused;
};

const int CHAINS = 8;

// 2 * CHAINS operations a thread and round.
KERNEL(peak_f32, PeakParams, 256) {
    float c[CHAINS];
    const float a = 1.0f + threadIdx.x * 1e-9f, b = threadIdx.x * 1e-9f;
#pragma unroll
    for (int i = 0; i < CHAINS; i++) c[i] = i;
    for (int round = 0; round < p.rounds; round++) {
#pragma unroll
        for (int i = 0; i < CHAINS; i++) c[i] = c[i] * a + b;
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < CHAINS; i++) sum += c[i];
    p.y[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

#if defined(HONE_EMULATOR) || __CUDA_ARCH__ >= 800
// CHAINS products of 16 x 8 by K a warp and round; K is 16 for bf16, 8 for TF32.
template <class T> DEVICE void peak_mma(const PeakParams& p) {
    float c[CHAINS][4] = {};
    const u32 a[4] = {threadIdx.x, 0u, 0u, 0u}, b[2] = {threadIdx.x, 0u};
    for (int round = 0; round < p.rounds; round++) {
#pragma unroll
        for (int i = 0; i < CHAINS; i++) mma(T(), c[i], a, b);
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < CHAINS; i++) sum += c[i][0] + c[i][1] + c[i][2] + c[i][3];
    p.y[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}
KERNEL(peak_tf32, PeakParams, 256) { peak_mma<float>(p); }
KERNEL(peak_bf16, PeakParams, 256) { peak_mma<bf16>(p); }
#endif
