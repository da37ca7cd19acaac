// Batch normalisation of x (rows, channels), with the ReLU and the residual that follow it in a residual network.
//
// Sums over rows go in two passes: blocks reduce pieces of rows, one block adds the pieces in order. No float is added
// atomically, so the bits are the same each time. Channels lie innermost: a warp reads neighbouring channels of a row.
//
// y = act(xhat * gamma + beta + residual), xhat = (x - mean) * rstd. With g = dy where the ReLU let it pass:
// dbeta = sum g, dgamma = sum g * xhat, dresidual = g, and dx = gamma * rstd * (g - (dbeta + xhat * dgamma) / rows) with batch
// statistics, gamma * rstd * g with stored ones.
#include "common.cuh"

const int CHANNELS = 32;  // of a block
const int LANES = 8;      // rows a block reads at a time; thread = lane * CHANNELS + channel

template <class T> struct StatisticsParams {
    In<T> x;           // (rows, channels)
    Out<float> parts;  // (row blocks, 2, channels): mean, sum of squared deviations
    int rows, channels, rows_per_block;
};

// Two numbers of two sets of values: their mean and sum of squared deviations. Chan, Golub and LeVeque, 1979.
DEVICE void merge(float& mean, float& squares, float& count, float other_mean, float other_squares, float other_count) {
    const float total = count + other_count;
    if (other_count == 0.0f) return;
    const float delta = other_mean - mean, share = other_count / total;
    mean += delta * share;
    squares += other_squares + delta * delta * count * share;
    count = total;
}

// Grid: channel blocks, row blocks.
template <class T> DEVICE void statistics(const StatisticsParams<T>& p) {
    SHARED(float, shared, 3 * CHANNELS * LANES);
    const int lane = threadIdx.x / CHANNELS, c = blockIdx.x * CHANNELS + threadIdx.x % CHANNELS;
    const int begin = blockIdx.y * p.rows_per_block, end = min(begin + p.rows_per_block, p.rows);
    // Shifted by the piece's first row, so that a large mean does not cancel a small variance.
    float shift = 0.0f, sum = 0.0f, squares = 0.0f, count = 0.0f;
    if (c < p.channels) {
        shift = to_float(p.x[static_cast<i64>(begin) * p.channels + c]);
        for (int row = begin + lane; row < end; row += LANES) {
            const float d = to_float(p.x[static_cast<i64>(row) * p.channels + c]) - shift;
            sum += d;
            squares += d * d;
            count += 1.0f;
        }
    }
    float mean = count > 0.0f ? sum / count : 0.0f;
    squares -= sum * mean;
    mean += shift;
    shared[threadIdx.x] = mean;
    shared[threadIdx.x + CHANNELS * LANES] = squares;
    shared[threadIdx.x + 2 * CHANNELS * LANES] = count;
    __syncthreads();
    if (lane > 0 || c >= p.channels) return;
    for (int i = 1; i < LANES; i++) {
        const int other = threadIdx.x + i * CHANNELS;
        merge(mean, squares, count, shared[other], shared[other + CHANNELS * LANES], shared[other + 2 * CHANNELS * LANES]);
    }
    const i64 at = static_cast<i64>(blockIdx.y) * 2 * p.channels + c;
    p.parts[at] = mean;
    p.parts[at + p.channels] = squares;
}
KERNEL(statistics_f32, StatisticsParams<float>, 256) { statistics(p); }
KERNEL(statistics_bf16, StatisticsParams<bf16>, 256) { statistics(p); }

struct MergeStatisticsParams {
    In<float> parts;  // (blocks, 2, channels) of rows_per_block rows each, the last one of the rest
    Out<float> mean;
    Out<float> variance;  // biased
    int rows, channels, rows_per_block, blocks;
};

// A warp a channel: each lane merges a run of parts, then lanes merge in pairs. Grid: channels / 8.
KERNEL(merge_statistics, MergeStatisticsParams, 256) {
    const int c = blockIdx.x * 8 + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int run = (p.blocks + WARP - 1) / WARP;
    float mean = 0.0f, squares = 0.0f, count = 0.0f;
    if (c < p.channels) {
        for (int i = lane * run; i < min((lane + 1) * run, p.blocks); i++) {
            const float n = min(p.rows_per_block, p.rows - i * p.rows_per_block);
            const i64 at = static_cast<i64>(i) * 2 * p.channels + c;
            merge(mean, squares, count, p.parts[at], p.parts[at + p.channels], n);
        }
    }
#pragma unroll
    for (int offset = 1; offset < WARP; offset *= 2) {
        const float m = __shfl_xor_sync(0xffffffffu, mean, offset), s = __shfl_xor_sync(0xffffffffu, squares, offset);
        const float n = __shfl_xor_sync(0xffffffffu, count, offset);
        merge(mean, squares, count, m, s, n);
    }
    if (lane == 0 && c < p.channels) {
        p.mean[c] = mean;
        p.variance[c] = squares / count;
    }
}

template <class T> struct NormParams {
    In<T> x;         // (rows, channels)
    In<T> residual;  // as x, or null
    Out<T> y;
    In<float> gamma;  // (channels), as the next three
    In<float> beta;
    In<float> mean;
    In<float> variance;
    i64 count;  // rows * channels
    float eps;
    int channels, relu, unused;
};

// As the CPU computes it: 1 / sqrt in full precision.
DEVICE float reciprocal_deviation(float variance, float eps) { return 1.0f / sqrtf(variance + eps); }

// N neighbouring channels a thread; N divides channels.
template <int N, class T> DEVICE void normalise(const NormParams<T>& p) {
    const i64 step = static_cast<i64>(gridDim.x) * blockDim.x * N;
    for (i64 i = (static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x) * N; i < p.count; i += step) {
        const int c = static_cast<int>(i % p.channels);
        float x[N], r[N] = {};
        load_floats<N>(p.x + i, x);
        if (p.residual) load_floats<N>(p.residual + i, r);
#pragma unroll
        for (int e = 0; e < N; e++) {
            const float scale = p.gamma[c + e] * reciprocal_deviation(p.variance[c + e], p.eps);
            const float y = x[e] * scale + (p.beta[c + e] - p.mean[c + e] * scale) + r[e];
            x[e] = p.relu && y < 0.0f ? 0.0f : y;
        }
        store_floats<T, N>(p.y + i, x);
    }
}
KERNEL(normalise_f32, NormParams<float>, 256) { p.channels % 4 == 0 ? normalise<4>(p) : normalise<1>(p); }
KERNEL(normalise_bf16, NormParams<bf16>, 256) { p.channels % 8 == 0 ? normalise<8>(p) : normalise<1>(p); }

template <class T> struct NormBackwardParams {
    In<T> x;
    In<T> y;   // what came out, for the ReLU's mask; null without one
    In<T> dy;
    Out<T> dx;         // null in the first pass
    Out<T> dresidual;  // null unless asked for
    In<float> gamma;
    In<float> mean;
    In<float> variance;
    Out<float> parts;  // first pass: (row blocks, 2, channels), sums of g and of g * xhat
    In<float> dgamma;  // second pass
    In<float> dbeta;
    i64 count;
    float eps;
    int rows, channels, rows_per_block, batch_statistics, unused;
};

// First pass. Grid: channel blocks, row blocks.
template <class T> DEVICE void norm_sums(const NormBackwardParams<T>& p) {
    SHARED(float, shared, 2 * CHANNELS * LANES);
    const int lane = threadIdx.x / CHANNELS, c = blockIdx.x * CHANNELS + threadIdx.x % CHANNELS;
    const int begin = blockIdx.y * p.rows_per_block, end = min(begin + p.rows_per_block, p.rows);
    float sum = 0.0f, product = 0.0f;
    if (c < p.channels) {
        const float mean = p.mean[c], rstd = reciprocal_deviation(p.variance[c], p.eps);
        for (int row = begin + lane; row < end; row += LANES) {
            const i64 i = static_cast<i64>(row) * p.channels + c;
            const bool passes = !p.y || to_float(p.y[i]) > 0.0f;
            const float g = passes ? to_float(p.dy[i]) : 0.0f;
            sum += g;
            product += g * ((to_float(p.x[i]) - mean) * rstd);
        }
    }
    shared[threadIdx.x] = sum;
    shared[threadIdx.x + CHANNELS * LANES] = product;
    __syncthreads();
    if (lane > 0 || c >= p.channels) return;
    for (int i = 1; i < LANES; i++) {
        sum += shared[threadIdx.x + i * CHANNELS];
        product += shared[threadIdx.x + i * CHANNELS + CHANNELS * LANES];
    }
    const i64 at = static_cast<i64>(blockIdx.y) * 2 * p.channels + c;
    p.parts[at] = sum;
    p.parts[at + p.channels] = product;
}
KERNEL(norm_sums_f32, NormBackwardParams<float>, 256) { norm_sums(p); }
KERNEL(norm_sums_bf16, NormBackwardParams<bf16>, 256) { norm_sums(p); }

struct ColumnPartsParams {
    In<float> parts;  // (blocks, n)
    Out<float> sums;  // (n)
    int blocks, n;
};

// Adds parts: a warp a column. Grid: n / 8.
KERNEL(add_column_parts, ColumnPartsParams, 256) {
    const int column = blockIdx.x * 8 + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float sum = 0.0f;
    if (column < p.n) {
        for (int i = lane; i < p.blocks; i += WARP) sum += p.parts[static_cast<i64>(i) * p.n + column];
    }
    sum = warp_sum(sum);
    if (lane == 0 && column < p.n) p.sums[column] = sum;
}

// Second pass.
template <int N, class T> DEVICE void norm_backward(const NormBackwardParams<T>& p) {
    const i64 step = static_cast<i64>(gridDim.x) * blockDim.x * N;
    const float per_row = p.batch_statistics ? 1.0f / p.rows : 0.0f;
    for (i64 i = (static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x) * N; i < p.count; i += step) {
        const int c = static_cast<int>(i % p.channels);
        float x[N], g[N];
        load_floats<N>(p.x + i, x);
        load_floats<N>(p.dy + i, g);
        if (p.y) {
            float y[N];
            load_floats<N>(p.y + i, y);
#pragma unroll
            for (int e = 0; e < N; e++) g[e] = y[e] > 0.0f ? g[e] : 0.0f;
        }
        if (p.dresidual) store_floats<T, N>(p.dresidual + i, g);
#pragma unroll
        for (int e = 0; e < N; e++) {
            const float rstd = reciprocal_deviation(p.variance[c + e], p.eps), xhat = (x[e] - p.mean[c + e]) * rstd;
            const float mean_part = p.batch_statistics ? (p.dbeta[c + e] + xhat * p.dgamma[c + e]) * per_row : 0.0f;
            x[e] = p.gamma[c + e] * rstd * (g[e] - mean_part);
        }
        store_floats<T, N>(p.dx + i, x);
    }
}
KERNEL(norm_backward_f32, NormBackwardParams<float>, 256) { p.channels % 4 == 0 ? norm_backward<4>(p) : norm_backward<1>(p); }
KERNEL(norm_backward_bf16, NormBackwardParams<bf16>, 256) { p.channels % 8 == 0 ? norm_backward<8>(p) : norm_backward<1>(p); }

template <class T> struct ColumnSumsParams {
    In<T> x;           // (rows, channels)
    Out<float> parts;  // (row blocks, channels)
    int rows, channels, rows_per_block, unused;
};

// For every column the sum over rows: the gradient to a bias. Grid: channel blocks, row blocks.
KERNEL(column_sums_f32, ColumnSumsParams<float>, 256) {
    SHARED(float, shared, CHANNELS * LANES);
    const int lane = threadIdx.x / CHANNELS, c = blockIdx.x * CHANNELS + threadIdx.x % CHANNELS;
    const int begin = blockIdx.y * p.rows_per_block, end = min(begin + p.rows_per_block, p.rows);
    float sum = 0.0f;
    if (c < p.channels) {
        for (int row = begin + lane; row < end; row += LANES) sum += p.x[static_cast<i64>(row) * p.channels + c];
    }
    shared[threadIdx.x] = sum;
    __syncthreads();
    if (lane > 0 || c >= p.channels) return;
    for (int i = 1; i < LANES; i++) sum += shared[threadIdx.x + i * CHANNELS];
    p.parts[static_cast<i64>(blockIdx.y) * p.channels + c] = sum;
}

struct BlendParams {
    Out<float> running;
    In<float> batch;
    float keep, factor;
    int n, unused;
};

// running = running * keep + batch * factor: running statistics, and averages of the network.
KERNEL(blend, BlendParams, 256) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < p.n; i += gridDim.x * blockDim.x)
        p.running[i] = p.running[i] * p.keep + p.batch[i] * p.factor;
}
