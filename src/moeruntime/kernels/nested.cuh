// What the kernels of nested experts have in common.
#pragma once
#include "chain.cuh"
#include "nested_work.cuh"

constexpr int GROUP = 128; // columns that have one scale

__device__ __forceinline__ void copy_ahead(u32 to, const void *from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from));
}
