// How the kernels of nested experts for Hopper devices go through the columns, and how tokens lie for them.
#pragma once
#include "nested.cuh"

constexpr int BATCHES = 4;
constexpr int TILE_BYTES = 2 * TILE * GROUP;       // of a batch: rows of 128 columns of a token's upper, then lower half
constexpr int TILE_STEP = BATCHES * TILE_BYTES;    // of a step
constexpr int TILE_GROUPS = BATCHES * TILE * 8;    // beside them: what tokens' integers count, and their sums

// A step is 128 bytes of two runs of the shared codes, q and q + 2, so that a byte of a 2-bit plane, which has
// fields for both, is read once: with two fields a byte, 4 batches of 128 columns.
struct Columns {
    int num_columns;
    __device__ __forceinline__ int num_groups() const { return num_columns / GROUP; }
    __device__ __forceinline__ int pieces() const { return num_columns / (8 * GROUP); }
    __device__ __forceinline__ int steps() const { return 2 * pieces(); }
    // Which 128 columns a batch of a step is of.
    __device__ __forceinline__ int group_of(int step, int batch) const {
        return ((step & 1) + (batch & 2) + 4 * (batch & 1)) * pieces() + (step >> 1);
    }
    // And where some are.
    __device__ __forceinline__ int step_of(int group) const { return group % pieces() * 2 + (group / pieces() & 1); }
    __device__ __forceinline__ int batch_of(int group) const {
        const int run = group / pieces();
        return (run & 2) + (run >> 2);
    }
};

// Where a chunk of 16 bytes of a row of 128 lies: in other banks than those of rows beside it.
__device__ __forceinline__ u32 place_of(int row, int chunk) { return row * GROUP + 16 * (chunk ^ row & 7); }
