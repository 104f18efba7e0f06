// The experts of a step over nested codes, for faces of one slot that meet, on Hopper devices.
//
// The same sums as `nested_fast.cu`, whose head says what they are and how codes lie: integers, exact, and one
// scale for 128 columns. `nested_many.cu` serves a face after the other, and where a slot has several it is what
// multiprocessors can fetch that limits it: the shared codes again for each. Here a block takes a meeting of faces of a
// slot, in parts of up to PART_TILES tiles of four tokens of a face, and ROWS rows (of gate_up half as many neurons' gate
// and up rows). Of a step (`Columns`) it fetches the shared codes once, then the private codes and the tokens of one
// part after the other, and puts codes together anew for each.
//
// There is a block for every multiprocessor, and each has as much to do (`for_each_piece`). Three threads have shared
// codes, private codes and tokens copied into rings of slots by the copy engine, of one piece of work after the other;
// a slot of private codes is free again as soon as they are in registers. WARPGROUPS warpgroups multiply 64 rows each,
// and never wait for each other: a lane has a neuron's gate and up row. Its sums of all parts are in shared memory,
// where only it reads them, as registers have no numbers that a program could count up. While a warp waits for its
// products the others of its scheduler put codes together. Tried and no faster: H multiplied by itself, with the tokens
// of all faces at once, and L with those of each; deeper rings, with smaller parts.
//
// Compiled with GATE_UP, COLUMNS, WARPGROUPS, SUMS (tiles of a meeting), PLANES (private planes that a face
// has at most: three bits are two), WIDE (somebody has a private plane of 4 bits), OWN_SLOTS and TOKEN_SLOTS (of rings).

constexpr int ROWS = 64 * WARPGROUPS; // of a block
constexpr int RUN = ROWS * 128;       // bytes of a run of codes

#include "nested_joined.cuh"

constexpr int WORKERS = 128 * WARPGROUPS, WARPS = WORKERS / 32, THREADS = WORKERS + 128;
constexpr int SHARED_SLOTS = 2, SHARED_SLOT = 2 * RUN; // of a step
constexpr int OWN_SLOT = OWN_RUNS * RUN, TOKEN_SLOT = PART_TILES * TILE_STEP; // of a part
constexpr int GROUPS = PART_TILES * TILE_GROUPS;
constexpr int OWN_AT = SHARED_SLOTS * SHARED_SLOT, TOKENS_AT = OWN_AT + OWN_SLOTS * OWN_SLOT;
constexpr int GROUPS_AT = TOKENS_AT + TOKEN_SLOTS * TOKEN_SLOT, SUMS_AT = GROUPS_AT + TOKEN_SLOTS * GROUPS;
constexpr int BARRIERS_AT = SUMS_AT + SUMS * 8 * WORKERS;
constexpr int ADDRESSEES_AT = BARRIERS_AT + 16 * (SHARED_SLOTS + OWN_SLOTS + TOKEN_SLOTS);
constexpr int ARRIVED_AT = ADDRESSEES_AT + SUMS * TILE * 8;
constexpr int PARTIAL = ROWS * SUMS * TILE; // sums of a piece of work

static_assert(PART_TILES == 6 && SUMS <= MOST_PARTS, "programs for so many tiles, and room for so many parts");

constexpr int STEPS = 2 * COLUMNS / (8 * GROUP);

typedef SlotRing<SHARED_SLOTS, SHARED_SLOT, 0, BARRIERS_AT> SharedRing;
typedef SlotRing<OWN_SLOTS, OWN_SLOT, OWN_AT, BARRIERS_AT + 16 * SHARED_SLOTS> OwnRing;
typedef SlotRing<TOKEN_SLOTS, TOKEN_SLOT, TOKENS_AT, BARRIERS_AT + 16 * (SHARED_SLOTS + OWN_SLOTS)> TokenRing;

struct Step : Arguments {
    const Face *faces;
    // Of each tile that is cut, by the number of the block that has the end of it: sums of its beginning and of its
    // end, and how many of them are there.
    float *partial;
    int *arrived;
    __device__ __forceinline__ int tiles() const { return (num_rows + ROWS - 1) / ROWS; }
    // Here steps with q = 0 come first: what a lane needs of scales in a step lies beside what it needs in the next.
    __device__ __forceinline__ int tokens_of(int step) const { return 2 * (step % pieces()) + run_of(step); } // which step
    __device__ __forceinline__ int run_of(int step) const { return step >= pieces(); }
    __device__ __forceinline__ int column_of(int step) const { return step % pieces() * GROUP; } // of a run
    __device__ __forceinline__ int group_of(int step, int batch) const {
        return step + ((batch & 2) + 4 * (batch & 1)) * pieces();
    }
    // Of a strip. The last tile has some rows of the tile before, which writes them, where it would have too few.
    __device__ __forceinline__ int first_row(int tile) const { return min(tile * ROWS, num_rows - ROWS); }
};

// Of what a meeting says of a part.
__device__ __forceinline__ int tiles_of(u32 part) { return part & 0xF; }
__device__ __forceinline__ Code code_of(u32 part) { return {(int)(part >> 4 & 0xF), (int)(part >> 8)}; }

// One thread: the shared codes that a piece of work needs.
__device__ __forceinline__ void copy_shared(const Step &of, const Piece &piece, u32 memory_at, SharedRing &ring) {
    const u8 *const shared = of.shared_plane(piece.meeting->slot);
    const int first_row = of.first_row(piece.tile), J = COLUMNS / 8;
#pragma unroll 1
    for (int step = piece.first; step < piece.last; step++) {
        const u32 full = memory_at + ring.full(), to = memory_at + ring.at();
        const int p = of.run_of(step), j = of.column_of(step);
        await_phase(memory_at + ring.empty(), ring.parity ^ 1);
        arrive_expecting(full, SHARED_SLOT);
        of.copy_rows(to, shared, p * J + j, first_row, ROWS, full);
        of.copy_rows(to + RUN, shared, (p + 2) * J + j, first_row, ROWS, full);
        ring.advance();
    }
}

// One thread: the private codes of all parts, in the order in which they are read.
__device__ __forceinline__ void copy_own_codes(const Step &of, const Piece &piece, u32 memory_at, OwnRing &ring) {
    const Meeting &meeting = *piece.meeting;
    const int first_row = of.first_row(piece.tile), parts = meeting.parts;
#pragma unroll 1
    for (int step = piece.first; step < piece.last; step++)
#pragma unroll 1
        for (int part = 0; part < parts; part++) {
            const Face &face = of.faces[meeting.faces[part]];
            const u32 full = memory_at + ring.full();
            await_phase(memory_at + ring.empty(), ring.parity ^ 1);
            arrive_expecting(full, Code{(int)face.bits, (int)face.step}.runs() * RUN);
            copy_own(of, face, of.run_of(step), of.column_of(step), memory_at + ring.at(), first_row, ROWS, full);
            ring.advance();
        }
}

// One thread: their tokens.
__device__ __forceinline__ void copy_tokens(const Step &of, const Piece &piece, u32 memory_at, TokenRing &ring) {
    const Meeting &meeting = *piece.meeting;
    const int parts = meeting.parts;
#pragma unroll 1
    for (int step = piece.first; step < piece.last; step++)
#pragma unroll 1
        for (int part = 0; part < parts; part++) {
            const int tiles = tiles_for(meeting.tokens[part]);
            const u32 full = memory_at + ring.full();
            await_phase(memory_at + ring.empty(), ring.parity ^ 1);
            arrive_expecting(full, tiles * (TILE_STEP + TILE_GROUPS));
            of.copy_tiles(of.tokens_of(step), meeting.tile[part], tiles, memory_at + ring.at(),
                          memory_at + GROUPS_AT + ring.slot * GROUPS, full);
            ring.advance();
        }
}

struct Addressee { // of a token's sums
    int pair;     // -1: nobody
    float weight; // by which they are multiplied first
};
// Those of a meeting. By all that multiply, before they serve it.
__device__ __forceinline__ void list_addressees(const Step &of, const Meeting &meeting, Addressee *list) {
    await_threads<WORKERS>(); // the last meeting's are no longer read
    int first = 0;            // tile of a part
    for (int part = 0; part < meeting.parts; part++) {
        const u32 what = meeting.codes[part];
        const int token = (int)threadIdx.x - TILE * first, tiles = tiles_of(what);
        if (token >= 0 && token < TILE * tiles) {
            const int pair = token < meeting.tokens[part] ? of.pairs[meeting.first[part] + token] : -1;
            const float scale = code_of(what).way() == ANY ? Joined<ANY>::SCALE : Joined<NARROW>::SCALE;
            list[threadIdx.x] = {pair, pair < 0 ? 0.f : of.weight_of(pair) / scale};
        }
        first += tiles;
    }
    await_threads<WORKERS>();
}

// What a lane has of a piece of work.
struct Worker {
    const Step &of;
    const Piece &piece;
    const Meeting &meeting;
    u8 *const memory;
    const u32 memory_at;
    SharedRing &shared;
    OwnRing &own;
    TokenRing &tokens;
    const int lane = threadIdx.x & 31, t = lane & 3, mine = 64 * (threadIdx.x / 128) + own_row(); // of the block's rows
    const int row = of.row_of(of.first_row(piece.tile) + mine);
    float2 *const sums = (float2 *)(memory + SUMS_AT) + threadIdx.x; // of a tile's token, both rows; WORKERS apart
    float scales[BATCHES][2];
    u32 next_scales[BATCHES][2];

    __device__ __forceinline__ void release(u32 at) { arrive_once(memory_at + at); }

    // A step of a part of up to T tiles, whose sums begin there.
    template <int T, Way WAY>
    __device__ __forceinline__ void multiply(int tiles, const Code &code, int p, float2 *sums_of) {
        // Five tiles are served as six, of which the last one is the next part's.
        auto is_other = [&](int tile) { return T > 4 && tile == T - 1 && tiles < T; };
        float found[T][2];
#pragma unroll
        for (int tile = 0; tile < T; tile++) {
            const float2 both = is_other(tile) ? make_float2(0.f, 0.f) : sums_of[tile * WORKERS];
            found[tile][0] = both.x, found[tile][1] = both.y;
        }
        const u64 operand = descriptor(memory_at + tokens.at(), TILE_STEP);
        const float2 *const groups = (const float2 *)(memory + GROUPS_AT + tokens.slot * GROUPS) + t;
        const float middle = Joined<WAY>::SCALE * code.middle();
        Joined<WAY> joined(code);
        u32 a[2][16];
        int c[4 * T];
        auto join = [&](int batch) {
            const int field = batch & 1, upper = batch >> 1; // of q = p + 2 upper
            if (field == 0) joined.load_run(memory + shared.at(), memory + own.at(), mine, t, p, upper);
#pragma unroll
            for (int i = 0; i < 16; i++) a[field][i] = joined.of(i, p, upper, field);
        };
        await_phase(memory_at + own.full(), own.parity);
        await_phase(memory_at + tokens.full(), tokens.parity);
        join(0);
#pragma unroll
        for (int batch = 0; batch < BATCHES; batch++) {
            start_products<T, true>(c, a[batch & 1], operand + batch * TILE_BYTES / 16);
            if (batch + 1 < BATCHES) join(batch + 1);
            await_products<0>();
            if (batch == (Joined<WAY>::BOTH ? 1 : 0)) release(own.empty()); // it is all in registers
            add_up<T>(found, c, groups + batch * TILE, scales[batch], middle);
        }
#pragma unroll
        for (int tile = 0; tile < T; tile++)
            if (!is_other(tile)) sums_of[tile * WORKERS] = make_float2(found[tile][0], found[tile][1]);
    }
    template <Way WAY> __device__ __forceinline__ void multiply(int tiles, const Code &code, int p, float2 *sums_of) {
        if (tiles > 4)
            multiply<6, WAY>(tiles, code, p, sums_of);
        else if (tiles > 3)
            multiply<4, WAY>(tiles, code, p, sums_of);
        else if (tiles > 2)
            multiply<3, WAY>(tiles, code, p, sums_of);
        else if (tiles > 1)
            multiply<2, WAY>(tiles, code, p, sums_of);
        else
            multiply<1, WAY>(tiles, code, p, sums_of);
    }

    __device__ __forceinline__ void multiply_all() {
        const u16 *scale_at = of.scales + ((i64)meeting.slot * of.num_rows + row) * of.num_groups() + piece.first;
        const u16 *scale_below = scale_at + of.apart() * of.num_groups();
        auto load_scales = [&] {
#pragma unroll
            for (int batch = 0; batch < BATCHES; batch++) {
                next_scales[batch][0] = __ldg(scale_at + of.group_of(0, batch));
                next_scales[batch][1] = __ldg(scale_below + of.group_of(0, batch));
            }
        };
        load_scales();
        const int num_parts = meeting.parts;
        u32 next = meeting.codes[0];
#pragma unroll 1
        for (int step = piece.first; step < piece.last; step++) {
#pragma unroll
            for (int i = 0; i < 2 * BATCHES; i++) scales[i >> 1][i & 1] = scale_from(next_scales[i >> 1][i & 1]);
            if (step + 1 < piece.last) scale_at++, scale_below++;
            load_scales();
            const int p = of.run_of(step);
            float2 *sums_of = sums;
            await_phase(memory_at + shared.full(), shared.parity);
#pragma unroll 1
            for (int at = 0; at < num_parts; at++) {
                const u32 part = next;
                next = meeting.codes[at + 1 < num_parts ? at + 1 : 0];
                const int tiles = tiles_of(part);
                const Code code = code_of(part);
                for_way(code, [&](auto way) { multiply<decltype(way)::value>(tiles, code, p, sums_of); });
                release(tokens.empty());
                own.advance();
                tokens.advance();
                sums_of += tiles * WORKERS;
            }
            release(shared.empty());
            shared.advance();
        }
    }

    // Of a tile that is cut, this block's sums meet the other's. Whether it came second: then it has all of them.
    __device__ __forceinline__ bool meet_other() {
        const bool end = piece.first > 0;
        const int tile = blockIdx.x + !end, count = meeting.tiles;
        float2 *const mine = (float2 *)(of.partial + (2 * tile + end) * PARTIAL) + threadIdx.x;
        const float2 *const its = (const float2 *)(of.partial + (2 * tile + !end) * PARTIAL) + threadIdx.x;
        volatile int &arrived = *(volatile int *)(memory + ARRIVED_AT);
        for (int i = 0; i < count; i++) mine[i * WORKERS] = sums[i * WORKERS];
        __threadfence();
        await_threads<WORKERS>();
        if (threadIdx.x == 0) arrived = atomicAdd(of.arrived + tile, 1);
        await_threads<WORKERS>();
        if (arrived == 0) return false;
        __threadfence();
        for (int i = 0; i < count; i++) {
            const float2 other = __ldcg(its + i * WORKERS);
            sums[i * WORKERS].x += other.x, sums[i * WORKERS].y += other.y;
        }
        return true;
    }

    __device__ __forceinline__ void write() const {
        const Addressee *const list = (const Addressee *)(memory + ADDRESSEES_AT) + t;
        for (int tile = 0; tile < meeting.tiles; tile++) {
            const Addressee to = list[tile * TILE];
            const float2 both = sums[tile * WORKERS];
            if (to.pair >= 0) of.put(to.pair, row, both.x * to.weight, both.y * to.weight);
        }
    }

    __device__ __forceinline__ void run() {
        for (int i = 0; i < meeting.tiles; i++) sums[i * WORKERS] = make_float2(0.f, 0.f);
        multiply_all();
        const bool whole = piece.last - piece.first == STEPS || meet_other();
        if (whole && of.first_row(piece.tile) + mine >= piece.tile * ROWS) write(); // others are the tile's before
        __syncwarp();
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    nested_meetings(const u8 *__restrict__ x, const float2 *__restrict__ groups, int num_tiles,
                    const u8 *__restrict__ plane, const u16 *__restrict__ scales, const int *__restrict__ pairs,
                    const Meeting *__restrict__ meetings, const float *__restrict__ weights, float *__restrict__ out,
                    int num_rows, int, const Face *__restrict__ faces, float *__restrict__ partial, int *__restrict__ arrived) {
    extern __shared__ __align__(1024) u8 memory[];
    begin();
    if (meetings[0].meetings == 0) return;
    const u32 memory_at = (u32)__cvta_generic_to_shared(memory);
    SharedRing shared;
    OwnRing own;
    TokenRing tokens;
    if (threadIdx.x == 0) {
        SharedRing::init(memory_at, WARPS);
        OwnRing::init(memory_at, WARPS);
        TokenRing::init(memory_at, WARPS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); // for the copy engine too
    }
    __syncthreads();
    const Step of = {{{COLUMNS}, x, groups, num_tiles, plane, scales, pairs, weights, out, num_rows}, faces, partial, arrived};
    // As many registers in all as before: or warps wait for each other for ever.
    if (threadIdx.x >= WORKERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        if (threadIdx.x == WORKERS)
            for_each_piece<STEPS>(meetings, of.tiles(),
                                  [&](const Piece &piece) { copy_shared(of, piece, memory_at, shared); });
        else if (threadIdx.x == WORKERS + 32)
            for_each_piece<STEPS>(meetings, of.tiles(), [&](const Piece &piece) { copy_own_codes(of, piece, memory_at, own); });
        else if (threadIdx.x == WORKERS + 64)
            for_each_piece<STEPS>(meetings, of.tiles(),
                                  [&](const Piece &piece) { copy_tokens(of, piece, memory_at, tokens); });
    } else {
#if WARPGROUPS == 3
        asm volatile("setmaxnreg.inc.sync.aligned.u32 152;");
#else
        asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
#endif
        const Meeting *last = nullptr;
        for_each_piece<STEPS>(meetings, of.tiles(), [&](const Piece &piece) {
            if (piece.meeting != last) list_addressees(of, *piece.meeting, (Addressee *)(memory + ADDRESSEES_AT));
            last = piece.meeting;
            Worker{of, piece, *piece.meeting, memory, memory_at, shared, own, tokens}.run();
        });
    }
}
