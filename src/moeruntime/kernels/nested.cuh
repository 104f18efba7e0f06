// What the kernels of nested experts have in common.
#pragma once
#include "chain.cuh"
#include "nested_work.cuh"

constexpr int GROUP = 128; // columns that have one scale
