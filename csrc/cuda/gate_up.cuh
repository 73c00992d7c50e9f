// inner = act(x W_gate + b_gate) * (x W_up + b_up)      one expert's weights per row tile
//
//     x [T, H], W [E, R, H]  ->  inner [S, I], rows in the sorted order of the slots
//
// Rows of x are gathered by the copies to shared memory. Both halves of a gated activation are in one
// warp's tile (see Columns). That tile goes once more through shared memory: a lane then has 8
// consecutive elements of inner, which it stores at once, and the code of the activations is there
// once, in a loop, instead of once per accumulator.
#pragma once
#include "staging.cuh"
#include "zero.cuh"

namespace reap::cuda {

enum class Pairing : int { none, halves, neighbours };  // where gate and up are in a tile

template <class T> struct GateUpArgs {
    Global<const T> hidden;  // [T, H]
    int64_t hidden_stride;
    Projection<T> weights;  // rows R, k H
    Global<T> inner;        // [S, pitch], elements past I are 0
    Routing routing;
    Gate gate;
    Pairing pairing;
    Walk walk;
    int K, H, I, pitch;
    int tiles;  // a bound; blocks from there on have shares of the zeros
    Zero zero;
};

// Activates a staged tile of `rows` rows from sorted position `first` on, whose first column is result
// column `column`, and stores it.
template <class T>
__device__ __forceinline__ void store_inner(const GateUpArgs<T>& args, const Staging& staged, int rows, int first,
                                            int end, int column) {
    const bool gated = args.pairing != Pairing::none;
    const int chunks = gated ? 4 : 8;  // of 8 elements of inner per row
    if (gated) column /= 2;
    for (int i = lane_id(); i < rows * chunks; i += WARP) {
        const int row = i / chunks, chunk = i % chunks, n = column + chunk * 8;
        float y[8];
        if (gated) {
            float x[16], u[8];
            staged.load(x, row, chunk * 16);
            const bool halves = args.pairing == Pairing::halves;
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                y[k] = halves ? x[k] : x[2 * k];
                u[k] = halves ? x[8 + k] : x[2 * k + 1];
            }
            activate(y, u, args.gate);
        } else {
            staged.load(y, row, chunk * 8);
            activate(y, args.gate);
        }
#pragma unroll
        for (int k = 0; k < 8; ++k)  // columns past the last repeat it
            if (n + k >= args.I) y[k] = 0.0f;
        if (is_real(first + row, end) && n < args.pitch)
            store_global(
                cast<uint4>(args.inner + (int64_t(first + row) * args.pitch + n)),
                uint4{narrow2<T>(y[0], y[1]), narrow2<T>(y[2], y[3]), narrow2<T>(y[4], y[5]), narrow2<T>(y[6], y[7])});
    }
}

// The element of x where tile row i starts. Past the end the last row repeats.
template <class T> __device__ __forceinline__ int64_t gathered_row(const GateUpArgs<T>& args, const Tile& tile, int i) {
    const int slot = load_global(args.routing.order + min(tile.first + i, tile.end - 1));
    return slot / args.K * args.hidden_stride;
}

template <class T, int ROWS, Layout LAYOUT>
__device__ __forceinline__ void gate_up_tile(const GateUpArgs<T>& args, const Tile& tile) {
    const int column = tile.column * COLUMNS;

    const auto x_row = [&](int i) { return gathered_row(args, tile, i); };
    auto a = [&] {
        if constexpr (LAYOUT == Layout::any) return StridedSlice<T, ROWS>(args.hidden, args.H, 1, x_row);
        else return KMajorSlice<T, ROWS>(args.hidden, args.H, x_row);
    }();
    auto b = weight_slices<T, LAYOUT>(args.weights, tile.expert, column, args.H);

    Accumulators<ROWS> acc;
    start<T, ROWS>(acc, args.weights, tile.expert, column);
    multiply<T, ROWS, LAYOUT == Layout::mn_major>(acc, a, b, (args.H + TILE_K - 1) / TILE_K);

    // Other warps may still read the ring's last slice.
    __syncthreads();
    const Staging staged{cast<float>(shared_memory()) + threadIdx.x / WARP * (ROWS / 2 * WARP_COLUMNS)};
#pragma unroll
    for (int i = 0; i < ROWS / 32; ++i) staged.store(acc[i], i * 16);
    __syncwarp();
    store_inner(args, staged, ROWS / 2, tile.first + warp_row<ROWS>(), tile.end, column + warp_column());
}

template <class T, int ROWS, Layout LAYOUT>
__global__ void __launch_bounds__(THREADS) gate_up_kernel(GateUpArgs<T> args) {
    let_next_launch_start();
    wait_for_launch_before();
    const int number = blockIdx.x;
    if (number >= args.tiles) return zero_share(args.zero, number - args.tiles, threadIdx.x, THREADS);
    Tile tile;
    if (!locate(tile, args.routing, number, args.walk, ROWS)) return;
    with_rows<ROWS>(tile, [&](auto rows) { gate_up_tile<T, rows.value, LAYOUT>(args, tile); });
}

}  // namespace reap::cuda
