// 16 lanes of fp32 in a register, and two bf16 per lane where the processor multiplies those.
#pragma once
#include <immintrin.h>
#include <cstdint>
#include <cstring>

namespace reap {
namespace REAP_ISA {

constexpr int W = 16;
constexpr int MAX_V = 4;
// Register tiles of 2*RH weight rows by V token vectors: 24 accumulators of 32 registers where V allows. Never more
// than 8 rows: they often lie a multiple of 4 KiB apart, and a first-level cache has 8 lines for those.
constexpr int rows_per_half(int V) { return V == 4 ? 3 : 4; }

using vf = __m512;

// The lower half of a register, on which processors that split 512-bit operations spend half the time.
constexpr bool HAS_LOW = true;
using vh = __m256;
static inline vh lower(vf x) { return _mm512_castps512_ps256(x); }
static inline vh load_low(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, vh x) { _mm256_storeu_ps(p, x); }
static inline vh add(vh a, vh b) { return _mm256_add_ps(a, b); }
static inline vh fma(vh a, vh b, vh c) { return _mm256_fmadd_ps(a, b, c); }

static inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }

static inline vf set1(float x) { return _mm512_set1_ps(x); }
static inline vf load(const float* p) { return _mm512_loadu_ps(p); }
static inline vf load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
static inline void store(float* p, vf x) { _mm512_storeu_ps(p, x); }
static inline void store_first(float* p, vf x, int n) { _mm512_mask_storeu_ps(p, first(n), x); }

static inline vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
// The second operand if either is NaN.
static inline vf max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf min(vf a, vf b) { return _mm512_min_ps(a, b); }
static inline vf abs(vf x) { return _mm512_abs_ps(x); }
static inline vf max_abs(vf a, vf b) { return _mm512_range_ps(a, b, 0x0b); }  // max(|a|, |b|); drops NaN
static inline vf round(vf x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline vf scale(vf x, vf n) { return _mm512_scalef_ps(x, n); }  // x * 2^n
static inline vf if_less(vf a, vf b, vf x, vf y) {                     // a < b ? x : y
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
static inline float reduce_add(vf x) { return _mm512_reduce_add_ps(x); }

static inline __m256i load16(const uint16_t* p, int n) {
    return n >= W ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)) : _mm256_maskz_loadu_epi16(first(n), p);
}
static inline void store16(uint16_t* p, __m256i x, int n) {
    if (n >= W) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
    else _mm256_mask_storeu_epi16(p, first(n), x);
}
static inline vf widen_bf16(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
static inline vf widen_f16(__m256i x) { return _mm512_cvtph_ps(x); }
static inline __m256i narrow_f16(vf x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline __m256i narrow_bf16(vf x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16));
}

#ifdef __AVX512BF16__
constexpr bool HAS_DOT = true;
// Lane i: a[i] in the low half, b[i] in the high half.
static inline vf pair(__m256i a, __m256i b) {
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16);
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_cvtepu16_epi32(a), high));
}
static inline vf low_of_pair(vf x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 16)); }
static inline vf high_of_pair(vf x) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(~0xffff)));
}
static inline vf dot(vf sum, vf a, vf b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(b), reinterpret_cast<__m512bh>(a));
}
static inline vh dot(vh sum, vh a, vh b) {
    return _mm256_dpbf16_ps(sum, reinterpret_cast<__m256bh>(b), reinterpret_cast<__m256bh>(a));
}
// dot with the four bytes at p in every lane, as one instruction: a broadcast of its own costs half as much as the
// multiplication, which shows where it serves only one, and GCC 12 does not fold it in.
static inline vf dot_broadcast(vf sum, vf a, const char* p) {
    struct __attribute__((packed, may_alias)) Bytes {
        char bytes[4];
    };
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(a), "m"(*reinterpret_cast<const Bytes*>(p)));
    return sum;
}
#else
constexpr bool HAS_DOT = false;
static inline vf pair(__m256i, __m256i) { __builtin_unreachable(); }
static inline vf low_of_pair(vf) { __builtin_unreachable(); }
static inline vf high_of_pair(vf) { __builtin_unreachable(); }
static inline vf dot(vf, vf, vf) { __builtin_unreachable(); }
static inline vh dot(vh, vh, vh) { __builtin_unreachable(); }
static inline vf dot_broadcast(vf, vf, const char*) { __builtin_unreachable(); }
#endif

static inline void transpose(vf* r) {
    vf t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
        r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
        r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
        r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

}  // namespace REAP_ISA
}  // namespace reap
