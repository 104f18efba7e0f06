// What kernels have in common whose blocks take units of tokens of a face: 128 rows of one, then of another, for every
// multiprocessor a block. Some threads have things copied, and two warpgroups multiply 64 rows each.
#pragma once

constexpr int ROWS = 128;       // of a block
constexpr int RUN = ROWS * 128; // bytes of a run of codes in shared memory

#include "nested_joined.cuh"

constexpr int WORKERS = 256, WARPS = WORKERS / 32, THREADS = WORKERS + 128;
constexpr int CODES = RUN * (2 + OWN_RUNS); // bytes of a step: of two runs of the shared codes, then private ones

// By one thread: the codes of a step, of which `full` is to expect `code_bytes`.
__device__ __forceinline__ int code_bytes(const Code &code) { return (2 + code.runs()) * RUN; }
__device__ __forceinline__ void copy_codes(const Arguments &of, const Unit &unit, int row_tile, int step, u32 to, u32 full) {
    const int J = of.num_columns / 8, p = step & 1, j = (step >> 1) * GROUP, row = ROWS * row_tile;
    const u8 *const shared = of.shared_plane(unit.slot);
    of.copy_rows(to, shared, p * J + j, row, ROWS, full);
    of.copy_rows(to + RUN, shared, (p + 2) * J + j, row, ROWS, full);
    copy_own(of, unit, p, j, to + 2 * RUN, row, ROWS, full);
}
