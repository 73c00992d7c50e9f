// 8 lanes of fp32 in a register, with FMA and F16C.
#pragma once
#include <immintrin.h>
#include <cstdint>
#include <cstring>

namespace reap {
namespace REAP_ISA {

constexpr int W = 8;
constexpr int MAX_V = 2;
constexpr int rows_per_half(int V) { return V == 2 ? 3 : 6; }  // 12 accumulators in 16 registers

using vf = __m256;

constexpr bool HAS_LOW = false;  // half a register takes as long as a whole one
using vh = vf;
static inline vh lower(vf x) { return x; }
static inline vh load_low(const float* p) { return _mm256_loadu_ps(p); }

static inline __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

static inline vf set1(float x) { return _mm256_set1_ps(x); }
static inline vf load(const float* p) { return _mm256_loadu_ps(p); }
static inline vf load_first(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
static inline void store(float* p, vf x) { _mm256_storeu_ps(p, x); }
static inline void store_first(float* p, vf x, int n) { _mm256_maskstore_ps(p, first(n), x); }

static inline vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
static inline vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf div(vf a, vf b) { return _mm256_div_ps(a, b); }
static inline vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
// The second operand if either is NaN.
static inline vf max(vf a, vf b) { return _mm256_max_ps(a, b); }
static inline vf min(vf a, vf b) { return _mm256_min_ps(a, b); }
static inline vf abs(vf x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
static inline vf max_abs(vf a, vf b) { return max(a, abs(b)); }  // a >= 0; drops NaN
static inline vf round(vf x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline vf scale(vf x, vf n) {  // x * 2^n, in two steps because 2^n alone may not fit
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1), bias = _mm256_set1_epi32(127);
    const __m256i low = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    const __m256i high = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
    return _mm256_mul_ps(_mm256_mul_ps(x, _mm256_castsi256_ps(low)), _mm256_castsi256_ps(high));
}
static inline vf if_less(vf a, vf b, vf x, vf y) {  // a < b ? x : y
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
static inline float reduce_add(vf x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

static inline __m128i load16(const uint16_t* p, int n) {
    if (n >= W) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    alignas(16) uint16_t part[W] = {};
    memcpy(part, p, 2 * static_cast<size_t>(n));
    return _mm_load_si128(reinterpret_cast<const __m128i*>(part));
}
static inline void store16(uint16_t* p, __m128i x, int n) {
    if (n >= W) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), x);
    alignas(16) uint16_t part[W];
    _mm_store_si128(reinterpret_cast<__m128i*>(part), x);
    memcpy(p, part, 2 * static_cast<size_t>(n));
}
static inline vf widen_bf16(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
static inline vf widen_f16(__m128i x) { return _mm256_cvtph_ps(x); }
static inline __m128i narrow_f16(vf x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline __m128i narrow_bf16(vf x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    const __m256 result = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_set1_ps(__builtin_nanf("")), nan);
    const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(result), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

constexpr bool HAS_DOT = false;
static inline vf pair(__m128i, __m128i) { __builtin_unreachable(); }
static inline vf low_of_pair(vf) { __builtin_unreachable(); }
static inline vf high_of_pair(vf) { __builtin_unreachable(); }
static inline vf dot(vf, vf, vf) { __builtin_unreachable(); }
static inline vf dot_broadcast(vf, vf, const char*) { __builtin_unreachable(); }

static inline void transpose(vf* r) {
    vf t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
        t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
    memcpy(r, t, sizeof(t));
}

}  // namespace REAP_ISA
}  // namespace reap
