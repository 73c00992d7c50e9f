// What becomes of y in down's epilogue: its norm, its peak, and its part of the output.
//
//     y, a warp's rows of 64 columns  ->  parts of sum y^2 and max |y|  [ceil(H / 64), S]
//                                     ->  combined [T, H] += gate * y
//
// The 64 columns of a row leave one partial in a cell of their own, and `finish` adds those in a fixed
// order: norms and peaks have the same bits in every run. Gated rows are added to combined where they
// arrive; in deterministic mode they go to a slab [S, W] of W columns, one cell per slot, which
// `finish` adds in the order of k. They leave as whole lines of memory, from shared memory: a fragment
// has of 8 rows 32 bytes each, and memory is asked by the line.
#pragma once
#include "staging.cuh"

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
    Global<float> combined;   // [T, pitch], or the slab [S, pitch]
    Global<float2> partials;  // 64 columns, sorted position -> sum of y^2, max |y| [ceil(H / 64), S]
    int64_t pitch;            // a multiple of 8, past whose real columns anything may be written
    int K, S, H;
    int first_column;  // of the slab
    bool deterministic;
};

// A row's place in the output and its gate.
struct Target {
    int row;  // of `combined`: a token, or a slot
    float gate;
};

// The slot at a sorted position. Past the end the last one repeats.
__device__ __forceinline__ int find_slot(const Combine& args, int position, int end) {
    return load_global(args.order + min(position, end - 1));
}

// The row of `combined` for a slot's y: its own, or that of its token.
__device__ __forceinline__ int output_row(const Combine& args, int slot) {
    return args.deterministic ? slot : slot / args.K;
}

__device__ __forceinline__ Target find_target(const Combine& args, int slot) {
    return {output_row(args, slot), args.gates.at(slot)};
}

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

// The sizes of a strip's 16 rows to the partials: rows from sorted position `first` on, columns from
// `column` on. What is past the last column becomes 0.
template <int N>
__device__ __forceinline__ void measure_strip(float (&strip)[N][4], const Combine& args, int first, int end,
                                              int column) {
    static_assert(N * 8 == PARTIAL_COLUMNS);
    if (column + PARTIAL_COLUMNS > args.H) {
#pragma unroll
        for (int j = 0; j < N; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c)
                if (column + j * 8 + fragment_column() + c % 2 >= args.H) strip[j][c] = 0.0f;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float2 size = row_size(strip, half);
        const int position = first + fragment_row() + half * 8;
        if (is_real(position, end) && fragment_column() == 0)
            store_global(args.partials + (int64_t(column / PARTIAL_COLUMNS) * args.S + position), size);
    }
}

// gate * y of a warp's staged rows to the output: ROWS rows from sorted position `first` on, 64 columns
// from `column` on. Neighbouring lanes have N consecutive floats of a row each; put(cell, y) stores
// or adds them.
template <int ROWS, int N, class Put>
__device__ __forceinline__ void combine_rows(const Combine& args, const Staging& staged, int first, int end, int column,
                                             Put put) {
    constexpr int ACROSS = N == 1 ? WARP : WARP_COLUMNS / N;  // lanes
    constexpr int BATCH = ROWS == 16 ? ROWS : WARP;           // rows whose targets the lanes have
    const Global<float> slab = args.combined - args.first_column;
#pragma unroll 1
    for (int done = 0; done < ROWS; done += BATCH) {
        const Target mine = find_target(args, find_slot(args, first + done + lane_id(), end));
#pragma unroll 4
        for (int i = 0; i < BATCH; i += WARP / ACROSS) {
            const int row = i + lane_id() / ACROSS;
            const float gate = __shfl_sync(ALL_LANES, mine.gate, row);
            const Global<float> target = slab + __shfl_sync(ALL_LANES, mine.row, row) * args.pitch;
#pragma unroll
            for (int c = 0; c < WARP_COLUMNS; c += ACROSS * N) {
                const int n = c + lane_id() % ACROSS * N;
                float y[N];
                staged.load(y, done + row, n);
                map(y, [&](float x) { return gate * x; });
                if (is_real(first + done + row, end) && column + n < args.H) put(target + (column + n), y);
            }
        }
    }
}

// All of it for a warp's tile: strips of 16 rows from sorted position `first` on, 64 columns from
// `column` on.
template <int STRIPS>
__device__ __forceinline__ void combine_tile(float (&strips)[STRIPS][COLUMN_TILES][4], const Combine& args,
                                             const Staging& staged, int first, int end, int column) {
    if (column >= args.H) return;
#pragma unroll
    for (int i = 0; i < STRIPS; ++i) {
        measure_strip(strips[i], args, first + i * 16, end, column);
        staged.store(strips[i], i * 16);
    }
    __syncwarp();
    constexpr int ROWS = STRIPS * 16;
    const auto four = [](const float (&y)[4]) { return float4{y[0], y[1], y[2], y[3]}; };
    if (args.deterministic)
        combine_rows<ROWS, 4>(args, staged, first, end, column, [&](Global<float> cell, const float (&y)[4]) {
            store_global(cast<float4>(cell), four(y));
        });
    else if (has_red_add4())
        combine_rows<ROWS, 4>(args, staged, first, end, column,
                              [&](Global<float> cell, const float (&y)[4]) { red_add4(cell, four(y)); });
    else
        combine_rows<ROWS, 1>(args, staged, first, end, column,
                              [&](Global<float> cell, const float (&y)[1]) { red_add(cell, y[0]); });
}

}  // namespace reap::cuda
