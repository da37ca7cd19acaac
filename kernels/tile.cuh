// One block's tile of a matrix product C = A B, for every product in hone: dense matrices, and convolutions whose left side
// is gathered while it is loaded. A product is put together from two operands and an engine:
//
// - an operand knows where its elements lie: MatrixAlongK, MatrixAcrossK, Patches, FilterRows, PatchesAcrossK;
// - SimtEngine multiplies in f32 on the CUDA cores, MmaEngine in TF32 or bf16 on the tensor cores.
//
// An operand has ROWS of the tile (of C's rows for A, its columns for B) and a depth, K, that is summed over. It lies either
// along K (a row's elements side by side) or across K (the rows of one k side by side). Elements move in packs of 16 bytes;
// a thread's packs of a tile are its slots. For slots along K the row stays the same from tile to tile, across K the place
// in the row.
#pragma once
#include "mma.cuh"

// Where the rows of an implicit matrix lie: row m belongs to a position of a grid of grid_h x grid_w in each image, and is
// made of one run of elements for each of taps_h x taps_w taps. `pixel` elements lie between pixels of the source.
struct Gather {
    int rows, taps_h, taps_w, run, pixel;
    int source_h, source_w;
    // Source coordinate of position i and tap u: i * step + start + u * tap_step.
    int step_h, step_w, start_h, start_w, tap_step;
    // Tap u, v of the filter's row: ((filter_h + u * filter_step) * filter_w_taps + filter_w + v * filter_step) * run.
    int filter_h, filter_w, filter_step, filter_w_taps;
    // Row of the target that position i, j is written to: (n * target_h + target_start_h + i * target_step_h) * target_w + ...
    int target_h, target_w, target_start_h, target_start_w, target_step_h, target_step_w;
    Divider grid_w, grid;

    DEVICE void position(u32 row, int& n, int& i, int& j) const {
        n = static_cast<int>(row / grid);
        const u32 rest = row - n * grid.divisor;
        i = static_cast<int>(rest / grid_w);
        j = static_cast<int>(rest - i * grid_w.divisor);
    }
    DEVICE i64 target(u32 row) const {
        int n, i, j;
        position(row, n, i, j);
        return (static_cast<i64>(n) * target_h + target_start_h + i * target_step_h) * target_w + target_start_w +
               j * target_step_w;
    }
};

// ---- operands -----------------------------------------------------------------------------------------------------------
// Each has: T, ALONG_K; seek(slot, row, k): where slot's pack is within the tile; next(depth): on to the next tile of that
// depth; address(slot, valid): of the pack, for copies of 16 bytes; floats(slot, x): four elements as floats, with whatever
// does not exist as zero, for any alignment.

// a (rows, depth), row-major with `pitch` elements from row to row.
template <class E, int SLOTS> struct MatrixAlongK {
    using T = E;
    static const bool ALONG_K = true;
    In<T> a;
    int rows, depth, pitch;
    bool packed;  // whether packs of four are aligned and none is cut by the end of a row
    int row[SLOTS], k[SLOTS];

    DEVICE void seek(int slot, int r, int at) { row[slot] = r, k[slot] = at; }
    DEVICE void next(int tile_depth) {
#pragma unroll
        for (int i = 0; i < SLOTS; i++) k[i] += tile_depth;
    }
    DEVICE In<T> address(int slot, bool& valid) const {
        valid = row[slot] < rows && k[slot] < depth;
        return a + (valid ? static_cast<i64>(row[slot]) * pitch + k[slot] : 0);
    }
    DEVICE void floats(int slot, float* x) const {
        bool valid;
        const In<T> p = address(slot, valid);
        if (packed && valid) return load_floats<4>(p, x);
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = valid && k[slot] + i < depth ? to_float(p[i]) : 0.0f;
    }
};

// b (depth, rows), row-major with `pitch` elements from k to k.
template <class E, int SLOTS> struct MatrixAcrossK {
    using T = E;
    static const bool ALONG_K = false;
    In<T> b;
    int rows, depth, pitch;
    bool packed;
    int row[SLOTS], k[SLOTS];

    DEVICE void seek(int slot, int r, int at) { row[slot] = r, k[slot] = at; }
    DEVICE void next(int tile_depth) {
#pragma unroll
        for (int i = 0; i < SLOTS; i++) k[i] += tile_depth;
    }
    DEVICE In<T> address(int slot, bool& valid) const {
        valid = row[slot] < rows && k[slot] < depth;
        return b + (valid ? static_cast<i64>(k[slot]) * pitch + row[slot] : 0);
    }
    DEVICE void floats(int slot, float* x) const {
        bool valid;
        const In<T> p = address(slot, valid);
        if (packed && valid) return load_floats<4>(p, x);
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = valid && row[slot] + i < rows ? to_float(p[i]) : 0.0f;
    }
};

// The patches of x (images, source_h, source_w, pixel) along K: tap after tap, and a tap's run in tiles of its own.
template <class E, int SLOTS> struct Patches {
    using T = E;
    static const bool ALONG_K = true;
    In<T> x;
    const Gather& g;
    bool packed;
    int tap_h, tap_w, tile;  // where the current tile is
    int k[SLOTS], y0[SLOTS], x0[SLOTS];
    i64 image[SLOTS];

    DEVICE Patches(In<T> source, const Gather& geometry, bool in_packs)
        : x(source), g(geometry), packed(in_packs), tap_h(0), tap_w(0), tile(0) {}
    DEVICE void seek(int slot, int row, int at) {
        int n = 0, i = 0, j = 0;
        g.position(row < g.rows ? row : 0, n, i, j);
        k[slot] = at;
        // A row beyond the last reads nothing: no tap brings it back inside.
        y0[slot] = row < g.rows ? i * g.step_h + g.start_h : -(1 << 29);
        x0[slot] = j * g.step_w + g.start_w;
        image[slot] = static_cast<i64>(n) * g.source_h * g.source_w;
    }
    DEVICE void next(int depth) {
        tile += depth;
        if (tile < g.run) return;
        tile = 0;
        if (++tap_w < g.taps_w) return;
        tap_w = 0;
        tap_h++;
    }
    DEVICE In<T> address(int slot, bool& valid) const {
        const int row = y0[slot] + tap_h * g.tap_step, column = x0[slot] + tap_w * g.tap_step;
        valid = static_cast<u32>(row) < static_cast<u32>(g.source_h) &&
                static_cast<u32>(column) < static_cast<u32>(g.source_w) && tile + k[slot] < g.run;
        return x + (valid ? (image[slot] + row * g.source_w + column) * g.pixel + tile + k[slot] : 0);
    }
    DEVICE void floats(int slot, float* v) const {
        bool valid;
        const In<T> p = address(slot, valid);
        if (packed && valid) return load_floats<4>(p, v);
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = valid && tile + k[slot] + i < g.run ? to_float(p[i]) : 0.0f;
    }
};

// Filters (outputs, filter taps, run), in the order in which Patches visits the taps.
template <class E, int SLOTS> struct FilterRows {
    using T = E;
    static const bool ALONG_K = true;
    In<T> w;
    const Gather& g;
    int outputs, pitch;
    bool packed;
    int tap_h, tap_w, tile;
    int row[SLOTS], k[SLOTS];

    DEVICE FilterRows(In<T> filter, const Gather& geometry, int rows, int row_pitch, bool in_packs)
        : w(filter), g(geometry), outputs(rows), pitch(row_pitch), packed(in_packs), tap_h(0), tap_w(0), tile(0) {}
    DEVICE void seek(int slot, int r, int at) { row[slot] = r, k[slot] = at; }
    DEVICE void next(int depth) {
        tile += depth;
        if (tile < g.run) return;
        tile = 0;
        if (++tap_w < g.taps_w) return;
        tap_w = 0;
        tap_h++;
    }
    DEVICE In<T> address(int slot, bool& valid) const {
        valid = row[slot] < outputs && tile + k[slot] < g.run;
        const int tap = (g.filter_h + tap_h * g.filter_step) * g.filter_w_taps + g.filter_w + tap_w * g.filter_step;
        return w + (valid ? static_cast<i64>(row[slot]) * pitch + tap * g.run + tile + k[slot] : 0);
    }
    DEVICE void floats(int slot, float* v) const {
        bool valid;
        const In<T> p = address(slot, valid);
        if (packed && valid) return load_floats<4>(p, v);
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = valid && tile + k[slot] + i < g.run ? to_float(p[i]) : 0.0f;
    }
};

// The patches of x across K: k is a position, a row one element (tap, c) of the patch. For gradients to filters.
template <class E, int SLOTS> struct PatchesAcrossK {
    using T = E;
    static const bool ALONG_K = false;
    In<T> x;
    const Gather& g;
    Divider run, taps_w;
    int end;  // positions from here on belong to another block
    bool packed;
    int row[SLOTS], k[SLOTS], dy[SLOTS], dx[SLOTS], c[SLOTS];

    DEVICE PatchesAcrossK(In<T> source, const Gather& geometry, const Divider& by_run, const Divider& by_taps_w, int last,
                          bool in_packs)
        : x(source), g(geometry), run(by_run), taps_w(by_taps_w), end(last), packed(in_packs) {}
    DEVICE void decode(int r, int& tap_y, int& tap_x, int& channel) const {
        const u32 tap = static_cast<u32>(r) / run;
        channel = static_cast<int>(r - tap * run.divisor);
        const u32 u = tap / taps_w;
        tap_y = static_cast<int>(u);
        tap_x = static_cast<int>(tap - u * taps_w.divisor);
    }
    DEVICE int rows() const { return g.taps_h * g.taps_w * g.run; }
    DEVICE void seek(int slot, int r, int at) {
        row[slot] = r, k[slot] = at;
        decode(r, dy[slot], dx[slot], c[slot]);
    }
    DEVICE void next(int depth) {
#pragma unroll
        for (int i = 0; i < SLOTS; i++) k[i] += depth;
    }
    DEVICE In<T> at(int slot, int tap_y, int tap_x, int channel, bool& valid) const {
        int n, i, j;
        g.position(k[slot] < end ? k[slot] : 0, n, i, j);
        const int y = i * g.step_h + g.start_h + tap_y, column = j * g.step_w + g.start_w + tap_x;
        valid = valid && k[slot] < end && static_cast<u32>(y) < static_cast<u32>(g.source_h) &&
                static_cast<u32>(column) < static_cast<u32>(g.source_w);
        return x + (valid ? ((static_cast<i64>(n) * g.source_h + y) * g.source_w + column) * g.pixel + channel : 0);
    }
    DEVICE In<T> address(int slot, bool& valid) const {
        valid = row[slot] < rows();
        return at(slot, dy[slot], dx[slot], c[slot], valid);
    }
    DEVICE void floats(int slot, float* v) const {
        if (packed) {
            bool valid;
            const In<T> p = address(slot, valid);
            if (valid) return load_floats<4>(p, v);
#pragma unroll
            for (int i = 0; i < 4; i++) v[i] = 0.0f;
            return;
        }
        // Neighbours may belong to different taps.
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int tap_y, tap_x, channel;
            decode(row[slot] + i, tap_y, tap_x, channel);
            bool valid = row[slot] + i < rows();
            const In<T> p = at(slot, tap_y, tap_x, channel, valid);
            v[i] = valid ? to_float(p[0]) : 0.0f;
        }
    }
};

// ---- engines ------------------------------------------------------------------------------------------------------------
// Each has THREADS, ROWS x COLUMNS of C, and run(a, b, tiles, c): leaves the tile in shared memory as f32 with PITCH elements
// from row to row, for an epilogue to read after the barrier that run ends with.

// f32 on the CUDA cores. A thread computes M x M elements from M + M values it holds in registers; the next tile's packs are
// on their way to registers meanwhile.
template <int BM, int BN, int BK, int M> struct SimtEngine {
    static const int ROWS = BM, COLUMNS = BN, THREADS = BM / M * (BN / M), PITCH = BN + 4, K_TILE = BK;
    static const int A_SLOTS = BM * BK / 4 / THREADS, B_SLOTS = BN * BK / 4 / THREADS;
    static const int HALF = M / 4;  // groups of four

    // Where pack q of an operand's tile is.
    template <bool ALONG_K, int R> DEVICE static void place(int q, int& row, int& k) {
        if (ALONG_K) {
            row = q / (BK / 4), k = q % (BK / 4) * 4;
        } else {
            row = q % (R / 4) * 4, k = q / (R / 4);
        }
    }
    template <int R, int SLOTS, class O> DEVICE static void seek(O& o, int first_row, int first_k) {
#pragma unroll
        for (int i = 0; i < SLOTS; i++) {
            int row, k;
            place<O::ALONG_K, R>(threadIdx.x + i * THREADS, row, k);
            o.seek(i, first_row + row, first_k + k);
        }
    }
    template <int R, int SLOTS, class O> DEVICE static void store(const float (*packs)[4], Shared<float> tile) {
#pragma unroll
        for (int i = 0; i < SLOTS; i++) {
            int row, k;
            place<O::ALONG_K, R>(threadIdx.x + i * THREADS, row, k);
            if (O::ALONG_K) {
#pragma unroll
                for (int e = 0; e < 4; e++) tile[(k + e) * (R + 4) + row] = packs[i][e];
            } else {
                store_floats<float, 4>(tile + (k * (R + 4) + row), packs[i]);
            }
        }
    }

    template <class A, class B>
    DEVICE static void run(A& a, B& b, int first_row, int first_column, int first_k, int tiles, Shared<float> memory) {
        const int A_TILE = BK * (BM + 4), B_TILE = BK * (BN + 4);
        const int ty = threadIdx.x / (BN / M) * 4, tx = threadIdx.x % (BN / M) * 4;
        seek<BM, A_SLOTS>(a, first_row, first_k);
        seek<BN, B_SLOTS>(b, first_column, first_k);
        float c[M][M] = {};
        float next_a[A_SLOTS][4], next_b[B_SLOTS][4];
        for (int tile = -1; tile < tiles; tile++) {
            const int current = tile & 1;
            if (tile + 1 < tiles) {
#pragma unroll
                for (int i = 0; i < A_SLOTS; i++) a.floats(i, next_a[i]);
#pragma unroll
                for (int i = 0; i < B_SLOTS; i++) b.floats(i, next_b[i]);
                a.next(BK), b.next(BK);
            }
            if (tile >= 0) {
                const Shared<float> as = memory + current * (A_TILE + B_TILE), bs = as + A_TILE;
#pragma unroll
                for (int k = 0; k < BK; k++) {
                    float av[M], bv[M];
#pragma unroll
                    for (int h = 0; h < HALF; h++) {
                        load_floats<4>(as + (k * (BM + 4) + h * (BM / HALF) + ty), av + h * 4);
                        load_floats<4>(bs + (k * (BN + 4) + h * (BN / HALF) + tx), bv + h * 4);
                    }
#pragma unroll
                    for (int i = 0; i < M; i++)
#pragma unroll
                        for (int j = 0; j < M; j++) c[i][j] += av[i] * bv[j];
                }
            }
            if (tile + 1 < tiles) {
                const Shared<float> as = memory + (1 - current) * (A_TILE + B_TILE);
                store<BM, A_SLOTS, A>(next_a, as);
                store<BN, B_SLOTS, B>(next_b, as + A_TILE);
            }
            __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < M; i++)
#pragma unroll
            for (int h = 0; h < HALF; h++) {
                const int row = i / 4 * (BM / HALF) + ty + i % 4, column = h * (BN / HALF) + tx;
                store_floats<float, 4>(memory + (row * PITCH + column), c[i] + h * 4);
            }
        __syncthreads();
    }
};

// Tensor cores: TF32 for f32 elements, bf16 for bf16, sums in f32. A tile of K is 64 bytes a row, two steps of the mma;
// copies of the tiles after it are under way in STAGES - 1 buffers. Packs lie in shared memory in an order that keeps
// ldmatrix free of bank conflicts.
template <class T, int BM, int BN, int WARPS_M, int WARPS_N, int STAGES> struct MmaEngine {
    static const int ROWS = BM, COLUMNS = BN, THREADS = WARPS_M * WARPS_N * WARP, PITCH = BN + 4;
    static const int PACK = 16 / sizeof(T), BK = 4 * PACK, K_TILE = BK;
    static const int A_SLOTS = BM * 4 / THREADS, B_SLOTS = BN * 4 / THREADS;
    static const int TILE_M = BM / WARPS_M / 16, TILE_N = BN / WARPS_N / 16;

    // Element index of pack `pack` of row `row` in an operand's tile along K, or of pack `pack` of k across K.
    DEVICE static int along(int row, int pack) { return (row * 4 + (pack ^ (row >> 1 & 3))) * PACK; }
    template <int R> DEVICE static int across(int k, int pack) {
        return (k * (R / PACK) + (pack ^ (sizeof(T) == 2 ? k & 7 : (k & 3) << 1))) * PACK;
    }
    template <bool ALONG_K, int R> DEVICE static void place(int q, int& row, int& k, int& index) {
        if (ALONG_K) {
            row = q / 4, k = q % 4 * PACK, index = along(row, q % 4);
        } else {
            row = q % (R / PACK) * PACK, k = q / (R / PACK), index = across<R>(k, q % (R / PACK));
        }
    }
    template <int R, int SLOTS, class O> DEVICE static void seek(O& o, int first_row, int first_k) {
#pragma unroll
        for (int i = 0; i < SLOTS; i++) {
            int row, k, index;
            place<O::ALONG_K, R>(threadIdx.x + i * THREADS, row, k, index);
            o.seek(i, first_row + row, first_k + k);
        }
    }
    template <int R, int SLOTS, class O> DEVICE static void copy(O& o, Shared<T> tile) {
#pragma unroll
        for (int i = 0; i < SLOTS; i++) {
            int row, k, index;
            place<O::ALONG_K, R>(threadIdx.x + i * THREADS, row, k, index);
            bool valid;
            const In<T> p = o.address(i, valid);
            cp_async_16(tile + index, p, valid);
        }
        o.next(BK);
    }
    DEVICE static void round(u32* r) {
        if (sizeof(T) == 4) {
#pragma unroll
            for (int i = 0; i < 4; i++) r[i] = round_to_tf32(r[i]);
        }
    }
    // Rows row..row+15 of A for step `step`: the mma's operand a.
    template <bool ALONG_K> DEVICE static void fragment_a(u32* r, Shared<T> tile, int row, int step) {
        const int lane = threadIdx.x % WARP;
        if (ALONG_K) {
            ldmatrix(r, tile + along(row + lane % 16, step * 2 + lane / 16));
        } else if (sizeof(T) == 2) {
            const int k = step * 16 + lane % 8 + lane / 16 * 8;
            ldmatrix_transposed(r, tile + across<BM>(k, row / PACK + lane / 8 % 2));
        } else {
            scalar_fragment<BM>(r, tile, row, step, 1, 2);
        }
        round(r);
    }
    // Columns column..column+15 of B: operand b of two mmas.
    template <bool ALONG_K> DEVICE static void fragment_b(u32* r, Shared<T> tile, int column, int step) {
        const int lane = threadIdx.x % WARP;
        if (ALONG_K) {
            ldmatrix(r, tile + along(column + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
        } else if (sizeof(T) == 2) {
            const int k = step * 16 + lane % 16;
            ldmatrix_transposed(r, tile + across<BN>(k, column / PACK + lane / 16));
        } else {
            scalar_fragment<BN>(r, tile, column, step, 2, 1);
        }
        round(r);
    }
    // There is no transposing ldmatrix for 32 bits. Register i has row + 8 if i & row_bit, k + 4 if i & k_bit.
    template <int R> DEVICE static void scalar_fragment(u32* r, Shared<T> tile, int row, int step, int row_bit, int k_bit) {
        const int lane = threadIdx.x % WARP;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int at = row + lane / 4 + (i & row_bit ? 8 : 0), k = step * 8 + lane % 4 + (i & k_bit ? 4 : 0);
            r[i] = float_to_bits(to_float(T(tile[across<R>(k, at / PACK) + at % PACK])));
        }
    }

    template <class A, class B>
    DEVICE static void run(A& a, B& b, int first_row, int first_column, int first_k, int tiles, Shared<float> memory) {
#ifdef HONE_EMULATOR
        const Shared<T> stages{memory.address};
#else
        T* const stages = reinterpret_cast<T*>(memory);
#endif
        const int STAGE = (BM + BN) * BK;
        const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
        const int row0 = warp / WARPS_N * (BM / WARPS_M), column0 = warp % WARPS_N * (BN / WARPS_N);
        seek<BM, A_SLOTS>(a, first_row, first_k);
        seek<BN, B_SLOTS>(b, first_column, first_k);
        float c[TILE_M][TILE_N * 2][4] = {};
#pragma unroll
        for (int s = 0; s < STAGES - 1; s++) {
            if (s < tiles) {
                copy<BM, A_SLOTS>(a, stages + s * STAGE);
                copy<BN, B_SLOTS>(b, stages + (s * STAGE + BM * BK));
            }
            cp_async_commit();
        }
        for (int tile = 0; tile < tiles; tile++) {
            cp_async_wait<STAGES - 2>();
            // Also: everybody is done with the tile before, whose buffer is filled again now.
            __syncthreads();
            if (tile + STAGES - 1 < tiles) {
                const Shared<T> free = stages + (tile + STAGES - 1) % STAGES * STAGE;
                copy<BM, A_SLOTS>(a, free);
                copy<BN, B_SLOTS>(b, free + BM * BK);
            }
            cp_async_commit();
            const Shared<T> as = stages + tile % STAGES * STAGE, bs = as + BM * BK;
#pragma unroll
            for (int step = 0; step < 2; step++) {
                u32 fa[TILE_M][4], fb[TILE_N][4];
#pragma unroll
                for (int i = 0; i < TILE_M; i++) fragment_a<A::ALONG_K>(fa[i], as, row0 + i * 16, step);
#pragma unroll
                for (int j = 0; j < TILE_N; j++) fragment_b<B::ALONG_K>(fb[j], bs, column0 + j * 16, step);
#pragma unroll
                for (int i = 0; i < TILE_M; i++)
#pragma unroll
                    for (int j = 0; j < TILE_N * 2; j++) mma(T(), c[i][j], fa[i], fb[j / 2] + j % 2 * 2);
            }
        }
        cp_async_wait<0>();
        __syncthreads();
#pragma unroll
        for (int i = 0; i < TILE_M; i++)
#pragma unroll
            for (int j = 0; j < TILE_N * 2; j++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const int row = row0 + i * 16 + h * 8 + lane / 4, column = column0 + j * 8 + lane % 4 * 2;
                    store_floats<float, 2>(memory + (row * PITCH + column), c[i][j] + h * 2);
                }
        __syncthreads();
    }
};
