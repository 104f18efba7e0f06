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
    const Code code = {unit.bits, unit.step};
    const int J = of.num_columns / 8, p = step & 1, j = (step >> 1) * GROUP;
    const u8 *const shared = of.shared_plane(unit.slot), *const own = plane_of(unit.at4, unit.at2, unit.at1, code.bits);
    auto copy_run = [&](int run, const u8 *plane, int byte) {
        of.copy_rows(to + run * RUN, plane, byte, ROWS * row_tile, ROWS, full);
    };
    copy_run(0, shared, p * J + j);
    copy_run(1, shared, (p + 2) * J + j);
    if (code.own_runs()) copy_run(2, own, (code.bits == 1 ? 0 : p * J) + j);
    if (code.own_runs() == 2) copy_run(3, own, (p + 2) * J + j);
    if (code.second()) copy_run(2 + OWN, (const u8 *)unit.at1, j);
}
