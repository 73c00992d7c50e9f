// A group of up to GROUP weight rows times all tokens of a block, k in pieces that fit the caches.
#pragma once
#include "pack.h"

namespace reap {
namespace REAP_ISA {

// Which rows of a projection form a group. They have positions 0 .. GROUP-1 in it; half h is made of
// the positions start[h] + j * stride for j < height, and its products go to the rows h * second + j of C.
struct Group {
    int64_t row[2];    // output rows at position 0 and, if there are two spans, at GROUP / 2
    int spans, count;  // spans of consecutive rows; rows in each
    int start[2], stride, height, second;
    int rows_ahead;  // from here to the same row of the group that follows
};

static inline Group gated_group(const Layer& layer, int64_t i, int height) {  // C: gate rows, then up rows
    constexpr int half = GROUP / 2;
    if (layer.interleaved) return {{2 * i, 0}, 1, 2 * height, {0, 1}, 2, height, half, GROUP};
    return {{i, layer.I + i}, 2, height, {0, half}, 1, height, half, half};
}

static inline Group plain_group(int64_t row, int count) {  // C: the rows as they come
    const int height = (count + 1) / 2;
    return {{row, 0}, 1, count, {0, count - height}, 1, height, count - height, GROUP};
}

// Packed tokens, tile by tile [steps, lanes]; `exact`: the last tile has as many lanes as tokens.
struct Tokens {
    const char* data;
    bool exact;
};

struct Scratch {
    char* tokens;    // packed operand of a block
    float* weights;  // packed weights [GROUP, piece_steps]
    float* sums[2];  // C, double-buffered [GROUP, BLOCK_TOKENS]
};

template <Dtype D> static int64_t token_steps(const Layer& layer) {
    const int64_t h = steps<D>(layer.H), i = native<D> ? 0 : layer.I;  // native tokens of `down` need no packing
    return h > i ? h : i;
}

template <Dtype D> static size_t scratch_bytes(const Layer& layer) {
    return static_cast<size_t>(
        4 * (token_steps<D>(layer) * BLOCK_TOKENS + GROUP * piece_steps<D> + 2 * GROUP * BLOCK_TOKENS));
}

template <Dtype D> static Scratch carve(char* memory) {
    float* sums = reinterpret_cast<float*>(memory);
    float* weights = sums + 2 * GROUP * BLOCK_TOKENS;
    return {reinterpret_cast<char*>(weights + GROUP * piece_steps<D>), weights, {sums, sums + GROUP * BLOCK_TOKENS}};
}

static inline int64_t row_of(const Group& group, int position) {
    const bool other = group.spans == 2 && position >= GROUP / 2;
    return other ? group.row[1] + position - GROUP / 2 : group.row[0] + position;
}

// The group's weights for the steps from `step` on: where they lie, or a packed copy of that piece.
template <Dtype D>
static Rows find_rows(const Weights& w, const char* matrix, const Group& group, int64_t k_size, int64_t step,
                      int64_t num_steps, float* packed) {
    const int64_t row_bytes = w.row_stride * Number<D>::size, k_bytes = w.k_stride * Number<D>::size;
    const char* piece = matrix + step * per_step<D> * k_bytes;
    if (native<D> && w.k_stride == 1) {
        const char* const half0 = piece + row_of(group, group.start[0]) * row_bytes;
        const char* const half1 = piece + row_of(group, group.start[1]) * row_bytes;
        // After this piece of k comes the next one, and after the last one the next group.
        const bool more = (step + num_steps) * per_step<D> < k_size;
        const int64_t ahead = more ? num_steps * 4 : group.rows_ahead * row_bytes - step * 4;
        return {{half0, half1}, group.stride * row_bytes,      4, group.height,
                group.second,   {half0 + ahead, half1 + ahead}};
    }

    const bool k_major = w.k_stride == 1;
    const int64_t row_step = k_major ? piece_steps<D> : 1;  // floats from position to position
    const int64_t k_rest = k_size - step * per_step<D>;
    for (int span = 0; span < group.spans; ++span) {
        const char* source = piece + group.row[span] * row_bytes;
        float* target = packed + span * (GROUP / 2) * row_step;
        if (k_major) pack_k_major<D>(source, row_bytes, group.count, num_steps, target);
        else if (w.row_stride == 1) pack_mn_major<D>(source, k_bytes, group.count, k_rest, num_steps, target);
        else pack_strided<D>(source, row_bytes, k_bytes, group.count, k_rest, num_steps, target);
    }
    const char* base = reinterpret_cast<const char*>(packed);
    return {{base + group.start[0] * row_step * 4, base + group.start[1] * row_step * 4},
            group.stride * row_step * 4,
            k_major ? 4 : GROUP * 4,
            group.height,
            group.second,
            {base, base}};
}

// Returns C, [GROUP, lanes of the block]. Tokens are in the SIMD lanes.
template <Dtype D>
static const float* multiply_token_lanes(const Weights& w, const char* matrix, const Group& group, int64_t k_size,
                                         const Tokens& tokens, const Tiling& tiling, const Scratch& scratch) {
    constexpr bool dot = Number<D>::dot;
    const int64_t all_steps = steps<D>(k_size);
    const bool in_place = native<D> && w.k_stride == 1;
    int now = 0;
    for (int64_t step = 0; step < all_steps; step += piece_steps<D>, now ^= 1) {
        const int64_t num_steps = all_steps - step < piece_steps<D> ? all_steps - step : piece_steps<D>;
        const Rows rows = find_rows<D>(w, matrix, group, k_size, step, num_steps, scratch.weights);
        const bool half_step = dot && in_place && k_size % 2 && step + num_steps == all_steps;
        for (int tile = 0; tile < tiling.tiles; ++tile) {
            const int lanes = tokens.exact ? tiling.tokens_in(tile) : tiling.size(tile) * W;
            Tile t = {};
            t.step_stride = rows.step_stride;
            t.tokens = tokens.data + (all_steps * tiling.begin(tile) * W + step * lanes) * 4;
            t.token_stride = lanes * 4;
            t.steps = num_steps - half_step;
            t.half_step = half_step;
            t.c0 = scratch.sums[now] + tiling.begin(tile) * W;
            t.c_stride = tiling.lanes();
            t.previous = step ? scratch.sums[now ^ 1] - scratch.sums[now] : 0;
            multiply_rows<dot>(rows, t, tiling.size(tile), tiling.tokens_in(tile) <= tiling.size(tile) * W - W / 2);
        }
    }
    return scratch.sums[now ^ 1];
}

}  // namespace REAP_ISA
}  // namespace reap
