// The experts of a step over nested codes where many tokens meet, on Hopper's warpgroup products.
//
// The same sums as `nested_fast.cu`, whose head says what they are and how codes lie: integers, exact,
// and one scale for 128 columns. There a warp multiplies 32 rows with 16 tokens at most, and waits for
// every product; a code is unpacked once for each 16 tokens. Here a block takes 128 rows (of gate_up 64
// neurons' gate and up rows) and up to 4 TILES tokens of a face. Codes are unpacked into registers, once
// for all of those tokens, while the products of what was unpacked before run; tokens come from shared
// memory without passing through registers.
//
// A batch of a step (`Columns`) is four products of 64 rows and 32 columns a warpgroup.
//
// There is a block for every multiprocessor. One thread has steps copied into a ring by the copy engine, of one
// piece of work after the other; two warpgroups multiply 64 rows each, and never wait for each other: a lane has
// a neuron's gate and up row. Tried and no faster: two smaller blocks a multiprocessor; a slot's shared codes
// fetched once for all of its faces, or put together with the private codes of four faces one after the other.
// H and L multiplied by themselves, H with the tokens of four faces at once, is an eighth faster for about four
// tokens of each, and slower for more or for one face. In field 1 H could be used where it lies, if twice the
// sum fitted a byte: it does not, as it may be 134.
//
// Compiled with GATE_UP, TILES (2, 4, 8 or 12), PLANES (private planes that a face has at most: three bits
// are two), WIDE (somebody has a private plane of 4 bits) and STAGES (of the ring).

#include "nested_hopper.cuh"

constexpr int ROWS = 128; // of a block
constexpr int WORKERS = 256, WARPS = WORKERS / 32, THREADS = WORKERS + 128;
constexpr int RUN = ROWS * GROUP;                   // bytes of a run of codes in a stage
constexpr int OWN = PLANES == 0 ? 0 : WIDE ? 2 : 1; // runs of the first private plane
constexpr int TOKENS_AT = RUN * (2 + OWN + (PLANES == 2));
constexpr int STAGE = TOKENS_AT + TILES * TILE_STEP; // a multiple of what a descriptor wants
constexpr int GROUPS_AT = STAGES * STAGE, GROUPS = TILES * TILE_GROUPS;
constexpr int BARRIERS_AT = GROUPS_AT + STAGES * GROUPS;

typedef SlotRing<STAGES, STAGE, 0, BARRIERS_AT> Ring;

// Tiles of the narrowest program that holds so many tokens.
__device__ __forceinline__ int width_for(int tokens) { return tokens > 32 ? 12 : tokens > 16 ? 8 : tokens > 8 ? 4 : 2; }

// One thread: all that a piece of work needs.
__device__ __forceinline__ void copy_all(const Arguments &of, const Unit &unit, int row_tile, u32 ring_at, Ring &ring) {
    const int bits = unit.bits, J = of.num_columns / 8, tiles = tiles_for(unit.tokens);
    const bool second = PLANES > 1 && bits == 3; // private plane
    const int own_runs = PLANES == 0 || bits == 0 ? 0 : WIDE && bits == 4 ? 2 : 1;
    const u8 *const shared = of.shared_plane(unit.slot), *const own1 = (const u8 *)unit.at1;
    const u8 *const own = plane_of(unit.at4, unit.at2, unit.at1, bits);
    const int bytes = (2 + own_runs + second) * RUN + tiles * (TILE_STEP + TILE_GROUPS);
    const int steps = of.steps();
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        await_phase(ring_at + ring.empty(), ring.parity ^ 1);
        const u32 full = ring_at + ring.full(), to = ring_at + ring.at();
        const int p = step & 1, j = (step >> 1) * GROUP;
        auto copy_run = [&](int run, const u8 *plane, int byte) {
            of.copy_rows(to + run * RUN, plane, byte, ROWS * row_tile, ROWS, full);
        };
        arrive_expecting(full, bytes);
        copy_run(0, shared, p * J + j);
        if (own_runs) copy_run(2, own, (bits == 1 ? 0 : p * J) + j);
        of.copy_tiles(step, unit.tile, tiles, to + TOKENS_AT, ring_at + GROUPS_AT + ring.slot * GROUPS, full);
        if (second) copy_run(2 + OWN, own1, j);
        copy_run(1, shared, (p + 2) * J + j);
        if (own_runs == 2) copy_run(3, own, (p + 2) * J + j);
        ring.advance();
    }
}

template <int T>
__device__ __forceinline__ void multiply_all(const Arguments &of, const Unit &unit, int row_tile, u8 *memory,
                                             u32 ring_at, Ring &ring) {
    const int lane = threadIdx.x & 31, t = lane & 3, mine = 64 * (threadIdx.x / 128) + own_row(); // of the block's rows
    const int bits = unit.bits, row = of.row_of(ROWS * row_tile + mine), num_groups = of.num_groups();
    const u16 *const scale_at = of.scales + ((i64)unit.slot * of.num_rows + row) * num_groups;
    const u16 *const scale_below = scale_at + of.apart() * num_groups;
    const u32 step = bits == 0 ? 0 : bits == 3 ? 2 * unit.step : unit.step, step1 = bits == 3 ? unit.step : 0;
    const float middle = 60.f + (bits ? (float)unit.step * (float)((1 << bits) - 1) * 0.5f : 0.f);
    const u32 own_mask = bits == 4 ? 0x0F0F0F0Fu : bits == 1 ? 0x01010101u : 0x03030303u;

    float sums[T][2]; // of a token, both rows
#pragma unroll
    for (int i = 0; i < 2 * T; i++) sums[i >> 1][i & 1] = 0.f;

    const int steps = of.steps();
#pragma unroll 1
    for (int at_step = 0; at_step < steps; at_step++) {
        await_phase(ring_at + ring.full(), ring.parity);
        u16 scale_of[BATCHES][2];
#pragma unroll
        for (int batch = 0; batch < BATCHES; batch++) {
            scale_of[batch][0] = __ldg(scale_at + of.group_of(at_step, batch));
            scale_of[batch][1] = __ldg(scale_below + of.group_of(at_step, batch));
        }
        const u8 *const here = memory + ring.at();
        const float2 *const groups_here = (const float2 *)(memory + GROUPS_AT + ring.slot * GROUPS) + t;
        const int p = at_step & 1;

        Words shared, own, own1;
        u32 a[2][16];
        int c[2][4 * T];
        auto start = [&](int batch) {
            const int field = batch & 1, upper = batch >> 1; // of q = p + 2 upper
            if (field == 0) {
                load(shared, here + upper * RUN, mine, t);
                if (PLANES > 0 && (upper == 0 || WIDE))
                    load(own, here + (2 + (WIDE && bits == 4 ? upper : 0)) * RUN, mine, t);
                if (PLANES > 1 && upper == 0) load(own1, here + (2 + OWN) * RUN, mine, t);
            }
            const int shift1 = p + 2 * upper + 4 * field;
            const int own_shift = bits == 1 ? shift1 : (bits == 4 ? 0 : 2 * upper) + 4 * field;
#pragma unroll
            for (int i = 0; i < 16; i++) {
                u32 code = (field ? shared[i] >> 1 : shared[i] << 3) & 0x78787878u;
                if (PLANES > 0) code += (own[i] >> own_shift & own_mask) * step;
                if (PLANES > 1) code += (own1[i] >> shift1 & 0x01010101u) * step1;
                a[batch & 1][i] = code;
            }
            start_products<T>(c[batch & 1], a[batch & 1],
                              descriptor(ring_at + ring.at() + TOKENS_AT + batch * TILE_BYTES, TILE_STEP));
        };
        auto add_up = [&](int batch) {
            int(&found)[4 * T] = c[batch & 1];
            keep_order(found);
            float u[2];
#pragma unroll
            for (int below = 0; below < 2; below++) u[below] = scale_from(scale_of[batch][below]);
#pragma unroll
            for (int tile = 0; tile < T; tile++) {
                const float2 one = groups_here[(tile * BATCHES + batch) * TILE];
                const float less = one.y * middle;
#pragma unroll
                for (int below = 0; below < 2; below++)
                    sums[tile][below] += u[below] * (whole(found + 4 * tile + 2 * below) * one.x - less);
            }
        };
        pipeline<BATCHES>(start, add_up);
        __syncwarp();
        if (lane == 0) arrive(ring_at + ring.empty());
        ring.advance();
    }

#pragma unroll
    for (int tile = 0; tile < T; tile++)
        if (TILE * tile + t < unit.tokens)
            of.write(of.pairs[unit.first + TILE * tile + t], row, sums[tile][0], sums[tile][1]);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    nested_many(const u8 *__restrict__ x, const float2 *__restrict__ groups, int num_tiles,
                const u8 *__restrict__ plane, const u16 *__restrict__ scales, const int *__restrict__ pairs,
                const Unit *__restrict__ units, const float *__restrict__ weights, float *__restrict__ out,
                int num_rows, int num_columns) {
    extern __shared__ __align__(1024) u8 memory[];
    const u32 ring_at = (u32)__cvta_generic_to_shared(memory);
    if (threadIdx.x == 0) {
        Ring::init(ring_at, WARPS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); // for the copy engine too
    }
    __syncthreads();
    begin();
    const Arguments of = {{num_columns}, x, groups, num_tiles, plane, scales, pairs, weights, out, num_rows};
    const int num_units = units[0].units, work = num_units * (num_rows / ROWS);
    // Turned by a unit for each row tile: some are dear and some cheap, and every block should get all kinds.
    auto unit_of = [&](int at) { return (at + at / num_units) % num_units; };
    Ring ring;
    if (threadIdx.x >= WORKERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        if (threadIdx.x == WORKERS)
            for (int at = blockIdx.x; at < work; at += gridDim.x)
                copy_all(of, units[unit_of(at)], at / num_units, ring_at, ring);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
        for (int at = blockIdx.x; at < work; at += gridDim.x) {
            const Unit unit = units[unit_of(at)];
            const int width = width_for(unit.tokens), row_tile = at / num_units;
            if (TILES >= 12 && width == 12)
                multiply_all<TILES >= 12 ? 12 : 2>(of, unit, row_tile, memory, ring_at, ring);
            else if (TILES >= 8 && width == 8)
                multiply_all<TILES >= 8 ? 8 : 2>(of, unit, row_tile, memory, ring_at, ring);
            else if (TILES >= 4 && width == 4)
                multiply_all<TILES >= 4 ? 4 : 2>(of, unit, row_tile, memory, ring_at, ring);
            else
                multiply_all<2>(of, unit, row_tile, memory, ring_at, ring);
        }
    }
}
