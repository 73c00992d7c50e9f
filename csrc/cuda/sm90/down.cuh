// ../down.cuh for Hopper: TMA brings both operands, on behalf of one thread. This is the cooperative form,
// in which the consumers share each tile; in that of pingpong.cuh each has tiles of its own.
#pragma once
#include "../down.cuh"
#include "combine.cuh"

namespace reap::cuda::sm90 {

template <class T> struct Down {
    DownArgs<T> args;
    Global<int32_t> counter;  // of tiles
    TensorMap inner;          // [S, I]
    TensorMap weights;        // see weight_box()
    Guess guess;
};

// By one thread, before the routing is known; for tiles of so many columns, as load_down().
template <class T, bool B_MN_MAJOR, int COLUMNS> __device__ __forceinline__ void prefetch_down(const Down<T>& down) {
    prefetch_map(down.inner);
    prefetch_weights<B_MN_MAJOR, COLUMNS / BOX>(down.weights, down.guess, down.args.combine.first_column, down.args.I,
                                                false);
}

// By one thread. The map of inner has boxes of BOX_ROWS.
template <class T, bool B_MN_MAJOR, int COLUMNS, int BOX_ROWS>
__device__ __forceinline__ void load_down(const Down<T>& down, const Ring& ring) {
    constexpr int BYTES = BOX_ROWS * ROW_BYTES;
    const DownArgs<T>& args = down.args;
    PipelineState state;
    Tile tile;
    int next = 0;
    for (int number = blockIdx.x; locate(tile, args.routing, number, args.walk, TILE_ROWS); number = next) {
        next = take_tile(down.counter);
        const int column = args.combine.first_column + tile.column * COLUMNS;
        const int boxes = (rows_of(tile) + BOX_ROWS - 1) / BOX_ROWS;
        for (int k = 0; k < args.I; k += TILE_K) {
            const Shared<uint64_t> full = ring.full + state.stage;
            wait_empty(ring, state);
            announce(ring, state, tile);
            mbarrier_arrive_expect(full, COLUMNS / BOX * BOX_BYTES + boxes * BYTES);
            // Rows past the expert's last are those of the next. Not unrolled, for few registers.
#pragma unroll 1
            for (int i = 0; i < boxes; ++i) {
                const int at[2] = {k, tile.first + i * BOX_ROWS};
                tma_load(ring.a(state.stage) + i * BYTES, down.inner, full, at);
            }
            load_weights<B_MN_MAJOR, COLUMNS / BOX>(ring.b(state.stage), down.weights, full, tile.expert, column, k,
                                                    false);
            state.advance();
        }
    }
    wait_empty(ring, state);
    announce_end(ring, state);
    mbarrier_arrive(ring.full + state.stage);
}

template <class T, bool B_MN_MAJOR>
__device__ __forceinline__ void compute_down(const DownArgs<T>& args, const Ring& ring) {
    const BulkStaging staged{shared_memory() + (STAGED_AT + consumer_warp() * ADDED_STRIP_BYTES)};
    const int slices = (args.I + TILE_K - 1) / TILE_K;
    PipelineState state;
    Tile tile;
    for (bool more = next_tile(tile, ring, state); more; more = next_tile(tile, ring, state)) {
        if (!has_rows(tile)) {
            pass_over(ring, state, slices);
            continue;
        }
        const int column = args.combine.first_column + tile.column * TILE_COLUMNS, first = tile.first + consumer_row();
        // Comes during the main loop.
        const int slot = find_slot(args.combine, first + lane_id() % STRIP_ROWS, tile.end);
        Accumulators acc;
        multiply<T, B_MN_MAJOR, false>(acc, ring, state, slices);
        add_bias(acc, args.weights, tile.expert, column);
        const Rows rows = find_rows(args.combine, slot);
#pragma unroll
        for (int s = 0; s < 4; ++s)
            combine_strip(acc[s], args.combine, rows, staged, first, tile.end, column + s * BOX);
    }
    bulk_wait_read();  // shared memory is the block's no longer than its threads are there
}

template <class T, bool B_MN_MAJOR>
__global__ void __launch_bounds__(BLOCK, 1) down_kernel(const __grid_constant__ Down<T> down) {
#ifdef REAP_HOPPER
    let_next_launch_start();
    const Ring ring = make_ring(1, STAGE_BYTES, CONSUMERS * WARPGROUP / WARP);
    if (threadIdx.x < WARPGROUP) {
        release_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) prefetch_down<T, B_MN_MAJOR, TILE_COLUMNS>(down);
        wait_for_launch_before();
        if (threadIdx.x == 0) load_down<T, B_MN_MAJOR, TILE_COLUMNS, GROUP_ROWS>(down, ring);
    } else {
        acquire_registers<CONSUMER_REGISTERS>();
        wait_for_launch_before();
        compute_down<T, B_MN_MAJOR>(down.args, ring);
    }
#else
    trap_unless(false);
#endif
}

}  // namespace reap::cuda::sm90
