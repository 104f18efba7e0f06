// The experts of a step over nested codes where faces have dozens of tokens and more, on Hopper devices.
//
// Weights u (8 H + a L - m), of which the head of `nested_fast.cu` tells, are decoded in registers as
// `nested.decode_faces` decodes them into memory, to the bit, and multiplied as bfloat16 with tokens in bfloat16. So
// sums run through all columns, and nothing is added up in between, which is what `nested_many.cu` spends most of its
// instructions on where tokens are many; unpacking takes twice as many as there.
//
// A code's bits become the first ones of a number in [2, 4): h = 2 + H / 8 and l = 2 + 2 L / 2^bits, two numbers a
// register. With K = 2^bits a + m + 128, the weight is u (64 h + 2^bits a / 2 l - K). Everything in brackets is a
// multiple of a half below 256, so exact, but for K: what it is rounded by leaves with the last multiplication.
//
// A block takes 128 rows (of gate_up 64 neurons' gate and up rows) and up to 8 TILES tokens of a face. There is a block
// for every multiprocessor, which takes one piece of work after the other. One thread has codes copied into a ring,
// another has tokens copied into another ring; two warpgroups multiply 64 rows each, and never wait for each other.
//
// Compiled with GATE_UP, TILES (of eight tokens: 4, 8, 12 or 16), PLANES (private planes that a face has at most: three
// bits are two), WIDE (somebody has a private plane of 4 bits), CODE_SLOTS and TOKEN_SLOTS (of the rings).

#include "nested_units.cuh"

static_assert(TILE == 8, "tokens lie by eights");

constexpr int TOKEN_SLOT = TILES * TILE_BYTES; // of a batch
constexpr int TOKENS_AT = CODE_SLOTS * CODES, BARRIERS_AT = TOKENS_AT + TOKEN_SLOTS * TOKEN_SLOT;

typedef SlotRing<CODE_SLOTS, CODES, 0, BARRIERS_AT> CodeRing;
typedef SlotRing<TOKEN_SLOTS, TOKEN_SLOT, TOKENS_AT, BARRIERS_AT + 16 * CODE_SLOTS> TokenRing;

// Two numbers in bfloat16.
__device__ __forceinline__ u32 times_plus(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
__device__ __forceinline__ u32 turned(u32 word, u32 right) { return __funnelshift_r(word, word, right); }
__device__ __forceinline__ u32 rounded(float x) { // to the nearest, twice
    const u32 bits = __float_as_uint(x), upper = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return upper * 0x10001;
}

struct Wide : Arguments {
    // Tokens of `count` tiles of a batch.
    __device__ __forceinline__ void copy_batch(int step, int batch, int tile, int count, u32 to, u32 barrier) const {
        copy_bytes(to, x + (((i64)step * BATCHES + batch) * num_tiles + tile) * TILE_BYTES, count * TILE_BYTES, barrier);
    }
};

// Tiles of the narrowest program that holds so many tokens.
__device__ __forceinline__ int width_for(int tokens) { return tokens > 96 ? 16 : tokens > 64 ? 12 : tokens > 32 ? 8 : 4; }

// One thread: all codes that a piece of work needs.
__device__ __forceinline__ void copy_all(const Wide &of, const Unit &unit, int row_tile, u32 memory_at, CodeRing &ring) {
    const int bytes = code_bytes({unit.bits, unit.step}), steps = of.steps();
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        const u32 full = memory_at + ring.full();
        await_phase(memory_at + ring.empty(), ring.parity ^ 1);
        arrive_expecting(full, bytes);
        copy_codes(of, unit, row_tile, step, memory_at + ring.at(), full);
        ring.advance();
    }
}

// One thread: all of its tokens.
__device__ __forceinline__ void copy_tokens(const Wide &of, const Unit &unit, u32 memory_at, TokenRing &ring) {
    const int tiles = tiles_for(unit.tokens), steps = of.steps();
#pragma unroll 1
    for (int step = 0; step < steps; step++)
#pragma unroll 1
        for (int batch = 0; batch < BATCHES; batch++) {
            const u32 full = memory_at + ring.full();
            await_phase(memory_at + ring.empty(), ring.parity ^ 1);
            arrive_expecting(full, tiles * TILE_BYTES);
            of.copy_batch(step, batch, unit.tile, tiles, memory_at + ring.at(), full);
            ring.advance();
        }
}

template <int T>
__device__ __forceinline__ void multiply_all(const Wide &of, const Unit &unit, int row_tile, u8 *memory, u32 memory_at,
                                             CodeRing &codes, TokenRing &tokens) {
    const int lane = threadIdx.x & 31, t = lane & 3, mine = 64 * (threadIdx.x / 128) + own_row(); // of the block's rows
    const int bits = unit.bits, row = of.row_of(ROWS * row_tile + mine), num_groups = of.num_groups();
    const u16 *const scale_at = of.scales + ((i64)unit.slot * of.num_rows + row) * num_groups;
    const u16 *const scale_below = scale_at + of.apart() * num_groups;
    const float step_of_l = bits ? (float)unit.step * (float)(1 << bits) : 0.f;
    const float K = step_of_l + 128.f + middle_of(bits, unit.step);
    const u32 less = rounded(-K), of_l = rounded(step_of_l * 0.5f), of_h = rounded(64.f);
    const float amiss = -K - __uint_as_float(less << 16);
    // The upper half of a number. It is in a register, as columns are even, which nobody knows who compiles this: then
    // what says which bytes go where need not be.
    const u32 upper_half = 0x40404040u | (of.num_columns & 1);
    // Where L goes in the lower half: its first bit follows the exponent.
    const u32 own_mask = bits == 4 ? 0x78787878u : bits == 1 ? 0x40404040u : 0x60606060u;

    float c[4 * T];
#pragma unroll
    for (int i = 0; i < 4 * T; i++) c[i] = 0.f;
    u32 a[2][16]; // half of a batch each
    u32 done = 0; // tokens' slot that products may still read
    const int steps = of.steps();
#pragma unroll 1
    for (int at_step = 0; at_step < steps; at_step++) {
        u16 scale_of[BATCHES][2];
#pragma unroll
        for (int batch = 0; batch < BATCHES; batch++) {
            scale_of[batch][0] = __ldg(scale_at + of.group_of(at_step, batch));
            scale_of[batch][1] = __ldg(scale_below + of.group_of(at_step, batch));
        }
        await_phase(memory_at + codes.full(), codes.parity);
        const u8 *const here = memory + codes.at();
        const int p = at_step & 1;
        Words shared, own, own1;
#pragma unroll
        for (int batch = 0; batch < BATCHES; batch++) {
            const int field = batch & 1, upper = batch >> 1; // of q = p + 2 upper
            if (field == 0) {
                load(shared, here + upper * RUN, mine, t);
                if (PLANES > 0 && (upper == 0 || WIDE))
                    load(own, here + (2 + (WIDE && bits == 4 ? upper : 0)) * RUN, mine, t);
                if (PLANES > 1 && upper == 0) load(own1, here + (2 + OWN) * RUN, mine, t);
            }
            if (batch == BATCHES - 1) {
                arrive_once(memory_at + codes.empty());
            }
            const int shift1 = p + 2 * upper + 4 * field;
            const int own_shift = bits == 1 ? shift1 : (bits == 4 ? 0 : 2 * upper) + 4 * field;
            const u32 own_turn = own_shift - (bits == 4 ? 3 : bits == 1 ? 6 : 5), turn1 = shift1 - 4; // to the right
            u32 u[2], rest[2];
#pragma unroll
            for (int below = 0; below < 2; below++) {
                u[below] = (u32)scale_of[batch][below] * 0x10001;
                rest[below] = rounded(amiss * scale_from(scale_of[batch][below]));
            }
            await_phase(memory_at + tokens.full(), tokens.parity);
            const u64 operand = descriptor(memory_at + tokens.at(), TILE_BYTES);
#pragma unroll
            for (int half = 0; half < 2; half++) {
#pragma unroll
                for (int i = 0; i < 8; i++) { // a row's four columns of product i / 2
                    const u32 word = shared[8 * half + i];
                    const u32 h = (field ? word >> 1 : word << 3) & 0x78787878u;
                    u32 l = 0;
                    if (PLANES > 0) {
                        l = turned(own[8 * half + i], own_turn) & own_mask;
                        if (PLANES > 1 && bits == 3) l |= turned(own1[8 * half + i], turn1) & 0x10101010u;
                    }
#pragma unroll
                    for (int pair = 0; pair < 2; pair++) {
                        const u32 which = pair ? 0x4342 : 0x4140;
                        u32 weight = less;
                        if (PLANES > 0) weight = times_plus(__byte_perm(l, upper_half, which), of_l, less);
                        weight = times_plus(__byte_perm(h, upper_half, which), of_h, weight);
                        a[half][4 * (i >> 1) + (i & 1) + 2 * pair] = times_plus(weight, u[i & 1], rest[i & 1]);
                    }
                }
                keep_order(a[half]);
                start_products<T>(c, a[half], operand + half * TILE_BYTES / 32, at_step + batch + half);
                await_products<1>();
                if (half == 0 && at_step + batch > 0) { // those before are done
                    arrive_once(memory_at + done);
                }
            }
            done = tokens.empty();
            tokens.advance();
        }
        codes.advance();
    }
    await_products<0>();
    arrive_once(memory_at + done);
    keep_order(c);
#pragma unroll
    for (int tile = 0; tile < T; tile++)
#pragma unroll
        for (int beside = 0; beside < 2; beside++) {
            const int token = TILE * tile + 2 * t + beside;
            if (token < unit.tokens)
                of.write(of.pairs[unit.first + token], row, c[4 * tile + beside], c[4 * tile + 2 + beside]);
        }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    nested_wide(const u8 *__restrict__ x, const float2 *__restrict__ groups, int num_tiles,
                const u8 *__restrict__ plane, const u16 *__restrict__ scales, const int *__restrict__ pairs,
                const Unit *__restrict__ units, const float *__restrict__ weights, float *__restrict__ out,
                int num_rows, int num_columns) {
    extern __shared__ __align__(1024) u8 memory[];
    const u32 memory_at = (u32)__cvta_generic_to_shared(memory);
    CodeRing codes;
    TokenRing tokens;
    if (threadIdx.x == 0) {
        CodeRing::init(memory_at, WARPS);
        TokenRing::init(memory_at, WARPS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); // for the copy engine too
    }
    __syncthreads();
    begin();
    const Wide of = {{{num_columns}, x, groups, num_tiles, plane, scales, pairs, weights, out, num_rows}};
    const int num_units = units[0].units, work = num_units * (num_rows / ROWS);
    if (threadIdx.x >= WORKERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        for (int at = blockIdx.x; at < work; at += gridDim.x) {
            if (threadIdx.x == WORKERS) copy_all(of, units[at % num_units], at / num_units, memory_at, codes);
            if (threadIdx.x == WORKERS + 32) copy_tokens(of, units[at % num_units], memory_at, tokens);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
        for (int at = blockIdx.x; at < work; at += gridDim.x) {
            const Unit unit = units[at % num_units];
            const int width = width_for(unit.tokens), row_tile = at / num_units;
            if (TILES >= 16 && width == 16)
                multiply_all<TILES >= 16 ? 16 : 4>(of, unit, row_tile, memory, memory_at, codes, tokens);
            else if (TILES >= 12 && width == 12)
                multiply_all<TILES >= 12 ? 12 : 4>(of, unit, row_tile, memory, memory_at, codes, tokens);
            else if (TILES >= 8 && width == 8)
                multiply_all<TILES >= 8 ? 8 : 4>(of, unit, row_tile, memory, memory_at, codes, tokens);
            else
                multiply_all<4>(of, unit, row_tile, memory, memory_at, codes, tokens);
        }
    }
}
