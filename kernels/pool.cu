// Max pooling and global average pooling of x (images, h, w, channels), both ways.
#include "common.cuh"

template <class T> struct MaxPoolParams {
    In<T> x;         // forward: (images, h, w, c)
    Out<T> y;        // (images, oh, ow, c)
    Out<u8> places;  // as y: which of the window's places the maximum came from
    In<T> dy;        // backward: as y
    In<u8> from;     // as y
    Out<T> dx;       // as x
    int images, h, w, c, oh, ow, kernel, stride, padding, unused;
};

// The maximum of each window, the first of equals; NaN is greater than any number, padding is never the maximum.
template <class T> DEVICE void max_pool(const MaxPoolParams<T>& p) {
    const i64 n = static_cast<i64>(p.images) * p.oh * p.ow * p.c;
    for (i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += static_cast<i64>(gridDim.x) * blockDim.x) {
        const int c = static_cast<int>(i % p.c), ox = static_cast<int>(i / p.c % p.ow);
        const int oy = static_cast<int>(i / p.c / p.ow % p.oh), image = static_cast<int>(i / p.c / p.ow / p.oh);
        float best = -1.0f / 0.0f;
        int place = 255;
        for (int ky = 0; ky < p.kernel; ky++) {
            for (int kx = 0; kx < p.kernel; kx++) {
                const int y = oy * p.stride + ky - p.padding, x = ox * p.stride + kx - p.padding;
                if (y < 0 || y >= p.h || x < 0 || x >= p.w) continue;
                const float v = to_float(p.x[((static_cast<i64>(image) * p.h + y) * p.w + x) * p.c + c]);
                if (place == 255 || v > best || (v != v && best == best)) best = v, place = ky * p.kernel + kx;
            }
        }
        p.y[i] = from_float<T>(best);
        p.places[i] = static_cast<u8>(place);
    }
}
KERNEL(max_pool_f32, MaxPoolParams<float>, 256) { max_pool(p); }
KERNEL(max_pool_bf16, MaxPoolParams<bf16>, 256) { max_pool(p); }

// Each input position collects from the windows it is the maximum of.
template <class T> DEVICE void max_pool_backward(const MaxPoolParams<T>& p) {
    const i64 n = static_cast<i64>(p.images) * p.h * p.w * p.c;
    for (i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += static_cast<i64>(gridDim.x) * blockDim.x) {
        const int c = static_cast<int>(i % p.c), x = static_cast<int>(i / p.c % p.w);
        const int y = static_cast<int>(i / p.c / p.w % p.h), image = static_cast<int>(i / p.c / p.w / p.h);
        const int top = y + p.padding, left = x + p.padding;
        const int oy0 = max(0, (top - p.kernel + p.stride) / p.stride), oy1 = min(top / p.stride, p.oh - 1);
        const int ox0 = max(0, (left - p.kernel + p.stride) / p.stride), ox1 = min(left / p.stride, p.ow - 1);
        float sum = 0.0f;
        for (int oy = oy0; oy <= oy1; oy++) {
            for (int ox = ox0; ox <= ox1; ox++) {
                const i64 at = ((static_cast<i64>(image) * p.oh + oy) * p.ow + ox) * p.c + c;
                if (p.from[at] == (top - oy * p.stride) * p.kernel + left - ox * p.stride) sum += to_float(p.dy[at]);
            }
        }
        p.dx[i] = from_float<T>(sum);
    }
}
KERNEL(max_pool_backward_f32, MaxPoolParams<float>, 256) { max_pool_backward(p); }
KERNEL(max_pool_backward_bf16, MaxPoolParams<bf16>, 256) { max_pool_backward(p); }

template <class T> struct AveragePoolParams {
    In<T> x;         // forward: (images, pixels, c)
    Out<float> y;    // (images, c)
    In<float> dy;    // backward
    Out<T> dx;
    int images, pixels, c, unused;
};

template <class T> DEVICE void average_pool(const AveragePoolParams<T>& p) {
    const int n = p.images * p.c;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        const i64 start = static_cast<i64>(i / p.c) * p.pixels * p.c + i % p.c;
        float sum = 0.0f;
        for (int pixel = 0; pixel < p.pixels; pixel++) sum += to_float(p.x[start + static_cast<i64>(pixel) * p.c]);
        p.y[i] = sum / p.pixels;
    }
}
KERNEL(average_pool_f32, AveragePoolParams<float>, 256) { average_pool(p); }
KERNEL(average_pool_bf16, AveragePoolParams<bf16>, 256) { average_pool(p); }

template <class T> DEVICE void average_pool_backward(const AveragePoolParams<T>& p) {
    const i64 n = static_cast<i64>(p.images) * p.pixels * p.c;
    for (i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += static_cast<i64>(gridDim.x) * blockDim.x) {
        const i64 image = i / p.c / p.pixels;
        p.dx[i] = from_float<T>(p.dy[image * p.c + i % p.c] / p.pixels);
    }
}
KERNEL(average_pool_backward_f32, AveragePoolParams<float>, 256) { average_pool_backward(p); }
KERNEL(average_pool_backward_bf16, AveragePoolParams<bf16>, 256) { average_pool_backward(p); }
