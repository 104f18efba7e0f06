// What the kernels of nested experts for Hopper devices have in common: how the thread that has things copied and
// warps that multiply wait for each other, and how products of a warpgroup run.
#pragma once
#include "nested_tiles.cuh"

__device__ __forceinline__ void init_barrier(u32 at, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
}
// By a whole warp, of which one lane does. A jump here would part what products of a warpgroup read.
__device__ __forceinline__ void arrive_once(u32 at) {
    __syncwarp();
    asm volatile("{.reg .pred first; setp.eq.b32 first, %1, 0;\n"
                 "@first mbarrier.arrive.shared::cta.b64 _, [%0];}" ::"r"(at),
                 "r"(threadIdx.x & 31)
                 : "memory");
}
__device__ __forceinline__ void await_phase(u32 at, u32 parity) {
    asm volatile("{.reg .pred done;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;}" ::"r"(at),
                 "r"(parity)
                 : "memory");
}

// By one thread: and so many bytes are to come before the phase ends.
__device__ __forceinline__ void arrive_expecting(u32 at, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}
// A run of bytes, of a multiple of 16.
__device__ __forceinline__ void copy_bytes(u32 to, const void *from, int bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

// A ring of slots in shared memory: which is next, and how often it went round. A slot's barriers say when it is full
// and may be read, and when it is empty and may be written.
template <int SLOTS, int SLOT, int RING_AT, int BARRIERS> struct SlotRing {
    int slot = 0;
    u32 parity = 0;
    __device__ __forceinline__ void advance() {
        if (++slot == SLOTS) slot = 0, parity ^= 1;
    }
    __device__ __forceinline__ u32 at() const { return RING_AT + slot * SLOT; }
    __device__ __forceinline__ u32 full() const { return BARRIERS + 8 * slot; }
    __device__ __forceinline__ u32 empty() const { return BARRIERS + 8 * (SLOTS + slot); }
    // By one thread.
    static __device__ __forceinline__ void init(u32 memory_at, int readers) {
        for (int i = 0; i < SLOTS; i++) {
            init_barrier(memory_at + BARRIERS + 8 * i, 1); // and what the copy engine brings
            init_barrier(memory_at + BARRIERS + 8 * (SLOTS + i), readers);
        }
    }
};

struct Words { // 16 bytes of a lane's two rows, the left and the right half of a group
    uint4 top[2], bottom[2];
    // Of product `i / 4`, its register `i % 4`.
    __device__ __forceinline__ u32 operator[](int i) const {
        const uint4 &v = i & 1 ? bottom[i >> 3] : top[i >> 3];
        const int word = i >> 1 & 3;
        return word == 0 ? v.x : word == 1 ? v.y : word == 2 ? v.z : v.w;
    }
};

// Of 64 rows a warpgroup multiplies; which of them a lane has first. The other one is HALF further down.
__device__ __forceinline__ int own_row() {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x & 31;
    return 2 * HALF * (warp >> 1) + 8 * (warp & 1) + (lane >> 2);
}

__device__ __forceinline__ void load(Words &words, const u8 *run, int row, int t) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        words.top[half] = *(const uint4 *)(run + code_place(row, 4 * half + t));
        words.bottom[half] = *(const uint4 *)(run + code_place(row + HALF, 4 * half + t));
    }
}

// Of tokens in shared memory: tiles of eight rows of 128 bytes, whose chunks are exchanged as `place_of` says; how far
// the next tile is.
__device__ __forceinline__ u64 descriptor(u32 at, int next) {
    return (u64)(at >> 4 & 0x3FFF) | 1ull << 16 | (u64)(next >> 4) << 32 | 1ull << 62;
}

// c (+)= rows [64, 32 bytes] in registers times tokens [32 bytes, 8 T] in shared memory: integers of 8 bits, whose sums
// are integers, or bfloat16.
template <class Sum, int T> struct Product;

// An instruction's operands have numbers: first come those of c, then a's four, b and `add`.
#define FIRST_4 "%0,%1,%2,%3"
#define FIRST_8 FIRST_4 ",%4,%5,%6,%7"
#define FIRST_16 FIRST_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define FIRST_12 FIRST_8 ",%8,%9,%10,%11"
#define FIRST_24 FIRST_16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define FIRST_32 FIRST_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define FIRST_48 FIRST_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define FIRST_64 FIRST_48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define C4(R, i) R(c[i]), R(c[i + 1]), R(c[i + 2]), R(c[i + 3])
#define C8(R, i) C4(R, i), C4(R, i + 4)
#define C16(R, i) C8(R, i), C8(R, i + 8)
#define INTEGER "+r"
#define NUMBER "+f"

#define PRODUCT(SUM, T, KIND, REST, C, A, B, ADD, ...)                                                                  \
    template <> struct Product<SUM, T> {                                                                             \
        static __device__ __forceinline__ void start(SUM (&c)[4 * T], const u32 *a, u64 b, int add) {                \
            asm volatile("{.reg .pred p; setp.ne.b32 p, " ADD ", 0;\n"                                               \
                         "wgmma.mma_async.sync.aligned." KIND " {" C "}, {" A "}, " B ", p" REST ";}"                \
                         : __VA_ARGS__                                                                               \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                            \
        }                                                                                                            \
    }
#define OF_INTEGERS(T, COLUMNS, ...) PRODUCT(int, T, "m64n" COLUMNS "k32.s32.u8.s8", "", __VA_ARGS__)
#define OF_NUMBERS(T, COLUMNS, ...) PRODUCT(float, T, "m64n" COLUMNS "k16.f32.bf16.bf16", ", 1, 1, 0", __VA_ARGS__)

OF_INTEGERS(1, "8", FIRST_4, "%4,%5,%6,%7", "%8", "%9", C4(INTEGER, 0));
OF_INTEGERS(2, "16", FIRST_8, "%8,%9,%10,%11", "%12", "%13", C8(INTEGER, 0));
OF_INTEGERS(3, "24", FIRST_12, "%12,%13,%14,%15", "%16", "%17", C8(INTEGER, 0), C4(INTEGER, 8));
OF_INTEGERS(4, "32", FIRST_16, "%16,%17,%18,%19", "%20", "%21", C16(INTEGER, 0));
OF_INTEGERS(6, "48", FIRST_24, "%24,%25,%26,%27", "%28", "%29", C16(INTEGER, 0), C8(INTEGER, 16));
OF_INTEGERS(8, "64", FIRST_32, "%32,%33,%34,%35", "%36", "%37", C16(INTEGER, 0), C16(INTEGER, 16));
OF_INTEGERS(12, "96", FIRST_48, "%48,%49,%50,%51", "%52", "%53", C16(INTEGER, 0), C16(INTEGER, 16), C16(INTEGER, 32));
OF_NUMBERS(4, "32", FIRST_16, "%16,%17,%18,%19", "%20", "%21", C16(NUMBER, 0));
OF_NUMBERS(8, "64", FIRST_32, "%32,%33,%34,%35", "%36", "%37", C16(NUMBER, 0), C16(NUMBER, 16));
OF_NUMBERS(12, "96", FIRST_48, "%48,%49,%50,%51", "%52", "%53", C16(NUMBER, 0), C16(NUMBER, 16), C16(NUMBER, 32));
OF_NUMBERS(16, "128", FIRST_64, "%64,%65,%66,%67", "%68", "%69", C16(NUMBER, 0), C16(NUMBER, 16), C16(NUMBER, 32),
           C16(NUMBER, 48));

__device__ __forceinline__ void fence_registers() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int OPEN> __device__ __forceinline__ void await_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(OPEN) : "memory");
}
// Whoever reads or writes these registers next does so after this.
template <class T, int COUNT> __device__ __forceinline__ void keep_order(T (&c)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+r"(c[i])::"memory");
}
template <int COUNT> __device__ __forceinline__ void keep_order(float (&c)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(c[i])::"memory");
}
// c (+)= what four products of 16 registers and the tokens that an operand says make; `add` whether there was any.
// An operand's last three bits are 0, so bits may be SET in place of adding numbers: who compiles this makes fewer
// instructions of the one in some kernels, of the other in others.
template <int T, bool SET = false, class Sum>
__device__ __forceinline__ void start_products(Sum (&c)[4 * T], const u32 (&a)[16], u64 operand, int add = 0) {
    keep_order(c);
    fence_registers();
#pragma unroll
    for (int i = 0; i < 4; i++) Product<Sum, T>::start(c, a + 4 * i, SET ? operand | 2 * i : operand + 2 * i, add + i);
    commit_products();
}
// While products run, those before are added up.
template <int COUNT, class Start, class AddUp> __device__ __forceinline__ void pipeline(Start start, AddUp add_up) {
    start(0);
#pragma unroll
    for (int at = 1; at < COUNT; at++) {
        start(at);
        await_products<1>();
        add_up(at - 1);
    }
    await_products<0>();
    add_up(COUNT - 1);
}
// What both halves of a token make, in units of the lower one.
__device__ __forceinline__ float whole(const int *halves) { return (float)(128 * halves[0] + halves[1]); }

// Those that multiply, and nobody who copies.
template <int COUNT> __device__ __forceinline__ void await_threads() {
    asm volatile("bar.sync 1, %0;" ::"n"(COUNT) : "memory");
}

struct Arguments : Columns { // of a kernel
    const u8 *x; // as `halves` of nested_halves.cu has it, with room for so many tiles
    const float2 *groups;
    int num_tiles;
    const u8 *plane; // of the slots
    const u16 *scales;
    const int *pairs;
    const float *weights;
    float *out;
    int num_rows;
    // What a lane's first row of a strip is a row of, and how far from it the other is.
    __device__ __forceinline__ int row_of(int strip_row) const {
        return GATE_UP ? strip_row / (2 * HALF) * HALF + strip_row % HALF : strip_row;
    }
    __device__ __forceinline__ int apart() const { return GATE_UP ? num_rows / 2 : HALF; }
    __device__ __forceinline__ const u8 *shared_plane(int slot) const {
        return plane + (i64)slot * num_rows * (num_columns / 2);
    }
    // Some rows of the strip of a plane that begins at so many bytes of each row.
    __device__ __forceinline__ void copy_rows(u32 to, const u8 *from, int byte, int row, int count, u32 barrier) const {
        copy_bytes(to, from + (i64)byte * num_rows + row * GROUP, count * GROUP, barrier);
    }
    // What was found for a row and the one `apart` from it, weighted already.
    __device__ __forceinline__ void put(i64 pair, int row, float first, float second) const {
        if (GATE_UP) {
            out[pair * (num_rows / 2) + row] = first / (1.f + __expf(-first)) * second;
        } else {
            out[pair * num_rows + row] = first;
            out[pair * num_rows + row + HALF] = second;
        }
    }
    __device__ __forceinline__ float weight_of(i64 pair) const { return GATE_UP ? 1.f : weights[pair]; }
    __device__ __forceinline__ void write(i64 pair, int row, float first, float second) const {
        const float weight = weight_of(pair);
        put(pair, row, first * weight, second * weight);
    }
    // Tokens of `count` tiles, and what they count, in a step.
    __device__ __forceinline__ void copy_tiles(int step, int tile, int count, u32 tokens_to, u32 groups_to,
                                               u32 barrier) const {
        const i64 at = (i64)step * num_tiles + tile;
        copy_bytes(tokens_to, x + at * TILE_STEP, count * TILE_STEP, barrier);
        copy_bytes(groups_to, (const u8 *)groups + at * TILE_GROUPS, count * TILE_GROUPS, barrier);
    }
};

__device__ __forceinline__ float scale_from(u32 bits) { return __uint_as_float(bits << 16); }
