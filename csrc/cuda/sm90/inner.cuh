// How gate_up's accumulators become rows of inner. A lane has gate and up of the same elements, so that
// gated swish, which nearly all models have, is computed where they are: only 16-bit results go through
// shared memory, whence bulk copies take a row's 256 bytes each. The other activations are longer, and
// their code is there once, in the loop of store_inner().
#pragma once
#include "../gate_up.cuh"
#include "pipeline.cuh"

namespace reap::cuda::sm90 {

constexpr int INNER_COLUMNS = TILE_COLUMNS / 2;               // of a gated tile
constexpr int INNER_PITCH = INNER_COLUMNS * 2 + CHUNK_BYTES;  // bytes from row to row, which start in other banks
constexpr int INNER_BYTES = STRIP_ROWS * INNER_PITCH;         // of a warp; a strip for store_inner() has place there
static_assert(INNER_BYTES >= STRIP_ROWS * BOX * int(sizeof(float)));

__device__ __forceinline__ bool is_gated_swish(Pairing pairing, const Gate& gate) {
    return pairing != Pairing::none &&
           (gate.activation == Activation::silu || gate.activation == Activation::swiglu_clamped);
}

__device__ __forceinline__ float gated_swish(float g, float u, const Gate& gate) {
    return swish(limited_gate(g, gate), gate) * limited_up(u, gate);
}

// The warp's 16 rows of a tile, activated, in shared memory.
template <class T>
__device__ __forceinline__ void stage_inner(const Accumulators& acc, Pairing pairing, const Gate& gate,
                                            Shared<char> staged) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int low = 2 * half, high = low + 1;
        const Shared<T> row = cast<T>(staged + (fragment_row() + half * 8) * INNER_PITCH);
        if (pairing == Pairing::halves) {
#pragma unroll
            for (int s = 0; s < 2; ++s)
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const float (&g)[4] = acc[s][j], (&u)[4] = acc[s + 2][j];
                    store_shared(cast<uint32_t>(row + (s * BOX + j * 8 + fragment_column())),
                                 narrow2<T>(gated_swish(g[low], u[low], gate), gated_swish(g[high], u[high], gate)));
                }
        } else {
#pragma unroll
            for (int s = 0; s < 4; ++s)
#pragma unroll
                for (int j = 0; j < 8; ++j)
                    store_shared(row + (s * BOX + j * 8 + fragment_column()) / 2,
                                 narrow<T>(gated_swish(acc[s][j][low], acc[s][j][high], gate)));
        }
    }
}

// And in inner: rows from sorted position `first` on, elements from `n` on. What a row has past I,
// down does not read.
template <class T>
__device__ __forceinline__ void send_inner(const GateUpArgs<T>& args, Shared<char> staged, int first, int end, int n) {
    fence_proxy_async();
    __syncwarp();
    const int bytes = min(INNER_COLUMNS, args.pitch - n) * int(sizeof(T));
    if (lane_id() < STRIP_ROWS && is_real(first + lane_id(), end))
        bulk_store(args.inner + (int64_t(first + lane_id()) * args.pitch + n),
                   cast<T>(staged + lane_id() * INNER_PITCH), bytes);
    bulk_commit();
}

// Strip s of the result, in which gate and up alternate as store_inner() wants them.
__device__ __forceinline__ void result_strip(float (&strip)[BOX / 8][4], const Accumulators& acc, int s, bool halves) {
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) strip[j][c] = halves ? acc[j % 2 * 2 + s / 2][s % 2 * 4 + j / 2][c] : acc[s][j][c];
}

// All of it for a warp: from result column `column` on.
template <class T>
__device__ __forceinline__ void finish_tile(const GateUpArgs<T>& args, const Accumulators& acc, Shared<char> staged,
                                            int first, int end, int column) {
    if (is_gated_swish(args.pairing, args.gate)) {
        bulk_wait_read();  // for the rows that lay here before
        __syncwarp();
        stage_inner<T>(acc, args.pairing, args.gate, staged);
        send_inner(args, staged, first, end, column / 2);
        return;
    }
    const Staging strips{cast<float>(staged)};
#pragma unroll
    for (int s = 0; s < 4; ++s) {
        float strip[BOX / 8][4];
        result_strip(strip, acc, s, args.pairing == Pairing::halves);
        strips.store(strip, 0);
        __syncwarp();
        store_inner(args, strips, STRIP_ROWS, first, end, column + s * BOX);
        __syncwarp();
    }
}

}  // namespace reap::cuda::sm90
