// What the kernels of nested experts have in common.
#pragma once
#include "chain.cuh"
#include "nested_work.cuh"

constexpr int GROUP = 128; // columns that have one scale

// A plane of codes lies in memory in strips (`strips.py`): 128 bytes of all rows, then the next 128. Rows come by 32:
// of gate_up 16 neurons' gate rows and their up rows.
constexpr int HALF = 16; // of such rows

// Where a chunk of 16 bytes of a row of a strip lies, in memory and when copied: every other row has its halves
// exchanged, since two rows are all banks.
__device__ __forceinline__ u32 code_place(int row, int chunk) { return row * GROUP + 16 * (chunk ^ (row & 1) << 2); }

// m of a face's codes.
__device__ __forceinline__ float middle_of(int bits, int step) { return 60.f + 0.5f * (float)(step * ((1 << bits) - 1)); }

// A face's private plane of so many bits; of three bits the one of two.
__device__ __forceinline__ const u8 *plane_of(i64 at4, i64 at2, i64 at1, int bits) {
    return (const u8 *)(bits == 4 ? at4 : bits == 1 ? at1 : at2);
}
