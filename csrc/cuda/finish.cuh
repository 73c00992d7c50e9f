// Fixed-order sums of what down left: norms and peaks per slot, and the output in the model dtype.
//
//     norms[slot] = sqrt(sum of the row's partial squares), peaks[slot] = the largest partial
//     out[t] = combined[t], or the sum over k, in order, of the slab's rows of token t
#pragma once
#include "numbers.cuh"
#include "routing.cuh"

namespace reap::cuda {

constexpr int FINISH_THREADS = 128;

template <class T> struct FinishArgs {
    Global<const float> combined;   // [T, pitch], or the slab [S, pitch]
    Global<const float2> partials;  // sum of y^2, max |y| [parts, S]
    Ids ids;                        // [S]
    Global<const int32_t> order;    // sorted position -> slot [S]
    Global<const int32_t> offsets;  // [E] ends the slots that have an expert [E+1]
    Global<T> out;                  // [T, H]
    Global<float> norms, peaks;     // [S]
    int64_t pitch;
    int tokens, K, E, H, S;
    int parts;                      // 0: leave norms and peaks alone
    int first_column, last_column;  // of the slab
    bool deterministic;
};

// Norm and peak of the slot at a sorted position.
template <class T> __device__ __forceinline__ void finish_slot(const FinishArgs<T>& args, int position) {
    float squares = 0.0f, peak = 0.0f;
    if (position < load_global(args.offsets + args.E))  // the others have no partials
        for (int part = 0; part < args.parts; ++part) {
            const float2 size = load_global(args.partials + (int64_t(part) * args.S + position));
            squares += size.x;
            peak = max_nan(peak, size.y);
        }
    const int slot = load_global(args.order + position);
    store_global(args.norms + slot, sqrtf(squares));
    store_global(args.peaks + slot, peak);
}

// Four consecutive columns of a token, before rounding.
template <class T> __device__ __forceinline__ float4 sum_columns(const FinishArgs<T>& args, int token, int column) {
    if (!args.deterministic) return load_global(cast<const float4>(args.combined + (token * args.pitch + column)));
    float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
    for (int k = 0; k < args.K; ++k) {
        const int slot = token * args.K + k;
        if (args.ids.at(slot) >= args.E) continue;
        const float4 y = load_global(cast<const float4>(args.combined + (slot * args.pitch + column)));
        sum.x += y.x, sum.y += y.y, sum.z += y.z, sum.w += y.w;
    }
    return sum;
}

// Block: a token's columns of the slab, and 128 sorted positions.
template <class T> __global__ void __launch_bounds__(FINISH_THREADS) finish_kernel(FinishArgs<T> args) {
    wait_for_launch_before();
    const int block = blockIdx.x;
    const int64_t position = int64_t(block) * FINISH_THREADS + threadIdx.x;
    if (args.parts > 0 && position < args.S) finish_slot(args, static_cast<int>(position));
    if (block >= args.tokens) return;
    const int width = args.last_column - args.first_column;
    for (int column = threadIdx.x * 4; column < width; column += FINISH_THREADS * 4) {
        const float4 y = sum_columns(args, block, column);
        const int n = args.first_column + column;
        const Global<T> cell = args.out + (int64_t(block) * args.H + n);
        if (args.H % 4 == 0) {
            store_global(cast<uint2>(cell), uint2{narrow2<T>(y.x, y.y), narrow2<T>(y.z, y.w)});
        } else {
            const float each[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
            for (int c = 0; c < 4; ++c)
                if (column + c < width) store_global(cell + c, narrow<T>(each[c]));
        }
    }
}

}  // namespace reap::cuda
