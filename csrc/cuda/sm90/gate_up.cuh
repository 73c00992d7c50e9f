// ../gate_up.cuh for Hopper: weights come by TMA, rows of x by cp.async, which unlike TMA can gather
// them.
#pragma once
#include "inner.cuh"

namespace reap::cuda::sm90 {

template <class T> struct GateUp {
    GateUpArgs<T> args;
    Global<int32_t> counter;  // of tiles
    TensorMap weights;        // see weight_box()
    Guess guess;
};

constexpr int PRODUCERS_MEET = 1;  // a named barrier; 0 is that of __syncthreads

constexpr int GATE_UP_BYTES = STAGED_AT + CONSUMERS * WARPGROUP / WARP * INNER_BYTES;

// One stage of rows of x: 64 for each warpgroup that has a real one.
template <class T>
__device__ __forceinline__ void gather_groups(const KMajorSlice<T, TILE_ROWS>& x, const Tile& tile,
                                              Shared<char> stage) {
    const bool both = is_real(tile.first + GROUP_ROWS, tile.end);
    x.template fill_part<0, GROUP_ROWS>(stage);
    if (both) x.template fill_part<GROUP_ROWS, TILE_ROWS>(stage);
}

template <class T, bool B_MN_MAJOR, class Gather>
__device__ __forceinline__ void load_gate_up(const GateUp<T>& up, const Ring& ring, Gather gather) {
    const GateUpArgs<T>& args = up.args;
    PipelineState state;
    Tile tile;
    int number = blockIdx.x;
    for (int turn = 0; locate(tile, args.routing, number, args.walk, TILE_ROWS); turn ^= 1) {
        const int next = threadIdx.x == 0 ? take_tile(up.counter) : 0;
        KMajorSlice<T, TILE_ROWS> x(args.hidden, args.H, [&](int i) { return gathered_row(args, tile, i); });
        for (int k = 0; k < args.H; k += TILE_K) {
            const Shared<uint64_t> full = ring.full + state.stage;
            wait_empty(ring, state);
            if (threadIdx.x == 0) {
                announce(ring, state, tile);
                mbarrier_arrive_expect(full, B_BYTES);
                load_weights<B_MN_MAJOR>(ring.b(state.stage), up.weights, full, tile.expert, tile.column * TILE_COLUMNS,
                                         k, args.pairing == Pairing::halves);
            }
            gather(x, tile, ring.a(state.stage));
            x.advance();
            cp_async_mbarrier_arrive(full);
            state.advance();
        }
        if (threadIdx.x == 0) store_shared(ring.taken + turn, next);
        named_barrier(PRODUCERS_MEET, WARPGROUP);
        number = load_shared(ring.taken + turn);
    }
    wait_empty(ring, state);
    if (threadIdx.x == 0) {
        announce_end(ring, state);
        mbarrier_arrive(ring.full + state.stage);
    }
    mbarrier_arrive(ring.full + state.stage);
    drain(ring, state);
}

// This block's shares of the zeros, by the consumers.
__device__ __forceinline__ void zero_shares(const Zero& zero) {
    constexpr int MULTIPLIERS = CONSUMERS * WARPGROUP;
    for (int64_t share = blockIdx.x; share * MULTIPLIERS * ZERO_STEPS < zero.count; share += gridDim.x)
        zero_share(zero, share, threadIdx.x - WARPGROUP, MULTIPLIERS);
}

template <class T, bool B_MN_MAJOR>
__device__ __forceinline__ void compute_gate_up(const GateUpArgs<T>& args, const Ring& ring) {
    const int slices = (args.H + TILE_K - 1) / TILE_K;
    PipelineState state;
    Tile tile;
    for (bool more = next_tile(tile, ring, state); more; more = next_tile(tile, ring, state)) {
        if (!has_rows(tile)) {
            pass_over(ring, state, slices);
            continue;
        }
        const int column = tile.column * TILE_COLUMNS;
        Accumulators acc;
        multiply<T, B_MN_MAJOR, true>(acc, ring, state, slices);
        add_bias(acc, args.weights, tile.expert, column);
        const Shared<char> staged = shared_memory() + (STAGED_AT + consumer_warp() * INNER_BYTES);
        finish_tile(args, acc, staged, tile.first + consumer_row(), tile.end, column);
    }
    bulk_wait_read();  // shared memory is the block's no longer than its threads are there
    zero_shares(args.zero);
}

template <class T, bool B_MN_MAJOR>
__global__ void __launch_bounds__(BLOCK, 1) gate_up_kernel(const __grid_constant__ GateUp<T> up) {
#ifdef REAP_HOPPER
    let_next_launch_start();
    const Ring ring = make_ring(WARPGROUP + 1, STAGE_BYTES, CONSUMERS * WARPGROUP / WARP);
    if (threadIdx.x < WARPGROUP) {
        release_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0)
            prefetch_weights<B_MN_MAJOR>(up.weights, up.guess, 0, up.args.H, up.args.pairing == Pairing::halves);
        wait_for_launch_before();
        load_gate_up<T, B_MN_MAJOR>(up, ring, gather_groups<T>);
    } else {
        acquire_registers<CONSUMER_REGISTERS>();
        wait_for_launch_before();
        compute_gate_up<T, B_MN_MAJOR>(up.args, ring);
    }
#else
    trap_unless(false);
#endif
}

}  // namespace reap::cuda::sm90
