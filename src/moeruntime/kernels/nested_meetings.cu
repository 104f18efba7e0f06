// The experts of a step over nested codes, for faces of one slot that meet, on Hopper devices.
//
// The same sums as `nested_fast.cu`, whose head says what they are and how codes lie: integers, exact, and one
// scale for 128 columns. A block takes a meeting, up to TILES tiles of four tokens of faces of a slot, and three
// times 64 rows (of gate_up 32 neurons' gate and up rows). Of a step (`Columns`) it multiplies H with the tokens of
// all of them, then each face's L with its own. So H is fetched and brought into registers once for all, and codes
// are multiplied as they lie in a byte: one instruction for four of them, where putting 8 H + a L together as
// `nested_many.cu` does takes five. The powers of two leave with the scale.
//
// There is a block for every multiprocessor, and each has as much to do (`for_each_piece`). One thread has codes
// copied into a ring of slots by the copy engine, another has tokens copied into another ring, of one piece of work
// after the other. Three warpgroups multiply 64 rows each, and never wait for each other: a lane has a neuron's
// gate and up row.
//
// Compiled with GATE_UP, COLUMNS, TILES (8 or 12), CODE_SLOTS and TOKEN_SLOTS (of the rings).

#include "nested_hopper.cuh"

constexpr int WARPGROUPS = 3, ROWS = 64 * WARPGROUPS; // of a block
constexpr int WORKERS = 128 * WARPGROUPS, WARPS = WORKERS / 32, THREADS = WORKERS + 128;
constexpr int RUN = ROWS * GROUP; // bytes of a run of codes
constexpr int TOKEN_SLOT = TILES * TILE_STEP, GROUPS = TILES * TILE_GROUPS; // of a step
constexpr int TOKENS_AT = CODE_SLOTS * RUN, GROUPS_AT = TOKENS_AT + TOKEN_SLOTS * TOKEN_SLOT;
constexpr int BARRIERS_AT = GROUPS_AT + TOKEN_SLOTS * GROUPS;
constexpr int ARRIVED_AT = BARRIERS_AT + 16 * (CODE_SLOTS + TOKEN_SLOTS);
constexpr int PARTIAL = ROWS * TILES * TILE; // sums of a piece of work

constexpr int STEPS = 2 * COLUMNS / (8 * GROUP);

typedef SlotRing<CODE_SLOTS, RUN, 0, BARRIERS_AT> Codes;
typedef SlotRing<TOKEN_SLOTS, TOKEN_SLOT, TOKENS_AT, BARRIERS_AT + 16 * CODE_SLOTS> Tokens;

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

// One thread: all codes that a piece of work needs, in the order in which they are read.
__device__ __forceinline__ void copy_codes(const Step &of, const Piece &piece, u32 memory_at, Codes &ring) {
    const Meeting &meeting = *piece.meeting;
    const int first_row = of.first_row(piece.tile);
    auto copy_run = [&](const u8 *plane, int byte) {
        const u32 full = memory_at + ring.full();
        await_phase(memory_at + ring.empty(), ring.parity ^ 1);
        arrive_expecting(full, RUN);
        of.copy_rows(memory_at + ring.at(), plane, byte, first_row, ROWS, full);
        ring.advance();
    };
    const u8 *const shared = of.shared_plane(meeting.slot);
    const int run_bytes = COLUMNS / 8, own_run = meeting.bits == 1 ? 0 : run_bytes, tiles = meeting.tiles;
#pragma unroll 1
    for (int step = piece.first; step < piece.last; step++) {
        const int p = of.run_of(step), j = of.column_of(step);
        copy_run(shared, p * run_bytes + j);
        copy_run(shared, (p + 2) * run_bytes + j);
#pragma unroll 1
        for (int tile = 0; tile < tiles; tile += meeting.sizes[tile]) {
            const Face &face = of.faces[meeting.faces[tile]];
            copy_run(plane_of(face.at4, face.at2, face.at1, meeting.bits), p * own_run + j);
        }
    }
}

// One thread: all tokens, tiles of a face at once.
__device__ __forceinline__ void copy_tokens(const Step &of, const Piece &piece, u32 memory_at, Tokens &ring) {
    const Meeting &meeting = *piece.meeting;
    const Bytes sizes = meeting.sizes;
    const int tiles = meeting.tiles;
#pragma unroll 1
    for (int step = piece.first; step < piece.last; step++) {
        const u32 full = memory_at + ring.full(), to = memory_at + ring.at();
        const u32 groups_to = memory_at + GROUPS_AT + ring.slot * GROUPS;
        await_phase(memory_at + ring.empty(), ring.parity ^ 1);
        arrive_expecting(full, tiles * (TILE_STEP + TILE_GROUPS));
#pragma unroll 1
        for (int tile = 0; tile < tiles; tile += sizes[tile])
            of.copy_tiles(of.tokens_of(step), meeting.tile[tile], sizes[tile], to + tile * TILE_STEP,
                          groups_to + tile * TILE_GROUPS, full);
        ring.advance();
    }
}

// What a lane has of a piece of work with up to four times HALVES tiles.
template <int HALVES> struct Worker {
    const Step &of;
    const Piece &piece;
    const Meeting &meeting;
    u8 *const memory;
    const u32 memory_at;
    Codes &codes;
    Tokens &tokens;
    const int lane = threadIdx.x & 31, t = lane & 3, mine = 64 * (threadIdx.x / 128) + own_row(); // of the block's rows
    const int row = of.row_of(of.first_row(piece.tile) + mine);
    const bool single = meeting.bits == 1; // bit: runs lie a bit apart
    float sums[4 * HALVES][2] = {};        // of a tile's token, both rows
    u16 scales[BATCHES][2];
    u64 operand;          // tokens of the first batch, and
    const float2 *groups; // what their integers count: of the tile that is first in `sums`

    __device__ __forceinline__ void release(u32 at) {
        __syncwarp();
        if (lane == 0) arrive(memory_at + at);
    }
    __device__ __forceinline__ void load_run(Words &words) {
        await_phase(memory_at + codes.full(), codes.parity);
        load(words, memory + codes.at(), mine, t);
        release(codes.empty());
        codes.advance();
    }

    // H with all tokens, four tiles at a time.
    __device__ __forceinline__ void multiply_shared() {
        Words words;
        u32 h[2][16];
        int c[2][16];
        auto start = [&](int at) {
            const int batch = at / HALVES, half = at % HALVES;
            if (half == 0) {
                if (batch % 2 == 0) load_run(words);
#pragma unroll
                for (int i = 0; i < 16; i++) h[batch & 1][i] = words[i] & 0x0F0F0F0Fu << 4 * (batch & 1);
            }
            keep_order(h[batch & 1]);
            start_products<4>(c[at & 1], h[batch & 1], operand + (batch * TILE_BYTES + half * 4 * TILE_STEP) / 16);
        };
        auto add_up = [&](int at) {
            const int batch = at / HALVES, half = at % HALVES;
            const float times = batch & 1 ? 0.5f : 8.f; // the second field lies 4 bits higher
            const float u[2] = {scale_from(scales[batch][0]) * times, scale_from(scales[batch][1]) * times};
            keep_order(c[at & 1]);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float one = groups[((4 * half + i) * BATCHES + batch) * TILE].x;
#pragma unroll
                for (int below = 0; below < 2; below++)
                    sums[4 * half + i][below] += u[below] * (whole(c[at & 1] + 4 * i + 2 * below) * one);
            }
        };
        pipeline<BATCHES * HALVES>(start, add_up);
    }

    // L of a face, a a step of it, with T tiles of tokens, from the one that is the FIRST in `sums` on.
    template <int T, int FIRST> __device__ __forceinline__ void multiply_own(int a, bool later_run) {
        const u32 mask = !single ? 0x03030303u : later_run ? 0x02020202u : 0x01010101u;
        const float middle = 60.f + (float)a * (single ? 0.5f : 1.5f);
        const float times = (float)a * (single && later_run ? 0.5f : 1.f);
        Words words;
        u32 l[2][16];
        int c[2][4 * T];
        load_run(words);
        auto shift_of = [](int batch) { return 4 * (batch & 1) + 2 * (batch >> 1); };
        auto start = [&](int batch) {
#pragma unroll
            for (int i = 0; i < 16; i++) l[batch & 1][i] = words[i] & mask << shift_of(batch);
            keep_order(l[batch & 1]);
            start_products<T>(c[batch & 1], l[batch & 1], operand + (batch * TILE_BYTES + FIRST * TILE_STEP) / 16);
        };
        auto add_up = [&](int batch) {
            const float power = times / (float)(1 << shift_of(batch));
            keep_order(c[batch & 1]);
#pragma unroll
            for (int i = 0; i < T; i++) {
                const float2 one = groups[((FIRST + i) * BATCHES + batch) * TILE];
                const float counts = one.x * power, less = one.y * middle;
#pragma unroll
                for (int below = 0; below < 2; below++)
                    sums[FIRST + i][below] += scale_from(scales[batch][below]) *
                                              (whole(c[batch & 1] + 4 * i + 2 * below) * counts - less);
            }
        };
        pipeline<BATCHES>(start, add_up);
    }

    // Tiles are multiplied where they are first, since registers have no numbers that a program could count up.
    template <int BY> __device__ __forceinline__ void turn() {
        float were[4 * HALVES][2];
#pragma unroll
        for (int i = 0; i < 8 * HALVES; i++) were[i >> 1][i & 1] = sums[i >> 1][i & 1];
#pragma unroll
        for (int i = 0; i < 8 * HALVES; i++) sums[i >> 1][i & 1] = were[((i >> 1) + BY) % (4 * HALVES)][i & 1];
        operand += BY * TILE_STEP / 16;
        groups += BY * BATCHES * TILE;
    }

    __device__ __forceinline__ void multiply_all() {
        const Bytes steps = meeting.steps, sizes = meeting.sizes;
        const u16 *scale_at = of.scales + ((i64)meeting.slot * of.num_rows + row) * of.num_groups() + piece.first;
        const u16 *scale_below = scale_at + of.apart() * of.num_groups();
#pragma unroll 1
        for (int step = piece.first; step < piece.last; step++, scale_at++, scale_below++) {
#pragma unroll
            for (int batch = 0; batch < BATCHES; batch++) {
                scales[batch][0] = __ldg(scale_at + of.group_of(0, batch));
                scales[batch][1] = __ldg(scale_below + of.group_of(0, batch));
            }
            await_phase(memory_at + tokens.full(), tokens.parity);
            operand = descriptor(memory_at + tokens.at(), TILE_STEP);
            groups = (const float2 *)(memory + GROUPS_AT + tokens.slot * GROUPS) + t;
            multiply_shared();
            const bool later_run = of.run_of(step);
#pragma unroll 1
            for (int tile = 0; tile < 4 * HALVES; tile += 2) {
                const int size = tile < meeting.tiles ? sizes[tile] : 0, a = steps[tile];
                if (size == 4) {
                    multiply_own<4, 0>(a, later_run);
                    turn<2>();
                    tile += 2;
                } else if (size == 2) {
                    multiply_own<2, 0>(a, later_run);
                } else if (size == 1) {
                    multiply_own<1, 0>(a, later_run);
                    if (tile + 1 < meeting.tiles) multiply_own<1, 1>(steps[tile + 1], later_run);
                }
                turn<2>();
            }
            release(tokens.empty());
            tokens.advance();
        }
    }

    // Of a tile that is cut, this block's sums meet the other's. Whether it came second: then it has all of them.
    __device__ __forceinline__ bool meet_other() {
        const bool end = piece.first > 0;
        const int tile = blockIdx.x + !end;
        float *const mine = of.partial + (2 * tile + end) * PARTIAL + threadIdx.x;
        const float *const its = of.partial + (2 * tile + !end) * PARTIAL + threadIdx.x;
        volatile int &arrived = *(volatile int *)(memory + ARRIVED_AT);
#pragma unroll
        for (int i = 0; i < 8 * HALVES; i++) mine[i * WORKERS] = sums[i >> 1][i & 1];
        __threadfence();
        await_threads<WORKERS>();
        if (threadIdx.x == 0) arrived = atomicAdd(of.arrived + tile, 1);
        await_threads<WORKERS>();
        if (arrived == 0) return false;
        __threadfence();
#pragma unroll
        for (int i = 0; i < 8 * HALVES; i++) sums[i >> 1][i & 1] += __ldcg(its + i * WORKERS);
        return true;
    }

    __device__ __forceinline__ void write() const {
        if (of.first_row(piece.tile) + mine < piece.tile * ROWS) return; // they are the tile's before
#pragma unroll
        for (int tile = 0; tile < 4 * HALVES; tile++) {
            if (tile >= meeting.tiles || t >= meeting.tokens[tile]) continue;
            of.write(of.pairs[meeting.first[tile] + t], row, sums[tile][0], sums[tile][1]);
        }
    }

    __device__ __forceinline__ void run() {
        multiply_all();
        if (piece.last - piece.first == STEPS || meet_other()) write();
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
    Codes codes;
    Tokens tokens;
    if (threadIdx.x == 0) {
        Codes::init(memory_at, WARPS);
        Tokens::init(memory_at, WARPS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); // for the copy engine too
    }
    __syncthreads();
    const Step of = {{{COLUMNS}, x, groups, num_tiles, plane, scales, pairs, weights, out, num_rows}, faces, partial, arrived};
    // As many registers in all as before: or warps wait for each other for ever.
    if (threadIdx.x >= WORKERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        if (threadIdx.x == WORKERS)
            for_each_piece<STEPS>(meetings, of.tiles(),
                                  [&](const Piece &piece) { copy_codes(of, piece, memory_at, codes); });
        else if (threadIdx.x == WORKERS + 32)
            for_each_piece<STEPS>(meetings, of.tiles(),
                                  [&](const Piece &piece) { copy_tokens(of, piece, memory_at, tokens); });
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 152;");
        for_each_piece<STEPS>(meetings, of.tiles(), [&](const Piece &piece) {
            if (piece.meeting->tiles <= TILES - 4)
                Worker<TILES / 4 - 1>{of, piece, *piece.meeting, memory, memory_at, codes, tokens}.run();
            else
                Worker<TILES / 4>{of, piece, *piece.meeting, memory, memory_at, codes, tokens}.run();
        });
    }
}
