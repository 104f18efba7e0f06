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
// a neuron's gate and up row. Products and other instructions take turns on a multiprocessor, so what counts is how
// few instructions there are; and where several faces have a slot, its shared codes are fetched for each of them,
// which `nested_meetings.cu` does once. Tried and no faster: two smaller blocks a multiprocessor.
//
// Compiled with GATE_UP, COLUMNS, TILES (4, 8 or 12), PLANES (private planes that a face has at most: three bits
// are two), WIDE (somebody has a private plane of 4 bits) and STAGES (of the ring).

#include "nested_units.cuh"

constexpr int STAGE = CODES + TILES * TILE_STEP; // a multiple of what a descriptor wants
constexpr int GROUPS_AT = STAGES * STAGE, GROUPS = TILES * TILE_GROUPS;
constexpr int BARRIERS_AT = GROUPS_AT + STAGES * GROUPS;

typedef SlotRing<STAGES, STAGE, 0, BARRIERS_AT> Ring;

// One thread: all that a piece of work needs.
__device__ __forceinline__ void copy_all(const Arguments &of, const Unit &unit, int row_tile, u32 ring_at, Ring &ring) {
    const int tiles = tiles_for(unit.tokens), steps = of.steps();
    const int bytes = code_bytes({unit.bits, unit.step}) + tiles * (TILE_STEP + TILE_GROUPS);
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        const u32 full = ring_at + ring.full(), to = ring_at + ring.at();
        await_phase(ring_at + ring.empty(), ring.parity ^ 1);
        arrive_expecting(full, bytes);
        of.copy_tiles(step, unit.tile, tiles, to + CODES, ring_at + GROUPS_AT + ring.slot * GROUPS, full);
        copy_codes(of, unit, row_tile, step, to, full);
        ring.advance();
    }
}

// Scales of a lane's two rows in a step.
struct Scales {
    const u16 *first, *below; // of a row, and of the other one
    u32 of[BATCHES][2];       // bfloat16
    __device__ __forceinline__ void load(const Arguments &in, int step) {
#pragma unroll
        for (int batch = 0; batch < BATCHES; batch++) {
            of[batch][0] = __ldg(first + in.group_of(step, batch));
            of[batch][1] = __ldg(below + in.group_of(step, batch));
        }
    }
};

template <int T, Way WAY>
__device__ __forceinline__ void multiply_all(const Arguments &of, const Unit &unit, int row_tile, u8 *memory,
                                             u32 ring_at, Ring &ring) {
    const int lane = threadIdx.x & 31, t = lane & 3, mine = 64 * (threadIdx.x / 128) + own_row(); // of the block's rows
    const int row = of.row_of(ROWS * row_tile + mine);
    const u16 *const scale_at = of.scales + ((i64)unit.slot * of.num_rows + row) * of.num_groups();
    Scales next = {scale_at, scale_at + of.apart() * of.num_groups()};
    next.load(of, 0);
    const Code code = {unit.bits, unit.step};
    const float middle = Joined<WAY>::SCALE * code.middle();
    Joined<WAY> joined(code);

    float sums[T][2]; // of a token, both rows
#pragma unroll
    for (int i = 0; i < 2 * T; i++) sums[i >> 1][i & 1] = 0.f;

    const int steps = of.steps();
#pragma unroll 1
    for (int at_step = 0; at_step < steps; at_step++) {
        await_phase(ring_at + ring.full(), ring.parity);
        const Scales scales = next;
        next.load(of, min(at_step + 1, steps - 1));
        const u8 *const here = memory + ring.at();
        const float2 *const groups_here = (const float2 *)(memory + GROUPS_AT + ring.slot * GROUPS) + t;
        const u64 operand = descriptor(ring_at + ring.at() + CODES, TILE_STEP);
        const int p = at_step & 1;

        u32 a[2][16];
        int c[2][4 * T];
        auto start = [&](int batch) {
            const int field = batch & 1, upper = batch >> 1; // of q = p + 2 upper
            if (field == 0) joined.load_run(here, here + 2 * RUN, mine, t, p, upper);
#pragma unroll
            for (int i = 0; i < 16; i++) a[batch & 1][i] = joined.of(i, p, upper, field);
            start_products<T>(c[batch & 1], a[batch & 1], operand + batch * TILE_BYTES / 16);
        };
        auto add = [&](int batch) {
            const float scale[2] = {scale_from(scales.of[batch][0]), scale_from(scales.of[batch][1])};
            add_up<T>(sums, c[batch & 1], groups_here + batch * TILE, scale, middle);
        };
        pipeline<BATCHES>(start, add);
        arrive_once(ring_at + ring.empty());
        ring.advance();
    }

    const float weight = 1.f / Joined<WAY>::SCALE;
#pragma unroll
    for (int tile = 0; tile < T; tile++)
        if (TILE * tile + t < unit.tokens)
            of.write(of.pairs[unit.first + TILE * tile + t], row, sums[tile][0] * weight, sums[tile][1] * weight);
}

// The fewest tiles that have a program and hold so many.
template <class Do> __device__ __forceinline__ void for_width(int tiles, Do serve) {
    constexpr int fourth = TILES > 8 ? 4 : TILES / 4;
    if (tiles > TILES - fourth) return serve(Constant<TILES>());
    if (tiles > TILES - 2 * fourth) return serve(Constant<TILES - fourth>());
    if constexpr (TILES > 8) return serve(Constant<fourth>());
    if (tiles > fourth) return serve(Constant<2 * fourth>());
    serve(Constant<fourth>());
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    nested_many(const u8 *__restrict__ x, const float2 *__restrict__ groups, int num_tiles,
                const u8 *__restrict__ plane, const u16 *__restrict__ scales, const int *__restrict__ pairs,
                const Unit *__restrict__ units, const float *__restrict__ weights, float *__restrict__ out,
                int num_rows, int) {
    extern __shared__ __align__(1024) u8 memory[];
    const u32 ring_at = (u32)__cvta_generic_to_shared(memory);
    if (threadIdx.x == 0) {
        Ring::init(ring_at, WARPS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); // for the copy engine too
    }
    __syncthreads();
    begin();
    const Arguments of = {{COLUMNS}, x, groups, num_tiles, plane, scales, pairs, weights, out, num_rows};
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
        if (blockIdx.x >= work) return;
        Unit next = units[unit_of(blockIdx.x)];
        for (int at = blockIdx.x; at < work; at += gridDim.x) {
            const Unit unit = next; // fetched while the one before it was served
            next = units[unit_of(min(at + (int)gridDim.x, work - 1))];
            const int tiles = tiles_for(unit.tokens);
            auto serve = [&](auto width, auto way) {
                multiply_all<decltype(width)::value, decltype(way)::value>(of, unit, at / num_units, memory, ring_at, ring);
            };
            for_way({unit.bits, unit.step},
                    [&](auto way) { for_width(tiles, [&](auto width) { serve(width, way); }); });
        }
    }
}
