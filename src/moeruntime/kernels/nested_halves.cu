// Activations as the integers that the kernels of nested experts multiply, and the list of what is to be done.
//
// A run of 128 values becomes integers of 15 bits and one scale, and each of these two signed bytes, its halves:
// 128 times the upper one and the lower one. Compiled with TILED:
// - 0, for `nested_fast.cu`: rows of x as they are, [rows, 2 halves, columns].
// - 1, for kernels whose products read shared memory: four tokens of a face side by side in a tile, tiles of a
//   face one after the other, a step of the columns after the other (`Columns`), so that the
//   copy engine brings a step of a face's tokens in one go: [steps, tiles, 4 batches, 4 tokens, 2 halves, 128].

#include "nested_tiles.cuh"

// Which pair is about token `place` of all tiles; -1 where there is none. By a whole warp.
__device__ __forceinline__ int pair_at(int place, const int *counts, int num_faces, const int *pairs, int capacity) {
    const int lane = threadIdx.x & 31, tile = place / TILE;
    int own[MOST_FACES / 32], tiles = 0; // of the faces of a lane
#pragma unroll
    for (int i = 0; i < MOST_FACES / 32; i++) {
        const int face = MOST_FACES / 32 * lane + i;
        own[i] = face < num_faces ? counts[face] : 0;
        tiles += tiles_for(own[i]);
    }
    int until = tiles; // of these faces and all before
#pragma unroll
    for (int far = 1; far < 32; far *= 2) {
        const int before = __shfl_up_sync(~0u, until, far);
        if (lane >= far) until += before;
    }
    int found = -1, in = tile - (until - tiles);
    if (in >= 0 && tile < until) {
#pragma unroll
        for (int i = 0; i < MOST_FACES / 32; i++) {
            const int first = in * TILE + place % TILE;
            if (in >= 0 && first < own[i]) found = pairs[(i64)(MOST_FACES / 32 * lane + i) * capacity + first];
            in -= tiles_for(own[i]);
        }
    }
    return __reduce_max_sync(~0u, found);
}

// Two numbers in bfloat16, as near as there are.
__device__ __forceinline__ u32 both_rounded(float first, float second) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
}

// The first blocks split x, a warp for 128 values, and for each such group note what one of its integers counts and
// their sum. The last block lists the units, `tokens` of a face each, and the meetings of faces of up to
// `most_tokens`, and that where these are cut nobody has arrived.
extern "C" __global__ void __launch_bounds__(MOST_FACES)
    halves(const float *__restrict__ x, i8 *__restrict__ out, float2 *__restrict__ groups, int num_rows,
           int groups_a_row, int top_k, const Face *__restrict__ faces, const int *__restrict__ counts,
           const int *__restrict__ pairs, int num_faces, Unit *__restrict__ units, int num_units, int tokens,
           int capacity, Meeting *__restrict__ meetings, int meeting_tiles, int most_tokens,
           int *__restrict__ arrived, int num_cuts) {
    begin();
    const int thread = threadIdx.x, lane = thread & 31;
    if (blockIdx.x + 1 == gridDim.x) {
        for (int i = thread; i < num_cuts; i += MOST_FACES) arrived[i] = 0;
        list_units(faces, counts, num_faces, units, num_units, tokens, capacity, meetings, meeting_tiles,
                   most_tokens);
        return;
    }
    const int index = blockIdx.x * (MOST_FACES / 32) + (thread >> 5);
    const int row = index / groups_a_row, group = index % groups_a_row;
    if (row >= num_rows) return;
    i64 from = row;
    if (TILED) {
        const int pair = pair_at(row, counts, num_faces, pairs, capacity);
        if (pair < 0) return;
        from = pair / top_k;
    }
    const float4 v = ((const float4 *)(x + (from * groups_a_row + group) * GROUP))[lane];
    if (TILED == 2) {
        const Columns columns = {groups_a_row * GROUP};
        const i64 batch = (i64)columns.step_of(group) * BATCHES + columns.batch_of(group);
        // Of each 16 columns product `lane & 3` of a half wants four, two of which are among its last eight.
        u8 *const to = (u8 *)out + (batch * (num_rows / TILE) + row / TILE) * TILE_BYTES + (lane >> 4) * (TILE_BYTES / 2) +
                       (lane >> 2 & 3) * 4;
        *(u32 *)(to + place_of(row % TILE, 2 * (lane & 3))) = both_rounded(v.x, v.y);
        *(u32 *)(to + place_of(row % TILE, 2 * (lane & 3) + 1)) = both_rounded(v.z, v.w);
        return;
    }
    float most = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
#pragma unroll
    for (int far = 16; far; far >>= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, far));
    const float limit = 127.f * 128.f, times = most > 0.f ? limit / most : 0.f;
    const float values[4] = {v.x, v.y, v.z, v.w};
    u32 high = 0, low = 0;
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int whole = __float2int_rn(values[i] * times), upper = (whole + 64) >> 7;
        high |= (u32)(upper & 0xFF) << 8 * i;
        low |= (u32)((whole - 128 * upper) & 0xFF) << 8 * i;
        sum += whole;
    }
#pragma unroll
    for (int far = 16; far; far >>= 1) sum += __shfl_xor_sync(~0u, sum, far);
    const float one = most / limit;
    const float2 counts_and_sum = make_float2(one, one * (float)sum);
    if (TILED) {
        const Columns columns = {groups_a_row * GROUP};
        const int batch = columns.batch_of(group), half_row = 2 * (row % TILE);
        const i64 step = (i64)columns.step_of(group) * (num_rows / TILE) + row / TILE;
        // Of each 16 columns of a half of a group a product's lane wants four: 0-3 of each 16, then 4-7, and so on.
        const int chunk = (lane & 16) >> 2 | (lane & 3);
        u8 *const to = (u8 *)out + step * TILE_STEP + batch * TILE_BYTES + (lane >> 2 & 3) * 4;
        *(u32 *)(to + place_of(half_row, chunk)) = high;
        *(u32 *)(to + place_of(half_row + 1, chunk)) = low;
        if (lane == 0) groups[(step * BATCHES + batch) * TILE + row % TILE] = counts_and_sum;
    } else {
        u32 *const to = (u32 *)(out + (2 * from * groups_a_row + group) * GROUP);
        to[lane] = high;
        to[groups_a_row * (GROUP / 4) + lane] = low;
        if (lane == 0) groups[index] = counts_and_sum;
    }
}
