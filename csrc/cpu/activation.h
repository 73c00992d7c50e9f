// The activations on fp32 vectors. NaN goes in, NaN comes out.
#pragma once
#include "job.h"

namespace reap {
namespace REAP_ISA {

// e^x by x = n ln 2 + r and a polynomial fitted on |r| <= ln 2 / 2 (relative error 1e-8 before
// rounding); 0 and infinity beyond the range of fp32.
static inline vf exp(vf x) {
    x = max(set1(-110.0f), min(set1(90.0f), x));
    const vf n = round(mul(x, set1(1.44269504f)));
    vf r = fma(n, set1(-0.693359375f), x);
    r = fma(n, set1(2.12194440e-4f), r);
    vf p = set1(0.00139336437f);
    p = fma(p, r, set1(0.00836317557f));
    p = fma(p, r, set1(0.041666465f));
    p = fma(p, r, set1(0.16666577f));
    p = fma(p, r, set1(0.5f));
    p = fma(p, mul(r, r), add(r, set1(1.0f)));
    return scale(p, n);
}

static inline vf sigmoid(vf x) { return div(set1(1.0f), add(set1(1.0f), exp(sub(set1(0.0f), x)))); }

// erfc(z) for z >= 0: exp(-z^2) times t e^P(t) with t = 1 / (1 + z/2) and P fitted on z in [0, 10]
// to 5e-8, so that its relative error is small where it is tiny and gelu's tail keeps its digits.
static inline vf erfc(vf z) {
    const vf t = div(set1(1.0f), fma(z, set1(0.5f), set1(1.0f)));
    vf p = set1(0.144930214f);
    p = fma(p, t, set1(-0.680827177f));
    p = fma(p, t, set1(1.15673376f));
    p = fma(p, t, set1(-0.696251897f));
    p = fma(p, t, set1(-0.0802804339f));
    p = fma(p, t, set1(0.00126758726f));
    p = fma(p, t, set1(0.0346027997f));
    p = fma(p, t, set1(0.386640412f));
    p = fma(p, t, set1(0.998632783f));
    p = fma(p, t, set1(-1.265448f));
    return mul(t, exp(fma(sub(set1(0.0f), z), z, p)));
}

static inline vf gelu(vf x) {
    const vf half = mul(set1(0.5f), erfc(mul(abs(x), set1(0.707106781f))));  // normal tail beyond |x|
    return mul(x, if_less(x, set1(0.0f), half, sub(set1(1.0f), half)));
}

// 0.5 x (1 + tanh y) = x sigmoid(2 y)
static inline vf gelu_tanh(vf x) {
    const vf cubic = fma(mul(mul(x, x), x), set1(0.044715f), x);
    return mul(x, sigmoid(mul(cubic, set1(1.59576912f))));
}

// Act is a compile-time constant, so that a loop over rows holds the code of one activation.
template <Activation Act> static inline vf activate(vf x) {
    if constexpr (Act == Activation::silu) return mul(x, sigmoid(x));
    else if constexpr (Act == Activation::gelu) return gelu(x);
    else if constexpr (Act == Activation::gelu_tanh) return gelu_tanh(x);
    const vf positive = max(set1(0.0f), x);
    if constexpr (Act == Activation::relu2) return mul(positive, positive);
    return positive;
}

template <Activation Act> static inline vf activate_gated(vf gate, vf up, const Layer& layer) {
    if constexpr (Act != Activation::swiglu_clamped) return mul(activate<Act>(gate), up);
    const vf limit = set1(layer.limit);
    const vf g = min(limit, gate);
    const vf u = max(set1(-layer.limit), min(limit, up));
    return mul(mul(g, sigmoid(mul(set1(layer.alpha), g))), add(u, set1(layer.offset)));
}

}  // namespace REAP_ISA
}  // namespace reap
