// What the kernels of nested experts have in common: numbers' names, and the lists of their work.
#pragma once
#include "chain.cuh"

typedef signed char i8;
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

constexpr int GROUP = 128; // columns that have one scale

struct Unit { // tokens of one face
    i64 at4, at2, at1;
    int face, slot, bits, step;
    int first, tokens; // in `pairs`, and how many from there on: 0 where there is no work
    int units;         // of the first one: how many there are
};

struct Entry { // tokens of a face that meets another
    int face, step;
    int first, tokens;
};

struct Pair { // of faces of a slot that have as many private bits
    Entry entries[2];
    int slot, bits;
    int tiles; // of four tokens, that each has at most
    int pairs; // of the first one: how many there are
};

__device__ __forceinline__ void copy_ahead(u32 to, const void *from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from));
}
