// A group of MN-major weight rows times a few tokens: rows are in the SIMD lanes, and a step of a token, packed as for
// a larger block, is in all of them.
#pragma once
#include "k_lanes.h"

namespace reap {
namespace REAP_ISA {

constexpr int ROW_LANES_TOKENS = 8;   // most tokens of a block
constexpr int ROW_LANES_VECTORS = 3;  // of rows in a register tile, or 1,
constexpr int ROW_LANES_TILE = 4;     // by up to so many tokens

struct RowLanes {
    const char* weights;   // first row at k = 0
    int64_t k_bytes;       // from k to k + 1
    const char* tokens;    // packed operand [steps, lanes]
    int64_t token_stride;  // bytes from step to step
    int64_t k_size;
};

// R vectors of rows, `count` lanes of the last one, from k on, times N tokens.
template <Dtype D, int R, int N>
static inline void add_row_lanes(const char* w, int64_t k_bytes, int64_t k_rest, int count, const char* tokens,
                                 vf (&sums)[R][N]) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        const vf weight = load_mn_major<D>(w + r * W * Number<D>::size, k_bytes, k_rest, r + 1 < R ? W : count);
#pragma GCC unroll 4
        for (int t = 0; t < N; ++t)
            sums[r][t] = multiply_add<Number<D>::dot>(weight, broadcast_step(tokens + t * 4), sums[r][t]);
    }
}

// Products of `rows` rows, at most R * W, with N tokens -> [rows, N]. In pieces of k, like a larger block's: one long
// sum would be less accurate.
template <Dtype D, int R, int N> static void multiply_row_lanes_tile(RowLanes tile, int rows, float* out) {
    constexpr int each = per_step<D>;
    const int count = rows - (R - 1) * W;
    vf sums[R][N] = {};
    for (int64_t k = 0; k < tile.k_size;) {
        vf piece[R][N];
#pragma GCC unroll 16
        for (int i = 0; i < R * N; ++i) piece[i / N][i % N] = set1(0.0f);
        const int64_t stop = k + piece_steps<D> * each < tile.k_size ? k + piece_steps<D> * each : tile.k_size;
        for (; k < stop; k += each) {
            prefetch_mn_major<D>(tile.weights, tile.k_bytes, R * W * Number<D>::size);
            add_row_lanes<D, R, N>(tile.weights, tile.k_bytes, tile.k_size - k, count, tile.tokens, piece);
            tile.weights += each * tile.k_bytes;
            tile.tokens += tile.token_stride;
        }
        for (int i = 0; i < R * N; ++i) sums[i / N][i % N] = add(sums[i / N][i % N], piece[i / N][i % N]);
    }
    for (int row = 0; row < rows; row += W)
        for (int t = 0; t < N; ++t) {
            alignas(64) float lanes[W];
            store(lanes, sums[row / W][t]);
            for (int i = 0; i < W && row + i < rows; ++i) out[(row + i) * N + t] = lanes[i];
        }
}

template <Dtype D, int R>
static void multiply_row_lanes_vectors(const RowLanes& tile, int rows, int tokens, float* out) {
    switch (tokens) {
        case 1: return multiply_row_lanes_tile<D, R, 1>(tile, rows, out);
        case 2: return multiply_row_lanes_tile<D, R, 2>(tile, rows, out);
        case 3: return multiply_row_lanes_tile<D, R, 3>(tile, rows, out);
        case 4: return multiply_row_lanes_tile<D, R, 4>(tile, rows, out);
        default: __builtin_unreachable();
    }
}

// Returns C, [GROUP, lanes of the block], from packed tokens.
template <Dtype D>
static const float* multiply_row_lanes(const Weights& w, const char* matrix, const Group& group, int64_t k_size,
                                       const Tokens& tokens, const Tiling& tiling, const Scratch& scratch) {
    static_assert(ROW_LANES_TOKENS <= MAX_V * W, "the tokens are one tile");
    const int64_t token_stride = 4 * (tokens.exact ? tiling.tokens : tiling.lanes());
    for (int span = 0; span < group.spans; ++span) {
        const char* const weights = matrix + group.row[span] * Number<D>::size;
        for (int row = 0, wide; row < group.count; row += wide) {
            wide = group.count - row < ROW_LANES_VECTORS * W ? W : ROW_LANES_VECTORS * W;
            const int rows = group.count - row < wide ? group.count - row : wide;
            for (int t = 0; t < tiling.tokens; t += ROW_LANES_TILE) {
                const int n = tiling.tokens - t < ROW_LANES_TILE ? tiling.tokens - t : ROW_LANES_TILE;
                const RowLanes tile = {weights + row * Number<D>::size, w.k_stride * Number<D>::size,
                                       tokens.data + t * 4, token_stride, k_size};
                float out[ROW_LANES_VECTORS * W * ROW_LANES_TILE];
                if (wide == W) multiply_row_lanes_vectors<D, 1>(tile, rows, n, out);
                else multiply_row_lanes_vectors<D, ROW_LANES_VECTORS>(tile, rows, n, out);
                for (int i = 0; i < rows; ++i) {
                    const int position = span * (GROUP / 2) + row + i;
                    const int to = group.stride == 2 ? position % 2 * group.second + position / 2 : position;
                    memcpy(scratch.sums[0] + to * tiling.lanes() + t, out + i * n,
                           sizeof(float) * static_cast<size_t>(n));
                }
            }
        }
    }
    return scratch.sums[0];
}

// C from packed tokens, by the way that suits the layout and the number of tokens.
template <Dtype D>
static const float* multiply_packed(const Weights& w, const char* matrix, const Group& group, int64_t k_size,
                                    const Tokens& tokens, const Tiling& tiling, const Scratch& scratch) {
    const bool row_lanes = w.k_stride != 1 && w.row_stride == 1 && tiling.tokens <= ROW_LANES_TOKENS;
    return row_lanes ? multiply_row_lanes<D>(w, matrix, group, k_size, tokens, tiling, scratch)
                     : multiply_token_lanes<D>(w, matrix, group, k_size, tokens, tiling, scratch);
}

}  // namespace REAP_ISA
}  // namespace reap
