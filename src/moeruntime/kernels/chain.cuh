// What a kernel does that is launched while the one before it still runs: see `chain.py`.
#pragma once

// Comes before anything is read or written: waits until all before is complete, then lets the next kernel be put
// in place once all blocks have said so.
__device__ __forceinline__ void begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\n"
                 "griddepcontrol.launch_dependents;" ::
                     : "memory");
#endif
}
