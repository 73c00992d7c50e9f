// ../gate_up.cuh for Hopper: weights come by the copy engine, rows of x by cp.async, which unlike the
// copy engine can gather them.
#pragma once
#include "../gate_up.cuh"
#include "pipeline.cuh"

namespace reap::cuda::sm90 {

template <class T> struct GateUp {
    GateUpArgs<T> args;
    TensorMap weights;  // see weight_box()
};

// Behind the ring, one staged strip for each consumer warp.
constexpr int STRIP_BYTES = 16 * BOX * sizeof(float);
constexpr int STRIPS_AT = (RING_BYTES + 127) / 128 * 128;
constexpr int GATE_UP_BYTES = STRIPS_AT + CONSUMERS * WARPGROUP / WARP * STRIP_BYTES;

template <class T, bool N_ADJACENT>
__device__ __forceinline__ void load_gate_up(const GateUp<T>& up, const Ring& ring) {
    const GateUpArgs<T>& args = up.args;
    Turn turn;
    Tile tile;
    for (int number = blockIdx.x; locate(tile, args.routing, number, args.E, args.column_tiles, args.group, TILE_ROWS);
         number += gridDim.x) {
        SliceAlongK<T, TILE_ROWS> x(args.hidden, args.H, [&](int i) { return gathered_row(args, tile, i); });
        for (int k = 0; k < args.H; k += STEP) {
            const Shared<uint64_t> full = ring.full + turn.stage;
            wait_empty(ring, turn);
            if (threadIdx.x == 0) {
                mbarrier_arrive_expect(full, B_BYTES);
                load_weights<N_ADJACENT>(ring.b(turn.stage), up.weights, full, tile.expert, tile.column * TILE_COLUMNS,
                                         k, args.pairing == Pairing::halves);
            }
            x.fill(ring.a(turn.stage));
            cp_async_mbarrier_arrive(full);
            turn.advance();
        }
    }
    drain(ring, turn);
}

// Strip s of the result, in which gate and up alternate as store_inner() wants them.
__device__ __forceinline__ void result_strip(float (&strip)[BOX / 8][4], const Accumulators& acc, int s, bool halves) {
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c)
            strip[j][c] = halves ? acc[j % 2 * 2 + s / 2][s % 2 * 4 + j / 2][c] : acc[s][j][c];
}

template <class T, bool N_ADJACENT>
__device__ __forceinline__ void compute_gate_up(const GateUpArgs<T>& args, const Ring& ring) {
    Turn turn;
    Tile tile;
    for (int number = blockIdx.x; locate(tile, args.routing, number, args.E, args.column_tiles, args.group, TILE_ROWS);
         number += gridDim.x) {
        const int column = tile.column * TILE_COLUMNS;
        Accumulators acc;
        multiply<T, N_ADJACENT, true>(acc, ring, turn, (args.H + STEP - 1) / STEP);
        add_bias(acc, args.weights, tile.expert, column);
        // From a shuffle, so that the addresses in there are not kept in registers during the main loop.
        const int warp = __shfl_sync(ALL_LANES, (threadIdx.x - WARPGROUP) / WARP, 0);
        const Staging staged{cast<float>(shared_memory() + (STRIPS_AT + warp * STRIP_BYTES))};
#pragma unroll
        for (int s = 0; s < 4; ++s) {
            float strip[BOX / 8][4];
            result_strip(strip, acc, s, args.pairing == Pairing::halves);
            staged.store(strip, 0);
            __syncwarp();
            store_inner(args, staged, 16, tile.first + consumer_row(), tile.end, column + s * BOX);
            __syncwarp();
        }
    }
}

template <class T, bool N_ADJACENT>
__global__ void __launch_bounds__(BLOCK, 1) gate_up_kernel(const __grid_constant__ GateUp<T> up) {
#ifdef REAP_HOPPER
    const Ring ring = make_ring(WARPGROUP + 1);
    if (threadIdx.x < WARPGROUP) {
        release_registers<PRODUCER_REGISTERS>();
        load_gate_up<T, N_ADJACENT>(up, ring);
    } else {
        acquire_registers<CONSUMER_REGISTERS>();
        compute_gate_up<T, N_ADJACENT>(up.args, ring);
    }
#else
    trap_unless(false);
#endif
}

}  // namespace reap::cuda::sm90
