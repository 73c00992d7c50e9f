// ../down.cuh for Hopper: TMA brings both operands, on behalf of one thread.
#pragma once
#include "../down.cuh"
#include "combine.cuh"

namespace reap::cuda::sm90 {

template <class T> struct Down {
    DownArgs<T> args;
    TensorMap inner;    // [S, I], boxes of 128 rows
    TensorMap weights;  // see weight_box()
};

template <class T, bool B_MN_MAJOR>
__device__ __forceinline__ void load_down(const Down<T>& down, const Ring& ring) {
    const DownArgs<T>& args = down.args;
    PipelineState state;
    Tile tile;
    for (int number = blockIdx.x; locate(tile, args.routing, number, args.E, args.column_tiles, args.group, TILE_ROWS);
         number += gridDim.x) {
        const int column = args.combine.first_column + tile.column * TILE_COLUMNS;
        for (int k = 0; k < args.I; k += TILE_K) {
            const Shared<uint64_t> full = ring.full + state.stage;
            wait_empty(ring, state);
            mbarrier_arrive_expect(full, STAGE_BYTES);
            const int at[2] = {k, tile.first};  // rows past the expert's last are those of the next
            tma_load(ring.a(state.stage), down.inner, full, at);
            load_weights<B_MN_MAJOR>(ring.b(state.stage), down.weights, full, tile.expert, column, k, false);
            state.advance();
        }
    }
}

template <class T, bool B_MN_MAJOR>
__device__ __forceinline__ void compute_down(const DownArgs<T>& args, const Ring& ring) {
    PipelineState state;
    Tile tile;
    const BulkStaging staged{shared_memory() + (ADDED_STRIPS_AT + consumer_warp() * ADDED_STRIP_BYTES)};
    for (int number = blockIdx.x; locate(tile, args.routing, number, args.E, args.column_tiles, args.group, TILE_ROWS);
         number += gridDim.x) {
        const int column = args.combine.first_column + tile.column * TILE_COLUMNS, first = tile.first + consumer_row();
        Accumulators acc;
        multiply<T, B_MN_MAJOR, false>(acc, ring, state, (args.I + TILE_K - 1) / TILE_K);
        add_bias(acc, args.weights, tile.expert, column);
        const Rows rows = find_rows(args.combine, first, tile.end);
#pragma unroll
        for (int s = 0; s < 4; ++s) combine_strip(acc[s], args.combine, rows, staged, first, tile.end, column + s * BOX);
    }
    bulk_wait_read();  // shared memory is the block's no longer than its threads are there
}

template <class T, bool B_MN_MAJOR>
__global__ void __launch_bounds__(BLOCK, 1) down_kernel(const __grid_constant__ Down<T> down) {
#ifdef REAP_HOPPER
    const Ring ring = make_ring(1);
    if (threadIdx.x < WARPGROUP) {
        release_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) load_down<T, B_MN_MAJOR>(down, ring);
    } else {
        acquire_registers<CONSUMER_REGISTERS>();
        compute_down<T, B_MN_MAJOR>(down.args, ring);
    }
#else
    trap_unless(false);
#endif
}

}  // namespace reap::cuda::sm90
