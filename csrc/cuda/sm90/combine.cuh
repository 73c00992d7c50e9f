// ../combine.cuh for Hopper: a strip's rows leave shared memory by bulk copies, a row's 256 bytes at a
// time, which TMA adds to the output while the warp goes on to the next strip.
#pragma once
#include "../combine.cuh"
#include "pipeline.cuh"

namespace reap::cuda::sm90 {

// A staged strip of each consumer warp. Rows 0, 1, 2, 3 of any four are 32 bytes apart in their banks,
// for the fragments of half a warp: a quarter of the strip has all rows of one kind.
constexpr int QUARTER_BYTES = STRIP_ROWS / 4 * BOX * sizeof(float) + 32;
constexpr int ADDED_STRIP_BYTES = (4 * QUARTER_BYTES + 127) / 128 * 128;
constexpr int DOWN_BYTES = STAGED_AT + CONSUMERS * WARPGROUP / WARP * ADDED_STRIP_BYTES;

struct BulkStaging {
    Shared<char> strip;

    __device__ __forceinline__ Shared<float> row(int number) const {
        return cast<float>(strip + (number % 4 * QUARTER_BYTES + number / 4 * BOX * int(sizeof(float))));
    }
};

// What a warp knows of its 16 rows.
struct Rows {
    Global<float> target;  // where the row of this lane's number modulo 16 starts in the slab's columns
    float gates[2];        // of the two rows in this lane's fragments
};

// From the slot of this lane's row.
__device__ __forceinline__ Rows find_rows(const Combine& args, int slot) {
    const Target mine = find_target(args, slot);
    Rows rows;
    rows.target = args.combined + mine.row * args.pitch;
#pragma unroll
    for (int half = 0; half < 2; ++half)
        rows.gates[half] = __shfl_sync(ALL_LANES, mine.gate, fragment_row() + half * 8);
    return rows;
}

// A strip of 64 columns from `column` on: its sizes to the partials, gate * y to the output.
__device__ __forceinline__ void combine_strip(float (&strip)[BOX / 8][4], const Combine& args, const Rows& rows,
                                              const BulkStaging& staged, int first, int end, int column) {
    if (column >= args.H) return;
    measure_strip(strip, args, first, end, column);
    bulk_wait_read();  // for the rows that lay here before
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const Shared<float> row = staged.row(fragment_row() + half * 8) + fragment_column();
#pragma unroll
        for (int j = 0; j < BOX / 8; ++j)
            store_shared(cast<float2>(row + j * 8),
                         float2{rows.gates[half] * strip[j][2 * half], rows.gates[half] * strip[j][2 * half + 1]});
    }
    fence_proxy_async();
    __syncwarp();
    const int bytes = min(BOX, args.H - column) * int(sizeof(float));
    const Global<float> target = rows.target + (column - args.first_column);
    if (lane_id() < STRIP_ROWS && is_real(first + lane_id(), end)) {
        const Shared<float> row = staged.row(lane_id());
        if (args.deterministic) bulk_store(target, row, bytes);
        else bulk_add(target, row, bytes);
    }
    bulk_commit();
}

}  // namespace reap::cuda::sm90
