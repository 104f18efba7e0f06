// Shared and private codes put together in bytes, in registers, as an operand of a warpgroup's products. Whoever
// includes this says PLANES (private planes that a face has at most: three bits are two), WIDE (somebody has a private
// plane of 4 bits), and RUN: bytes of a run of codes in shared memory.
#pragma once
#include "nested_hopper.cuh"

constexpr int OWN = PLANES == 0 ? 0 : WIDE ? 2 : 1; // runs of the first private plane, in a step
constexpr int OWN_RUNS = OWN + (PLANES == 2);       // of all private planes

// How a face's codes are put together, four in a word.
enum Way {
    EVEN,   // two private bits, and a is 2: 2 a L is L two bits further up
    NARROW, // 2 a L is below 16 otherwise, so that half a byte holds it; and L is not of three bits
    ANY,
};
struct Code { // of a face: r and a
    int bits, step;
    __device__ __forceinline__ int most() const { return step * ((1 << bits) - 1); } // a L
    __device__ __forceinline__ float middle() const { return middle_of(bits, step); }
    __device__ __forceinline__ Way way() const {
        if (PLANES > 0 && bits == 2 && step == 2) return EVEN;
        return PLANES == 0 || bits != 3 && most() < 8 ? NARROW : ANY;
    }
    // Runs of the first private plane and of the second that a step reads.
    __device__ __forceinline__ int own_runs() const { return PLANES == 0 || bits == 0 ? 0 : WIDE && bits == 4 ? 2 : 1; }
    __device__ __forceinline__ bool second() const { return PLANES > 1 && bits == 3; }
    __device__ __forceinline__ int runs() const { return own_runs() + second(); }
};

// By one thread: the private codes of a face, or of a unit of its tokens, beside shared codes that are `j` bytes into
// run p of each row.
template <class Owner>
__device__ __forceinline__ void copy_own(const Arguments &of, const Owner &owner, int p, int j, u32 to, int row, int rows,
                                         u32 full) {
    const Code code = {(int)owner.bits, (int)owner.step};
    const int J = of.num_columns / 8, runs = code.own_runs();
    const u8 *const own = plane_of(owner.at4, owner.at2, owner.at1, code.bits);
    auto copy_run = [&](int run, const u8 *plane, int byte) {
        of.copy_rows(to + run * RUN, plane, byte + j, row, rows, full);
    };
    if (runs) copy_run(0, own, code.bits == 1 ? 0 : p * J);
    if (runs == 2) copy_run(1, own, (p + 2) * J);
    if (code.second()) copy_run(OWN, (const u8 *)owner.at1, 0);
}

// The upper half of each byte of one word, and the lower half of each of another. Who compiles this would not see that
// it is one instruction.
__device__ __forceinline__ u32 halves_of(u32 upper, u32 lower) {
    u32 both;
    asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(both) : "r"(upper), "r"(lower), "r"(0xF0F0F0F0u));
    return both;
}

// 8 H + a L of a lane's rows in bytes, in units of 1 / SCALE.
template <Way WAY> struct Joined {
    static constexpr float SCALE = WAY == ANY ? 1.f : 2.f;
    static constexpr bool BOTH = WIDE && WAY == ANY; // runs may have private codes of their own
    const int bits;
    const u32 step, step1; // of the first private plane and of the second
    const u32 own_mask;
    Words shared, own, own1;
    u32 l[16]; // unless ANY: 2 a L of both fields
    __device__ __forceinline__ explicit Joined(const Code &code)
        : bits(code.bits), step(bits == 0 ? 0 : bits == 3 ? 2 * code.step : code.step), step1(bits == 3 ? code.step : 0),
          own_mask(bits == 4 ? 0x0F0F0F0Fu : bits == 1 ? 0x01010101u : 0x03030303u) {}
    // Run p + 2 upper of the shared codes, and the private codes beside it; `upper` first 0, then 1.
    __device__ __forceinline__ void load_run(const u8 *shared_runs, const u8 *own_runs, int row, int t, int p, int upper) {
        load(shared, shared_runs + upper * RUN, row, t);
        if (PLANES > 0 && (upper == 0 || BOTH)) load(own, own_runs + (BOTH && bits == 4 ? upper : 0) * RUN, row, t);
        if (PLANES > 1 && WAY == ANY && upper == 0) load(own1, own_runs + OWN * RUN, row, t);
        if (WAY == EVEN) {
#pragma unroll
            for (int i = 0; i < 16; i++) l[i] = (upper ? own[i] : own[i] << 2) & 0xCCCCCCCCu;
        } else if (WAY == NARROW) {
            const int odd = bits == 1 ? p : 0; // how much further up bits lie
#pragma unroll
            for (int i = 0; i < 16; i++)
                l[i] = PLANES == 0 ? 0 : (own[i] >> 2 * upper & 0x11 * own_mask << odd) * (2 * step >> odd);
        }
    }
    __device__ __forceinline__ u32 of(int i, int p, int upper, int field) const {
        if (WAY != ANY) return field ? halves_of(shared[i], l[i] >> 4) : halves_of(shared[i] << 4, l[i]);
        u32 code = (field ? shared[i] >> 1 : shared[i] << 3) & 0x78787878u;
        const int shift1 = p + 2 * upper + 4 * field;
        const int shift = bits == 1 ? shift1 : (bits == 4 ? 0 : 2 * upper) + 4 * field;
        if (PLANES > 0) code += (own[i] >> shift & own_mask) * step;
        if (PLANES > 1) code += (own1[i] >> shift1 & 0x01010101u) * step1;
        return code;
    }
};

// What the products of some tokens' halves with a lane's rows add to its sums: T tiles, whose integers count what
// `groups` says.
template <int T>
__device__ __forceinline__ void add_up(float (&sums)[T][2], int (&found)[4 * T], const float2 *groups,
                                       const float (&scale)[2], float middle) {
    keep_order(found);
#pragma unroll
    for (int tile = 0; tile < T; tile++) {
        const float2 one = groups[tile * BATCHES * TILE];
        const float less = one.y * middle;
#pragma unroll
        for (int below = 0; below < 2; below++)
            sums[tile][below] += scale[below] * (whole(found + 4 * tile + 2 * below) * one.x - less);
    }
}

template <auto VALUE> struct Constant {
    static constexpr auto value = VALUE;
};
// Calls `serve` with a constant: the way of a code.
template <class Serve> __device__ __forceinline__ void for_way(const Code &code, Serve serve) {
    if constexpr (PLANES == 0) {
        serve(Constant<NARROW>());
    } else {
        const Way way = code.way();
        if (way == EVEN) return serve(Constant<EVEN>());
        if (way == NARROW) return serve(Constant<NARROW>());
        serve(Constant<ANY>());
    }
}
