// 16-bit numbers, and the activations on fp32. NaN goes in, NaN comes out.
#pragma once
#include <cmath>
#include <cstring>

#include "../layer.h"
#include "ptx.cuh"

namespace reap::cuda {

__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(f16 x) { return __half2float(x); }

template <class T> __device__ __forceinline__ T narrow(float x);
template <> __device__ __forceinline__ bf16 narrow<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ f16 narrow<f16>(float x) { return __float2half_rn(x); }

// Two 16-bit numbers in a register, the first in the lower half.
template <class Pair> __device__ __forceinline__ uint32_t bits(Pair pair) {
    uint32_t word;
    static_assert(sizeof pair == sizeof word);
    memcpy(&word, &pair, sizeof word);
    return word;
}
template <class T> __device__ __forceinline__ uint32_t pack(T low, T high) {
    struct {
        T low, high;
    } const pair{low, high};
    return bits(pair);
}
template <class T> __device__ __forceinline__ uint32_t narrow2(float low, float high);
template <> __device__ __forceinline__ uint32_t narrow2<bf16>(float low, float high) {
    return bits(__floats2bfloat162_rn(low, high));
}
template <> __device__ __forceinline__ uint32_t narrow2<f16>(float low, float high) {
    return bits(__floats2half2_rn(low, high));
}

__device__ __forceinline__ float sigmoid(float x) {
    constexpr float LOG2_E = 1.4426950408889634f;
    return reciprocal_approx(1.0f + exp2_approx(-LOG2_E * x));
}

// What stands between the two projections of an expert.
struct Gate {
    Activation activation;
    float alpha, limit, offset;  // of swiglu_clamped; 1, infinity and 0 for the others
};

template <int N, class F> __device__ __forceinline__ void map(float (&x)[N], F f) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = f(x[i]);
}

__device__ __forceinline__ float swish(float x, const Gate& gate) { return x * sigmoid(gate.alpha * x); }

template <int N> __device__ __forceinline__ void activate(float (&x)[N], const Gate& gate) {
    switch (gate.activation) {
        case Activation::silu:
        case Activation::swiglu_clamped: return map(x, [&](float v) { return swish(v, gate); });
        case Activation::gelu: return map(x, [](float v) { return 0.5f * v * (1.0f + erff(0.70710678f * v)); });
        case Activation::gelu_tanh:  // (1 + tanh z) / 2 = sigmoid(2 z)
            return map(x, [](float v) { return v * sigmoid(1.59576912f * v * (1.0f + 0.044715f * v * v)); });
        case Activation::relu: return map(x, [](float v) { return max_nan(v, 0.0f); });
        case Activation::relu2: return map(x, [](float v) { return max_nan(v, 0.0f) * max_nan(v, 0.0f); });
    }
}

// What is before the activation, and what it is multiplied with.
__device__ __forceinline__ float limited_gate(float g, const Gate& gate) { return min_nan(g, gate.limit); }
__device__ __forceinline__ float limited_up(float u, const Gate& gate) {
    return max_nan(min_nan(u, gate.limit), -gate.limit) + gate.offset;
}

// g = act(g) * u
template <int N> __device__ __forceinline__ void activate(float (&g)[N], const float (&u)[N], const Gate& gate) {
    map(g, [&](float v) { return limited_gate(v, gate); });
    activate(g, gate);
#pragma unroll
    for (int i = 0; i < N; ++i) g[i] *= limited_up(u[i], gate);
}

}  // namespace reap::cuda
