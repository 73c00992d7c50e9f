// The three model dtypes as vectors of fp32, and the two ways to multiply them.
//
// A "step" along k is always four bytes of packed operand: one fp32, or (Dot) two consecutive bf16
// that the processor multiplies and adds at once. Everything but the multiplication is then the same.
#pragma once
#include "job.h"

namespace reap {
namespace REAP_ISA {

template <Dtype D> struct Number;

template <> struct Number<Dtype::f32> {
    static constexpr bool dot = false;
    static constexpr int size = 4;
    static vf load(const char* p, int n = W) {
        const float* x = reinterpret_cast<const float*>(p);
        return n >= W ? reap::REAP_ISA::load(x) : load_first(x, n);
    }
    static void store(char* p, vf x, int n) {
        float* y = reinterpret_cast<float*>(p);
        if (n >= W) reap::REAP_ISA::store(y, x);
        else store_first(y, x, n);
    }
};
template <> struct Number<Dtype::bf16> {
    static constexpr bool dot = HAS_DOT;
    static constexpr int size = 2;
    static auto load_narrow(const char* p, int n = W) { return load16(reinterpret_cast<const uint16_t*>(p), n); }
    static vf load(const char* p, int n = W) { return widen_bf16(load_narrow(p, n)); }
    static void store(char* p, vf x, int n) { store16(reinterpret_cast<uint16_t*>(p), narrow_bf16(x), n); }
};
template <> struct Number<Dtype::f16> {
    static constexpr bool dot = false;
    static constexpr int size = 2;
    static vf load(const char* p, int n = W) { return widen_f16(load16(reinterpret_cast<const uint16_t*>(p), n)); }
    static void store(char* p, vf x, int n) { store16(reinterpret_cast<uint16_t*>(p), narrow_f16(x), n); }
};

template <Dtype D> constexpr int per_step = Number<D>::dot ? 2 : 1;
// Steps that a register sums before it goes to the fp32 tile. More would round worse than a plain loop in fp32; where
// operands have 8 bits, that does not show.
template <Dtype D> constexpr int piece_steps = Number<D>::dot ? 512 : 128;
// Whether weights are multiplied as they lie in memory, without passing through a tile of fp32.
template <Dtype D> constexpr bool native = Number<D>::dot || D == Dtype::f32;
template <Dtype D> static inline int64_t steps(int64_t k) { return ceil_div(k, per_step<D>); }

template <Dtype D> static inline float scalar(const char* p) {
    alignas(64) float lanes[W];
    store(lanes, Number<D>::load(p, 1));
    return lanes[0];
}

template <bool Dot, class Vector> static inline Vector multiply_add(Vector weight, Vector token, Vector sum) {
    if constexpr (Dot) return dot(sum, weight, token);
    else return fma(weight, token, sum);
}

static inline vf broadcast_step(const char* p) {
    float x;
    memcpy(&x, p, 4);
    return set1(x);
}
// The last step of an odd k: the second bf16 is not there.
static inline vf broadcast_half_step(const char* p) {
    uint32_t bits = 0;
    memcpy(&bits, p, 2);
    float x;
    memcpy(&x, &bits, 4);
    return set1(x);
}

// How a block's tokens are cut into register tiles: `tiles` of nearly equal numbers of vectors.
struct Tiling {
    int tokens, vectors, tiles;
    explicit Tiling(int n) : tokens(n), vectors((n + W - 1) / W), tiles((vectors + MAX_V - 1) / MAX_V) {}
    int lanes() const { return vectors * W; }
    int begin(int tile) const {  // first vector
        const int each = vectors / tiles, longer = vectors % tiles;
        return tile * each + (tile < longer ? tile : longer);
    }
    int size(int tile) const { return begin(tile + 1) - begin(tile); }
    int tokens_in(int tile) const {
        const int rest = tokens - begin(tile) * W, all = size(tile) * W;
        return rest < all ? rest : all;
    }
};

}  // namespace REAP_ISA
}  // namespace reap
