// Tensor cores and asynchronous copies: one thin function for each instruction, the only inline assembly of the kernels.
// They need sm_80; below it they are not compiled and the host does not launch kernels that use them.
#pragma once
#include "common.cuh"

#ifdef HONE_EMULATOR

namespace emulator {

struct Registers {
    u32 r[4];
};

// One 16-byte row address a lane; matrix i of four has its rows in lanes 8i..8i+7. Lane l is given elements
// [l/4][2(l%4)..] of every 8x8 matrix of 16-bit elements, or [2(l%4)..][l/4] of the transposed ones.
inline void ldmatrix(u32* registers, uint64_t address, bool transposed, int line) {
    struct Argument {
        u16 row[8];
        u32 result[4];
    } mine;
    // Reading here, as the lane that asks, puts errors where they belong.
    memcpy(mine.row, check(address, 16, 16, false), 16);
    auto combine = [transposed](Argument** all) {
        for (int lane = 0; lane < WARP_SIZE; lane++) {
            for (int matrix = 0; matrix < 4; matrix++) {
                Argument** rows = all + matrix * 8;
                const int a = lane / 4, b = lane % 4 * 2;
                const u16 low = transposed ? rows[b]->row[a] : rows[a]->row[b];
                const u16 high = transposed ? rows[b + 1]->row[a] : rows[a]->row[b + 1];
                all[lane]->result[matrix] = u32(low) | u32(high) << 16;
            }
        }
    };
    meet(mine, line, combine);
    memcpy(registers, mine.result, 16);
}

// c[16][8] += a[16][K] b[K][8] from the fragments of all lanes; `element` reads element i of a register.
template <int K, class F> inline void mma(float* c, const u32* a, const u32* b, int line, F element) {
    struct Argument {
        const u32 *a, *b;
        float* c;
    } mine{a, b, c};
    auto combine = [element](Argument** all) {
        const int per = K / 8;  // elements in a register: 2 of 16 bits, 1 of 32
        float A[16][K], B[K][8];
        for (int lane = 0; lane < WARP_SIZE; lane++) {
            const int group = lane / 4, t = lane % 4;
            for (int r = 0; r < 4; r++) {
                for (int i = 0; i < per; i++) A[group + r % 2 * 8][r / 2 * (K / 2) + t * per + i] = element(all[lane]->a[r], i);
            }
            for (int r = 0; r < 2; r++) {
                for (int i = 0; i < per; i++) B[r * (K / 2) + t * per + i][group] = element(all[lane]->b[r], i);
            }
        }
        for (int lane = 0; lane < WARP_SIZE; lane++) {
            for (int r = 0; r < 4; r++) {
                const int m = lane / 4 + r / 2 * 8, n = lane % 4 * 2 + r % 2;
                float sum = all[lane]->c[r];
                for (int k = 0; k < K; k++) sum += A[m][k] * B[k][n];
                all[lane]->c[r] = sum;
            }
        }
    };
    meet(mine, line, combine);
}

}  // namespace emulator

template <class T, class U> DEVICE void cp_async_16(Shared<T> target, In<U> source, bool valid) {
    emulator::Thread* t = emulator::block().current;
    emulator::PendingCopy copy;
    copy.target = target.address;
    copy.group = t->group;
    memset(copy.data, 0, 16);
    if (valid) memcpy(copy.data, emulator::check(source.address, 16, 16, false), 16);
    emulator::check(target.address, 16, 16, true, emulator::Async::Begins);
    t->copies.push_back(copy);
}

DEVICE void cp_async_commit() { emulator::block().current->group++; }

template <int N> DEVICE void cp_async_wait() {
    emulator::Thread* t = emulator::block().current;
    size_t kept = 0;
    for (const auto& copy : t->copies) {
        if (copy.group + N >= t->group) {
            t->copies[kept++] = copy;
        } else {
            memcpy(emulator::check(copy.target, 16, 16, true, emulator::Async::Ends), copy.data, 16);
        }
    }
    t->copies.resize(kept);
}

template <class T> DEVICE void ldmatrix(u32* registers, Shared<T> row) {
    emulator::ldmatrix(registers, row.address, false, __LINE__);
}
template <class T> DEVICE void ldmatrix_transposed(u32* registers, Shared<T> row) {
    emulator::ldmatrix(registers, row.address, true, __LINE__);
}

DEVICE void mma(bf16, float* c, const u32* a, const u32* b) {
    emulator::mma<16>(c, a, b, __LINE__, [](u32 r, int i) { return to_float(bf16{u16(r >> 16 * i)}); });
}
// The unit takes 19 bits of each operand and ignores the rest.
DEVICE void mma(float, float* c, const u32* a, const u32* b) {
    emulator::mma<8>(c, a, b, __LINE__, [](u32 r, int) { return bits_to_float(r & 0xffffe000u); });
}

// To 10 bits of mantissa, to the nearest, ties away from zero.
DEVICE u32 round_to_tf32(u32 x) { return (x & 0x7f800000u) == 0x7f800000u ? x : x + 0x1000u; }

#else

DEVICE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory past the registers; zeros where not `valid`. Visible to this thread after
// cp_async_wait, to the others after a barrier as well.
template <class T, class U> DEVICE void cp_async_16(T* target, const U* source, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source), "r"(valid ? 16 : 0)
                 : "memory");
}

DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all but the last N groups.
template <int N> DEVICE void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l%8 of matrix l/8 and is given elements
// [l/4][2(l%4)] and the next of each. Rows of 32-bit elements work as well: lane l is given element [l/4][l%4].
template <class T> DEVICE void ldmatrix(u32* r, T* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
}

template <class T> DEVICE void ldmatrix_transposed(u32* r, T* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
}

// c[16][8] += a[16][16] b[16][8], bf16 in f32.
DEVICE void mma(bf16, float* c, const u32* a, const u32* b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c[16][8] += a[16][8] b[8][8], TF32 in f32.
DEVICE void mma(float, float* c, const u32* a, const u32* b) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// To 10 bits of mantissa, to the nearest; without it the unit would cut the rest off, always towards zero.
DEVICE u32 round_to_tf32(u32 x) {
    u32 y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(__uint_as_float(x)));
    return y;
}

#endif
