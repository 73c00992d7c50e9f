// Weighted sums over the slots of an expert: of rows of inner, as `down` reads them, and of rows of the output.
//
// A block is summed in fp32 where its rows are at hand: inner in gate_up, behind the rows that it has just written,
// and the output in down, before gates and rounding. Blocks are added in fp64, in their order: down's tasks of a slab
// come in that order (`next_block`), and the first slab takes what gate_up left with it. What weighs 0 is left out,
// whatever it is.
#pragma once
#include "row_lanes.h"

namespace reap {
namespace REAP_ISA {

constexpr float LEAST_WEIGHT = 0x1p-126f;  // smaller ones are 0

// The two weights of each of a block's slots.
struct SumLanes {
    alignas(64) float weight[2][BLOCK_TOKENS];
};

static void fill_sum_lanes(const Job& job, const Block& block, SumLanes& lanes) {
    const int64_t slots = job.layer.T * job.layer.K;
    memset(&lanes, 0, sizeof(lanes));
    for (int lane = 0; lane < block.tokens; ++lane)
        for (int i = 0; i < 2; ++i)
            lanes.weight[i][lane] = job.layer.sum_weights[i * slots + job.order[block.first + lane]];
}

static inline vf add_weighted(vf sum, vf weight, vf x) {
    return add(sum, if_less(abs(weight), set1(LEAST_WEIGHT), set1(0.0f), mul(weight, x)));
}

// Where gate_up leaves the sums of a block's inner rows [2, inner_width].
static inline float* block_sums_of(const Job& job, int64_t b) {
    return job.block_sums + b % job.buffers * 2 * job.inner_width;
}

// Rows of inner from `first` on that lie tile by tile [steps, tokens of the tile].
template <Dtype D>
static void sum_token_lanes(const Job& job, const Tiling& tiling, const SumLanes& lanes, const char* inner,
                            int64_t first, int count, float* sums) {
    constexpr int cell = Number<D>::size * per_step<D>;
    for (int tile = 0; tile < tiling.tiles; ++tile) {
        const int tokens = tiling.tokens_in(tile), begin = tiling.begin(tile) * W;
        const char* in = inner + (steps<D>(job.layer.I) * begin + first / per_step<D> * tokens) * cell;
        for (int row = 0; row < count; row += per_step<D>, in += tokens * cell) {
            vf sum[per_step<D>][2];
            for (int i = 0; i < 2 * per_step<D>; ++i) sum[i / 2][i % 2] = set1(0.0f);
            for (int lane = 0; lane < tokens; lane += W) {
                const int n = tokens - lane < W ? tokens - lane : W;
                vf x[per_step<D>];
                if constexpr (Number<D>::dot) {
                    const vf both = Number<Dtype::f32>::load(in + lane * cell, n);
                    x[0] = low_of_pair(both), x[1] = high_of_pair(both);
                } else {
                    x[0] = Number<D>::load(in + lane * cell, n);
                }
                for (int i = 0; i < 2; ++i) {
                    const vf weight = load(lanes.weight[i] + begin + lane);
                    for (int r = 0; r < per_step<D>; ++r) sum[r][i] = add_weighted(sum[r][i], weight, x[r]);
                }
            }
            for (int r = 0; r < per_step<D> && row + r < count; ++r)
                for (int i = 0; i < 2; ++i) {
                    float* const total = sums + i * job.inner_width + first + row + r;
                    *total = reduce_add(sum[r][i]) + (tile ? *total : 0.0f);
                }
        }
    }
}

// The same of rows that lie as [tokens, inner_width].
template <Dtype D>
static void sum_k_lanes(const Job& job, int tokens, const SumLanes& lanes, const char* inner, int64_t first, int count,
                        float* sums) {
    for (int row = 0; row < count; row += W) {
        const int n = count - row < W ? count - row : W;
        vf sum[2] = {set1(0.0f), set1(0.0f)};
        for (int lane = 0; lane < tokens; ++lane) {
            const vf x = Number<D>::load(inner + (lane * job.inner_width + first + row) * Number<D>::size, n);
            for (int i = 0; i < 2; ++i) sum[i] = add_weighted(sum[i], set1(lanes.weight[i][lane]), x);
        }
        for (int i = 0; i < 2; ++i) store_first(sums + i * job.inner_width + first + row, sum[i], n);
    }
}

// `count` rows of the inner size, from `first` on, which gate_up has written.
template <Dtype D> static void sum_inner(const Job& job, int64_t b, const SumLanes& lanes, int64_t first, int count) {
    const Block& block = job.blocks[b];
    const char* const inner = job.inner + block.inner;
    float* const sums = block_sums_of(job, b);
    if (takes_k_lanes(job.layer, block)) sum_k_lanes<D>(job, block.tokens, lanes, inner, first, count, sums);
    else sum_token_lanes<D>(job, Tiling(block.tokens), lanes, inner, first, count, sums);
}

// `count` sums of a block are added to those of its expert, `running`, which the expert's first block begins.
static inline void add_block(const Job& job, int64_t b, const float* sums, int count, double* running, float* result) {
    const bool begins = b == 0 || job.blocks[b - 1].expert != job.blocks[b].expert;
    for (int i = 0; i < count; ++i) {
        running[i] = (begins ? 0.0 : running[i]) + sums[i];
        result[i] = static_cast<float>(running[i]);
    }
}

// What gate_up left of a block. Only in the turn of its first slab.
static void add_channel_sums(const Job& job, int64_t b) {
    const Layer& layer = job.layer;
    for (int i = 0; i < 2; ++i) {
        float* const result = layer.channel_sums + (i * layer.E + job.blocks[b].expert) * layer.I;
        add_block(job, b, block_sums_of(job, b) + i * job.inner_width, static_cast<int>(layer.I),
                  job.running + i * layer.I, result);
    }
}

// `height` columns of the output, from `column` on: their sums over the lanes of the block, one vector per column. Only
// in the turn of the slab.
static void add_output_sums(const Job& job, int64_t b, int64_t column, int height, vf (&sums)[2][W]) {
    const Layer& layer = job.layer;
    for (int i = 0; i < 2; ++i) {
        transpose(sums[i]);
        for (int half = W / 2; half; half /= 2)
            for (int lane = 0; lane < half; ++lane) sums[i][lane] = add(sums[i][lane], sums[i][lane + half]);
        alignas(64) float all[W];
        store(all, sums[i][0]);
        float* const result = layer.output_sums + (i * layer.E + job.blocks[b].expert) * layer.H + column;
        add_block(job, b, all, height, job.running + 2 * layer.I + i * layer.H + column, result);
    }
}

}  // namespace REAP_ISA
}  // namespace reap
