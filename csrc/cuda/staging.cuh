// How a tile of results goes from the fragments of a warp to whole rows: through shared memory.
#pragma once
#include "tiles.cuh"

namespace reap::cuda {

// The fp32 tile of one warp in shared memory, 64 columns in chunks of 4. A chunk is swizzled by
// its row so that neither fragments (2 columns of 4 rows at a time) nor readers (a chunk of each of
// 8 lanes, from 1 or 2 rows) meet in a bank.
struct Staging {
    Shared<float> tile;

    __device__ __forceinline__ Shared<float> chunk(int row, int number) const {
        return tile + (row * WARP_COLUMNS + (number ^ row % 4 * 2 ^ number / 8) * 4);
    }
    // A strip of 16 rows.
    __device__ __forceinline__ void store(const float (&strip)[COLUMN_TILES][4], int row) const {
        const int column = fragment_column();
#pragma unroll
        for (int j = 0; j < COLUMN_TILES; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                store_shared(cast<float2>(chunk(row + fragment_row() + half * 8, 2 * j + column / 4) + column % 4),
                             float2{strip[j][2 * half], strip[j][2 * half + 1]});
    }
    // N consecutive columns, a multiple of 4 or one.
    template <int N> __device__ __forceinline__ void load(float (&x)[N], int row, int column) const {
        if constexpr (N == 1) {
            x[0] = load_shared(chunk(row, column / 4) + column % 4);
        } else {
#pragma unroll
            for (int i = 0; i < N; i += 4) {
                const float4 four = load_shared(cast<const float4>(chunk(row, (column + i) / 4)));
                x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
            }
        }
    }
};

}  // namespace reap::cuda
