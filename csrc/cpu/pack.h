// Operands into the layout that the register tile reads: [steps, lanes] of four bytes.
#pragma once
#include "multiply.h"

namespace reap {
namespace REAP_ISA {

// W steps of one row of a token, from element k on; zero beyond the row's end.
template <Dtype D> static inline vf load_steps(const char* row, int64_t k, int64_t size) {
    const int64_t rest = size - k;
    const char* p = row + k * Number<D>::size;
    if constexpr (!Number<D>::dot) {
        return Number<D>::load(p, static_cast<int>(rest < W ? rest : W));
    } else if (rest >= 2 * W) {
        return load(reinterpret_cast<const float*>(p));
    } else {
        alignas(64) uint16_t part[2 * W] = {};
        memcpy(part, p, 2 * static_cast<size_t>(rest));
        return load(reinterpret_cast<const float*>(part));
    }
}

// The rows of a block's tokens -> tile by tile [steps, lanes of the tile]. Lanes beyond the last token repeat it:
// they are computed and dropped.
template <Dtype D>
static void pack_tokens(const Layer& layer, const int32_t* slots, const Tiling& tiling, char* packed) {
    const int64_t num_steps = steps<D>(layer.H);
    for (int tile = 0; tile < tiling.tiles; ++tile) {
        const int lanes = tiling.size(tile) * W;
        for (int lane = 0; lane < lanes; lane += W) {
            const char* rows[W];
            for (int i = 0; i < W; ++i) {
                const int wanted = tiling.begin(tile) * W + lane + i;
                const int64_t token = slots[wanted < tiling.tokens ? wanted : tiling.tokens - 1] / layer.K;
                rows[i] = layer.hidden + token * layer.hidden_stride * Number<D>::size;
            }
            float* out = reinterpret_cast<float*>(packed) + lane;
            for (int64_t step = 0; step < num_steps; step += W) {
                vf square[W];
#pragma GCC unroll 16
                for (int i = 0; i < W; ++i) square[i] = load_steps<D>(rows[i], step * per_step<D>, layer.H);
                transpose(square);
                const int64_t rest = num_steps - step;
                for (int i = 0; i < (rest < W ? rest : W); ++i) store(out + (step + i) * lanes, square[i]);
            }
        }
        packed += num_steps * lanes * 4;
    }
}

constexpr int STEPS_AHEAD = 16;

// Of MN-major weights, the `bytes` of rows that come STEPS_AHEAD steps later. Every k lies in another page, where
// hardware prefetchers do not follow.
template <Dtype D> static inline void prefetch_mn_major(const char* w, int64_t k_bytes, int bytes) {
#pragma GCC unroll 2
    for (int i = 0; i < per_step<D>; ++i) {
        const char* ahead = w + (STEPS_AHEAD * per_step<D> + i) * k_bytes;
        for (int at = 0; at < bytes; at += 64) prefetch(ahead + at);
        prefetch(ahead + bytes - 1);
    }
}

// One step of `n` rows of MN-major weights, in the lanes; with `k_rest` of 1, the second bf16 is not there.
template <Dtype D> static inline vf load_mn_major(const char* w, int64_t k_bytes, int64_t k_rest, int n) {
    if constexpr (!Number<D>::dot) return Number<D>::load(w, n);
    else
        return pair(Number<D>::load_narrow(w, n),
                    k_rest > 1 ? Number<D>::load_narrow(w + k_bytes, n) : Number<D>::load_narrow(w, 0));
}

// `count` rows by `num_steps` steps of MN-major weights -> [steps, GROUP].
template <Dtype D>
static void pack_mn_major(const char* w, int64_t k_bytes, int count, int64_t k_rest, int64_t num_steps, float* packed) {
    for (int64_t step = 0; step < num_steps; ++step) {
        prefetch_mn_major<D>(w, k_bytes, count * Number<D>::size);
        for (int row = 0; row < count; row += W) {
            const int n = count - row < W ? count - row : W;
            store_first(packed + row, load_mn_major<D>(w + row * Number<D>::size, k_bytes, k_rest - 2 * step, n), n);
        }
        w += per_step<D> * k_bytes;
        packed += GROUP;
    }
}

// The same for any strides, element by element.
template <Dtype D>
static void pack_strided(const char* w, int64_t row_bytes, int64_t k_bytes, int count, int64_t k_rest,
                         int64_t num_steps, float* packed) {
    for (int64_t step = 0; step < num_steps; ++step)
        for (int row = 0; row < count; ++row) {
            const char* p = w + row * row_bytes + step * per_step<D> * k_bytes;
            float* cell = packed + step * GROUP + row;
            if constexpr (Number<D>::dot) {
                uint16_t two[2] = {};
                memcpy(&two[0], p, 2);
                if (2 * step + 1 < k_rest) memcpy(&two[1], p + k_bytes, 2);
                memcpy(cell, two, 4);
            } else {
                *cell = scalar<D>(p);
            }
        }
}

// `count` rows of 16-bit K-major weights -> fp32 [rows, piece_steps].
template <Dtype D>
static void pack_k_major(const char* w, int64_t row_bytes, int count, int64_t num_steps, float* packed) {
    for (int row = 0; row < count; ++row)
        for (int64_t k = 0; k < num_steps; k += W) {
            const int n = static_cast<int>(num_steps - k < W ? num_steps - k : W);
            store_first(packed + row * piece_steps<D> + k,
                        Number<D>::load(w + row * row_bytes + k * Number<D>::size, n), n);
        }
}

}  // namespace REAP_ISA
}  // namespace reap
