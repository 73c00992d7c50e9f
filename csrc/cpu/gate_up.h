// hidden_states -> inner: gather, gate and up projection, bias, activation.
//
// inner is [S, I] in the model dtype, block by block and tile by tile, as [steps, tokens of the tile]: the packed
// operand of `down` where the processor multiplies the model dtype itself.
#pragma once
#include "activation.h"
#include "group.h"

namespace reap {
namespace REAP_ISA {

template <Dtype D> static inline char* inner_of(const Job& job, const Block& block) {
    return job.inner + block.first * job.inner_width * Number<D>::size;
}

template <Dtype D> static inline vf bias_of(const Weights& w, int64_t expert, int64_t row) {
    if (!w.bias) return set1(0.0f);
    return set1(scalar<D>(w.bias + (expert * w.bias_expert_stride + row * w.bias_row_stride) * Number<D>::size));
}

// C of one group -> rows i .. i+count of inner.
template <Dtype D, Activation Act>
static void write_inner(const Job& job, const Block& block, const Tiling& tiling, int64_t i, int count, const float* c) {
    const Layer& layer = job.layer;
    const int64_t up_first = layer.interleaved ? 1 : layer.I, row_factor = layer.interleaved ? 2 : 1;
    for (int j = 0; j < count; j += per_step<D>) {
        vf bias[4];
        for (int r = 0; r < per_step<D>; ++r) {
            const int64_t row = i + (j + r < count ? j + r : j);
            bias[2 * r] = bias_of<D>(layer.gate_up, block.expert, row * row_factor);
            bias[2 * r + 1] = layer.gated ? bias_of<D>(layer.gate_up, block.expert, row * row_factor + up_first) : set1(0.0f);
        }
        for (int tile = 0; tile < tiling.tiles; ++tile) {
            const int tokens = tiling.tokens_in(tile);
            constexpr int cell = Number<D>::size * per_step<D>;
            char* out = inner_of<D>(job, block) + (steps<D>(layer.I) * tiling.begin(tile) * W + (i + j) / per_step<D> * tokens) * cell;
            for (int lane = 0; lane < tokens; lane += W) {
                const int n = tokens - lane < W ? tokens - lane : W;
                const float* gates = c + j * tiling.lanes() + tiling.begin(tile) * W + lane;
                vf y[2];
                for (int r = 0; r < per_step<D>; ++r) {
                    const float* p = gates + r * tiling.lanes();
                    const vf gate = add(load(p), bias[2 * r]);
                    if (layer.gated) y[r] = activate_gated<Act>(gate, add(load(p + GROUP / 2 * tiling.lanes()), bias[2 * r + 1]), layer);
                    else y[r] = activate<Act>(gate);
                }
                if constexpr (Number<D>::dot) {
                    if (j + 1 == count) y[1] = set1(0.0f);
                    vf both = pair(narrow_bf16(y[0]), narrow_bf16(y[1]));
                    Number<Dtype::f32>::store(out + lane * cell, both, n);
                } else {
                    Number<D>::store(out + lane * cell, y[0], n);
                }
            }
        }
    }
}

template <Dtype D>
static void write_inner(const Job& job, const Block& block, const Tiling& tiling, int64_t i, int count, const float* c) {
    switch (job.layer.activation) {
        case Activation::silu: return write_inner<D, Activation::silu>(job, block, tiling, i, count, c);
        case Activation::gelu: return write_inner<D, Activation::gelu>(job, block, tiling, i, count, c);
        case Activation::gelu_tanh: return write_inner<D, Activation::gelu_tanh>(job, block, tiling, i, count, c);
        case Activation::relu: return write_inner<D, Activation::relu>(job, block, tiling, i, count, c);
        case Activation::relu2: return write_inner<D, Activation::relu2>(job, block, tiling, i, count, c);
        case Activation::swiglu_clamped: return write_inner<D, Activation::swiglu_clamped>(job, block, tiling, i, count, c);
    }
}

template <Dtype D> static void gate_up(const Job& job, int64_t task, char* memory) {
    const Layer& layer = job.layer;
    const Block& block = job.blocks[task / job.inner_splits];
    const int64_t part = task % job.inner_splits;
    const Tiling tiling(block.tokens);
    const Scratch scratch = carve(memory);
    pack_tokens<D>(layer, job.order + block.first, tiling, scratch.tokens);

    const char* matrix = layer.gate_up.data + block.expert * layer.gate_up.expert_stride * Number<D>::size;
    const int height = layer.gated ? GROUP / 2 : GROUP;
    const int64_t groups = ceil_div(layer.I, height);
    for (int64_t g = groups * part / job.inner_splits; g < groups * (part + 1) / job.inner_splits; ++g) {
        const int64_t i = g * height;
        const int count = static_cast<int>(layer.I - i < height ? layer.I - i : height);
        const Group group = layer.gated ? gated_group(layer, i, count) : plain_group(i, count);
        const Tokens tokens = {scratch.tokens, false};
        write_inner<D>(job, block, tiling, i, count, multiply_group<D>(layer.gate_up, matrix, group, layer.H, tokens, tiling, scratch));
    }
}

}  // namespace REAP_ISA
}  // namespace reap
