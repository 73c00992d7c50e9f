// y = inner W_down + b, and from its fp32 accumulators at once: norm, peak, gate and combine.
//
//     inner [S, I], W [E, H, I]  ->  combined [T, H] += gate * y,  parts of sum y^2 and max |y|
//
// No y is stored. Each 64 columns of a row, which are in one warp, leave one partial in a cell of
// their own, and `finish` adds those in a fixed order: norms and peaks have the same bits in every
// run. Gated rows are added to combined [T, H] where they arrive; in deterministic mode they go to a
// slab [S, W] of W columns, one cell per slot, which `finish` adds in the order of k.
#pragma once
#include "tiles.cuh"

namespace reap::cuda {

constexpr int PARTIAL_COLUMNS = WARP_COLUMNS;

// What the router left, in its dtype.
struct Gates {
    Global<const char> data;  // [S]
    Dtype dtype;

    __device__ __forceinline__ float at(int slot) const {
        if (dtype == Dtype::f32) return load_global(cast<const float>(data) + slot);
        if (dtype == Dtype::f16) return widen(load_global(cast<const f16>(data) + slot));
        return widen(load_global(cast<const bf16>(data) + slot));
    }
};

// Where y goes, seen from a sorted position.
struct Combine {
    Global<const int32_t> order;  // sorted position -> slot [S]
    Gates gates;
    Global<float> combined;       // [T, pitch], or the slab [S, pitch]
    Global<float2> partials;      // 64 columns, sorted position -> sum of y^2, max |y| [ceil(H / 64), S]
    int64_t pitch;                // a multiple of 8, past whose real columns anything may be written
    int K, S, H;
    int first_column;             // of the slab
    bool deterministic;
};

template <class T> struct DownArgs {
    Global<const T> inner;  // [S, inner_pitch]
    Projection<T> weights;  // rows H, k I
    Routing routing;
    Combine combine;
    int E, I, inner_pitch;
    int column_tiles, group;
};

// Sum of squares and largest |y| of a strip's row, from the four lanes that have it; in all of them.
template <int N> __device__ __forceinline__ float2 row_size(const float (&strip)[N][4], int half) {
    float squares = 0.0f, peak = 0.0f;
#pragma unroll
    for (int j = 0; j < N; ++j)
#pragma unroll
        for (int c = 2 * half; c < 2 * half + 2; ++c) {
            squares += strip[j][c] * strip[j][c];
            peak = max_nan(peak, fabsf(strip[j][c]));
        }
#pragma unroll
    for (int other = 1; other <= 2; other *= 2) {
        squares += __shfl_xor_sync(ALL_LANES, squares, other);
        peak = max_nan(peak, __shfl_xor_sync(ALL_LANES, peak, other));
    }
    return {squares, peak};
}

// One row of a strip: its size to the partials, gate * y to the output. A quad of lanes adds 32
// contiguous bytes at a time.
template <int N>
__device__ __forceinline__ void combine_row(const float (&strip)[N][4], int half, float2 size, const Combine& args,
                                            int position, int column) {
    if (fragment_column() == 0)
        store_global(args.partials + (int64_t(column / PARTIAL_COLUMNS) * args.S + position), size);
    const int slot = load_global(args.order + position);
    const float gate = args.gates.at(slot);
    const int row = args.deterministic ? slot : slot / args.K;
    const Global<float> cell = args.combined + (row * args.pitch + (column - args.first_column) + fragment_column());
#pragma unroll
    for (int j = 0; j < N; ++j) {
        if (column + j * 8 >= args.H) break;
        const float y0 = gate * strip[j][2 * half], y1 = gate * strip[j][2 * half + 1];
        if (args.deterministic)
            store_global(cast<float2>(cell + j * 8), float2{y0, y1});
        else
            red_add2(cell + j * 8, y0, y1);
    }
}

// What happens to y: a strip of 16 rows by 8 N columns in the fragments of one warp, from sorted
// position `first` and output column `column` on.
template <int N>
__device__ __forceinline__ void combine_strip(float (&strip)[N][4], const Combine& args, int first, int end, int column) {
    static_assert(N * 8 == PARTIAL_COLUMNS);
    if (column >= args.H) return;
#pragma unroll
    for (int j = 0; j < N; ++j)  // columns past the last repeat it
#pragma unroll
        for (int c = 0; c < 4; ++c)
            if (column + j * 8 + fragment_column() + c % 2 >= args.H) strip[j][c] = 0.0f;

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float2 size = row_size(strip, half);
        const int position = first + fragment_row() + half * 8;
        if (is_real(position, end)) combine_row(strip, half, size, args, position, column);
    }
}

template <class T, int ROWS, Layout LAYOUT>
__global__ void __launch_bounds__(THREADS) down_kernel(DownArgs<T> args) {
    Tile tile;
    if (!locate(tile, args.routing, blockIdx.x, args.E, args.column_tiles, args.group, ROWS)) return;
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
#pragma unroll
    for (int i = 0; i < ROWS / 32; ++i)
        combine_strip(acc[i], args.combine, tile.first + warp_row<ROWS>() + i * 16, tile.end, column + warp_column());
}

}  // namespace reap::cuda
