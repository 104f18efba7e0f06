// The experts of a step over nested codes, decoded in registers on their way into the tensor cores.
//
// A warp takes 32 rows of one slot: of gate_up 16 neurons' gate and up rows, of down 32 rows. It
// serves up to FACES faces of that slot at once, each with up to 8 * TILES tokens, so that shared
// codes are read and unpacked once for all variants. For few tokens a block's four warps take a
// quarter of the columns each and add their sums up at the end; for many they take other rows
// (ROW_WARPS), and have their tokens from the cache together. `down` may be cut further, into parts.
//
// Columns go by the pace of the 1-bit plane: with J = columns / 16, field 4 n + q of a word at j is
// column (4 n + q) J + j, whose shared nibble is nibble n of word q J + j. A lane's 16 bytes are
// eight neighbouring columns of a row; which of them is which k of a matrix product does not matter
// as long as weights and tokens agree, so nothing is ever shuffled.
//
// A field moved to bit 4 and put under the exponent of 1024.0 in float16 reads 1024 + 16 field. One
// multiply-add for the shared field and one for each private one turn that into q - m, exactly:
// `is_fast` in nested_fast.py admits only codes whose constants need no rounding.
//
// Each lane copies the words it will need into shared memory some steps ahead, in slots that only it
// reads: a ring that costs neither registers nor barriers.
//
// Compiled with FACES, TILES, PLANES (private planes a face has at most: three bits are two),
// ROW_WARPS (1 or 4) and GATE_UP defined, once for each combination that is used. Faces with fewer
// planes than that go the same way, with nothing behind it: a branch would cost more.

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

struct Face {
    i64 slot, bits, step, at4, at2, at1;
};

constexpr int WARPS = 4, K_WARPS = WARPS / ROW_WARPS, ROWS = 32, TOKENS = 8 * TILES;
constexpr int BLOCK_ROWS = ROWS * ROW_WARPS;
constexpr int ITEMS = 4 + 4 * FACES * PLANES; // 16 bytes of a lane: shared words, then faces'
constexpr int STAGES = FACES == 1 ? 3 : 2;
constexpr bool AHEAD = FACES * TILES <= 4; // whether registers suffice to fetch tokens a field early

__device__ __forceinline__ void copy_ahead(uint4 *to, const u16 *from) {
    const u32 address = (u32)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(address), "l"(from));
}

// (word & mask) | 1024.0 twice
__device__ __forceinline__ u32 in_mantissa(u32 word, u32 mask) {
    u32 r;
    asm("lop3.b32 %0, %1, %2, 0x64006400, 0xEA;" : "=r"(r) : "r"(word), "r"(mask));
    return r;
}

__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

__device__ __forceinline__ u32 half2_of(float value) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %1;" : "=r"(r) : "f"(value));
    return r;
}

// The nibble n of both halves, at bit 4.
template <int n> __device__ __forceinline__ u32 nibble(u32 word) {
    if (n == 0) word <<= 4;
    if (n > 1) word >>= 4 * n - 4;
    return in_mantissa(word, 0x00F000F0u);
}

__device__ __forceinline__ void product(float (&c)[4], const u32 *a, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
                 "{%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 part(const uint4 &v, int k) {
    return k == 0 ? v.x : k == 1 ? v.y : k == 2 ? v.z : v.w;
}

struct Variant {
    const u16 *own, *own1; // the plane it is refined with, from this lane's first row on; the 1-bit one
    u32 times, times1, mask, plus;
    int stride;            // words of a row of `own`
    int runs;              // which bits of q choose the run of words
    int shift;             // which bits of q are part of the field's place
    int bits;
    int tokens;            // how many of the tile are there
    const u16 *x[TILES];   // this lane's tokens
};

typedef uint4 Tokens[FACES][TILES];

__device__ __forceinline__ void fetch(Tokens &b, const Variant (&variant)[FACES], int column) {
#pragma unroll
    for (int v = 0; v < FACES; v++)
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
            if (FACES * TILES == 1 || 8 * tile < variant[v].tokens)
                b[v][tile] = __ldg(reinterpret_cast<const uint4 *>(variant[v].x[tile] + column));
}

template <int n>
__device__ __forceinline__ void field(float (&sums)[FACES][TILES][2][4], const Variant (&variant)[FACES],
                                      const uint4 (&shared)[4], const uint4 (*ring)[32], const Tokens &b,
                                      const u16 (*scale)[BLOCK_ROWS], int q, int column) {
    const int lane = threadIdx.x & 31;
    u32 level[4][4];
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int k = 0; k < 4; k++) level[i][k] = nibble<n>(part(shared[i], k));
    float u[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        u[i] = __uint_as_float((u32)scale[column >> 7][(lane >> 2) + 8 * i] << 16);
#pragma unroll
    for (int v = 0; v < FACES; v++) {
        const Variant &one = variant[v];
        if (FACES > 1 && one.tokens <= 0) continue;
        u32 a[2][2][4]; // row tile, step of 16 columns
        const int turn = (4 * n - 4 + (q & one.shift)) & 31, turn1 = (4 * n - 4 + q) & 31;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint4 own, own1;
            if (PLANES > 0) own = ring[4 + 4 * PLANES * v + i][lane];
            if (PLANES > 1) own1 = ring[8 + 4 * PLANES * v + i][lane];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                u32 q_m = fma2(level[i][k], 0x38003800u, one.plus); // times 1/2
                if (PLANES > 0) {
                    const u32 w = part(own, k);
                    q_m = fma2(in_mantissa(__funnelshift_r(w, w, turn), one.mask), one.times, q_m);
                }
                if (PLANES > 1) {
                    const u32 w = part(own1, k);
                    q_m = fma2(in_mantissa(__funnelshift_r(w, w, turn1), 0x00100010u), one.times1, q_m);
                }
                a[i >> 1][k >> 1][(i & 1) + 2 * (k & 1)] = q_m;
            }
        }
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            if (TILES > 1 && 8 * tile >= one.tokens) continue;
            // Columns of the product past the last token are whatever they are: nobody reads them.
            const uint4 x = AHEAD ? b[v][tile]
                                  : __ldg(reinterpret_cast<const uint4 *>(one.x[tile] + column));
#pragma unroll
            for (int m = 0; m < 2; m++) {
                float c[4] = {0.f, 0.f, 0.f, 0.f};
                product(c, a[m][0], x.x, x.y);
                product(c, a[m][1], x.z, x.w);
                sums[v][tile][m][0] += c[0] * u[2 * m];
                sums[v][tile][m][1] += c[1] * u[2 * m];
                sums[v][tile][m][2] += c[2] * u[2 * m + 1];
                sums[v][tile][m][3] += c[3] * u[2 * m + 1];
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, FACES == 1 && TILES <= 2 ? 4 : FACES == 2 && TILES == 1 ? 3 : 2)
    nested(const u16 *__restrict__ x, const u16 *__restrict__ plane, const u16 *__restrict__ scales,
           const Face *__restrict__ faces, const int *__restrict__ groups, const int *__restrict__ counts,
           const int *__restrict__ pairs, const float *__restrict__ weights, void *__restrict__ out,
           int num_groups, int capacity, int num_rows, int num_columns, int top_k) {
    extern __shared__ __align__(16) float memory[];
    __shared__ int levels[32 * WARPS];
    const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31;
    const int g = lane >> 2, t = lane & 3;

    // Which slot, and which tile of its faces' tokens.
    if (thread < num_groups) {
        int most = 0;
        for (int v = 0; v < FACES; v++) {
            const int face = groups[thread * FACES + v];
            if (face >= 0) most = max(most, counts[face]);
        }
        levels[thread] = (most + TOKENS - 1) / TOKENS;
    }
    __syncthreads();
    int group = 0, level = blockIdx.x;
    while (group < num_groups && level >= levels[group]) level -= levels[group++];
    if (group == num_groups) return;
    groups += group * FACES;
    const int slot = (int)faces[groups[0]].slot;

    // The warp's rows are two runs of 16, `half` apart.
    const int half = GATE_UP ? num_rows / 2 : ROWS / 2;
    const int row_warp = warp % ROW_WARPS, k_warp = warp / ROW_WARPS;
    const int first = (blockIdx.y * ROW_WARPS + row_warp) * (GATE_UP ? ROWS / 2 : ROWS);
    const int J = num_columns / 16, num_scales = num_columns / 128;
    int rows[4]; // of this lane: two in each of two tiles of 16
#pragma unroll
    for (int i = 0; i < 4; i++) rows[i] = first + (i >> 1) * half + g + 8 * (i & 1);

    Variant variant[FACES];
    int tile_pairs[FACES];
#pragma unroll
    for (int v = 0; v < FACES; v++) {
        Variant &one = variant[v];
        const int face = groups[v];
        one.tokens = face < 0 ? 0 : min(counts[face] - level * TOKENS, TOKENS);
        tile_pairs[v] = face * capacity + level * TOKENS;
        if (one.tokens <= 0) {
            one.tokens = 0;
            one.bits = 0;
            continue;
        }
        const Face code = faces[face];
        const int bits = (int)code.bits;
        const float step = (float)code.step;
        one.bits = bits;
        one.stride = bits == 4 ? num_columns / 4 : bits == 1 ? num_columns / 16 : num_columns / 8;
        one.own = (const u16 *)(bits == 4 ? code.at4 : bits == 1 ? code.at1 : code.at2);
        one.own += (i64)rows[0] * one.stride + 8 * t;
        one.own1 = (const u16 *)code.at1 + (i64)rows[0] * J + 8 * t;
        one.runs = bits == 4 ? 3 : bits == 1 ? 0 : 1;
        one.shift = bits == 4 ? 0 : bits == 1 ? 3 : 2;
        one.mask = bits == 4 ? 0x00F000F0u : bits == 1 ? 0x00100010u : 0x00300030u;
        const float high = bits == 3 ? 2.f * step : step; // what the wider private plane counts for
        one.times = half2_of(high / 16.f); // 0 without private bits
        one.times1 = half2_of(bits == 3 ? step / 16.f : 0.f);
        float plus = 512.f + 60.f + step * (float)((1 << bits) - 1) * 0.5f;
        if (bits) plus += 64.f * high;
        if (bits == 3) plus += 64.f * step;
        one.plus = half2_of(-plus);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            const int place = 8 * tile + g;
            const int pair = pairs[tile_pairs[v] + (place < one.tokens ? place : 0)];
            one.x[tile] = x + (i64)(GATE_UP ? pair / top_k : pair) * num_columns + 8 * t;
        }
    }

    plane += ((i64)slot * num_rows + rows[0]) * (num_columns / 4) + 8 * t;
    const int apart[4] = {0, 8, half, half + 8}; // this lane's rows, from its first
    // Runs of 32 words, divided among parts and then warps; four steps to each.
    const int runs = J / 32, part_begin = blockIdx.z * runs / gridDim.z;
    const int part_runs = (blockIdx.z + 1) * runs / gridDim.z - part_begin;
    const int begin = 32 * (part_begin + k_warp * part_runs / K_WARPS);
    const int steps = (32 * (part_begin + (k_warp + 1) * part_runs / K_WARPS) - begin) / 8;
    // [STAGES][ITEMS][32] of this warp
    uint4(*ring)[32] =
        reinterpret_cast<uint4(*)[32]>(memory + BLOCK_ROWS * num_scales / 2) + warp * STAGES * ITEMS;
    auto copy_step = [&](int step) {
        if (step < steps) {
            uint4(*slot_of)[32] = ring + step % STAGES * ITEMS;
            const int j = begin + step / 4 * 32, q = step % 4;
#pragma unroll
            for (int i = 0; i < 4; i++)
                copy_ahead(&slot_of[i][lane], plane + (i64)apart[i] * (num_columns / 4) + q * J + j);
#pragma unroll
            for (int v = 0; v < FACES; v++) {
                const Variant &one = variant[v];
                if (PLANES == 0 || one.bits == 0) continue;
#pragma unroll
                for (int i = 0; i < 4; i++)
                    copy_ahead(&slot_of[4 + 4 * PLANES * v + i][lane],
                               one.own + (i64)apart[i] * one.stride + (q & one.runs) * J + j);
                if (PLANES == 1 || one.bits != 3) continue;
#pragma unroll
                for (int i = 0; i < 4; i++)
                    copy_ahead(&slot_of[8 + 4 * PLANES * v + i][lane], one.own1 + (i64)apart[i] * J + j);
            }
        }
        asm volatile("cp.async.commit_group;");
    };
#pragma unroll
    for (int step = 0; step < STAGES - 1; step++) copy_step(step);

    // Scales of the block's rows, turned so that a lane's neighbours read neighbours.
    u16(*scales_of)[BLOCK_ROWS] = reinterpret_cast<u16(*)[BLOCK_ROWS]>(memory);
    for (int r = thread >> 2; r < BLOCK_ROWS; r += 8 * WARPS) {
        const int block_first = (blockIdx.y * ROW_WARPS + r / ROWS) * (GATE_UP ? ROWS / 2 : ROWS);
        const i64 row = (i64)slot * num_rows + block_first + (r % ROWS >> 4) * half + (r & 15);
        for (int s = 2 * t; s < num_scales; s += 8) {
            const u32 two = *(const u32 *)(scales + row * num_scales + s);
            scales_of[s][r] = two & 0xFFFF;
            scales_of[s + 1][r] = two >> 16;
        }
    }
    const u16(*scale)[BLOCK_ROWS] =
        reinterpret_cast<const u16(*)[BLOCK_ROWS]>(&scales_of[0][ROWS * row_warp]);
    float sums[FACES][TILES][2][4];
#pragma unroll
    for (int v = 0; v < FACES; v++)
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int e = 0; e < 4; e++) sums[v][tile][m][e] = 0.f;
    __syncthreads();

    Tokens now, next;
    if (AHEAD) fetch(now, variant, begin);
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        copy_step(step + STAGES - 1);
        const uint4(*slot_of)[32] = ring + step % STAGES * ITEMS;
        const int q = step % 4, column = q * J + begin + step / 4 * 32;
        const int after = min(step + 1, steps - 1); // whose tokens are fetched during the last field
        uint4 shared[4];
#pragma unroll
        for (int i = 0; i < 4; i++) shared[i] = slot_of[i][lane];
        if (AHEAD) fetch(next, variant, column + 4 * J);
        field<0>(sums, variant, shared, slot_of, now, scale, q, column);
        if (AHEAD) fetch(now, variant, column + 8 * J);
        field<1>(sums, variant, shared, slot_of, next, scale, q, column + 4 * J);
        if (AHEAD) fetch(next, variant, column + 12 * J);
        field<2>(sums, variant, shared, slot_of, now, scale, q, column + 8 * J);
        if (AHEAD) fetch(now, variant, after % 4 * J + begin + after / 4 * 32);
        field<3>(sums, variant, shared, slot_of, next, scale, q, column + 12 * J);
    }

    auto store = [&](int v, int row, int token, float value, float up) {
        const i64 pair = pairs[tile_pairs[v] + token];
        if (GATE_UP) {
            float inner = value / (1.f + __expf(-value)) * up;
            inner = fminf(fmaxf(inner, -65504.f), 65504.f);
            u16 bits;
            asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(inner));
            ((u16 *)out)[pair * (num_rows / 2) + first + row] = bits;
        } else {
            ((float *)out)[(pair * gridDim.z + blockIdx.z) * num_rows + first + row] = value * weights[pair];
        }
    };
    if (K_WARPS == 1) {
#pragma unroll
        for (int v = 0; v < FACES; v++)
#pragma unroll
            for (int tile = 0; tile < TILES; tile++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int row = g + 8 * (e >> 1), token = 8 * tile + 2 * t + (e & 1);
                    if (token >= variant[v].tokens) continue;
                    store(v, row, token, sums[v][tile][0][e], sums[v][tile][1][e]);
                    if (!GATE_UP) store(v, row + 16, token, sums[v][tile][1][e], 0.f);
                }
        return;
    }
    // Add the warps' quarters up, a face at a time, through shared memory.
    __syncthreads();
    float *quarter = memory + BLOCK_ROWS * num_scales / 2; // [WARPS][ROWS][TOKENS + 1]
#pragma unroll
    for (int v = 0; v < FACES; v++) {
        if (variant[v].tokens <= 0) continue;
        __syncthreads();
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int row = 16 * m + g + 8 * (e >> 1), token = 8 * tile + 2 * t + (e & 1);
                    quarter[(warp * ROWS + row) * (TOKENS + 1) + token] = sums[v][tile][m][e];
                }
        __syncthreads();
        auto total = [&](int row, int token) {
            float sum = 0.f;
            for (int w = 0; w < WARPS; w++) sum += quarter[(w * ROWS + row) * (TOKENS + 1) + token];
            return sum;
        };
        constexpr int kept = GATE_UP ? ROWS / 2 : ROWS;
        for (int at = thread; at < kept * variant[v].tokens; at += 32 * WARPS) {
            const int row = at % kept, token = at / kept;
            store(v, row, token, total(row, token), GATE_UP ? total(row + ROWS / 2, token) : 0.f);
        }
    }
}
