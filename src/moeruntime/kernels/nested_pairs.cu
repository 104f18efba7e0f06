// The experts of a step over nested codes, for faces of one slot that each have few tokens, on Hopper devices.
//
// The same sums as `nested_fast.cu`, whose head says what they are and how codes lie: integers, exact, and one
// scale for 128 columns. A block takes a pair of faces, with up to 16 tokens each, and three times 64 rows (of
// gate_up 32 neurons' gate and up rows). Both share H: its codes are fetched, and brought into registers, once.
// H and L are multiplied by themselves, as they lie in a byte; the powers of two leave with the scale. So
// four codes take one instruction, where putting 8 H + a L together as `nested_many.cu` does takes five:
// it is how fast instructions are issued that limits these kernels, far more than how fast codes are fetched.
// Products are those of a warp: nothing has to wait for them. Tried and slower: H by products of warpgroups,
// alone or beside L by those of a warp. What is known of four faces at a time is in docs/architecture.md.
//
// There is a block for every multiprocessor. One thread has codes copied into a ring of slots by the copy
// engine, two warps copy tokens into another ring, of one piece of work after the other. Twelve warps multiply,
// and never wait for each other: each has 16 rows, a lane a neuron's gate and up row.
//
// Compiled with GATE_UP, CODE_SLOTS and TOKEN_SLOTS (of the rings).

#include "nested_hopper.cuh"

constexpr int PARTS = 3, ROWS = 64; // of a block
constexpr int COPIERS = 64, WORKERS = 128 * PARTS, WARPS = WORKERS / 32, THREADS = WORKERS + 128;
constexpr int PART = ROWS * GROUP, RUN = PARTS * PART; // bytes of a run of codes
constexpr int BATCH_SLOT = 128 * GROUP;                // bytes: both halves of 64 tokens of a batch, or 16 of four
constexpr int GROUPS = 64 * 8;                         // bytes beside them: what their integers count
constexpr int TOKENS_AT = CODE_SLOTS * RUN, GROUPS_AT = TOKENS_AT + TOKEN_SLOTS * BATCH_SLOT;
constexpr int BARRIERS_AT = GROUPS_AT + TOKEN_SLOTS * GROUPS;
constexpr int STEP_CODES = 4; // slots: H, both L, H

// In one go, so that each has an address of its own and none waits for the one before to be done with it.
__device__ __forceinline__ void copy_two(u32 to, const i8 *a, const i8 *b) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n"
                 "cp.async.cg.shared.global.L2::128B [%0 + 1024], [%2], 16;" ::"r"(to),
                 "l"(a), "l"(b));
}
__device__ __forceinline__ void copy_four(u32 to, const i8 *a, const i8 *b, const i8 *c, const i8 *d) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n"
                 "cp.async.cg.shared.global.L2::128B [%0 + 1024], [%2], 16;\n"
                 "cp.async.cg.shared.global.L2::128B [%0 + 2048], [%3], 16;\n"
                 "cp.async.cg.shared.global.L2::128B [%0 + 3072], [%4], 16;" ::"r"(to),
                 "l"(a), "l"(b), "l"(c), "l"(d));
}
// A ring's slot that is next, and how often it went round. FULL says that it may be read, EMPTY written.
template <int SLOTS, int SLOT, int RING_AT, int BARRIERS> struct Ring {
    int slot = 0;
    u32 parity = 0;
    __device__ __forceinline__ void advance(int by) {
        if ((slot += by) >= SLOTS) slot -= SLOTS, parity ^= 1;
    }
    __device__ __forceinline__ Ring ahead(int by) const {
        Ring other = *this;
        other.advance(by);
        return other;
    }
    __device__ __forceinline__ u32 at() const { return RING_AT + slot * SLOT; }
    __device__ __forceinline__ u32 full() const { return BARRIERS + 8 * slot; }
    __device__ __forceinline__ u32 empty() const { return BARRIERS + 8 * (SLOTS + slot); }
};
typedef Ring<CODE_SLOTS, RUN, 0, BARRIERS_AT> Codes;
typedef Ring<TOKEN_SLOTS, BATCH_SLOT, TOKENS_AT, BARRIERS_AT + 16 * CODE_SLOTS> Tokens;

// Batches of so many tiles of tokens that fit a slot.
__host__ __device__ constexpr int batches_a_slot(int tiles) { return tiles <= 4 ? 4 : 2; }

// Four 8 x 8 matrices of pairs of bytes, whose rows are the 16 bytes where a lane says, of eight lanes each.
__device__ __forceinline__ void load_matrices(u32 *to, u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at));
}
// c += rows [16, 32] times tokens' halves [32, 8].
__device__ __forceinline__ void multiply(int (&c)[4], const u32 *a, u32 x0, u32 x1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(x0), "r"(x1));
}

struct Step : Arguments {
    __device__ __forceinline__ int tiles() const { return (num_rows / ROWS + PARTS - 1) / PARTS; }
    // The second 32 rows of a part are so far from the first.
    __device__ __forceinline__ int apart() const { return GATE_UP ? num_rows / 2 : BOX_ROWS; }
    // Where there is no part any more the last one is done again.
    __device__ __forceinline__ int first_row(int tile, int part) const {
        return min(tile * PARTS + part, num_rows / ROWS - 1) * (GATE_UP ? BOX_ROWS : ROWS);
    }
};

// One thread: all codes that a pair's row tile needs, in the order in which they are read.
__device__ __forceinline__ void copy_codes(const Step &of, const Pair &pair, int tile, u32 memory_at, Codes &ring) {
    const int J = of.num_columns / 8, shared_row = pair.slot * of.num_rows;
    int rows[2 * PARTS];
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        rows[2 * part] = of.first_row(tile, part);
        rows[2 * part + 1] = rows[2 * part] + of.apart();
    }
    auto copy_run = [&](const Map *map, int column, int row, bool wanted) {
        const u32 full = memory_at + ring.full(), to = memory_at + ring.at();
        await_phase(memory_at + ring.empty(), ring.parity ^ 1);
        if (wanted) {
            arrive_expecting(full, RUN);
#pragma unroll
            for (int i = 0; i < 2 * PARTS; i++) copy_box(to + i * BOX_ROWS * GROUP, map, column, row + rows[i], full);
        } else {
            arrive(full);
        }
        ring.advance(1);
    };
    const int steps = of.steps(), own_run = pair.bits == 1 ? 0 : J;
    const Map *const own[2] = {own_map(of.maps, pair.entries[0].face, pair.bits),
                               own_map(of.maps, pair.entries[1].face, pair.bits)};
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        const int p = step & 1, j = (step >> 1) * GROUP;
        copy_run(of.maps, p * J + j, shared_row, true);
        copy_run(own[0], p * own_run + j, 0, true);
        copy_run(own[1], p * own_run + j, 0, pair.entries[1].tokens);
        copy_run(of.maps, (p + 2) * J + j, shared_row, true);
    }
}

// A copier takes 16 bytes of a token's half, and of each eighth half from there on.
template <int TILES>
__device__ __forceinline__ void copy_tokens(const Step &of, const Pair &pair, u32 memory_at, Tokens &ring) {
    constexpr int BATCHES_A_SLOT = batches_a_slot(TILES);
    const int thread = threadIdx.x % COPIERS, chunk = thread & 7, row = thread >> 3;
    auto row_of_place = [&](int place) { // both faces have as many
        const bool second = place >= 2 * TILES;
        const Entry &entry = pair.entries[second];
        const int token = second ? place - 2 * TILES : place;
        const int of_pair = of.pairs[entry.first + (token < entry.tokens ? token : 0)];
        return GATE_UP ? of_pair / of.top_k : of_pair;
    };
    u32 token_at[TILES]; // in x: of the tile's token, a half
#pragma unroll
    for (int i = 0; i < TILES; i++)
        token_at[i] = (row_of_place(4 * i + (row >> 1)) * 2 + (row & 1)) * of.num_columns + 16 * chunk;
    const bool has_group = thread < 4 * TILES;
    const float2 *const groups = of.groups + row_of_place(has_group ? thread : 0) * of.num_groups();
    const u32 token_to = memory_at + place_of(row, chunk), groups_to = memory_at + GROUPS_AT + 8 * thread;
    const int steps = of.steps();
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
#pragma unroll 1
        for (int first = 0; first < BATCHES; first += BATCHES_A_SLOT) {
            await_phase(memory_at + ring.empty(), ring.parity ^ 1);
#pragma unroll
            for (int within = 0; within < BATCHES_A_SLOT; within++) {
                const int group = of.group_of(step, first + within);
                const i8 *const from = of.x + group * GROUP;
                const u32 to = token_to + ring.at() + within * TILES * 8 * GROUP;
#pragma unroll
                for (int i = 0; i + 4 <= TILES; i += 4)
                    copy_four(to + i * 8 * GROUP, from + token_at[i], from + token_at[i + 1], from + token_at[i + 2],
                              from + token_at[i + 3]);
                if (TILES % 4)
                    copy_two(to + (TILES - 2) * 8 * GROUP, from + token_at[TILES - 2], from + token_at[TILES - 1]);
                if (has_group) copy_eight(groups_to + ring.slot * GROUPS + within * TILES * 32, groups + group);
            }
            arrive_with_copies(memory_at + ring.full());
            ring.advance(1);
        }
    }
}

// T tiles of either face.
template <int T>
__device__ __forceinline__ void multiply_pair(const Step &of, const Pair &pair, int tile, u8 *memory, u32 memory_at,
                                              Codes &ring, Tokens &token_ring) {
    constexpr int N = 2 * T, BATCHES_A_SLOT = batches_a_slot(N), STEP_TOKENS = BATCHES / BATCHES_A_SLOT;
    constexpr int FACES = T == 1 ? 2 : 1; // at a time, so that there are four products that need not wait
    const int lane = threadIdx.x & 31, t = lane & 3, part = threadIdx.x / 128;
    // Eight lanes that read at once have rows whose chunks lie in different banks.
    const int mine = 8 * (threadIdx.x / 32 % 4) + (lane >> 3 | (lane & 4)), first = of.first_row(tile, part) + mine;
    const u16 *const scale_at = of.scales + ((i64)pair.slot * of.num_rows + first) * of.num_groups();
    const int scale_apart = of.apart() * of.num_groups();
    const bool single = pair.bits == 1; // bit: runs lie a bit apart
    const float middle = single ? 0.5f : 1.5f;
    const float times[2] = {(float)pair.entries[0].step, (float)pair.entries[1].step};
    // Which 16 bytes of a tile of tokens a lane asks for, of either half of a group.
    const u32 left = place_of(lane & 7, lane >> 3), right = place_of(lane & 7, 4 + (lane >> 3));
    float sums[N][2];
#pragma unroll
    for (int i = 0; i < 2 * N; i++) sums[i >> 1][i & 1] = 0.f;

    auto release = [&](auto at, int count) { // this warp has read so many slots
        __syncwarp();
        if (lane < count) arrive(memory_at + at.ahead(lane).empty());
    };
    auto load_run = [&](Words &words, const Codes &at) { load(words, memory + at.at() + part * PART, mine, BOX_ROWS, t); };
    const int steps = of.steps();
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
#pragma unroll
        for (int i = 0; i < 3; i++) await_phase(memory_at + ring.ahead(i).full(), ring.ahead(i).parity);
        Words shared, own[2];
        load_run(shared, ring);
        load_run(own[0], ring.ahead(1));
        load_run(own[1], ring.ahead(2));
        u32 tokens_at[STEP_TOKENS];
        const float2 *groups_at[STEP_TOKENS];
#pragma unroll
        for (int i = 0; i < STEP_TOKENS; i++) {
            const Tokens at = token_ring.ahead(i);
            await_phase(memory_at + at.full(), at.parity);
            tokens_at[i] = memory_at + at.at();
            groups_at[i] = (const float2 *)(memory + GROUPS_AT + at.slot * GROUPS) + t;
        }
        release(ring, 3);
        const u32 mask = single ? 0x01010101u << (step & 1) : 0x03030303u;
        const float power = single && step & 1 ? 0.5f : 1.f;
#pragma unroll
        for (int batch = 0; batch < BATCHES; batch++) {
            if (batch == 2) {
                await_phase(memory_at + ring.ahead(3).full(), ring.ahead(3).parity);
                load_run(shared, ring.ahead(3));
                release(ring.ahead(3), 1);
            }
            const u16 *const scale_here = scale_at + of.group_of(step, batch);
            const u16 scales[2] = {__ldg(scale_here), __ldg(scale_here + scale_apart)};
            const int field = batch & 1, own_shift = 4 * field + 2 * (batch >> 1);
            const float times_h = field ? 0.5f : 8.f; // H lies 4 bits higher
            const float u[2] = {scale_from(scales[0]) * times_h, scale_from(scales[1]) * times_h};
            const float times_l = power / (times_h * (float)(1 << own_shift));
            u32 h[16];
#pragma unroll
            for (int i = 0; i < 16; i++) h[i] = shared[i] & 0x0F0F0F0Fu << 4 * field;
#pragma unroll
            for (int face = 0; face < 2; face += FACES) {
                u32 l[FACES][16];
#pragma unroll
                for (int i = 0; i < 16 * FACES; i++) l[i / 16][i % 16] = own[face + i / 16][i % 16] & mask << own_shift;
#pragma unroll
                for (int two = 0; two < FACES * T; two += 2) {
                    constexpr int MOST = 2;
                    const int count = two + MOST <= FACES * T ? MOST : 1, in_batch = batch % BATCHES_A_SLOT * N;
                    u32 x[MOST][8];
                    int c[MOST][4] = {}, c_own[MOST][4] = {};
#pragma unroll
                    for (int i = 0; i < count; i++) {
                        const u32 at = tokens_at[batch / BATCHES_A_SLOT] + (in_batch + face * T + two + i) * 8 * GROUP;
                        load_matrices(x[i], at + left);
                        load_matrices(x[i] + 4, at + right);
                    }
#pragma unroll
                    for (int product = 0; product < 4; product++)
#pragma unroll
                        for (int i = 0; i < count; i++) {
                            const u32 *const half = x[i] + 2 * product;
                            multiply(c[i], h + 4 * product, half[0], half[1]);
                            multiply(c_own[i], l[FACES == 2 ? i : 0] + 4 * product, half[0], half[1]);
                        }
#pragma unroll
                    for (int i = 0; i < count; i++) {
                        const int at = face * T + two + i, of_face = FACES == 2 ? i : face;
                        const float2 one = groups_at[batch / BATCHES_A_SLOT][(in_batch + at) * 4];
                        const float of_l = times[of_face] * times_l;
                        const float less = one.y * ((60.f + times[of_face] * middle) / times_h);
#pragma unroll
                        for (int below = 0; below < 2; below++) {
                            const int *const found = c[i] + 2 * below, *const found_own = c_own[i] + 2 * below;
                            const float both = (float)(128 * found[0] + found[1]) +
                                               (float)(128 * found_own[0] + found_own[1]) * of_l;
                            sums[at][below] += u[below] * (both * one.x - less);
                        }
                    }
                }
            }
        }
        release(token_ring, STEP_TOKENS);
        token_ring.advance(STEP_TOKENS);
        ring.advance(STEP_CODES);
    }

#pragma unroll
    for (int at = 0; at < N; at++) {
        const Entry &entry = pair.entries[at / T];
        const int token = at % T * 4 + t;
        if (token >= entry.tokens) continue;
        const i64 to = of.pairs[entry.first + token];
        if (GATE_UP) {
            const float gate = sums[at][0];
            of.out[to * (of.num_rows / 2) + first] = gate / (1.f + __expf(-gate)) * sums[at][1];
        } else {
            const float weight = of.weights[to];
            of.out[to * of.num_rows + first] = sums[at][0] * weight;
            of.out[to * of.num_rows + first + BOX_ROWS] = sums[at][1] * weight;
        }
    }
    __syncwarp();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    nested_pairs(const i8 *__restrict__ x, const float2 *__restrict__ groups, const Map *__restrict__ maps,
                 const u16 *__restrict__ scales, const int *__restrict__ pairs, const Pair *__restrict__ work_pairs,
                 const float *__restrict__ weights, float *__restrict__ out, int num_rows, int num_columns, int top_k) {
    extern __shared__ __align__(1024) u8 memory[];
    begin();
    const int num_pairs = work_pairs[0].pairs;
    if (num_pairs == 0) return;
    const u32 memory_at = (u32)__cvta_generic_to_shared(memory);
    Codes codes;
    Tokens tokens;
    if (threadIdx.x == 0) {
        for (int i = 0; i < CODE_SLOTS; i++) {
            init_barrier(memory_at + codes.ahead(i).full(), 1);
            init_barrier(memory_at + codes.ahead(i).empty(), WARPS);
        }
        for (int i = 0; i < TOKEN_SLOTS; i++) {
            init_barrier(memory_at + tokens.ahead(i).full(), COPIERS);
            init_barrier(memory_at + tokens.ahead(i).empty(), WARPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); // for the copy engine too
    }
    __syncthreads();
    const Step of = {{{num_columns}, x, groups, maps, scales, pairs, weights, out, num_rows, top_k}};
    const int work = num_pairs * of.tiles();
    // Turned by a pair for each row tile: some are dear and some cheap, and every block should get all kinds.
    auto pair_of = [&](int at) { return work_pairs + (at + at / num_pairs) % num_pairs; };
    // As many registers in all as before: or warps wait for each other for ever.
    if (threadIdx.x >= WORKERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        if (threadIdx.x < WORKERS + COPIERS)
            for (int at = blockIdx.x; at < work; at += gridDim.x) {
                const Pair &pair = *pair_of(at);
                if (pair.tiles == 1) copy_tokens<2>(of, pair, memory_at, tokens);
                if (pair.tiles == 2) copy_tokens<4>(of, pair, memory_at, tokens);
                if (pair.tiles == 3) copy_tokens<6>(of, pair, memory_at, tokens);
                if (pair.tiles == 4) copy_tokens<8>(of, pair, memory_at, tokens);
            }
        else if (threadIdx.x == WORKERS + COPIERS)
            for (int at = blockIdx.x; at < work; at += gridDim.x)
                copy_codes(of, *pair_of(at), at / num_pairs, memory_at, codes);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 152;");
        for (int at = blockIdx.x; at < work; at += gridDim.x) {
            const Pair &pair = *pair_of(at);
            const int tile = at / num_pairs, tiles = pair.tiles;
            if (tiles == 1) multiply_pair<1>(of, pair, tile, memory, memory_at, codes, tokens);
            if (tiles == 2) multiply_pair<2>(of, pair, tile, memory, memory_at, codes, tokens);
            if (tiles == 3) multiply_pair<3>(of, pair, tile, memory, memory_at, codes, tokens);
            if (tiles == 4) multiply_pair<4>(of, pair, tile, memory, memory_at, codes, tokens);
        }
    }
}
