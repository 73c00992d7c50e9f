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
template <class T> __device__ __forceinline__ uint32_t pack(T low, T high) {
    static_assert(sizeof(T) == 2);
    struct Pair {
        T low, high;
    } pair{low, high};
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
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

__device__ __forceinline__ float activate(float x, const Gate& gate) {
    switch (gate.activation) {
        case Activation::silu:
        case Activation::swiglu_clamped:
            return x * sigmoid(gate.alpha * x);
        case Activation::gelu:
            return 0.5f * x * (1.0f + erff(0.70710678f * x));
        case Activation::gelu_tanh:  // (1 + tanh z) / 2 = sigmoid(2 z)
            return x * sigmoid(1.59576912f * x * (1.0f + 0.044715f * x * x));
        case Activation::relu:
            return max_nan(x, 0.0f);
        case Activation::relu2:
            x = max_nan(x, 0.0f);
            return x * x;
    }
    return x;
}

__device__ __forceinline__ float glu(float g, float u, const Gate& gate) {
    g = min_nan(g, gate.limit);
    u = max_nan(min_nan(u, gate.limit), -gate.limit);
    return activate(g, gate) * (u + gate.offset);
}

}  // namespace reap::cuda
