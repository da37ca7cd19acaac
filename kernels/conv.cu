// Convolution as a matrix product whose patches are gathered on the way to shared memory; no im2col matrix exists.
//
// - conv_*: y = epilogue(patches(x) filter^T). Forward, and the gradient to the input: there x is dy, the filters are
//   (inputs, taps, outputs), and positions that agree modulo the stride form a class with a Gather of its own, so that a
//   stride wastes nothing.
// - wgrad_*: dfilter = dy^T patches(x), summed over positions in `splits` parts that sum_parts adds in order.
// - pack_channels, unpack_filter: the first layer has 3 channels. Its input is copied with the padding written out and
//   channels padded to a power of two, so that a whole row of the filter is one aligned run.
//
// Names end in the engine and the tile: conv_bf16_mma_128x128.
#include "tile.cuh"

const int MAX_CLASSES = 4;

template <class T> struct ConvParams {
    In<T> x;         // (images, source_h, source_w, pixel)
    In<T> filter;    // (outputs, filter taps, run)
    Out<T> y;        // (images, target_h, target_w, outputs)
    In<float> bias;  // (outputs) or null
    In<T> residual;  // as y, or null
    // Null, or (row tiles, 2, outputs): mean and sum of squared deviations of each tile's part of each output channel.
    Out<float> statistics;
    int outputs, filter_pitch;
    int relu;
    int packed;  // whether run, pixel and every address allow packs of four in loads, outputs in stores
    int store_packed;
    int unused;
    Gather classes[MAX_CLASSES];
};

// What happens to a tile of sums (BM, BN) in shared memory: bias, residual, ReLU, statistics, and the way to y.
template <class Engine, class T> DEVICE void conv_epilogue(const ConvParams<T>& p, const Gather& g, Shared<float> tile) {
    const int first_row = blockIdx.x * Engine::ROWS, first_column = blockIdx.y * Engine::COLUMNS;
    const int PER_ROW = Engine::COLUMNS / 4;
    for (int q = threadIdx.x; q < Engine::ROWS * PER_ROW; q += Engine::THREADS) {
        const int row = q / PER_ROW, column = q % PER_ROW * 4;
        const int output = first_column + column;
        if (first_row + row >= g.rows || output >= p.outputs) continue;
        float v[4];
        load_floats<4>(tile + (row * Engine::PITCH + column), v);
        const i64 at = g.target(first_row + row) * p.outputs + output;
        if (p.store_packed) {
            if (p.bias) {
                float bias[4];
                load_floats<4>(p.bias + output, bias);
#pragma unroll
                for (int i = 0; i < 4; i++) v[i] += bias[i];
            }
            if (p.residual) {
                float residual[4];
                load_floats<4>(p.residual + at, residual);
#pragma unroll
                for (int i = 0; i < 4; i++) v[i] += residual[i];
            }
#pragma unroll
            for (int i = 0; i < 4; i++) v[i] = p.relu && v[i] < 0.0f ? 0.0f : v[i];
            store_floats<T, 4>(p.y + at, v);
        } else {
            for (int i = 0; i < 4 && output + i < p.outputs; i++) {
                float x = v[i] + (p.bias ? p.bias[output + i] : 0.0f) + (p.residual ? to_float(p.residual[at + i]) : 0.0f);
                p.y[at + i] = from_float<T>(p.relu && x < 0.0f ? 0.0f : x);
            }
        }
    }
    if (!p.statistics) return;
    // Of the values as they are stored: those are what will be normalised. A column is shared by PARTS threads; their
    // means and squares are put together by Chan, Golub and LeVeque's update.
    const int PARTS = Engine::THREADS / Engine::COLUMNS;
    SHARED(float, partial, Engine::THREADS * 2);
    const int column = threadIdx.x % Engine::COLUMNS, part = threadIdx.x / Engine::COLUMNS;
    const int rows = min(Engine::ROWS, g.rows - first_row), share = Engine::ROWS / PARTS;
    const int begin = min(part * share, rows), end = min(begin + share, rows);
    float sum = 0.0f, squares = 0.0f;
    for (int row = begin; row < end; row++) sum += to_float(from_float<T>(tile[row * Engine::PITCH + column]));
    const float mean = end > begin ? sum / (end - begin) : 0.0f;
    for (int row = begin; row < end; row++) {
        const float d = to_float(from_float<T>(tile[row * Engine::PITCH + column])) - mean;
        squares += d * d;
    }
    partial[threadIdx.x * 2] = mean;
    partial[threadIdx.x * 2 + 1] = squares;
    __syncthreads();
    if (part == 0 && first_column + column < p.outputs) {
        float total = partial[threadIdx.x * 2], total_squares = partial[threadIdx.x * 2 + 1];
        int count = min(share, rows);
        for (int i = 1; i < PARTS; i++) {
            const int n = min(share, rows - i * share);
            if (n <= 0) break;
            const int other = (i * Engine::COLUMNS + column) * 2;
            const float delta = partial[other] - total;
            total += delta * n / (count + n);
            total_squares += partial[other + 1] + delta * delta * count * n / (count + n);
            count += n;
        }
        const i64 at = static_cast<i64>(blockIdx.x) * 2 * p.outputs + first_column + column;
        p.statistics[at] = total;
        p.statistics[at + p.outputs] = total_squares;
    }
}

// Grid: row tiles, column tiles, classes.
template <class Engine, class T> DEVICE void conv(const ConvParams<T>& p) {
    DYNAMIC_SHARED(float, memory);
    const Gather& g = p.classes[blockIdx.z];
    const int first_row = blockIdx.x * Engine::ROWS, first_column = blockIdx.y * Engine::COLUMNS;
    // Classes may differ by a row or a column of positions.
    if (first_row >= g.rows) return;
    const int depth = Engine::K_TILE;
    const int tiles = g.taps_h * g.taps_w * ((g.run + depth - 1) / depth);
    Patches<T, Engine::A_SLOTS> a(p.x, g, p.packed);
    FilterRows<T, Engine::B_SLOTS> b(p.filter, g, p.outputs, p.filter_pitch, p.packed);
    Engine::run(a, b, first_row, first_column, 0, tiles, memory);
    conv_epilogue<Engine>(p, g, memory);
}

template <class T> struct WgradParams {
    In<T> x;           // (images, source_h, source_w, pixel)
    In<T> dy;          // (positions, outputs)
    Out<float> parts;  // (splits, outputs, taps * run)
    int outputs, columns, positions, split;  // split: positions of a part, a multiple of the engine's depth
    int packed_x, packed_dy;
    Divider run, taps_w;
    Gather patches;
};

// Grid: tiles of outputs, tiles of (tap, channel), splits.
template <class Engine, class T> DEVICE void wgrad(const WgradParams<T>& p) {
    DYNAMIC_SHARED(float, memory);
    const int first_row = blockIdx.x * Engine::ROWS, first_column = blockIdx.y * Engine::COLUMNS;
    const int begin = blockIdx.z * p.split, end = min(begin + p.split, p.positions);
    MatrixAcrossK<T, Engine::A_SLOTS> a{p.dy, p.outputs, end, p.outputs, p.packed_dy != 0};
    PatchesAcrossK<T, Engine::B_SLOTS> b(p.x, p.patches, p.run, p.taps_w, end, p.packed_x);
    const int depth = Engine::K_TILE;
    Engine::run(a, b, first_row, first_column, begin, (end - begin + depth - 1) / depth, memory);
    const int PER_ROW = Engine::COLUMNS / 4;
    for (int q = threadIdx.x; q < Engine::ROWS * PER_ROW; q += Engine::THREADS) {
        const int row = q / PER_ROW, column = q % PER_ROW * 4;
        const int output = first_row + row, at = first_column + column;
        if (output >= p.outputs || at >= p.columns) continue;
        const Out<float> target = p.parts + (static_cast<i64>(blockIdx.z) * p.outputs + output) * p.columns + at;
        float v[4];
        load_floats<4>(memory + (row * Engine::PITCH + column), v);
        if (p.columns % 4 == 0) {
            store_floats<float, 4>(target, v);
        } else {
            for (int i = 0; i < 4 && at + i < p.columns; i++) target[i] = v[i];
        }
    }
}

typedef SimtEngine<128, 128, 8, 8> Simt128;
typedef SimtEngine<64, 64, 16, 4> Simt64;

#define CONV(name, T, Engine)                                                             \
    KERNEL(conv_##name, ConvParams<T>, 256) { conv<Engine, T>(p); }                       \
    KERNEL(wgrad_##name, WgradParams<T>, 256) { wgrad<Engine, T>(p); }

CONV(f32_simt_128x128, float, Simt128)
CONV(f32_simt_64x64, float, Simt64)
CONV(bf16_simt_128x128, bf16, Simt128)
CONV(bf16_simt_64x64, bf16, Simt64)

#if defined(HONE_EMULATOR) || __CUDA_ARCH__ >= 800
#define MMA_CONV(name, T)                                                                 \
    typedef MmaEngine<T, 128, 128, 2, 4, 4> name##_128x128;                               \
    typedef MmaEngine<T, 128, 64, 4, 2, 4> name##_128x64;                                 \
    typedef MmaEngine<T, 64, 64, 2, 4, 4> name##_64x64;                                   \
    CONV(name##_128x128, T, name##_128x128)                                               \
    CONV(name##_128x64, T, name##_128x64)                                                 \
    CONV(name##_64x64, T, name##_64x64)

MMA_CONV(tf32_mma, float)
MMA_CONV(bf16_mma, bf16)
#endif

struct SumPartsParams {
    In<float> parts;  // (splits, n)
    Out<float> sum;   // (n)
    int n, splits;
};

// The second pass of wgrad: parts in their order, so that the bits are the same each time.
KERNEL(sum_parts, SumPartsParams, 256) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < p.n; i += gridDim.x * blockDim.x) {
        float sum = 0.0f;
        for (int part = 0; part < p.splits; part++) sum += p.parts[static_cast<i64>(part) * p.n + i];
        p.sum[i] = sum;
    }
}

template <class T> struct PackFilterParams {
    In<float> filter;  // (outputs, taps, inputs)
    Out<T> packed;
    int outputs, taps, inputs;
};

// To (outputs, taps, inputs) in the type of the activations.
#define CAST_FILTER(name, T)                                                                                      \
    KERNEL(cast_filter_##name, PackFilterParams<T>, 256) {                                                        \
        const int n = p.outputs * p.taps * p.inputs;                                                              \
        for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)                   \
            p.packed[i] = from_float<T>(p.filter[i]);                                                             \
    }
CAST_FILTER(bf16, bf16)

// To (inputs, taps, outputs), for gradients to inputs. Grid: tiles of 32 inputs, tiles of 32 outputs, taps.
template <class T> DEVICE void transpose_filter(const PackFilterParams<T>& p) {
    SHARED(float, tile, 32 * 33);
    const int input0 = blockIdx.x * 32, output0 = blockIdx.y * 32, tap = blockIdx.z;
    const int x = threadIdx.x % 32, y = threadIdx.x / 32;
    for (int i = y; i < 32; i += 8) {
        const int output = output0 + i, input = input0 + x;
        const bool inside = output < p.outputs && input < p.inputs;
        tile[i * 33 + x] = inside ? p.filter[(static_cast<i64>(output) * p.taps + tap) * p.inputs + input] : 0.0f;
    }
    __syncthreads();
    for (int i = y; i < 32; i += 8) {
        const int input = input0 + i, output = output0 + x;
        if (output < p.outputs && input < p.inputs)
            p.packed[(static_cast<i64>(input) * p.taps + tap) * p.outputs + output] = from_float<T>(tile[x * 33 + i]);
    }
}
KERNEL(transpose_filter_f32, PackFilterParams<float>, 256) { transpose_filter(p); }
KERNEL(transpose_filter_bf16, PackFilterParams<bf16>, 256) { transpose_filter(p); }

template <class T> struct PackChannelsParams {
    In<T> x;       // (images, h, w, c)
    Out<T> y;      // (images, padded_h, padded_w, pixel)
    int images, h, w, c, padded_h, padded_w, pixel, top, left;
};

// A copy with zeros around the image and after the channels: what the first layer reads.
template <class T> DEVICE void pack_channels(const PackChannelsParams<T>& p) {
    const int pixels = p.images * p.padded_h * p.padded_w;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < pixels; i += gridDim.x * blockDim.x) {
        const int n = i / (p.padded_h * p.padded_w), y = i / p.padded_w % p.padded_h - p.top, x = i % p.padded_w - p.left;
        const bool inside = y >= 0 && y < p.h && x >= 0 && x < p.w;
        for (int c = 0; c < p.pixel; c++) {
            const bool exists = inside && c < p.c;
            p.y[static_cast<i64>(i) * p.pixel + c] =
                exists ? T(p.x[((static_cast<i64>(n) * p.h + y) * p.w + x) * p.c + c]) : from_float<T>(0.0f);
        }
    }
}
KERNEL(pack_channels_f32, PackChannelsParams<float>, 256) { pack_channels(p); }
KERNEL(pack_channels_bf16, PackChannelsParams<bf16>, 256) { pack_channels(p); }

template <class T> struct RowFilterParams {
    In<float> filter;    // (outputs, taps_h, taps_w, c)
    Out<T> packed;       // (outputs, taps_h, packed_w, pixel), zeros where filter has nothing
    int outputs, taps_h, taps_w, c, packed_w, pixel;
};

// Filters of the first layer, as pack_channels has its input.
template <class T> DEVICE void pack_row_filter(const RowFilterParams<T>& p) {
    const int n = p.outputs * p.taps_h * p.packed_w * p.pixel;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        const int c = i % p.pixel, x = i / p.pixel % p.packed_w, row = i / (p.pixel * p.packed_w);
        const bool exists = c < p.c && x < p.taps_w;
        p.packed[i] = from_float<T>(exists ? p.filter[(static_cast<i64>(row) * p.taps_w + x) * p.c + c] : 0.0f);
    }
}
KERNEL(pack_row_filter_f32, RowFilterParams<float>, 256) { pack_row_filter(p); }
KERNEL(pack_row_filter_bf16, RowFilterParams<bf16>, 256) { pack_row_filter(p); }

struct UnpackRowFilterParams {
    In<float> packed;   // (outputs, taps_h, packed_w, pixel)
    Out<float> filter;  // (outputs, taps_h, taps_w, c)
    int outputs, taps_h, taps_w, c, packed_w, pixel;
};

// The way back, for gradients.
KERNEL(unpack_row_filter, UnpackRowFilterParams, 256) {
    const int n = p.outputs * p.taps_h * p.taps_w * p.c;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        const int c = i % p.c, x = i / p.c % p.taps_w, row = i / (p.c * p.taps_w);
        p.filter[i] = p.packed[(static_cast<i64>(row) * p.packed_w + x) * p.pixel + c];
    }
}
