// A group of K-major weight rows times a few tokens: k is in the SIMD lanes, weights and tokens are read where they
// lie.
//
// With tokens in the lanes, most lanes would be empty here; and at this size it is memory that limits: every
// weight is read once, and as fast as it comes.
#pragma once
#include "group.h"

namespace reap {
namespace REAP_ISA {

constexpr int K_LANES_ROWS = 4;  // of a register tile, by up to MAX_V tokens

static inline bool takes_k_lanes(const Layer& layer, const Block& block) {
    return block.tokens <= K_LANES_TOKENS && layer.gate_up.k_stride == 1 && layer.down.k_stride == 1;
}

template <Dtype D> static void find_tokens(const Layer& layer, const int32_t* slots, int n, const char** rows) {
    for (int i = 0; i < n; ++i) rows[i] = layer.hidden + slots[i] / layer.K * layer.hidden_stride * Number<D>::size;
}

template <Dtype D, int R, int N>
static void multiply_k_lanes_tile(const char* w, int64_t row_bytes, const char* const* tokens, int64_t k_size, float* c,
                                  int64_t c_stride) {
    vf sums[R * N];
#pragma GCC unroll 16
    for (int i = 0; i < R * N; ++i) sums[i] = set1(0.0f);
    const auto add_steps = [&](int64_t k, int64_t size) {
        vf token[N];
#pragma GCC unroll 4
        for (int t = 0; t < N; ++t) token[t] = load_steps<D>(tokens[t], k, size);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const vf weight = load_steps<D>(w + r * row_bytes, k, size);
#pragma GCC unroll 4
            for (int t = 0; t < N; ++t)
                sums[r * N + t] = multiply_add<Number<D>::dot>(weight, token[t], sums[r * N + t]);
        }
    };
    constexpr int each = W * per_step<D>;
    const int64_t whole = k_size / each * each;
    for (int64_t k = 0; k < whole; k += each) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) prefetch(w + (R + r) * row_bytes + k * Number<D>::size);  // the tile below
        add_steps(k, k + each);
    }
    if (whole < k_size) add_steps(whole, k_size);
    if constexpr (R * N == W) {  // W sums over W lanes: transposing them all is cheaper
        transpose(sums);
        for (int half = W / 2; half; half /= 2)
            for (int i = 0; i < half; ++i) sums[i] = add(sums[i], sums[i + half]);
        alignas(64) float all[W];
        store(all, sums[0]);
        for (int r = 0; r < R; ++r) memcpy(c + r * c_stride, all + r * N, N * sizeof(float));
    } else {
        for (int r = 0; r < R; ++r)
            for (int t = 0; t < N; ++t) c[r * c_stride + t] = reduce_add(sums[r * N + t]);
    }
}

template <Dtype D, int R>
static void multiply_k_lanes_rows(const char* w, int64_t row_bytes, const char* const* tokens, int n, int64_t k_size,
                                  float* c, int64_t c_stride) {
    for (int t = 0; t < n; t += MAX_V) {
        switch (n - t < MAX_V ? n - t : MAX_V) {
            case 1: multiply_k_lanes_tile<D, R, 1>(w, row_bytes, tokens + t, k_size, c + t, c_stride); break;
            case 2: multiply_k_lanes_tile<D, R, 2>(w, row_bytes, tokens + t, k_size, c + t, c_stride); break;
            case 3:
                multiply_k_lanes_tile < D, R, MAX_V<3 ? 1 : 3>(w, row_bytes, tokens + t, k_size, c + t, c_stride);
                break;
            default: multiply_k_lanes_tile<D, R, MAX_V>(w, row_bytes, tokens + t, k_size, c + t, c_stride);
        }
    }
}

// Returns C, [GROUP, lanes of the block].
template <Dtype D>
static const float* multiply_k_lanes(const Weights& w, const char* matrix, const Group& group, int64_t k_size,
                                     const char* const* tokens, const Tiling& tiling, const Scratch& scratch) {
    const int64_t row_bytes = w.row_stride * Number<D>::size;
    const int lanes = tiling.lanes();
    for (int half = 0; half < 2; ++half) {
        const char* rows = matrix + row_of(group, group.start[half]) * row_bytes;
        const int64_t stride = group.stride * row_bytes;
        float* c = scratch.sums[0] + half * group.second * lanes;
        int row = 0;
        for (; row + K_LANES_ROWS <= group.height; row += K_LANES_ROWS)
            multiply_k_lanes_rows<D, K_LANES_ROWS>(rows + row * stride, stride, tokens, tiling.tokens, k_size,
                                                   c + row * lanes, lanes);
        for (; row < group.height; ++row)
            multiply_k_lanes_rows<D, 1>(rows + row * stride, stride, tokens, tiling.tokens, k_size, c + row * lanes,
                                        lanes);
    }
    return scratch.sums[0];
}

}  // namespace REAP_ISA
}  // namespace reap
