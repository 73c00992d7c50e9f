// ../../gate_up.cuh for Hopper with its operands swapped: a lane activates what it has of an octet, and rows of
// inner come about by stmatrix, which transposes.
#pragma once
#include "../gate_up.cuh"
#include "tile.cuh"

namespace reap::cuda::sm90::swapped {

// Bytes from token to token of staged rows of inner, which start in other banks.
constexpr int INNER_PITCH = BOXES * BOX * 2 + CHUNK_BYTES;
constexpr int INNER_BUFFERS = BUFFERS * OCTET * INNER_PITCH;  // of a warpgroup
constexpr int GATE_UP_BYTES = STAGED_AT + CONSUMERS * INNER_BUFFERS;

// One stage of rows of x: those of the tile's octets, zeros where no token is real.
template <class T>
__device__ __forceinline__ void gather_octets(const KMajorSlice<T, TILE_ROWS>& x, const Tile& tile,
                                              Shared<char> stage) {
    const Shared<char> to = stage + chunk_offset(copy_row(), copy_chunk());
    const int octets = octets_of(tile);
#pragma unroll
    for (int i = 0; i < TILE_ROWS / COPY_ROWS; ++i) {
        const int row = copy_row() + i * COPY_ROWS;
        if (row < octets * OCTET)
            cp_async16(to + i * COPY_ROWS * ROW_BYTES, x.base + int64_t(x.offset[i]) * CHUNK_BYTES,
                       x.left > 0 && is_real(tile.first + row, tile.end));
    }
}

// Gate and up of neighbours, which are in lanes 4 apart: each of the two lanes gets one of their two columns.
__device__ __forceinline__ void part_neighbours(float (&gate)[4], float (&up)[4], const Octet& octet) {
    const bool odd = fragment_row() % 2;
#pragma unroll
    for (int box = 0; box < BOXES; ++box)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const float upper = octet[box][c], lower = octet[box][2 + c];
            const float other = __shfl_xor_sync(ALL_LANES, odd ? upper : lower, 4);
            gate[2 * box + c] = odd ? other : upper;
            up[2 * box + c] = odd ? lower : other;
        }
}

// Back in the order of columns.
__device__ __forceinline__ uint32_t sort_neighbours(uint32_t two_tokens) {
    const int row = fragment_row() % 4 * 2 + fragment_row() / 4;
    return __shfl_sync(ALL_LANES, two_tokens, row * 4 + lane_id() % 4);
}

// A warp's results of an octet to its rows: matrices of 8 columns, which are chunks of them.
template <class T>
__device__ __forceinline__ void store_octet(const Octet& octet, Pairing pairing, const Gate& gate, Shared<char> buffer,
                                            int warp) {
    const Shared<char> row = buffer + lane_id() % 8 * INNER_PITCH;
    const int matrix = lane_id() / 8 % 2;
    if (pairing == Pairing::none) {
#pragma unroll
        for (int box = 0; box < BOXES; ++box) {
            float y[4] = {octet[box][0], octet[box][1], octet[box][2], octet[box][3]};
            activate(y, gate);
            stmatrix_x2_trans(row + (box * 8 + warp * 2 + matrix) * CHUNK_BYTES,
                              {narrow2<T>(y[0], y[1]), narrow2<T>(y[2], y[3])});
        }
        return;
    }
    const bool halves = pairing == Pairing::halves;
    float y[4] = {octet[0][0], octet[0][1], octet[0][2], octet[0][3]};
    float u[4] = {octet[1][0], octet[1][1], octet[1][2], octet[1][3]};
    if (!halves) part_neighbours(y, u, octet);
    activate(y, u, gate);
    uint32_t results[2] = {narrow2<T>(y[0], y[1]), narrow2<T>(y[2], y[3])};
    if (!halves) results[0] = sort_neighbours(results[0]), results[1] = sort_neighbours(results[1]);
    stmatrix_x2_trans(row + (halves ? warp * 2 + matrix : matrix * 4 + warp) * CHUNK_BYTES, results);
}

template <class T, bool A_MN_MAJOR>
__device__ __forceinline__ void compute_gate_up(const GateUpArgs<T>& args, const Ring& ring) {
    const Boxes boxes(args.pairing == Pairing::halves);
    const Shared<char> buffers = shared_memory() + (STAGED_AT + warpgroup() * INNER_BUFFERS);
    const int width = (args.pairing == Pairing::none ? BOXES : 1) * BOX;  // of this warpgroup's results
    const int slices = (args.H + TILE_K - 1) / TILE_K;
    PipelineState state;
    Tile tile;
    for (bool more = next_tile(tile, ring, state); more; more = next_tile(tile, ring, state)) {
        const int octets = octets_of(tile);
        Accumulators acc;
        swapped::multiply<T, A_MN_MAJOR, true>(acc, ring, state, slices, boxes, octets);
        add_bias(acc, args.weights, boxes, tile.expert, tile.column * TILE_COLUMNS);
        const int column = (tile.column * CONSUMERS + warpgroup()) * width;
        // What a row has past I, down does not read.
        const int bytes = min(width, args.pitch - column) * int(sizeof(T));
        const int warp = warp_of_group();
        const auto fill = [&](const Octet& octet, Shared<char> buffer, int) {
            store_octet<T>(octet, args.pairing, args.gate, buffer, warp);
        };
        const auto send = [&](Shared<char> buffer, int number) {
            const int position = tile.first + number * OCTET + lane_id();
            if (lane_id() < OCTET && is_real(position, tile.end) && bytes > 0)
                bulk_store(args.inner + (int64_t(position) * args.pitch + column),
                           cast<T>(buffer + lane_id() * INNER_PITCH), bytes);
        };
        send_octets<INNER_PITCH>(acc, octets, buffers, fill, send);
    }
    bulk_wait_read();  // shared memory is the block's no longer than its threads are there
    zero_shares(args.zero);
}

template <class T, bool A_MN_MAJOR>
__global__ void __launch_bounds__(BLOCK, 1) gate_up_kernel(const __grid_constant__ GateUp<T> up) {
#ifdef REAP_HOPPER
    let_next_launch_start();
    const Ring ring = make_ring(WARPGROUP + 1, STAGE_BYTES, CONSUMERS * WARPGROUP / WARP);
    if (threadIdx.x < WARPGROUP) {
        release_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0)
            prefetch_weights<A_MN_MAJOR>(up.weights, up.guess, 0, up.args.H, up.args.pairing == Pairing::halves);
        wait_for_launch_before();
        load_gate_up<T, A_MN_MAJOR>(up, ring, gather_octets<T>);
    } else {
        acquire_registers<CONSUMER_REGISTERS>();
        wait_for_launch_before();
        swapped::compute_gate_up<T, A_MN_MAJOR>(up.args, ring);
    }
#else
    trap_unless(false);
#endif
}

}  // namespace reap::cuda::sm90::swapped
