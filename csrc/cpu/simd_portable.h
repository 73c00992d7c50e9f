// 4 lanes of fp32 in a compiler's vector type: no intrinsics, any processor. GCC and Clang.
#pragma once
#include <cstdint>
#include <cstring>

namespace reap {
namespace REAP_ISA {

constexpr int W = 4;
#ifdef __aarch64__  // 16 or 18 accumulators in 32 registers; with 24, GCC 12 keeps some of them in memory
constexpr int MAX_V = 4;
constexpr int rows_per_half(int V) { return V == 4 ? 2 : V == 3 ? 3 : V == 2 ? 4 : 6; }
#else
constexpr int MAX_V = 2;
constexpr int rows_per_half(int V) { return V == 2 ? 3 : 6; }  // 12 accumulators in 16 registers
#endif

typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
typedef uint32_t vu __attribute__((vector_size(16)));
struct v16 {
    uint16_t lane[W];
};

static inline vf set1(float x) { return vf{x, x, x, x}; }
static inline vf load(const float* p) {
    vf x;
    memcpy(&x, p, sizeof(x));
    return x;
}

constexpr bool HAS_LOW = false;  // half a register takes as long as a whole one
using vh = vf;
static inline vh lower(vf x) { return x; }
static inline vh load_low(const float* p) { return load(p); }

static inline vf load_first(const float* p, int n) {
    vf x = set1(0);
    memcpy(&x, p, sizeof(float) * static_cast<size_t>(n < W ? n : W));
    return x;
}
static inline void store(float* p, vf x) { memcpy(p, &x, sizeof(x)); }
static inline void store_first(float* p, vf x, int n) {
    memcpy(p, &x, sizeof(float) * static_cast<size_t>(n < W ? n : W));
}

static inline vf add(vf a, vf b) { return a + b; }
static inline vf sub(vf a, vf b) { return a - b; }
static inline vf mul(vf a, vf b) { return a * b; }
static inline vf div(vf a, vf b) { return a / b; }
static inline vf fma(vf a, vf b, vf c) { return a * b + c; }  // contracted where there is such an instruction
static inline vf from_bits(vu bits) { return reinterpret_cast<vf>(bits); }
static inline vu to_bits(vf x) { return reinterpret_cast<vu>(x); }
static inline vu everywhere(uint32_t bits) { return vu{bits, bits, bits, bits}; }
// The second operand if either is NaN.
static inline vf max(vf a, vf b) { return a > b ? a : b; }
static inline vf min(vf a, vf b) { return a < b ? a : b; }
static inline vf abs(vf x) { return from_bits(to_bits(x) & 0x7fffffff); }
static inline vf max_abs(vf a, vf b) { return max(a, abs(b)); }       // a >= 0; drops NaN
static inline vf round(vf x) { return (x + 0x1.8p23f) - 0x1.8p23f; }  // |x| < 2^22: the adder rounds
static inline vf scale(vf x, vf n) {  // x * 2^n, in two steps because 2^n alone may not fit
    const vi whole = __builtin_convertvector(n == n ? n : set1(0.0f), vi), half = whole >> 1;
    const vu low = reinterpret_cast<vu>(half + 127) << 23, high = reinterpret_cast<vu>(whole - half + 127) << 23;
    return x * from_bits(low) * from_bits(high);
}
static inline vf if_less(vf a, vf b, vf x, vf y) { return a < b ? x : y; }
static inline float reduce_add(vf x) { return (x[0] + x[2]) + (x[1] + x[3]); }

static inline v16 load16(const uint16_t* p, int n) {
    v16 x = {};
    memcpy(&x, p, 2 * static_cast<size_t>(n < W ? n : W));
    return x;
}
static inline void store16(uint16_t* p, v16 x, int n) { memcpy(p, &x, 2 * static_cast<size_t>(n < W ? n : W)); }
// One instruction on aarch64; GCC 12 makes ten of __builtin_convertvector.
static inline vu widen(v16 x) { return vu{x.lane[0], x.lane[1], x.lane[2], x.lane[3]}; }
static inline v16 narrow(vu x) {
    v16 y;
    for (int i = 0; i < W; ++i) y.lane[i] = static_cast<uint16_t>(x[i]);
    return y;
}

static inline vf widen_bf16(v16 x) { return from_bits(widen(x) << 16); }
static inline v16 narrow_bf16(vf x) {
    const vu bits = to_bits(x), rounded = bits + 0x7fff + (bits >> 16 & 1);
    return narrow(x == x ? rounded >> 16 : everywhere(0x7fc0));
}
// fp16 through the exponent arithmetic of fp32, so that subnormals need no case of their own.
static inline vf widen_f16(v16 x) {
    const vu half = widen(x), sign = (half & 0x8000) << 16;
    const vf small = from_bits((half & 0x7fff) << 13);  // the value times 2^-112, if it is finite
    const vu special = to_bits(small) | 0x70000000;     // infinity or NaN: exponent to the top
    return from_bits(sign | (small < 0x1p-96f ? to_bits(small * 0x1p112f) : special));
}
static inline v16 narrow_f16(vf x) {
    const vf size = abs(x);
    const vu bits = to_bits(size), sign = to_bits(x) >> 16 & 0x8000;
    const vu subnormal = to_bits(size + 0.5f) - 0x3f000000;  // the adder rounds
    const vu normal = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
    vu half = size < 0x1p-14f ? subnormal : normal;
    half = size < 65520.0f ? half : everywhere(0x7c00);  // what rounds to infinity
    half = size == size ? half : everywhere(0x7e00);
    return narrow(sign | half);
}

constexpr bool HAS_DOT = false;
static inline vf pair(v16, v16) { __builtin_unreachable(); }
static inline vf low_of_pair(vf) { __builtin_unreachable(); }
static inline vf high_of_pair(vf) { __builtin_unreachable(); }
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
