// The experts of a step over nested codes, decoded in registers on their way into the tensor cores.
//
// A block takes 32 rows of one face: of gate_up 16 neurons' gate and up rows, of down 32 rows; and up
// to 8 * TILES tokens. Its four warps take a quarter of the columns each, and add their sums up at the
// end. Blocks of one slot's faces run side by side, so that what they share comes from the L2 cache.
// (Unpacking it once for several faces was tried: fewer instructions, but fewer warps to hide their
// latency, and no faster. So was giving each warp rows of its own.)
//
// Columns go by the pace of the 1-bit plane: with J = columns / 16, field 4 n + q of a word at j is
// column (4 n + q) J + j, whose shared nibble is nibble n of word q J + j. A lane's 16 bytes are
// eight neighbouring columns of a row; which of them is which k of a matrix product does not matter
// as long as weights and tokens agree, so nothing is ever shuffled.
//
// A field moved to bit 4 and put under the exponent of 1024.0 in float16 reads 1024 + 16 field. One
// multiply-add for the shared field and one for each private one turn that into q - m, exactly:
// `is_fast` in face_parts.py admits only codes whose constants need no rounding.
//
// Each lane copies the words it will need into shared memory some steps ahead, in slots that only it
// reads: a ring that costs neither registers nor barriers.
//
// Compiled with TILES, PLANES (private planes a face has at most: three bits are two) and GATE_UP
// defined, once for each combination that is used. Faces with fewer planes than that go the same
// way, with nothing behind it: a branch would cost more.

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

struct Face {
    i64 slot, bits, step, at4, at2, at1;
};

constexpr int WARPS = 4, ROWS = 32, TOKENS = 8 * TILES, STAGES = 3;
constexpr int ITEMS = 4 + 4 * PLANES; // 16 bytes of a lane: shared words of four rows, private ones

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

// How a face refines its slot, as the loops need it.
struct Private {
    const u16 *own, *own1; // the plane it is refined with, from this lane's first row on; the 1-bit one
    u32 times, times1, mask, plus;
    int stride;            // words of a row of `own`
    int runs;              // which bits of q choose the run of words
    int shift;             // which bits of q are part of the field's place
    int bits;

    __device__ Private(const Face &face, int num_columns, int row, int column) {
        const float step = (float)face.step;
        bits = (int)face.bits;
        stride = bits == 4 ? num_columns / 4 : bits == 1 ? num_columns / 16 : num_columns / 8;
        own = (const u16 *)(bits == 4 ? face.at4 : bits == 1 ? face.at1 : face.at2) + (i64)row * stride + column;
        own1 = (const u16 *)face.at1 + (i64)row * (num_columns / 16) + column;
        runs = bits == 4 ? 3 : bits == 1 ? 0 : 1;
        shift = bits == 4 ? 0 : bits == 1 ? 3 : 2;
        mask = bits == 4 ? 0x00F000F0u : bits == 1 ? 0x00100010u : 0x00300030u;
        const float high = bits == 3 ? 2.f * step : step; // what the wider private plane counts for
        times = half2_of(high / 16.f);                    // 0 without private bits
        times1 = half2_of(bits == 3 ? step / 16.f : 0.f);
        float centre = 512.f + 60.f + step * (float)((1 << bits) - 1) * 0.5f;
        if (bits) centre += 64.f * high;
        if (bits == 3) centre += 64.f * step;
        plus = half2_of(-centre);
    }
};

// Field 4 n + q of the words at hand, times the tokens' columns that belong to it.
template <int n>
__device__ __forceinline__ void field(float (&sums)[TILES][2][4], const Private &code, const uint4 (&shared)[4],
                                      const uint4 (*ring)[32], const uint4 (&x)[TILES], const u16 *scale, int q,
                                      int tokens) {
    const int lane = threadIdx.x & 31;
    const int turn = (4 * n - 4 + (q & code.shift)) & 31, turn1 = (4 * n - 4 + q) & 31;
    u32 a[2][2][4]; // row tile, step of 16 columns
    float u[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u[i] = __uint_as_float((u32)scale[(lane >> 2) + 8 * i] << 16);
        uint4 own, own1;
        if (PLANES > 0) own = ring[4 + i][lane];
        if (PLANES > 1) own1 = ring[8 + i][lane];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            u32 q_m = fma2(nibble<n>(part(shared[i], k)), 0x38003800u, code.plus); // times 1/2
            if (PLANES > 0) {
                const u32 w = part(own, k);
                q_m = fma2(in_mantissa(__funnelshift_r(w, w, turn), code.mask), code.times, q_m);
            }
            if (PLANES > 1) {
                const u32 w = part(own1, k);
                q_m = fma2(in_mantissa(__funnelshift_r(w, w, turn1), 0x00100010u), code.times1, q_m);
            }
            a[i >> 1][k >> 1][(i & 1) + 2 * (k & 1)] = q_m;
        }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        if (TILES > 1 && 8 * tile >= tokens) continue;
        // Columns of the product past the last token are whatever they are: nobody reads them.
#pragma unroll
        for (int m = 0; m < 2; m++) {
            float c[4] = {0.f, 0.f, 0.f, 0.f};
            product(c, a[m][0], x[tile].x, x[tile].y);
            product(c, a[m][1], x[tile].z, x[tile].w);
            sums[tile][m][0] += c[0] * u[2 * m];
            sums[tile][m][1] += c[1] * u[2 * m];
            sums[tile][m][2] += c[2] * u[2 * m + 1];
            sums[tile][m][3] += c[3] * u[2 * m + 1];
        }
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, TILES <= 2 ? 4 : 2)
    nested(const u16 *__restrict__ x, const u16 *__restrict__ plane, const u16 *__restrict__ scales,
           const Face *__restrict__ faces, const int *__restrict__ counts, const int *__restrict__ pairs,
           const float *__restrict__ weights, void *__restrict__ out, int num_faces, int capacity, int num_rows,
           int num_columns, int top_k) {
    extern __shared__ __align__(16) float memory[];
    __shared__ int tiles_of[32 * WARPS];
    const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31;
    const int g = lane >> 2, t = lane & 3;

    // Which face, and which tile of its tokens.
    if (thread < num_faces) tiles_of[thread] = (counts[thread] + TOKENS - 1) / TOKENS;
    __syncthreads();
    int number = 0, first_token = blockIdx.x;
    while (number < num_faces && first_token >= tiles_of[number]) first_token -= tiles_of[number++];
    if (number == num_faces) return;
    first_token *= TOKENS;
    const int tokens = min(counts[number] - first_token, TOKENS);
    pairs += (i64)number * capacity + first_token;

    // The block's rows are two runs of 16, `half` apart; this lane's are two of each.
    const int half = GATE_UP ? num_rows / 2 : ROWS / 2;
    const int first = blockIdx.y * (GATE_UP ? ROWS / 2 : ROWS), row = first + g;
    const int apart[4] = {0, 8, half, half + 8};
    const int J = num_columns / 16, num_scales = num_columns / 128;
    const i64 slot_row = faces[number].slot * num_rows;
    const Private code(faces[number], num_columns, row, 8 * t);
    plane += (slot_row + row) * (num_columns / 4) + 8 * t;

    // Runs of 32 words, divided among the warps; four steps to each.
    const int begin = warp * (J / WARPS), steps = J / WARPS / 8;
    u16(*scale)[ROWS] = reinterpret_cast<u16(*)[ROWS]>(memory);
    float *const rest = memory + ROWS * num_scales / 2;
    uint4(*ring)[32] = reinterpret_cast<uint4(*)[32]>(rest) + warp * STAGES * ITEMS; // [STAGES][ITEMS][32]
    auto copy_step = [&](int step) {
        if (step < steps) {
            uint4(*stage)[32] = ring + step % STAGES * ITEMS;
            const int j = begin + step / 4 * 32, q = step % 4;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                copy_ahead(&stage[i][lane], plane + (i64)apart[i] * (num_columns / 4) + q * J + j);
                if (PLANES > 0 && code.bits)
                    copy_ahead(&stage[4 + i][lane], code.own + (i64)apart[i] * code.stride + (q & code.runs) * J + j);
                if (PLANES > 1 && code.bits == 3)
                    copy_ahead(&stage[8 + i][lane], code.own1 + (i64)apart[i] * J + j);
            }
        }
        asm volatile("cp.async.commit_group;");
    };
#pragma unroll
    for (int step = 0; step < STAGES - 1; step++) copy_step(step);

    // Scales, turned so that a lane's neighbours read neighbours.
    {
        const int r = thread >> 2;
        const u16 *const from = scales + (slot_row + first + (r >> 4) * half + (r & 15)) * num_scales;
        for (int s = 2 * t; s < num_scales; s += 8) {
            const u32 two = *(const u32 *)(from + s);
            scale[s][r] = two & 0xFFFF;
            scale[s + 1][r] = two >> 16;
        }
    }
    const u16 *token_x[TILES]; // this lane's tokens, at its columns
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        const int pair = pairs[8 * tile + g < tokens ? 8 * tile + g : 0];
        token_x[tile] = x + (i64)(GATE_UP ? pair / top_k : pair) * num_columns + 8 * t;
    }
    auto fetch = [&](uint4(&to)[TILES], int column) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
            if (TILES == 1 || 8 * tile < tokens)
                to[tile] = __ldg(reinterpret_cast<const uint4 *>(token_x[tile] + column));
    };
    float sums[TILES][2][4];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int e = 0; e < 8; e++) sums[tile][e >> 2][e & 3] = 0.f;
    __syncthreads();

    uint4 now[TILES], next[TILES]; // tokens of one field, and of the one after it
    fetch(now, begin);
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        copy_step(step + STAGES - 1);
        const uint4(*stage)[32] = ring + step % STAGES * ITEMS;
        const int q = step % 4, column = q * J + begin + step / 4 * 32;
        const int after = min(step + 1, steps - 1);
        uint4 shared[4];
#pragma unroll
        for (int i = 0; i < 4; i++) shared[i] = stage[i][lane];
        fetch(next, column + 4 * J);
        field<0>(sums, code, shared, stage, now, scale[column >> 7], q, tokens);
        fetch(now, column + 8 * J);
        field<1>(sums, code, shared, stage, next, scale[(column + 4 * J) >> 7], q, tokens);
        fetch(next, column + 12 * J);
        field<2>(sums, code, shared, stage, now, scale[(column + 8 * J) >> 7], q, tokens);
        fetch(now, after % 4 * J + begin + after / 4 * 32);
        field<3>(sums, code, shared, stage, next, scale[(column + 12 * J) >> 7], q, tokens);
    }

    // Add the warps' quarters up through shared memory.
    __syncthreads();
    auto quarter = reinterpret_cast<float(*)[ROWS][TOKENS + 1]>(rest); // [WARPS]
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int e = 0; e < 8; e++)
            quarter[warp][16 * (e >> 2) + g + 8 * (e >> 1 & 1)][8 * tile + 2 * t + (e & 1)] =
                sums[tile][e >> 2][e & 3];
    __syncthreads();
    auto total = [&](int r, int token) {
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += quarter[w][r][token];
        return sum;
    };
    constexpr int kept = GATE_UP ? ROWS / 2 : ROWS;
    for (int at = thread; at < kept * tokens; at += 32 * WARPS) {
        const int r = at % kept, token = at / kept;
        const i64 pair = pairs[token];
        if (GATE_UP) {
            const float gate = total(r, token);
            float inner = gate / (1.f + __expf(-gate)) * total(r + ROWS / 2, token);
            inner = fminf(fmaxf(inner, -65504.f), 65504.f);
            u16 bits;
            asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(inner));
            ((u16 *)out)[pair * (num_rows / 2) + first + r] = bits;
        } else {
            ((float *)out)[pair * num_rows + first + r] = total(r, token) * weights[pair];
        }
    }
}
