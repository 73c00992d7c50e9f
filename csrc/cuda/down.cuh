// y = inner W_down + b, one expert's weights per row tile; no y is stored, see combine.cuh.
//
//     inner [S, I], W [E, H, I]  ->  combined [T, H] += gate * y,  parts of sum y^2 and max |y|
#pragma once
#include "combine.cuh"

namespace reap::cuda {

template <class T> struct DownArgs {
    Global<const T> inner;  // [S, inner_pitch]
    Projection<T> weights;  // rows H, k I
    Routing routing;
    Combine combine;
    Walk walk;
    int I, inner_pitch;
};

template <class T, int ROWS, Layout LAYOUT>
__device__ __forceinline__ void down_tile(const DownArgs<T>& args, const Tile& tile) {
    const int column = args.combine.first_column + tile.column * COLUMNS;

    const auto inner_row = [&](int i) {  // past the end the last row repeats
        return min(i, tile.end - 1 - tile.first) * int64_t(args.inner_pitch);
    };
    const Global<const T> first = args.inner + int64_t(tile.first) * args.inner_pitch;
    KMajorSlice<T, ROWS> a(first, args.inner_pitch, inner_row);
    auto b = weight_slices<T, LAYOUT>(args.weights, tile.expert, column, args.I);

    Accumulators<ROWS> acc;
    start<T, ROWS>(acc, args.weights, tile.expert, column);
    multiply<T, ROWS, LAYOUT == Layout::mn_major>(acc, a, b, (args.I + TILE_K - 1) / TILE_K);

    // Other warps may still read the ring's last slice.
    __syncthreads();
    const Staging staged{cast<float>(shared_memory()) + threadIdx.x / WARP * (ROWS / 2 * WARP_COLUMNS)};
    combine_tile(acc, args.combine, staged, tile.first + warp_row<ROWS>(), tile.end, column + warp_column());
}

template <class T, int ROWS, Layout LAYOUT> __global__ void __launch_bounds__(THREADS) down_kernel(DownArgs<T> args) {
    let_next_launch_start();
    wait_for_launch_before();
    Tile tile;
    if (!locate(tile, args.routing, blockIdx.x, args.walk, ROWS)) return;
    with_rows<ROWS>(tile, [&](auto rows) { down_tile<T, rows.value, LAYOUT>(args, tile); });
}

}  // namespace reap::cuda
