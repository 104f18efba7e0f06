// The experts of a step over nested codes, on the integer matrix units, hardly unpacking them.
//
// A weight is u (8 H + a L - m): H and L are the shared and the private code, u is one scale for 128
// columns of a row, a and m are constants of a face. So a product with a token x is
//
//     sum over groups of u (sum (8 H + a L) x - m sum x)
//
// and the matrix units add up integers, if x is made of integers too. `nested_halves.cu` splits a run of
// 128 values into integers of 15 bits and one scale, and these into two signed bytes; both halves of four
// tokens are the eight columns of a matrix instruction. Every sum is exact.
//
// With J = columns / 8, byte j of run q < 4 of a 4-bit plane holds columns q J + j and (q + 4) J + j, its
// field 0 and 1. A 2-bit plane has two runs, a 1-bit plane one: the fields that belong to those two are
// 4 bits apart as well. A byte with all else masked out is a code times a power of two. For few tokens
// that is all the unpacking there is: shared and private codes are multiplied by themselves, and the
// powers leave with the scale. For more tokens products are dearer than putting 8 H + a L together,
// four weights at a time, which never carries into the next byte.
//
// A block takes 32 rows of one face (of gate_up 16 neurons' gate and up rows) and up to TOKENS of its
// tokens, then the same tokens with the next 32 rows, `turns` times. Of down it may be one of several blocks that
// have a part of the columns each: whoever reads what they leave adds it up. Each of its four warps takes one
// run of the shared codes. What comes next is copied into shared memory in the meantime. Tried and no
// faster: faces of one slot together in a block; 64 rows; more warps with fewer registers.
//
// Compiled with GATE_UP, TILES (of four tokens), PLANES (private planes that a face has at most: three
// bits are two) and WIDE (somebody has a private plane of 4 bits).

#include "nested.cuh"

constexpr int ROWS = 32, WARPS = 4, TOKENS = 4 * TILES, STAGES = 2;
constexpr bool JOINED = TILES > 1;                 // 8 H + a L is put together
constexpr int SUMS = JOINED ? 1 : 1 + PLANES;
constexpr int RUN = ROWS * GROUP;                  // bytes of a run of codes in a stage
constexpr int OWN = PLANES == 0 ? 0 : WIDE ? 4 : 2; // runs of the first private plane
constexpr int STAGE = RUN * (4 + OWN + (PLANES == 2));
constexpr int WARPS_AT_ONCE = TILES == 1 ? 16 : TILES == 2 ? 12 : 8; // on a multiprocessor

__device__ __forceinline__ void copy_ahead(u32 to, const void *from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from));
}

struct Words { // of a plane, 16 bytes of row g and of row g + 8, as two products want them
    uint4 top, bottom;
    __device__ __forceinline__ u32 operator[](int i) const {
        const uint4 &v = i & 1 ? bottom : top;
        return i < 2 ? v.x : i < 4 ? v.y : i < 6 ? v.z : v.w;
    }
};

__device__ __forceinline__ Words words_at(const u8 *run, int row, int chunk) {
    return {*(const uint4 *)(run + code_place(row, chunk)), *(const uint4 *)(run + code_place(row + 8, chunk))};
}

// c = d + rows [16, 32] times tokens [32, 8]; which columns are which of the 32 is the same for both.
__device__ __forceinline__ void product(int (&c)[4], int d0, int d1, int d2, int d3, const u32 *a, u32 x0, u32 x1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(x0), "r"(x1), "r"(d0), "r"(d1), "r"(d2), "r"(d3));
}

__device__ __forceinline__ float half_to_the(int power) { return __uint_as_float((u32)(127 - power) << 23); }

extern "C" __global__ void __launch_bounds__(32 * WARPS, WARPS_AT_ONCE / WARPS)
    nested(const i8 *__restrict__ x, const float2 *__restrict__ groups, const u8 *__restrict__ plane,
           const u16 *__restrict__ scales, const int *__restrict__ pairs, const Unit *__restrict__ units,
           const float *__restrict__ weights, float *__restrict__ out, int num_rows, int num_columns, int top_k,
           int turns) {
    extern __shared__ __align__(128) u8 memory[];
    begin();
    const int thread = threadIdx.x, q = thread >> 5, lane = thread & 31; // each warp has its run
    const int g = lane >> 2, t = lane & 3;
    const Unit unit = units[blockIdx.x];
    if (unit.tokens == 0) return;
    const int tokens = unit.tokens, bits = unit.bits;
    pairs += unit.first;

    // A turn's rows are two runs of 16, `apart` from each other.
    const int apart = GATE_UP ? num_rows / 2 : ROWS / 2, next = GATE_UP ? ROWS / 2 : ROWS;
    const int first = blockIdx.y * turns * next;
    auto row_of = [&](int row) { return first + row / (ROWS / 2) * apart + row % (ROWS / 2); };
    const int J = num_columns / 8, num_groups = num_columns / GROUP, all_steps = J / GROUP;
    const int parts = gridDim.z, steps = all_steps / parts, begin_at = blockIdx.z * steps; // of all_steps

    // Shared memory: stages of codes; scales of this turn and the next, rows 16 bytes longer than they need
    // to be, so that eight of them are in different banks; the warps' sums, in place of codes in a single turn.
    const u32 ring_at = (u32)__cvta_generic_to_shared(memory);
    const int scale_stride = 2 * num_groups + 16;
    u8 *const scales_of = memory + STAGES * STAGE;
    auto found =
        reinterpret_cast<float(*)[ROWS][TOKENS + 1]>(turns == 1 ? memory : scales_of + 2 * ROWS * scale_stride);

    // A turn's rows are side by side in a strip. A thread copies 16 of each 2048 bytes.
    const i64 slot_row = (i64)unit.slot * num_rows;
    const int own_runs = bits == 4 ? 4 : bits == 1 ? 1 : 2, at_thread = blockIdx.y * turns * RUN + 16 * thread;
    const u8 *shared_at = plane + slot_row * (4 * J) + at_thread, *own1_at = (const u8 *)unit.at1 + at_thread;
    const u8 *own_at = plane_of(unit.at4, unit.at2, unit.at1, bits) + at_thread;
    const u32 to = ring_at + 16 * thread;
    int copies = 0, copied = 0; // stages so far, and of this turn
    auto copy_stage = [&] {
        if (copies < turns * steps) {
            const int j = (begin_at + copied) * GROUP; // bytes of each row
            if (copied == 0) {
                const int turn = copies / steps;
                for (int i = thread; i < ROWS * num_groups / 8; i += 32 * WARPS) { // 8 scales of a row
                    const int r = i / (num_groups / 8), group = i % (num_groups / 8) * 8;
                    copy_ahead(ring_at + STAGES * STAGE + ((turn & 1) * ROWS + r) * scale_stride + 2 * group,
                               (const u8 *)(scales + (slot_row + row_of(r) + turn * next) * num_groups + group));
                }
            }
            const u32 stage = to + (copies & 1) * STAGE;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const u32 below = stage + half * RUN / 2;
#pragma unroll
                for (int run = 0; run < 4; run++)
                    copy_ahead(below + run * RUN, shared_at + half * RUN / 2 + (u32)((run * J + j) * num_rows));
                if (PLANES > 0 && bits) {
#pragma unroll
                    for (int run = 0; run < OWN; run++)
                        if (run < own_runs)
                            copy_ahead(below + (4 + run) * RUN,
                                       own_at + half * RUN / 2 + (u32)((run * J + j) * num_rows));
                }
                if (PLANES > 1 && bits == 3)
                    copy_ahead(below + (4 + OWN) * RUN, own1_at + half * RUN / 2 + (u32)(j * num_rows));
            }
            copies++;
            if (++copied == steps) {
                copied = 0;
                shared_at += RUN, own_at += RUN, own1_at += RUN;
            }
        }
        asm volatile("cp.async.commit_group;");
    };
    copy_stage();

    // Column g of a matrix instruction is a half of token g / 2; what comes out is of token t.
    const i8 *token_x[TILES];
    const float2 *token_groups[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        const int in = 4 * tile + (g >> 1), of = 4 * tile + t;
        const int pair = pairs[in < tokens ? in : 0], pair_of = pairs[of < tokens ? of : 0];
        const i64 in_row = GATE_UP ? pair / top_k : pair, of_row = GATE_UP ? pair_of / top_k : pair_of;
        token_x[tile] = x + (in_row * 2 + (g & 1)) * num_columns + q * J + begin_at * GROUP + 16 * t;
        token_groups[tile] = groups + of_row * num_groups + q * all_steps + begin_at;
    }
    const u32 step = bits == 0 ? 0 : bits == 3 ? 2 * unit.step : unit.step, step1 = bits == 3 ? unit.step : 0;
    const float middle = middle_of(bits, unit.step);
    const u32 own_mask = bits == 4 ? 0x0F0F0F0Fu : bits == 1 ? 0x01010101u : 0x03030303u;
    const int own_shift = bits == 4 ? 0 : bits == 1 ? q : (q >> 1) * 2;
    const int own_run = bits == 4 ? q : bits == 1 ? 0 : q & 1;
    const u32 masks[3] = {0x0F0F0F0Fu, own_mask << own_shift, 0x01010101u << q};
    const float times[3] = {8.f, (float)step * half_to_the(own_shift), (float)step1 * half_to_the(q)};

    uint4 tokens_of[2][TILES][2]; // 128 columns of field 0 and of field 1
    float2 groups_of[2][TILES];
    auto fetch_tokens = [&](int field, int at) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            const i8 *const from = token_x[tile] + 4 * field * J + at * GROUP;
            tokens_of[field][tile][0] = __ldg((const uint4 *)from);
            tokens_of[field][tile][1] = __ldg((const uint4 *)(from + GROUP / 2));
        }
    };
    auto fetch_groups = [&](int field, int at) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
            groups_of[field][tile] = __ldg(token_groups[tile] + 4 * field * all_steps + at);
    };
#pragma unroll
    for (int field = 0; field < 2; field++) fetch_tokens(field, 0), fetch_groups(field, 0);

#pragma unroll 1
    for (int turn = 0; turn < turns; turn++) {
        float sums[2][TILES][2]; // of 16 rows, of tokens, row g and g + 8
#pragma unroll
        for (int i = 0; i < 4 * TILES; i++) (&sums[0][0][0])[i] = 0.f;
#pragma unroll 1
        for (int at = 0; at < steps; at++) {
            asm volatile("cp.async.wait_group 0;" ::: "memory");
            __syncthreads(); // what was copied is there, and nobody reads what is overwritten next
            const u8 *const stage = memory + ((turn * steps + at) & 1) * STAGE;
            copy_stage();
            const int at_next = at + 1 < steps ? at + 1 : 0;
            const u8 *const runs[3] = {stage + q * RUN, stage + (4 + own_run) * RUN, stage + (4 + OWN) * RUN};
#pragma unroll
            for (int field = 0; field < 2; field++) {
                int c[SUMS][2][TILES][4];
#pragma unroll
                for (int half = 0; half < 2; half++)
#pragma unroll
                    for (int m = 0; m < 2; m++) {
                        Words words[1 + PLANES];
#pragma unroll
                        for (int p = 0; p < 1 + PLANES; p++) words[p] = words_at(runs[p], 16 * m + g, 4 * half + t);
#pragma unroll
                        for (int sum = 0; sum < SUMS; sum++) {
                            u32 a[8];
#pragma unroll
                            for (int i = 0; i < 8; i++) {
                                if (JOINED) {
                                    a[i] = (field ? words[0][i] >> 1 : words[0][i] << 3) & 0x78787878u;
                                    if (PLANES > 0)
                                        a[i] += (words[PLANES > 0][i] >> own_shift + 4 * field & own_mask) * step;
                                    if (PLANES > 1) a[i] += (words[PLANES][i] >> q + 4 * field & 0x01010101u) * step1;
                                } else {
                                    a[i] = words[sum][i] & masks[sum] << 4 * field;
                                }
                            }
#pragma unroll
                            for (int tile = 0; tile < TILES; tile++) {
                                const uint4 v = tokens_of[field][tile][half];
                                int(&to)[4] = c[sum][m][tile];
                                if (half == 0)
                                    product(to, 0, 0, 0, 0, a, v.x, v.y);
                                else
                                    product(to, to[0], to[1], to[2], to[3], a, v.x, v.y);
                                product(to, to[0], to[1], to[2], to[3], a + 4, v.z, v.w);
                            }
                        }
                    }
                fetch_tokens(field, at_next);
                const int group = (q + 4 * field) * all_steps + begin_at + at;
                const u8 *const scale = scales_of + ((turn & 1) * ROWS + g) * scale_stride + 2 * group;
#pragma unroll
                for (int i = 0; i < 4; i++) { // row g + 8 i
                    const float u = __uint_as_float((u32) * (const u16 *)(scale + 8 * i * scale_stride) << 16);
#pragma unroll
                    for (int tile = 0; tile < TILES; tile++) {
                        float total = 0.f;
#pragma unroll
                        for (int sum = 0; sum < SUMS; sum++) {
                            const int *const halves = c[sum][i >> 1][tile] + 2 * (i & 1);
                            total += (float)(128 * halves[0] + halves[1]) * (JOINED ? 1.f : times[sum]);
                        }
                        const float2 of = groups_of[field][tile];
                        const float one = field && !JOINED ? of.x * 0.0625f : of.x;
                        sums[i >> 1][tile][i & 1] += u * (total * one - of.y * middle);
                    }
                }
                fetch_groups(field, at_next);
            }
        }

        // Add the warps up through shared memory. Its readers pass a barrier before it is written again.
        if (turns == 1) __syncthreads();
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int tile = 0; tile < TILES; tile++)
#pragma unroll
                for (int below = 0; below < 2; below++)
                    found[q][16 * m + g + 8 * below][4 * tile + t] = sums[m][tile][below];
        __syncthreads();
        auto total = [&](int row, int token) {
            float sum = 0.f;
#pragma unroll
            for (int warp = 0; warp < WARPS; warp++) sum += found[warp][row][token];
            return sum;
        };
        constexpr int kept = GATE_UP ? ROWS / 2 : ROWS;
        for (int at = thread; at < kept * tokens; at += 32 * WARPS) {
            const int row = at % kept, token = at / kept;
            const i64 pair = pairs[token], to_row = first + turn * next + row;
            if (GATE_UP) {
                const float gate = total(row, token);
                out[pair * (num_rows / 2) + to_row] = gate / (1.f + __expf(-gate)) * total(row + ROWS / 2, token);
            } else {
                out[(pair * parts + blockIdx.z) * num_rows + to_row] = total(row, token) * weights[pair];
            }
        }
    }
}
