// One call of an engine. Plain data that both engines take: no instruction set, no torch.
//
// Letters: T tokens, K experts per token, S = T*K slots, E experts, H hidden size, I inner size.
#pragma once
#include <cstdint>

namespace reap {

enum class Dtype : int { bf16, f16, f32 };
enum class Activation : int { silu, gelu, gelu_tanh, relu, relu2, swiglu_clamped };

// Rows are outputs of a projection, k runs over its inputs. Strides count elements. K-major weights have a k_stride
// of 1, MN-major ones (those of transposed calls) a row_stride of 1.
struct Weights {
    const char* data;  // [E, rows, k] model dtype, any strides, any alignment
    int64_t expert_stride, row_stride, k_stride;
    const char* bias;  // [E, rows] model dtype, or null
    int64_t bias_expert_stride, bias_row_stride;
};

// How the kernels of csrc/cuda/sm90 multiply, see sm90/forms.cuh; automatic: in what should take the least time.
enum class Form : int { automatic, cooperative, pingpong, swapped };

struct Layer {
    int64_t T, K, E, H, I;
    Dtype dtype;
    Activation activation;
    float alpha, limit, offset;  // of swiglu_clamped
    bool gated, interleaved;
    const char* hidden;     // [T, H] model dtype, row-major
    int64_t hidden_stride;  // elements from token to token
    Weights gate_up, down;
    const void* top_k_index;    // [T, K] contiguous; outside [0, E) is a slot without expert
    bool wide_ids;              // int64, else int32; true on cpu
    const void* top_k_weights;  // [T, K] contiguous
    Dtype gates;                // of top_k_weights; f32 on cpu
    char* out;                  // [T, H] model dtype, contiguous
    float* norms;               // [T, K] fp32, or null: neither norms nor peaks
    float* peaks;               // [T, K] fp32, or null with norms
    const float* sum_weights;   // weights of each slot in two sums per expert [2, T, K], or null: no sums
    float* channel_sums;        // of rows of inner [2, E, I] fp32, or null with sum_weights
    float* output_sums;         // of outputs before their gates [2, E, H] fp32, or null with sum_weights
    int threads;                // cpu only
    bool deterministic;         // cuda only; cpu always is: the same bits run to run
    int device;                 // cuda only: ordinal
    int sm;                     // cuda only: compute capability, 90 for 9.0
    int processors;             // cuda only: streaming multiprocessors of the chip
    int64_t cache_bytes;        // cuda only: of the chip's L2 cache
    bool wgmma;                 // cuda only: the kernels of csrc/cuda/sm90
    Form form;                  // cuda only: of those kernels
};

}  // namespace reap
