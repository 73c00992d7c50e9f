// Zeros for the sums of the output, which `down` adds to. They need no launch of their own: gate_up
// writes them where its tiles leave processors idle, at its end.
#pragma once
#include "ptx.cuh"

namespace reap::cuda {

constexpr int ZERO_STEPS = 16;  // stores of a thread in one share

struct Zero {
    Global<float4> data;
    int64_t count;
};

// One share of the zeros, by `threads` threads.
__device__ __forceinline__ void zero_share(const Zero& zero, int64_t share, int thread, int threads) {
    const int64_t first = share * threads * ZERO_STEPS + thread;
    for (int64_t at = first; at < first + threads * ZERO_STEPS; at += threads)
        if (at < zero.count) store_global(zero.data + at, float4{0.0f, 0.0f, 0.0f, 0.0f});
}

}  // namespace reap::cuda
