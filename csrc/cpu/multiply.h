// C[rows, lanes] = weights[rows, k] * tokens[k, lanes]: the register tile, and a group of rows of it.
#pragma once
#include "numbers.h"

namespace reap {
namespace REAP_ISA {

// A group of weight rows in two halves of equal height (gate and up; or top and bottom, which share
// a row if their number is odd), so that a register tile needs two base pointers and one stride.
struct Rows {
    const char* half[2];  // first step of each half's first row
    int64_t row_stride;   // bytes
    int64_t step_stride;  // bytes
    int height;           // rows per half
    int second;           // row of C where the second half begins
    const char* next[2];  // what each half will want after its last row
};

constexpr int LINE_STEPS = 16;  // steps in a cache line of weights

static inline void prefetch(const char* p) { __builtin_prefetch(p, 0, 2); }

struct Tile {
    const char *w0, *w1;        // weights of both halves
    const char *next0, *next1;  // weights of the tile after this one
    int64_t row_stride, step_stride;
    const char* tokens;    // packed operand [steps, V * W]
    int64_t token_stride;  // bytes from step to step
    int64_t steps;
    bool half_step;  // one more step, of which the weights have only the first bf16
    float *c0, *c1;  // fp32 [RH, ...] of both halves
    int64_t c_stride;
    int64_t previous;  // where the sums over earlier k lie, in floats from c0 and c1; 0: nowhere
};

// V token vectors side by side. Of the last one, half a register is enough where no more tokens are in it (Low).
template <int V, bool Low> struct Strip {
    vf whole[V];  // the last one unused if Low
    vh low;
};

template <bool Dot, int V, bool Low>
static inline void multiply_row(vf weight, const Strip<V, Low>& token, Strip<V, Low>& sums) {
#pragma GCC unroll 4
    for (int v = 0; v < V - Low; ++v) sums.whole[v] = multiply_add<Dot>(weight, token.whole[v], sums.whole[v]);
    if constexpr (Low) sums.low = multiply_add<Dot>(lower(weight), token.low, sums.low);
}

template <int V, bool Low> static inline Strip<V, Low> fill_strip(float x) {
    Strip<V, Low> strip;
#pragma GCC unroll 4
    for (int v = 0; v < V - Low; ++v) strip.whole[v] = set1(x);
    if constexpr (Low) strip.low = lower(set1(x));
    return strip;
}

template <int V, bool Low> static inline Strip<V, Low> load_strip(const float* p) {
    Strip<V, Low> strip;
#pragma GCC unroll 4
    for (int v = 0; v < V - Low; ++v) strip.whole[v] = load(p + v * W);
    if constexpr (Low) strip.low = load_low(p + (V - 1) * W);
    return strip;
}

template <int V, bool Low> static inline void store_strip(float* p, const Strip<V, Low>& strip) {
#pragma GCC unroll 4
    for (int v = 0; v < V - Low; ++v) store(p + v * W, strip.whole[v]);
    if constexpr (Low) store(p + (V - 1) * W, strip.low);
}

template <int V, bool Low> static inline Strip<V, Low> add_strips(const Strip<V, Low>& a, const Strip<V, Low>& b) {
    Strip<V, Low> sum;
#pragma GCC unroll 4
    for (int v = 0; v < V - Low; ++v) sum.whole[v] = add(a.whole[v], b.whole[v]);
    if constexpr (Low) sum.low = add(a.low, b.low);
    return sum;
}

template <bool Dot, int V, bool Low>
static inline void multiply_step(const char* weight, const Strip<V, Low>& token, Strip<V, Low>& sums) {
    if constexpr (Dot && V == 1 && !Low) sums.whole[0] = dot_broadcast(sums.whole[0], token.whole[0], weight);
    else multiply_row<Dot>(broadcast_step(weight), token, sums);
}

// The next tile's weights are fetched into the second-level cache meanwhile: they come from memory, in more and
// shorter streams than hardware prefetchers follow.
template <bool Dot, int RH, int V, bool Low>
static inline void accumulate(Strip<V, Low> (&sums)[2 * RH], const Tile& tile) {
    const char *w0 = tile.w0, *w1 = tile.w1, *tokens = tile.tokens;
    const int64_t row_stride = tile.row_stride, step_stride = tile.step_stride, token_stride = tile.token_stride;
    const int64_t to_next0 = tile.next0 - tile.w0, to_next1 = tile.next1 - tile.w1;
    for (int64_t step = 0; step < tile.steps;) {
        for (int r = 0; r < RH; ++r) {
            prefetch(w0 + to_next0 + r * row_stride);
            prefetch(w1 + to_next1 + r * row_stride);
        }
        const int64_t stop = tile.steps - step < LINE_STEPS ? tile.steps : step + LINE_STEPS;
        for (; step < stop; ++step) {
            const auto token = load_strip<V, Low>(reinterpret_cast<const float*>(tokens));
#pragma GCC unroll 8
            for (int r = 0; r < RH; ++r) {
                multiply_step<Dot>(w0 + r * row_stride, token, sums[r]);
                multiply_step<Dot>(w1 + r * row_stride, token, sums[RH + r]);
            }
            w0 += step_stride;
            w1 += step_stride;
            tokens += token_stride;
        }
    }
}

template <bool Dot, int RH, int V, bool Low> static void multiply_tile(const Tile& tile) {
    Strip<V, Low> sums[2 * RH];
#pragma GCC unroll 16
    for (int r = 0; r < 2 * RH; ++r) sums[r] = fill_strip<V, Low>(0.0f);
    accumulate<Dot, RH>(sums, tile);
    if (tile.half_step) {
        const auto token =
            load_strip<V, Low>(reinterpret_cast<const float*>(tile.tokens + tile.steps * tile.token_stride));
        const int64_t end = tile.steps * tile.step_stride;
#pragma GCC unroll 16
        for (int r = 0; r < 2 * RH; ++r) {
            const char* w = (r < RH ? tile.w0 : tile.w1) + (r % RH) * tile.row_stride + end;
            multiply_row<Dot>(broadcast_half_step(w), token, sums[r]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < 2 * RH; ++r) {
        float* c = (r < RH ? tile.c0 : tile.c1) + (r % RH) * tile.c_stride;
        store_strip(c, tile.previous ? add_strips(load_strip<V, Low>(c + tile.previous), sums[r]) : sums[r]);
    }
}

// One register tile after the other down both halves. The last tile is moved up so that it ends with
// the group: rows that it shares with its neighbour are computed twice, to the same bits (which is
// why earlier sums are read from another place than the new ones are written to). Where a half is
// lower than a tile, each row fills a tile of its own with stride 0.
template <bool Dot, int V, bool Low> static void multiply_column(const Rows& rows, Tile tile) {
    constexpr int RH = rows_per_half(V);
    float* const c = tile.c0;
    const int64_t c_stride = tile.c_stride;
    const bool low = rows.height < RH;
    tile.row_stride = low ? 0 : rows.row_stride;
    tile.c_stride = low ? 0 : c_stride;
    const int last = low ? rows.height - 1 : rows.height - RH;
    for (int row = 0;; row += low ? 1 : RH) {
        if (row > last) row = last;
        tile.w0 = rows.half[0] + row * rows.row_stride;
        tile.w1 = rows.half[1] + row * rows.row_stride;
        tile.next0 = row == last ? rows.next[0] : tile.w0 + RH * rows.row_stride;
        tile.next1 = row == last ? rows.next[1] : tile.w1 + RH * rows.row_stride;
        tile.c0 = c + row * c_stride;
        tile.c1 = c + (rows.second + row) * c_stride;
        multiply_tile<Dot, RH, V, Low>(tile);
        if (row == last) break;
    }
}

template <bool Dot, int V> static void multiply_columns(const Rows& rows, const Tile& tile, bool low) {
    if (HAS_LOW && V > 1 && low) multiply_column<Dot, V, HAS_LOW && V != 1>(rows, tile);
    else multiply_column<Dot, V, false>(rows, tile);
}

// `low`: of the last of V token vectors, only the lower half is wanted.
template <bool Dot> static void multiply_rows(const Rows& rows, const Tile& tile, int V, bool low) {
    switch (V) {
        case 1: return multiply_columns<Dot, 1>(rows, tile, low);
        case 2: return multiply_columns<Dot, 2>(rows, tile, low);
        case 3: return multiply_columns<Dot, (MAX_V < 3 ? 1 : 3)>(rows, tile, low);
        case 4: return multiply_columns<Dot, (MAX_V < 4 ? 1 : 4)>(rows, tile, low);
        default: __builtin_unreachable();
    }
}

}  // namespace REAP_ISA
}  // namespace reap
