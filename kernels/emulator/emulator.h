// A grid on the CPU: the same kernel files, compiled by the host's C++ compiler with this header in front.
//
// A block's threads are fibers of one OS thread; they run until they wait at a barrier or a warp operation. What a card
// would do silently wrong stops the launch with a message here:
//
// - access outside the buffer that a pointer came from, or not aligned to its size, or to one that has been freed,
// - memory read before anything was written to it, shared memory above all,
// - a barrier that some threads of the block do not reach, or reach at another line; the same for a warp's operations,
// - shared memory written by one warp and touched by another without a barrier between them,
// - data of cp.async read before its wait.
//
// A device address is a host address with the number of its allocation in the upper 16 bits; arithmetic keeps the number,
// so every access can be held against the allocation it started from.
#pragma once
#define HONE_EMULATOR 1

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>
#include "fiber.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(n)
#define DEVICE inline

struct dim3 {
    unsigned x, y, z;
};

namespace emulator {

// Number of an allocation and its memory; the host side owns the table and shares it with every kernel library.
struct Allocation {
    uint64_t base, bytes;
    // One byte for each: 0 never written, 1 written.
    uint8_t* written;
};

struct Launch {
    const Allocation* allocations;
    uint64_t allocation_count;
    dim3 grid, block;
    uint32_t dynamic_shared;
    // Blocks that this call runs, by their linear number.
    uint64_t first, last;
    // What went wrong first.
    char* message;
    uint64_t message_bytes;
};

const int ADDRESS_BITS = 48;
const uint64_t ADDRESS_MASK = (uint64_t(1) << ADDRESS_BITS) - 1;
// The allocation number of shared memory.
const uint64_t SHARED_TAG = 0xffff;
const size_t SHARED_LIMIT = 227 << 10;
const int WARP_SIZE = 32;

enum class Wait { None, Barrier, Warp, Done };

struct PendingCopy {
    uint64_t target;
    uint8_t data[16];
    int group;
};

struct Thread {
    fiber::Fiber fiber;
    dim3 index;
    int linear = 0;
    Wait wait = Wait::None;
    int line = 0;
    // Arguments of the warp operation it waits at.
    void* slot = nullptr;
    std::vector<PendingCopy> copies;
    int group = 0;
};

// What is known of two bytes of shared memory: when and by whom they were last written and read. Times are barriers.
struct Cell {
    uint32_t written, read;
    uint16_t writer, reader;
    bool in_flight;
};

struct Block {
    const Launch* launch = nullptr;
    dim3 index;
    std::vector<Thread> threads;
    std::vector<uint8_t> shared;
    std::vector<Cell> cells;
    size_t static_shared = 0;
    // The epoch now, and that in which this block began; epochs only grow, so that old cells need no clearing.
    uint32_t epoch = 1, began = 1;
    uint64_t number = 0;
    Thread* current = nullptr;
    fiber::Fiber scheduler;
    bool failed = false;
    void (*body)(void*) = nullptr;
    void* argument = nullptr;
};

inline Block& block() {
    static thread_local Block instance;
    return instance;
}

// Ends the block with a message: control goes back to the scheduler and never returns.
template <class... A> [[noreturn]] inline void fail(const char* format, A... values) {
    Block& b = block();
    char what[256], where[160];
    snprintf(what, sizeof what, format, values...);
    const Thread* t = b.current;
    snprintf(where, sizeof where, " (block %u,%u,%u thread %u,%u,%u)", b.index.x, b.index.y, b.index.z, t ? t->index.x : 0,
             t ? t->index.y : 0, t ? t->index.z : 0);
    if (!b.failed) snprintf(b.launch->message, b.launch->message_bytes, "%s%s", what, where);
    b.failed = true;
    t->fiber.leave_to(b.scheduler);
}

inline void suspend(Wait why) {
    Block& b = block();
    b.current->wait = why;
    b.current->fiber.switch_to(b.scheduler);
}

inline void barrier(int line) {
    Thread* t = block().current;
    t->line = line;
    suspend(Wait::Barrier);
}

// Meets the other lanes of the warp at `line`; the last to come runs `combine` over the arguments of all of them.
template <class T, class F> inline void meet(T& mine, int line, F combine) {
    Block& b = block();
    Thread* t = b.current;
    Thread* warp = &b.threads[t->linear / WARP_SIZE * WARP_SIZE];
    t->slot = &mine;
    t->line = line;
    int waiting = 1;
    for (int lane = 0; lane < WARP_SIZE; lane++) waiting += warp[lane].wait == Wait::Warp;
    if (waiting < WARP_SIZE) {
        suspend(Wait::Warp);
        return;
    }
    T* all[WARP_SIZE];
    for (int lane = 0; lane < WARP_SIZE; lane++) {
        if (warp[lane].line != line) fail("lanes of a warp meet at lines %d and %d", line, warp[lane].line);
        all[lane] = static_cast<T*>(warp[lane].slot);
    }
    combine(all);
    for (int lane = 0; lane < WARP_SIZE; lane++) {
        if (warp[lane].wait == Wait::Warp) warp[lane].wait = Wait::None;
    }
}

enum class Async { None, Begins, Ends };

// Checks an access of `bytes` at a device address and returns where it is. An asynchronous copy is two writes.
inline uint8_t* check(uint64_t address, size_t bytes, size_t alignment, bool write, Async async = Async::None) {
    Block& b = block();
    const uint64_t tag = address >> ADDRESS_BITS, at = address & ADDRESS_MASK;
    const char* what = write ? "write" : "read";
    if (at % alignment) fail("%s of %zu bytes at a misaligned address", what, bytes);
    if (tag == SHARED_TAG) {
        const uint64_t offset = at - (reinterpret_cast<uint64_t>(b.shared.data()) & ADDRESS_MASK);
        const size_t size = b.static_shared + b.launch->dynamic_shared;
        if (offset >= size || bytes > size - offset) {
            fail("%s of %zu bytes at %lld of %zu bytes of shared memory", what, bytes, (long long)offset, size);
        }
        const int self = b.current->linear / WARP_SIZE;
        // A byte shares its cell with its neighbour: two warps that write bytes side by side are not told apart, and wrong.
        for (size_t i = offset / 2; i <= (offset + bytes - 1) / 2; i++) {
            Cell& cell = b.cells[i];
            const bool stale = cell.written < b.began;
            if (!stale && cell.in_flight && async == Async::None) fail("%s of shared memory at %zu before cp.async's wait", what, i * 2);
            if (!stale && cell.written == b.epoch && cell.writer != self) {
                fail("shared memory at %zu: %s by warp %d after a write by warp %d, no barrier between", i * 2, what, self,
                     int(cell.writer));
            }
            if (write) {
                if (cell.read == b.epoch && cell.reader != self) {
                    fail("shared memory at %zu: write by warp %d after a read by warp %d, no barrier between", i * 2, self,
                         int(cell.reader));
                }
                cell.written = b.epoch;
                cell.writer = uint16_t(self);
                cell.in_flight = async == Async::Begins;
            } else {
                if (stale) fail("read of shared memory at %zu before anything was written there", i * 2);
                // Of two warps that read, the later is remembered; a third that writes is caught by either.
                cell.read = b.epoch;
                cell.reader = uint16_t(self);
            }
        }
        return b.shared.data() + offset;
    }
    const Allocation* a = b.launch->allocations + tag;
    if (tag >= b.launch->allocation_count || a->base == 0) fail("%s through a pointer to no buffer", what);
    const uint64_t offset = at - a->base;
    if (offset >= a->bytes || bytes > a->bytes - offset) {
        fail("%s of %zu bytes at %lld of a buffer of %llu bytes", what, bytes, (long long)offset, (unsigned long long)a->bytes);
    }
    if (write) {
        memset(a->written + offset, 1, bytes);
    } else {
        for (size_t i = 0; i < bytes; i++) {
            if (!a->written[offset + i]) fail("read of byte %lld of a buffer before anything was written there", (long long)(offset + i));
        }
    }
    return reinterpret_cast<uint8_t*>(at);
}

template <class T> inline T read(uint64_t address) {
    T value;
    memcpy(&value, check(address, sizeof(T), alignof(T), false), sizeof(T));
    return value;
}

template <class T> inline void write(uint64_t address, const T& value) {
    memcpy(check(address, sizeof(T), alignof(T), true), &value, sizeof(T));
}

// An element that has been named but not yet read or written.
template <class T> struct Element {
    uint64_t address;
    operator T() const { return read<T>(address); }
    Element& operator=(const T& value) {
        write(address, value);
        return *this;
    }
    Element& operator=(const Element& other) { return *this = T(other); }
    Element& operator+=(const T& value) { return *this = T(*this) + value; }
};

template <class T> struct Pointer {
    uint64_t address;
    using Value = std::remove_const_t<T>;
    Pointer operator+(long long i) const { return Pointer{offset(i)}; }
    auto operator[](long long i) const {
        if constexpr (std::is_const_v<T>) {
            return read<Value>(offset(i));
        } else {
            return Element<T>{offset(i)};
        }
    }
    explicit operator bool() const { return address != 0; }
    operator Pointer<const T>() const { return Pointer<const T>{address}; }

  private:
    // Only the address moves, never the allocation's number.
    uint64_t offset(long long i) const {
        return (address & ~ADDRESS_MASK) | ((address + uint64_t(i * (long long)sizeof(T))) & ADDRESS_MASK);
    }
};

// Shared memory of one declaration: every thread of a block is given the same, every block a fresh one.
struct SharedSlot {
    uint64_t owner = 0;
    size_t offset = 0;
    template <class T> Pointer<T> get(size_t count) {
        Block& b = block();
        if (owner != b.number) {
            owner = b.number;
            offset = (b.static_shared + 15) / 16 * 16;
            b.static_shared = offset + (count * sizeof(T) + 15) / 16 * 16;
            if (b.static_shared + b.launch->dynamic_shared > SHARED_LIMIT) fail("more than %zu bytes of shared memory", SHARED_LIMIT);
        }
        // Dynamic memory comes first, so that its place does not depend on the declarations.
        return Pointer<T>{place(b.launch->dynamic_shared + offset)};
    }
    static uint64_t place(size_t offset) {
        return SHARED_TAG << ADDRESS_BITS | ((reinterpret_cast<uint64_t>(block().shared.data()) + offset) & ADDRESS_MASK);
    }
};

template <class T> inline Pointer<T> dynamic_shared() { return Pointer<T>{SharedSlot::place(0)}; }

template <class T> inline T shuffle_xor(T value, int mask, int line) {
    struct Argument {
        T value, result;
    } mine{value, value};
    meet(mine, line, [mask](Argument** all) {
        for (int lane = 0; lane < WARP_SIZE; lane++) all[lane]->result = all[lane ^ mask]->value;
    });
    return mine.result;
}

inline unsigned ballot(bool vote, int line) {
    struct Argument {
        bool vote;
        unsigned result;
    } mine{vote, 0};
    meet(mine, line, [](Argument** all) {
        unsigned mask = 0;
        for (int lane = 0; lane < WARP_SIZE; lane++) mask |= unsigned(all[lane]->vote) << lane;
        for (int lane = 0; lane < WARP_SIZE; lane++) all[lane]->result = mask;
    });
    return mine.result;
}

inline void run_thread(void* argument) {
    Block& b = block();
    b.body(b.argument);
    (void)argument;
    b.current->wait = Wait::Done;
    b.current->fiber.leave_to(b.scheduler);
}

// One block to its end; false once something has failed.
inline bool run_block(Block& b) {
    for (Thread& t : b.threads) {
        t.wait = Wait::None;
        t.copies.clear();
        t.group = 0;
        t.fiber.start(run_thread, nullptr);
    }
    for (;;) {
        bool progress = false;
        size_t done = 0, waiting = 0;
        for (Thread& t : b.threads) {
            if (t.wait == Wait::None) {
                b.current = &t;
                b.scheduler.switch_to(t.fiber);
                progress = true;
                if (b.failed) return false;
            }
            done += t.wait == Wait::Done;
            waiting += t.wait == Wait::Barrier;
        }
        if (done == b.threads.size()) return true;
        if (waiting == b.threads.size()) {
            b.current = &b.threads[0];
            for (Thread& t : b.threads) {
                if (t.line != b.threads[0].line) {
                    b.failed = true;
                    snprintf(b.launch->message, b.launch->message_bytes, "threads of a block wait at barriers in lines %d and %d",
                             b.threads[0].line, t.line);
                    return false;
                }
                t.wait = Wait::None;
            }
            b.epoch++;
        } else if (!progress) {
            const Thread* stuck = nullptr;
            for (Thread& t : b.threads) {
                if (!stuck && t.wait != Wait::Done) stuck = &t;
            }
            b.failed = true;
            snprintf(b.launch->message, b.launch->message_bytes,
                     "the %s at line %d is not reached by all threads: %zu of %zu wait at a barrier, %zu have ended (block %u,%u,%u)",
                     stuck->wait == Wait::Barrier ? "barrier" : "warp operation", stuck->line, waiting, b.threads.size(), done,
                     b.index.x, b.index.y, b.index.z);
            return false;
        }
    }
}

inline int run(const Launch* launch, void (*body)(void*), void* argument) {
    Block& b = block();
    const size_t threads = size_t(launch->block.x) * launch->block.y * launch->block.z;
    b.launch = launch;
    b.failed = false;
    b.body = body;
    b.argument = argument;
    b.current = nullptr;
    if (b.threads.size() != threads) b.threads = std::vector<Thread>(threads);
    b.shared.resize(SHARED_LIMIT + 16);
    b.cells.resize(SHARED_LIMIT / 2 + 8);
    for (size_t i = 0; i < threads; i++) {
        b.threads[i].linear = int(i);
        b.threads[i].index = dim3{unsigned(i % launch->block.x), unsigned(i / launch->block.x % launch->block.y),
                                  unsigned(i / launch->block.x / launch->block.y)};
    }
    if (threads == 0 || threads % WARP_SIZE || threads > 1024) {
        snprintf(launch->message, launch->message_bytes, "a block of %zu threads", threads);
        return 1;
    }
    for (uint64_t i = launch->first; i < launch->last; i++) {
        b.index = dim3{unsigned(i % launch->grid.x), unsigned(i / launch->grid.x % launch->grid.y),
                       unsigned(i / launch->grid.x / launch->grid.y)};
        b.static_shared = 0;
        b.number++;
        b.began = ++b.epoch;
        if (!run_block(b)) return 1;
    }
    return 0;
}

}  // namespace emulator

template <class T> using In = emulator::Pointer<const T>;
template <class T> using Out = emulator::Pointer<T>;
template <class T> using Shared = emulator::Pointer<T>;

template <class T, int N> struct Pack;

template <int N, class T> inline Pack<std::remove_const_t<T>, N> load_pack(emulator::Pointer<T> p) {
    return emulator::read<Pack<std::remove_const_t<T>, N>>(p.address);
}
template <int N, class T, class P> inline void store_pack(emulator::Pointer<T> p, const P& x) { emulator::write(p.address, x); }

#define SHARED(T, name, count)                              \
    static thread_local emulator::SharedSlot name##_slot;   \
    const Shared<T> name = name##_slot.get<T>(count)
#define DYNAMIC_SHARED(T, name) const Shared<T> name = emulator::dynamic_shared<T>()

#define KERNEL(name, Params, bound)                                                                     \
    static void name##_kernel(const Params& p);                                                         \
    extern "C" int name(const emulator::Launch* launch, const void* given, size_t bytes) {              \
        if (bytes != sizeof(Params)) {                                                                  \
            snprintf(launch->message, launch->message_bytes, "%zu bytes of parameters, expected %zu", bytes, sizeof(Params)); \
            return 1;                                                                                   \
        }                                                                                               \
        if (launch->block.x * launch->block.y * launch->block.z > (bound)) {                            \
            snprintf(launch->message, launch->message_bytes, "a block larger than the kernel's bound"); \
            return 1;                                                                                   \
        }                                                                                               \
        Params params;                                                                                  \
        memcpy(&params, given, bytes);                                                                  \
        return emulator::run(launch, [](void* p) { name##_kernel(*static_cast<const Params*>(p)); }, &params); \
    }                                                                                                   \
    static void name##_kernel(const Params& p)

#define threadIdx (emulator::block().current->index)
#define blockIdx (emulator::block().index)
#define blockDim (emulator::block().launch->block)
#define gridDim (emulator::block().launch->grid)
#define __syncthreads() emulator::barrier(__LINE__)
#define __syncwarp() (void)emulator::ballot(true, __LINE__)
#define __shfl_xor_sync(mask, value, lane_mask) emulator::shuffle_xor(value, lane_mask, __LINE__)
#define __ballot_sync(mask, vote) emulator::ballot(vote, __LINE__)
#define __any_sync(mask, vote) (emulator::ballot(vote, __LINE__) != 0)

inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
template <class T> inline T min(T a, T b) { return b < a ? b : a; }
template <class T> inline T max(T a, T b) { return a < b ? b : a; }
