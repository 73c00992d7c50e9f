// The GEMMs with their operands swapped, for experts of few rows: weights are the rows of the product and
// tokens its columns, of which wgmma takes any multiple of 8 where it takes 64 rows at a time.
//
//     256 rows of the weights (A)  x  up to 128 tokens (B)  ->  two boxes of 64 rows in each of two warpgroups
//
// Ring and producer are those of ../pipeline.cuh, whose A and B are B and A here. Only octets of tokens of which
// one is real are multiplied: their number picks the width of the wgmmas, outside of the main loop. A lane has
// of an octet two tokens in two rows of each box.
#pragma once
#include "../pipeline.cuh"
#include "ptx.cuh"

namespace reap::cuda::sm90::swapped {

constexpr int OCTET = 8;  // tokens
constexpr int OCTETS = TILE_ROWS / OCTET;
constexpr int BOXES = TILE_COLUMNS / BOX / CONSUMERS;  // of a warpgroup
constexpr int CONSUMERS_MEET = 2;                      // and 3: named barriers of the warpgroups

// Those of a warpgroup. [box][octet]: a fragment of 16 rows by 8 tokens in each warp.
using Accumulators = float[BOXES][OCTETS][4];

// Octets of the tile that have a real token.
__device__ __forceinline__ int octets_of(const Tile& tile) { return (rows_of(tile) + OCTET - 1) / OCTET; }

// This warpgroup's number, and the warp's in it.
__device__ __forceinline__ int warpgroup() { return consumer_warp() / 4; }
__device__ __forceinline__ int warp_of_group() { return consumer_warp() % 4; }

// All threads of this warpgroup.
__device__ __forceinline__ void meet() { named_barrier(CONSUMERS_MEET + warpgroup(), WARPGROUP); }

// The boxes of a stage that this warpgroup multiplies. Where gate and up are halves, one of each: a lane
// then has both of the same column and token.
struct Boxes {
    int first, step;

    __device__ __forceinline__ explicit Boxes(bool halves)
        : first(halves ? warpgroup() : BOXES * warpgroup()), step(halves ? BOXES : 1) {}
};

// acc = A B of this warpgroup's boxes by N tokens, over `slices` > 0 of k. GATHERED as for ../pipeline.cuh's.
template <class T, bool A_MN_MAJOR, bool GATHERED, int N>
__device__ __forceinline__ void multiply_width(Accumulators& acc, const Ring& ring, PipelineState& state, int slices,
                                               const Boxes& boxes) {
    constexpr int B_NEXT = 16 * 2 / 16;  // 16 k further along the rows, in 16 bytes
    constexpr int A_NEXT = A_MN_MAJOR ? 16 * ROW_BYTES / 16 : B_NEXT;
    const bool leader = lane_id() == 0;
    int previous = 0;
    // By the threads: where the first wgmmas do it, ptxas runs all of them one by one.
#pragma unroll
    for (int box = 0; box < BOXES; ++box)
#pragma unroll
        for (int i = 0; i < N / OCTET; ++i)
#pragma unroll
            for (int c = 0; c < 4; ++c) acc[box][i][c] = 0.0f;
    for (int slice = 0; slice < slices; ++slice) {
        wait(ring.full + state.stage, state.parity);
        if constexpr (GATHERED) fence_proxy_async();
        const uint64_t a = descriptor(ring.b(state.stage) + boxes.first * BOX_BYTES);
        const uint64_t b = descriptor(ring.a(state.stage));
        const int next_box = boxes.step * (BOX_BYTES / 16);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < TILE_K / 16; ++k)
#pragma unroll
            for (int box = 0; box < BOXES; ++box)
                wgmma_m64k16<T, A_MN_MAJOR, N>(acc[box], a + box * next_box + k * A_NEXT, b + k * B_NEXT);
        wgmma_commit();
        wgmma_wait<1>();
        if (slice > 0 && leader) mbarrier_arrive(ring.empty + previous);
        previous = state.stage;
        state.advance();
    }
    wgmma_wait<0>();
    if (leader) mbarrier_arrive(ring.empty + previous);
}

// The same with the width for so many octets.
template <class T, bool A_MN_MAJOR, bool GATHERED, int N = OCTET>
__device__ __forceinline__ void multiply(Accumulators& acc, const Ring& ring, PipelineState& state, int slices,
                                         const Boxes& boxes, int octets) {
    if constexpr (N < TILE_ROWS)
        if (octets * OCTET > N)
            return multiply<T, A_MN_MAJOR, GATHERED, N + OCTET>(acc, ring, state, slices, boxes, octets);
    multiply_width<T, A_MN_MAJOR, GATHERED, N>(acc, ring, state, slices, boxes);
}

// The first of the lane's two rows in a box; the other is 8 below.
__device__ __forceinline__ int box_row() { return warp_of_group() * 16 + fragment_row(); }

// Adds the bias, if there is one. `column` is where the tile starts among the result's, as load_weights() has it.
template <class T>
__device__ __forceinline__ void add_bias(Accumulators& acc, const Projection<T>& weights, const Boxes& boxes,
                                         int expert, int column) {
    if (!weights.bias) return;
    const bool halves = weights.columns.up != 0;
    const Global<const T> bias = weights.bias + expert * weights.bias_expert_stride;
#pragma unroll
    for (int box = 0; box < BOXES; ++box)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int n = (halves ? column / 2 + warpgroup() * BOX : column + (boxes.first + box) * BOX) + box_row();
            const int row = min(n + half * 8, weights.columns.count - 1) + box * weights.columns.up;
            const float x = widen(load_global(bias + row * weights.bias_row_stride));
#pragma unroll
            for (int i = 0; i < OCTETS; ++i) acc[box][i][2 * half] += x, acc[box][i][2 * half + 1] += x;
        }
}

template <class T, int N> __device__ __forceinline__ T pick(const T (&items)[N], int number) {
    T item = items[0];
#pragma unroll
    for (int i = 1; i < N; ++i)
        if (i == number) item = items[i];
    return item;
}

// What the lane has of one octet. Loops over octets pick them, so that their code is there once: by halving, for
// registers have no numbers.
using Octet = float[BOXES][4];
template <int FIRST = 0, int LAST = OCTETS>
__device__ __forceinline__ void pick_octet(Octet& octet, const Accumulators& acc, int number) {
    if constexpr (LAST - FIRST > 1) {
        constexpr int MIDDLE = (FIRST + LAST) / 2;
        if (number < MIDDLE) pick_octet<FIRST, MIDDLE>(octet, acc, number);
        else pick_octet<MIDDLE, LAST>(octet, acc, number);
    } else {
#pragma unroll
        for (int box = 0; box < BOXES; ++box)
#pragma unroll
            for (int c = 0; c < 4; ++c) octet[box][c] = acc[box][FIRST][c];
    }
}

// Results leave by rows of a token, PITCH bytes apart in shared memory: octets go through four buffers in turn.
// While the warpgroup fills one, copies read the others, those of buffer w started by warp w.
//
//     fill(octet, buffer, number)    each lane its part
//     send(buffer, number)           by a warp, which commits
constexpr int BUFFERS = 4;

template <int PITCH, class Fill, class Send>
__device__ __forceinline__ void send_octets(const Accumulators& acc, int octets, Shared<char> buffers, Fill fill,
                                            Send send) {
    const int warp = warp_of_group();
    bulk_wait_read();  // for what lay here before
    meet();
    for (int number = 0; number < octets; ++number) {
        const Shared<char> buffer = buffers + number % BUFFERS * (OCTET * PITCH);
        Octet octet;
        pick_octet(octet, acc, number);
        fill(octet, buffer, number);
        fence_proxy_async();
        if (warp == (number + 1) % BUFFERS) bulk_wait_read();  // which is filled next
        meet();
        if (warp == number % BUFFERS) {
            send(buffer, number);
            bulk_commit();
        }
    }
}

}  // namespace reap::cuda::sm90::swapped
