// hidden_states -> inner: gather, gate and up projection, bias, activation.
//
// inner is in the model dtype. A block with few tokens lies as [tokens, I]; others tile by tile as
// [steps, tokens of the tile], the packed operand of `down` where the processor multiplies the model dtype.
#pragma once
#include "activation.h"
#include "bias.h"
#include "sums.h"

namespace reap {
namespace REAP_ISA {

// Rows of inner as they come out of C: bias, activation, and the product with `up` if there is one.
template <Dtype D, Activation Act> struct Activated {
    const Layer& layer;
    int64_t expert, first;  // row of inner that row 0 of C belongs to
    const float* c;         // [GROUP, ld]
    int ld;

    vf operator()(int row, int lane) const {
        const int64_t i = first + row, stride = layer.interleaved ? 2 : 1;
        const float* p = c + row * ld + lane;
        const vf gate = add(load(p), bias_of<D>(layer.gate_up, expert, i * stride));
        if (!layer.gated) return activate<Act>(gate);
        const vf bias = bias_of<D>(layer.gate_up, expert, layer.interleaved ? 2 * i + 1 : layer.I + i);
        return activate_gated<Act>(gate, add(load(p + GROUP / 2 * ld), bias), layer);
    }
};

// `count` rows -> tile by tile [steps, tokens of the tile], where `down` has tokens in its lanes
template <Dtype D, class Rows>
static void write_for_token_lanes(const Rows& rows, const Tiling& tiling, int count, char* inner) {
    constexpr int cell = Number<D>::size * per_step<D>;
    for (int tile = 0; tile < tiling.tiles; ++tile) {
        const int tokens = tiling.tokens_in(tile), begin = tiling.begin(tile) * W;
        char* out = inner + (steps<D>(rows.layer.I) * begin + rows.first / per_step<D> * tokens) * cell;
        for (int row = 0; row < count; row += per_step<D>, out += tokens * cell)
            for (int lane = 0; lane < tokens; lane += W) {
                const int n = tokens - lane < W ? tokens - lane : W;
                const vf y = rows(row, begin + lane);
                if constexpr (Number<D>::dot) {
                    const vf second = row + 1 < count ? rows(row + 1, begin + lane) : set1(0.0f);
                    Number<Dtype::f32>::store(out + lane * cell, pair(narrow_bf16(y), narrow_bf16(second)), n);
                } else {
                    Number<D>::store(out + lane * cell, y, n);
                }
            }
    }
}

// `count` rows -> row-major [tokens, inner_width], where `down` has k in its lanes
template <Dtype D, class Rows>
static void write_for_k_lanes(const Rows& rows, int64_t inner_width, int tokens, int count, char* inner) {
    for (int lane = 0; lane < tokens; lane += W)
        for (int row = 0; row < count; row += W) {
            vf square[W];
            for (int i = 0; i < W; ++i) square[i] = row + i < count ? rows(row + i, lane) : set1(0.0f);
            transpose(square);
            const int n = count - row < W ? count - row : W;
            for (int i = 0; i < W && lane + i < tokens; ++i)
                Number<D>::store(inner + ((lane + i) * inner_width + rows.first + row) * Number<D>::size, square[i], n);
        }
}

template <Dtype D, Activation Act>
static void write_inner(const Job& job, const Block& block, int64_t first, int count, const float* c) {
    const Tiling tiling(block.tokens);
    const Activated<D, Act> rows = {job.layer, block.expert, first, c, tiling.lanes()};
    char* const inner = job.inner + block.inner;
    if (takes_k_lanes(job.layer, block)) write_for_k_lanes<D>(rows, job.inner_width, block.tokens, count, inner);
    else write_for_token_lanes<D>(rows, tiling, count, inner);
}

template <Dtype D>
static void write_inner(const Job& job, const Block& block, int64_t first, int count, const float* c) {
    switch (job.layer.activation) {
        case Activation::silu: return write_inner<D, Activation::silu>(job, block, first, count, c);
        case Activation::gelu: return write_inner<D, Activation::gelu>(job, block, first, count, c);
        case Activation::gelu_tanh: return write_inner<D, Activation::gelu_tanh>(job, block, first, count, c);
        case Activation::relu: return write_inner<D, Activation::relu>(job, block, first, count, c);
        case Activation::relu2: return write_inner<D, Activation::relu2>(job, block, first, count, c);
        case Activation::swiglu_clamped: return write_inner<D, Activation::swiglu_clamped>(job, block, first, count, c);
    }
}

template <Dtype D> static void gate_up(const Job& job, int64_t b, int64_t part, char* memory) {
    const Layer& layer = job.layer;
    const Block& block = job.blocks[b];
    const Tiling tiling(block.tokens);
    const Scratch scratch = carve<D>(memory);
    const bool k_lanes = takes_k_lanes(layer, block);
    const char* rows[K_LANES_TOKENS];
    if (k_lanes) find_tokens<D>(layer, job.order + block.first, block.tokens, rows);
    else pack_tokens<D>(layer, job.order + block.first, tiling, scratch.tokens);

    const char* matrix = layer.gate_up.data + block.expert * layer.gate_up.expert_stride * Number<D>::size;
    const int height = layer.gated ? GROUP / 2 : GROUP;
    const int64_t groups = ceil_div(layer.I, height);
    SumLanes lanes;
    if (job.block_sums) fill_sum_lanes(job, block, lanes);
    for (int64_t g = groups * part / job.inner_splits; g < groups * (part + 1) / job.inner_splits; ++g) {
        const int64_t i = g * height;
        const int count = static_cast<int>(layer.I - i < height ? layer.I - i : height);
        const Group group = layer.gated ? gated_group(layer, i, count) : plain_group(i, count);
        const Tokens tokens = {scratch.tokens, false};
        const float* c = k_lanes ? multiply_k_lanes<D>(layer.gate_up, matrix, group, layer.H, rows, tiling, scratch)
                                 : multiply_packed<D>(layer.gate_up, matrix, group, layer.H, tokens, tiling, scratch);
        write_inner<D>(job, block, i, count, c);
        if (job.block_sums) sum_inner<D>(job, b, lanes, i, count);
    }
}

}  // namespace REAP_ISA
}  // namespace reap
