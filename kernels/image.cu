// Pictures of bytes (images, source_h, source_w, 3) to the network's input (images, h, w, 3): a crop, mirrored or not, scaled
// to [0, 1] and normalised in the order in which torchvision does it.
#include "common.cuh"

struct Crop {
    int top, left, mirrored, unused;
};

template <class T> struct NormaliseImageParams {
    In<u8> x;
    In<Crop> crops;  // (images), or null for the upper left corner
    Out<T> y;
    int images, source_h, source_w, h, w;
    float mean[3], deviation[3];
    int unused;
};

template <class T> DEVICE void normalise_image(const NormaliseImageParams<T>& p) {
    const i64 n = static_cast<i64>(p.images) * p.h * p.w;
    for (i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += static_cast<i64>(gridDim.x) * blockDim.x) {
        const int x = static_cast<int>(i % p.w), y = static_cast<int>(i / p.w % p.h), image = static_cast<int>(i / p.w / p.h);
        Crop crop = {0, 0, 0, 0};
        if (p.crops) crop = p.crops[image];
        const int sx = crop.left + (crop.mirrored ? p.w - 1 - x : x), sy = crop.top + y;
        const i64 from = ((static_cast<i64>(image) * p.source_h + sy) * p.source_w + sx) * 3;
#pragma unroll
        for (int c = 0; c < 3; c++) p.y[i * 3 + c] = from_float<T>((p.x[from + c] / 255.0f - p.mean[c]) / p.deviation[c]);
    }
}
KERNEL(normalise_image_f32, NormaliseImageParams<float>, 256) { normalise_image(p); }
KERNEL(normalise_image_bf16, NormaliseImageParams<bf16>, 256) { normalise_image(p); }
