// A CUDA device on a CPU: runs kernels of `src/moeruntime/kernels` block by block, as `__init__.py` translates them.
//
// A thread is a fiber, which gives way wherever it waits for others. What the device does in its own time, copies and
// products of a warpgroup, happens at once or as late as it may, at random: who reads too early or writes too soon is
// found out. So is who waits for ever. Any thread may be behind the others of its warp. Shared memory is poisoned before a block begins. What is not shown: how memory
// of several blocks that run at once is ordered, and whatever is slow.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __CUDA_ARCH__ 900

struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};
struct uint4 {
    uint32_t x, y, z, w;
};
struct dim3 {
    uint32_t x, y, z;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
using std::max;
using std::min;

namespace emulated {

constexpr int WARP = 32, WARPGROUP = 128;
constexpr uint32_t SHARED_AT = 4096; // the address of the first byte of shared memory, as PTX has it
constexpr size_t STACK_BYTES = 128 * 1024, GUARD_BYTES = 1024;
constexpr uint8_t POISON = 0xA5;

struct Fail : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// -- threads ----------------------------------------------------------------------------------------------------------

struct Copy { // that has not happened yet
    uint8_t *to;
    const uint8_t *from;
    uint32_t bytes, barrier;
};
struct WarpgroupProduct { // c (+)= a, of all lanes, times columns of b
    void *c;
    const uint32_t *a;
    uint64_t b;
    bool add;
    int columns;
    bool wide; // 16 numbers in bfloat16 a row and column, in place of 32 integers of 8 bits
};
struct Thread {
    jmp_buf at; // where it gave way
    std::unique_ptr<char[]> stack;
    dim3 index;
    bool done;
    bool (*ready)(const void *); // what it waits for, if it does
    const void *waits_for;
    std::string error;
    std::vector<Copy> copies;                             // of this thread alone
    std::vector<std::vector<WarpgroupProduct>> products;  // groups of them; the last one is open
    uint32_t groups;                                      // that were begun so far
};
struct Meeting {
    int arrived = 0;
    uint32_t round = 0;
};
struct Phase { // of a barrier in shared memory
    int count, pending;
    int64_t bytes;
    uint32_t parity;
};

inline std::vector<Thread> threads;
inline int running, num_threads;
inline uint64_t progress, launch_seed;
inline jmp_buf scheduler;
inline std::function<void()> work;
inline std::mt19937_64 chance;
inline dim3 block, grid;
inline uint8_t *shared_memory;
inline uint32_t shared_bytes;
inline std::map<uint32_t, Phase> phases;
inline std::vector<Copy> copies; // of the copy engine
inline Meeting all, named, warps[32], warpgroups[8];
inline uint32_t lanes_have[1024];
inline const uint32_t *rows_of[1024];

inline void stop(const std::string &what) {
    const Thread &me = threads[running];
    throw Fail("block " + std::to_string(block.x) + "," + std::to_string(block.y) + "," + std::to_string(block.z) +
               ", thread " + std::to_string(me.index.x) + ": " + what);
}
// What it does is kept in fibers; `_setjmp` and `_longjmp` alone go from one to the other without the system.
inline void give_way() {
    if (_setjmp(threads[running].at) == 0) _longjmp(scheduler, 1);
}
template <class Done> void wait_until(Done done) {
    Thread &me = threads[running];
    me.ready = [](const void *done) { return (*(const Done *)done)(); };
    me.waits_for = &done;
    if (!done()) give_way();
    me.ready = nullptr, progress++;
}
inline void meet(Meeting &with, int count) {
    const uint32_t round = with.round;
    if (++with.arrived == count) {
        with.arrived = 0, with.round++, progress++;
    } else {
        wait_until([&] { return with.round != round; });
    }
}
inline void meet_warp() { meet(warps[running / WARP], WARP); }
inline void meet_warpgroup() { meet(warpgroups[running / WARPGROUP], WARPGROUP); }

// -- memory -----------------------------------------------------------------------------------------------------------

inline uint8_t *at(uint32_t address, uint32_t bytes) {
    if (address < SHARED_AT || address + bytes > SHARED_AT + shared_bytes)
        stop("address " + std::to_string((int)address - (int)SHARED_AT) + " is not of " + std::to_string(shared_bytes) +
             " shared bytes");
    return shared_memory + (address - SHARED_AT);
}
inline void settle(Phase &phase) {
    if (phase.pending < 0) stop("more arrive than a barrier expects");
    if (phase.pending == 0 && phase.bytes == 0) phase.pending = phase.count, phase.parity ^= 1, progress++;
}
inline Phase &phase_at(uint32_t address) {
    const auto found = phases.find(address);
    if (found == phases.end()) stop("there is no barrier at " + std::to_string((int)address - (int)SHARED_AT));
    return found->second;
}
inline void finish(const Copy &copy) {
    std::memcpy(copy.to, copy.from, copy.bytes);
    progress++;
    if (copy.barrier == 0) return;
    Phase &phase = phase_at(copy.barrier);
    phase.bytes -= copy.bytes;
    settle(phase);
}

// -- instructions, by the names that `__init__.py` gives them ---------------------------------------------------------

template <class... Operands> void nothing(Operands &&...) {}
inline void barrier_init(uint32_t address, int count) {
    at(address, 8);
    if (address % 8) stop("a barrier is not aligned");
    phases[address] = {count, count, 0, 0};
}
inline void barrier_arrive(uint32_t address) {
    Phase &phase = phase_at(address);
    phase.pending--, settle(phase);
}
inline void barrier_arrive_first(uint32_t address, uint32_t lane) {
    if (lane == 0) barrier_arrive(address);
}
inline void barrier_expect(uint32_t address, int bytes) {
    Phase &phase = phase_at(address);
    phase.bytes += bytes, phase.pending--, settle(phase);
}
inline void barrier_wait(uint32_t address, uint32_t parity) {
    wait_until([&] { return phase_at(address).parity != parity; });
}
inline void copy_bulk(uint32_t to, const void *from, int bytes, uint32_t barrier) {
    if (to % 16 || (uintptr_t)from % 16 || bytes % 16 || bytes <= 0) stop("a copy is not of whole 16 bytes");
    copies.push_back({at(to, bytes), (const uint8_t *)from, (uint32_t)bytes, barrier});
}
inline void copy_async(uint32_t to, const void *from) {
    if (to % 16 || (uintptr_t)from % 16) stop("a copy is not of whole 16 bytes");
    const Copy copy = {at(to, 16), (const uint8_t *)from, 16, 0};
    if (chance() & 1) finish(copy);
    else threads[running].copies.push_back(copy);
}
inline void copy_wait_all() {
    for (const Copy &copy : threads[running].copies) finish(copy);
    threads[running].copies.clear();
}
inline void meet_named(int count) { meet(named, count); }

// Of A, 16 rows of 32 bytes: lane 4 r + t has bytes 4 t and on of row r in register 0, of row r + 8 in register 1, and
// 16 bytes further in registers 2 and 3. Of B, 8 columns of 32 bytes: two registers a lane, like those of a row.
inline void warp_product(int &c0, int &c1, int &c2, int &c3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                         uint32_t b0, uint32_t b1, int d0, int d1, int d2, int d3) {
    const uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
    rows_of[running] = mine;
    meet_warp();
    const uint32_t *const *const lanes = rows_of + running / WARP * WARP;
    const int lane = running % WARP;
    uint32_t a[2][8], b[2][8]; // four columns each
    for (int k = 0; k < 8; k++)
        for (int i = 0; i < 2; i++) {
            a[i][k] = lanes[lane / 4 * 4 + k % 4][i + 2 * (k / 4)];
            b[i][k] = lanes[4 * (2 * (lane % 4) + i) + k % 4][4 + k / 4];
        }
    meet_warp();
    int found[4] = {d0, d1, d2, d3};
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 32; k++)
            found[i] += ((const uint8_t *)a[i / 2])[k] * ((const int8_t *)b[i % 2])[k];
    c0 = found[0], c1 = found[1], c2 = found[2], c3 = found[3];
}

inline float number(const uint8_t *bfloat16) {
    uint32_t bits = bfloat16[0] << 16 | bfloat16[1] << 24;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t bfloat16(double value) { // the nearest, whatever lies between in float32
    float near = (float)value;
    uint32_t bits;
    std::memcpy(&bits, &near, 4);
    const double error = value - near;
    if (error != 0 && (bits & 0xFFFF) == 0x8000) bits += (error > 0) == (near > 0) ? 1 : -1;
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline void two_times_plus(uint32_t &out, uint32_t a, uint32_t b, uint32_t c) {
    uint32_t found = 0;
    for (int i = 0; i < 2; i++) {
        auto of = [i](uint32_t two) { return (double)number((const uint8_t *)&two + 2 * i); };
        found |= bfloat16(of(a) * of(b) + of(c)) << 16 * i;
    }
    out = found;
}
inline void two_rounded(uint32_t &out, float upper, float lower) { out = bfloat16(upper) << 16 | bfloat16(lower); }

inline void select_bits(uint32_t &out, uint32_t a, uint32_t b, uint32_t of_a) { out = a & of_a | b & ~of_a; }

inline void multiply(const WarpgroupProduct &product) { // by all of a warpgroup
    rows_of[running] = product.a;
    meet_warpgroup();
    const uint32_t *const *const lanes = rows_of + running / WARP * WARP;
    const int lane = running % WARP;
    if (product.b >> 62 != 1) stop("the tokens are not swizzled by 128 bytes");
    const uint32_t first = (product.b & 0x3FFF) << 4, stride = (product.b >> 32 & 0x3FFF) << 4;
    uint32_t a[2][8];
    for (int k = 0; k < 8; k++)
        for (int below = 0; below < 2; below++) a[below][k] = lanes[lane / 4 * 4 + k % 4][below + 2 * (k / 4)];
    for (int eight = 0; eight < product.columns / 8; eight++)
        for (int i = 0; i < 4; i++) {
            const int row = 2 * (lane % 4) + i % 2;
            int &c = ((int *)product.c)[4 * eight + i];
            float &wide_c = ((float *)product.c)[4 * eight + i];
            int sum = product.add ? c : 0;
            float wide_sum = product.add ? wide_c : 0;
            // Addresses are of a window of 256 KB, whose bits 4 to 6 are exchanged with bits 7 to 9.
            const uint32_t begin = first + eight * stride + row * 128;
            for (int k = 0; k < 32; k += 16) {
                const uint32_t from = begin + k;
                const uint8_t *const b = at(from ^ (from >> 7 & 7) << 4, 16);
                const uint8_t *const mine = (const uint8_t *)a[i / 2] + k;
                if (product.wide)
                    for (int j = 0; j < 8; j++) wide_sum += number(mine + 2 * j) * number(b + 2 * j);
                else
                    for (int j = 0; j < 16; j++) sum += mine[j] * (int8_t)b[j];
            }
            if (product.wide) wide_c = wide_sum;
            else c = sum;
        }
    meet_warpgroup();
}
inline bool is_late(const Thread &me) { // all of a warpgroup say the same
    return std::hash<uint64_t>{}((launch_seed + me.groups * 8 + running / WARPGROUP) * 0x9E3779B97F4A7C15ull) >> 40 & 1;
}
template <int T> void start_product(int (&c)[4 * T], const uint32_t *a, uint64_t b, int add) {
    Thread &me = threads[running];
    if (me.products.empty()) me.products.emplace_back();
    const WarpgroupProduct product = {c, a, b, add != 0, 8 * T, false};
    if (!is_late(me)) return multiply(product);
    if (!add)
        for (int &one : c) one = 0x5A5A5A5A;
    me.products.back().push_back(product);
}
// These add to the same sums, one after the other.
template <int T> void start_product(float (&c)[4 * T], const uint32_t *a, uint64_t b, int add) {
    Thread &me = threads[running];
    if (me.products.empty()) me.products.emplace_back();
    bool waits = is_late(me);
    for (const auto &group : me.products) waits = waits || !group.empty();
    const WarpgroupProduct product = {c, a, b, add != 0, 8 * T, true};
    if (!waits) return multiply(product);
    if (!add)
        for (float &one : c) one = NAN;
    me.products.back().push_back(product);
}
inline void products_commit() {
    Thread &me = threads[running];
    me.groups++;
    me.products.emplace_back();
}
inline void products_wait(int open) {
    Thread &me = threads[running];
    while ((int)me.products.size() > open + 1) {
        for (const WarpgroupProduct &product : me.products.front()) multiply(product);
        me.products.erase(me.products.begin());
    }
}

// -- a launch ---------------------------------------------------------------------------------------------------------

inline void run_thread() { // of one block after the other
    for (;;) {
        Thread &me = threads[running];
        try {
            work();
            if (!me.copies.empty()) stop("copies are not waited for");
            for (const auto &group : me.products)
                if (!group.empty()) stop("products are not waited for");
        } catch (const Fail &problem) {
            me.error = problem.what();
        }
        me.done = true, progress++;
        give_way();
    }
}
inline void make_threads() {
    static ucontext_t context;
    threads = std::vector<Thread>(num_threads);
    for (running = 0; running < num_threads; running++) {
        threads[running].stack.reset(new char[STACK_BYTES]);
        getcontext(&context);
        context.uc_stack.ss_sp = threads[running].stack.get();
        context.uc_stack.ss_size = STACK_BYTES;
        makecontext(
            &context,
            [] {
                give_way();
                run_thread();
            },
            0);
        if (_setjmp(scheduler) == 0) setcontext(&context);
    }
}
inline void run_block() {
    std::fill(shared_memory, shared_memory + shared_bytes + GUARD_BYTES, POISON);
    phases.clear(), copies.clear();
    for (int i = 0; i < num_threads; i++) {
        threads[i].index = {(uint32_t)i, 0, 0};
        threads[i].done = false, threads[i].groups = 0;
        threads[i].products.clear();
    }
    int slow = -1; // who is behind all others, if anybody
    for (int left = num_threads; left > 0;) {
        const uint64_t before = progress;
        if (chance() % 8 == 0) slow = chance() % 8 ? -1 : chance() % num_threads;
        const int first = chance() % num_threads, by = chance() & 1 ? 1 : num_threads - 1;
        for (int i = 0, at = first; i < num_threads; i++, at = (at + by) % num_threads) {
            Thread &thread = threads[running = at];
            if (at == slow || thread.done || (thread.ready && !thread.ready(thread.waits_for))) continue;
            if (_setjmp(scheduler) == 0) _longjmp(thread.at, 1);
            if (!threads[running].error.empty()) throw Fail(threads[running].error);
            left -= threads[running].done;
        }
        const bool waits = progress == before;
        if (waits && slow >= 0) {
            slow = -1;
            continue;
        }
        if (waits && copies.empty()) {
            while (threads[running].done) running = (running + 1) % num_threads;
            stop("waits for ever");
        }
        for (size_t i = 0; i < copies.size();) {
            if (!waits && chance() & 1) {
                i++;
                continue;
            }
            const Copy copy = copies[i];
            copies.erase(copies.begin() + i);
            finish(copy);
        }
    }
    if (!copies.empty()) stop("copies are not waited for");
    for (uint32_t i = 0; i < GUARD_BYTES; i++)
        if (shared_memory[shared_bytes + i] != POISON) stop("something is written behind shared memory");
}
template <class... Parameters, size_t... I>
void prepare(void (*kernel)(Parameters...), void **arguments, std::index_sequence<I...>) {
    work = [=] { kernel(*(std::remove_const_t<Parameters> *)arguments[I]...); };
}
template <class... Parameters>
void launch(void (*kernel)(Parameters...), void **arguments, const uint32_t *grid_size, int block_size, int bytes,
            uint64_t seed) {
    prepare(kernel, arguments, std::index_sequence_for<Parameters...>{});
    grid = {grid_size[0], grid_size[1], grid_size[2]};
    num_threads = block_size, shared_bytes = bytes, running = 0;
    chance.seed(launch_seed = seed);
    std::vector<uint8_t> memory(bytes + GUARD_BYTES + 1024);
    shared_memory = (uint8_t *)(((uintptr_t)memory.data() + 1023) / 1024 * 1024);
    std::vector<dim3> blocks;
    for (uint32_t z = 0; z < grid.z; z++)
        for (uint32_t y = 0; y < grid.y; y++)
            for (uint32_t x = 0; x < grid.x; x++) blocks.push_back({x, y, z});
    std::shuffle(blocks.begin(), blocks.end(), chance);
    try {
        if ((int)threads.size() != num_threads) make_threads();
        for (const dim3 &one : blocks) block = one, run_block();
    } catch (const Fail &) { // whoever is somewhere within a kernel stays there
        threads.clear();
        all = named = {};
        for (Meeting &one : warps) one = {};
        for (Meeting &one : warpgroups) one = {};
        throw;
    }
}

} // namespace emulated

#define threadIdx (emulated::threads[emulated::running].index)
#define blockIdx emulated::block
#define gridDim emulated::grid

inline void __syncthreads() { emulated::meet(emulated::all, emulated::num_threads); }
inline void __syncwarp() { emulated::meet_warp(); }
inline void __threadfence() {}
template <class T> T __ldg(const T *from) { return *from; }
template <class T> T __ldcg(const T *from) { return *from; }
inline int atomicAdd(int *to, int more) { return std::exchange(*to, *to + more); }
inline float __expf(float x) { return std::exp(x); }
inline int __float2int_rn(float x) { return (int)std::nearbyint(x); }
inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t by) {
    return (uint32_t)(((uint64_t)high << 32 | low) >> (by & 31));
}
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t which) {
    uint32_t found = 0;
    for (int i = 0; i < 4; i++) found |= (uint32_t)(((uint64_t)high << 32 | low) >> 8 * (which >> 4 * i & 7) & 0xFF) << 8 * i;
    return found;
}
inline uint64_t __cvta_generic_to_shared(const uint8_t *at) {
    return emulated::SHARED_AT + (at - emulated::shared_memory);
}
template <class T> T from_lane(T mine, int lane) {
    static_assert(sizeof(T) == 4);
    std::memcpy(&emulated::lanes_have[emulated::running], &mine, 4);
    emulated::meet_warp();
    std::memcpy(&mine, &emulated::lanes_have[emulated::running / 32 * 32 + lane], 4);
    emulated::meet_warp();
    return mine;
}
template <class T> T __shfl_xor_sync(unsigned, T mine, int mask) { return from_lane(mine, emulated::running % 32 ^ mask); }
template <class T> T __shfl_up_sync(unsigned, T mine, int by) {
    const int lane = emulated::running % 32;
    return from_lane(mine, lane >= by ? lane - by : lane);
}
inline int __reduce_max_sync(unsigned, int mine) {
    for (int far = 16; far; far >>= 1) mine = max(mine, __shfl_xor_sync(~0u, mine, far));
    return mine;
}
