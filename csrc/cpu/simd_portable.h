// 4 lanes of fp32 in a compiler's vector type: no intrinsics, any processor. GCC and Clang.
#pragma once
#include <cstdint>
#include <cstring>

namespace reap {
namespace REAP_ISA {

constexpr int W = 4;
constexpr int MAX_V = 2;
constexpr int rows_per_half(int V) { return V == 2 ? 3 : 6; }  // 12 accumulators in 16 registers

typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
struct v16 { uint16_t lane[W]; };

static inline vf set1(float x) { return vf{x, x, x, x}; }
static inline vf load(const float* p) { vf x; memcpy(&x, p, sizeof(x)); return x; }
static inline vf load_first(const float* p, int n) {
    vf x = set1(0);
    memcpy(&x, p, sizeof(float) * static_cast<size_t>(n < W ? n : W));
    return x;
}
static inline void store(float* p, vf x) { memcpy(p, &x, sizeof(x)); }
static inline void store_first(float* p, vf x, int n) { memcpy(p, &x, sizeof(float) * static_cast<size_t>(n < W ? n : W)); }

static inline vf add(vf a, vf b) { return a + b; }
static inline vf sub(vf a, vf b) { return a - b; }
static inline vf mul(vf a, vf b) { return a * b; }
static inline vf div(vf a, vf b) { return a / b; }
static inline vf fma(vf a, vf b, vf c) { return a * b + c; }  // contracted where there is such an instruction
static inline vf pick(vi where, vf x, vf y) { return reinterpret_cast<vf>((where & reinterpret_cast<vi>(x)) | (~where & reinterpret_cast<vi>(y))); }
// The second operand if either is NaN.
static inline vf max(vf a, vf b) { return pick(a > b, a, b); }
static inline vf min(vf a, vf b) { return pick(a < b, a, b); }
static inline vf abs(vf x) { return reinterpret_cast<vf>(reinterpret_cast<vi>(x) & vi{0x7fffffff, 0x7fffffff, 0x7fffffff, 0x7fffffff}); }
static inline vf max_abs(vf a, vf b) { return max(a, abs(b)); }  // a >= 0; drops NaN
static inline vf round(vf x) {
    vf y;
    for (int i = 0; i < W; ++i) y[i] = __builtin_rintf(x[i]);
    return y;
}
static inline vf scale(vf x, vf n) {
    vf y;
    for (int i = 0; i < W; ++i) y[i] = __builtin_ldexpf(x[i], n[i] == n[i] ? static_cast<int>(n[i]) : 0);
    return y;
}
static inline vf if_less(vf a, vf b, vf x, vf y) { return pick(a < b, x, y); }
static inline float reduce_add(vf x) { return (x[0] + x[2]) + (x[1] + x[3]); }

static inline v16 load16(const uint16_t* p, int n) {
    v16 x = {};
    memcpy(&x, p, 2 * static_cast<size_t>(n < W ? n : W));
    return x;
}
static inline void store16(uint16_t* p, v16 x, int n) { memcpy(p, &x, 2 * static_cast<size_t>(n < W ? n : W)); }

static inline float from_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t to_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

static inline vf widen_bf16(v16 x) {
    vf y;
    for (int i = 0; i < W; ++i) y[i] = from_bits(static_cast<uint32_t>(x.lane[i]) << 16);
    return y;
}
static inline v16 narrow_bf16(vf x) {
    v16 y;
    for (int i = 0; i < W; ++i) {
        const uint32_t bits = to_bits(x[i]);
        y.lane[i] = static_cast<uint16_t>(x[i] != x[i] ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
    return y;
}
// fp16 through the exponent arithmetic of fp32, so that subnormals need no case of their own.
static inline vf widen_f16(v16 x) {
    vf y;
    for (int i = 0; i < W; ++i) {
        const uint32_t half = x.lane[i], sign = (half & 0x8000) << 16, rest = (half & 0x7fff) << 13;
        const uint32_t special = rest >= 0x0f800000 ? 0x70000000 : 0;  // infinity or NaN: exponent to the top
        y[i] = from_bits(sign | to_bits(special ? from_bits(rest | special) : from_bits(rest) * 0x1p112f));
    }
    return y;
}
static inline v16 narrow_f16(vf x) {
    v16 y;
    for (int i = 0; i < W; ++i) {
        const uint32_t bits = to_bits(x[i]), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
        uint32_t half;
        if (size > 0x7f800000) half = 0x7e00;
        else if (size >= 0x477ff000) half = 0x7c00;  // 65520 and above round to infinity
        else if (size < 0x38800000) half = to_bits(from_bits(size) + 0.5f) - 0x3f000000;  // subnormal: the adder rounds
        else half = (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;
        y.lane[i] = static_cast<uint16_t>(sign | half);
    }
    return y;
}

constexpr bool HAS_DOT = false;
static inline vf pair(v16, v16) { __builtin_unreachable(); }
static inline vf dot(vf, vf, vf) { __builtin_unreachable(); }
static inline vf dot_broadcast(vf, vf, const char*) { __builtin_unreachable(); }

static inline void transpose(vf* r) {
    for (int i = 0; i < W; ++i)
        for (int j = 0; j < i; ++j) {
            const float x = r[i][j];
            r[i][j] = r[j][i];
            r[j][i] = x;
        }
}

}  // namespace REAP_ISA
}  // namespace reap
