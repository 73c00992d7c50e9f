// inner -> layer output, norms and peaks: down projection, bias, sum of squares and maximum, gate, add.
//
// A task owns SLAB columns of the output for one block. Tasks are handed out block by block, and a slab's
// blocks add to it in that order (`next_block`), so that the sum of a token's experts has one order, whatever
// the number of threads. Norms leave as one partial per (slot, slab) in a cell nobody else writes.
#pragma once
#include "bias.h"
#include "sums.h"
#include "team.h"

namespace reap {
namespace REAP_ISA {

// 16-bit inner -> fp32 operand, for processors that do not multiply the model dtype.
template <Dtype D> static void widen_inner(const char* inner, int64_t rows, const Tiling& tiling, char* packed) {
    for (int tile = 0; tile < tiling.tiles; ++tile) {
        const int tokens = tiling.tokens_in(tile), lanes = tiling.size(tile) * W;
        for (int64_t row = 0; row < rows; ++row, inner += tokens * Number<D>::size, packed += lanes * 4)
            for (int lane = 0; lane < tokens; lane += W) {
                const int n = tokens - lane < W ? tokens - lane : W;
                Number<Dtype::f32>::store(packed + lane * 4, Number<D>::load(inner + lane * Number<D>::size, n), W);
            }
    }
}

// Per lane of the block: where its token's sums are, its gate, and what its norm has so far.
struct Lanes {
    float* sums[BLOCK_TOKENS];
    alignas(64) float gate[BLOCK_TOKENS];
    alignas(64) float square[BLOCK_TOKENS];
    alignas(64) float peak[BLOCK_TOKENS];
    SumLanes summed;
};

static void fill_lanes(const Job& job, const Block& block, int64_t column, Lanes& lanes) {
    memset(&lanes, 0, sizeof(lanes));
    if (job.block_sums) fill_sum_lanes(job, block, lanes.summed);
    for (int lane = 0; lane < block.tokens; ++lane) {
        const int64_t slot = job.order[block.first + lane];
        lanes.sums[lane] = job.sums + slot / job.layer.K * job.layer.H + column;
        lanes.gate[lane] = static_cast<const float*>(job.layer.top_k_weights)[slot];
    }
}

// Tokens lie anywhere in the sums: fetched while the group is multiplied, or each of its columns would wait for memory.
static inline void prefetch_sums(const Block& block, int offset, int count, const Lanes& lanes) {
    for (int lane = 0; lane < block.tokens; ++lane) {
        const float* sum = lanes.sums[lane] + offset;
        for (int column = 0; column < count; column += 16) __builtin_prefetch(sum + column, 1, 2);
        __builtin_prefetch(sum + count - 1, 1, 2);
    }
}

// C of one group (`count` columns of the output, from `offset` in the slab) -> sums and norms.
template <Dtype D, bool Norms, bool Sums>
static void add_output(const Job& job, int64_t b, int64_t column, int offset, int count, const float* c, Lanes& lanes) {
    const Layer& layer = job.layer;
    const Block& block = job.blocks[b];
    const Tiling tiling(block.tokens);
    const int ld = tiling.lanes();
    for (int row = 0; row < count; row += W) {
        const int height = count - row < W ? count - row : W;
        alignas(64) float bias[W] = {};
        if (layer.down.bias)
            for (int i = 0; i < height; ++i)
                store_first(bias + i, bias_of<D>(layer.down, block.expert, column + offset + row + i), 1);
        vf sums[2][W];
        if constexpr (Sums)
            for (int i = 0; i < 2 * W; ++i) sums[i / W][i % W] = set1(0.0f);
        for (int lane = 0; lane < block.tokens; lane += W) {
            const vf gate = load(lanes.gate + lane);
            vf square = load(lanes.square + lane), peak = load(lanes.peak + lane);
            vf y[W];
            for (int i = 0; i < W; ++i) {
                if (i >= height) {
                    y[i] = set1(0.0f);
                    continue;
                }
                const vf x = add(load(c + (row + i) * ld + lane), set1(bias[i]));
                if constexpr (Norms) {
                    square = fma(x, x, square);
                    peak = max_abs(peak, x);
                }
                if constexpr (Sums)
                    for (int s = 0; s < 2; ++s)
                        sums[s][i] = add_weighted(sums[s][i], load(lanes.summed.weight[s] + lane), x);
                y[i] = mul(x, gate);
            }
            store(lanes.square + lane, square);
            store(lanes.peak + lane, peak);
            transpose(y);
            for (int i = 0; i < W && lane + i < block.tokens; ++i) {
                float* sum = lanes.sums[lane + i] + offset + row;
                if (height == W) store(sum, add(load(sum), y[i]));
                else store_first(sum, add(load_first(sum, height), y[i]), height);
            }
        }
        if constexpr (Sums) add_output_sums(job, b, column + offset + row, height, sums);
    }
}

template <Dtype D> static void down(const Job& job, int64_t b, int64_t slab, char* memory) {
    const Layer& layer = job.layer;
    const int64_t column = slab * SLAB;
    const Block& block = job.blocks[b];
    const Tiling tiling(block.tokens);
    const Scratch scratch = carve<D>(memory);
    const bool k_lanes = takes_k_lanes(layer, block);
    Tokens tokens = {job.inner + block.inner, true};
    const char* rows[K_LANES_TOKENS];
    if (k_lanes) {
        for (int i = 0; i < block.tokens; ++i) rows[i] = tokens.data + i * job.inner_width * Number<D>::size;
    } else if (!native<D>) {
        widen_inner<D>(tokens.data, layer.I, tiling, scratch.tokens);
        tokens = {scratch.tokens, false};
    }
    const char* matrix = layer.down.data + block.expert * layer.down.expert_stride * Number<D>::size;
    const int width = static_cast<int>(layer.H - column < SLAB ? layer.H - column : SLAB);
    Lanes lanes;
    fill_lanes(job, block, column, lanes);
    for (int offset = 0; offset < width; offset += GROUP) {
        const int count = width - offset < GROUP ? width - offset : GROUP;
        const Group group = plain_group(column + offset, count);
        prefetch_sums(block, offset, count, lanes);
        const float* c = k_lanes ? multiply_k_lanes<D>(layer.down, matrix, group, layer.I, rows, tiling, scratch)
                                 : multiply_packed<D>(layer.down, matrix, group, layer.I, tokens, tiling, scratch);
        if (offset == 0) wait_until(job.next_block + slab, b);
        if (job.block_sums) add_output<D, true, true>(job, b, column, offset, count, c, lanes);
        else if (job.partials) add_output<D, true, false>(job, b, column, offset, count, c, lanes);
        else add_output<D, false, false>(job, b, column, offset, count, c, lanes);
    }
    if (job.block_sums && slab == 0) add_channel_sums(job, b);
    __atomic_store_n(job.next_block + slab, b + 1, __ATOMIC_RELEASE);
    if (!job.partials) return;
    for (int lane = 0; lane < block.tokens; ++lane) {
        float* cell = job.partials + ((block.row + lane) * job.slabs + slab) * 2;
        cell[0] = lanes.square[lane];
        cell[1] = lanes.peak[lane];
    }
}

}  // namespace REAP_ISA
}  // namespace reap
