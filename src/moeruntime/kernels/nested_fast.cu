// The experts of a step over nested codes, decoded in registers on their way into the tensor cores.
//
// A block takes 32 rows of one slot: of gate_up 16 neurons' gate and up rows, of down 32 rows. It
// serves up to FACES faces of that slot at once, each with up to 8 * TILES tokens, so that shared
// codes are read and unpacked once for all variants. Its four warps take a quarter of the columns
// each, and add their sums up at the end.
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
// Compiled with FACES, TILES and GATE_UP defined, once for each combination that is used.

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

struct Face {
    i64 slot, bits, step, at4, at2, at1;
};

constexpr int WARPS = 4, ROWS = 32, TOKENS = 8 * TILES;
// Three private bits are two planes. Registers suffice for both of two faces, or one of four.
constexpr bool THREE = FACES <= 2;

__device__ __forceinline__ uint4 load_codes(const u16 *at) {
    uint4 r;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
                 : "l"(at));
    return r;
}

__device__ __forceinline__ uint4 load_own(const u16 *at) {
    uint4 r;
    asm volatile("ld.global.nc.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
                 : "l"(at));
    return r;
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
    const u16 *own, *own1; // this lane's rows of the plane that is refined with; and of the 1-bit one
    u32 times, times1, mask, plus;
    int stride, stride1;   // words of a row
    int runs;              // which bits of q choose the run of words
    int shift;             // which bits of q are part of the field's place
    int bits;
    int tokens;            // how many of the tile are there
    const u16 *x[TILES];   // this lane's tokens
};

template <int n>
__device__ __forceinline__ void field(float (&sums)[FACES][TILES][2][4], const Variant (&variant)[FACES],
                                      const uint4 (&shared)[4], const uint4 (&own)[FACES][4],
                                      const uint4 (&own1)[FACES][4], const float (*scale)[ROWS], int q, int column) {
    u32 level[4][4];
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int k = 0; k < 4; k++) level[i][k] = nibble<n>(part(shared[i], k));
    const int lane = threadIdx.x & 31;
    float u[4];
#pragma unroll
    for (int i = 0; i < 4; i++) u[i] = scale[column >> 7][(lane >> 2) + 8 * i];
#pragma unroll
    for (int v = 0; v < FACES; v++) {
        const Variant &one = variant[v];
        if (one.tokens <= 0) continue;
        u32 a[2][2][4]; // row tile, step of 16 columns
        const int turn = (4 * n - 4 + (q & one.shift)) & 31;
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int k = 0; k < 4; k++) {
                u32 q_m = fma2(level[i][k], 0x38003800u, one.plus); // times 1/2
                if (one.bits) {
                    u32 w = part(own[v][i], k);
                    q_m = fma2(in_mantissa(__funnelshift_r(w, w, turn), one.mask), one.times, q_m);
                }
                if (THREE && one.bits == 3) {
                    u32 w = part(own1[v][i], k);
                    const int turn1 = (4 * n - 4 + q) & 31;
                    q_m = fma2(in_mantissa(__funnelshift_r(w, w, turn1), 0x00100010u), one.times1, q_m);
                }
                a[i >> 1][k >> 1][(i & 1) + 2 * (k & 1)] = q_m;
            }
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            if (8 * tile >= one.tokens) continue;
            uint4 b = make_uint4(0, 0, 0, 0);
            if ((lane >> 2) + 8 * tile < one.tokens)
                b = *reinterpret_cast<const uint4 *>(one.x[tile] + column + 8 * (lane & 3));
#pragma unroll
            for (int m = 0; m < 2; m++) {
                float c[4] = {0.f, 0.f, 0.f, 0.f};
                product(c, a[m][0], b.x, b.y);
                product(c, a[m][1], b.z, b.w);
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
    extern __shared__ float memory[];
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

    const int half = GATE_UP ? num_rows / 2 : ROWS / 2;
    const int first = blockIdx.y * (GATE_UP ? ROWS / 2 : ROWS);
    const int J = num_columns / 16, num_scales = num_columns / 128;
    int rows[4]; // of this lane: two in each of two tiles of 16
#pragma unroll
    for (int i = 0; i < 4; i++) rows[i] = first + (i >> 1) * half + g + 8 * (i & 1);

    // Scales of the block's rows, turned so that a lane's neighbours read neighbours.
    float(*scale)[ROWS] = reinterpret_cast<float(*)[ROWS]>(memory);
    {
        const int r = thread >> 2;
        const i64 row = (i64)slot * num_rows + first + (r >> 4) * half + (r & 15);
        for (int s = 2 * t; s < num_scales; s += 8) {
            const u32 two = *(const u32 *)(scales + row * num_scales + s);
            scale[s][r] = __uint_as_float(two << 16);
            scale[s + 1][r] = __uint_as_float(two & 0xFFFF0000u);
        }
    }

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
        one.stride1 = num_columns / 16;
        one.own = (const u16 *)(bits == 4 ? code.at4 : bits == 1 ? code.at1 : code.at2);
        one.own1 = (const u16 *)code.at1;
        one.runs = bits == 4 ? 3 : bits == 1 ? 0 : 1;
        one.shift = bits == 4 ? 0 : bits == 1 ? 3 : 2;
        one.mask = bits == 4 ? 0x00F000F0u : bits == 1 ? 0x00100010u : 0x00300030u;
        const float high = bits == 3 ? 2.f * step : step; // what the wider private plane counts for
        one.times = half2_of(high / 16.f);
        one.times1 = half2_of(step / 16.f);
        float plus = 512.f + 60.f + step * (float)((1 << bits) - 1) * 0.5f;
        if (bits) plus += 64.f * high;
        if (bits == 3) plus += 64.f * step;
        one.plus = half2_of(-plus);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            const int place = 8 * tile + g;
            const int pair = place < one.tokens ? pairs[tile_pairs[v] + place] : 0;
            one.x[tile] = x + (i64)(GATE_UP ? pair / top_k : pair) * num_columns;
        }
    }
    __syncthreads();

    float sums[FACES][TILES][2][4];
#pragma unroll
    for (int v = 0; v < FACES; v++)
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int e = 0; e < 4; e++) sums[v][tile][m][e] = 0.f;

    plane += (i64)slot * num_rows * (num_columns / 4);
    const int begin = warp * (J / WARPS), end = begin + J / WARPS;
#pragma unroll 1
    for (int j = begin; j < end; j += 32) {
#pragma unroll 1
        for (int q = 0; q < 4; q++) {
            uint4 shared[4], own[FACES][4], own1[FACES][4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                shared[i] = load_codes(plane + (i64)rows[i] * (num_columns / 4) + q * J + j + 8 * t);
#pragma unroll
            for (int v = 0; v < FACES; v++) {
                const Variant &one = variant[v];
                if (one.bits == 0) continue;
#pragma unroll
                for (int i = 0; i < 4; i++)
                    own[v][i] = load_own(one.own + (i64)rows[i] * one.stride + (q & one.runs) * J + j + 8 * t);
                if (THREE && one.bits == 3) {
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        own1[v][i] = load_own(one.own1 + (i64)rows[i] * one.stride1 + j + 8 * t);
                }
            }
            field<0>(sums, variant, shared, own, own1, scale, q, (0 + q) * J + j);
            field<1>(sums, variant, shared, own, own1, scale, q, (4 + q) * J + j);
            field<2>(sums, variant, shared, own, own1, scale, q, (8 + q) * J + j);
            field<3>(sums, variant, shared, own, own1, scale, q, (12 + q) * J + j);
        }
    }

    // Add the warps' quarters up, a face at a time, through shared memory.
    float *quarter = memory; // [WARPS][ROWS][TOKENS + 1]
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
        for (int at = thread; at < (GATE_UP ? ROWS / 2 : ROWS) * TOKENS; at += 32 * WARPS) {
            const int row = at % (GATE_UP ? ROWS / 2 : ROWS), token = at / (GATE_UP ? ROWS / 2 : ROWS);
            if (token >= variant[v].tokens) continue;
            const i64 pair = pairs[tile_pairs[v] + token];
            if (GATE_UP) {
                const float gate = total(row, token), up = total(row + ROWS / 2, token);
                float inner = gate / (1.f + __expf(-gate)) * up;
                inner = fminf(fmaxf(inner, -65504.f), 65504.f);
                u16 bits;
                asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(inner));
                ((u16 *)out)[pair * (num_rows / 2) + first + row] = bits;
            } else {
                ((float *)out)[pair * num_rows + first + row] = total(row, token) * weights[pair];
            }
        }
    }
}
