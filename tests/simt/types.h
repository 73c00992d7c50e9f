// CUDA's keywords, vector types, 16-bit types and arithmetic, for a C++ compiler without CUDA's
// headers. Only what kernels here use.
#pragma once
#include <math.h>

#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
constexpr float2 make_float2(float x, float y) { return {x, y}; }
constexpr float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
constexpr int2 make_int2(int x, int y) { return {x, y}; }
constexpr int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
constexpr uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace simt {

template <typename To, typename From> To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast between sizes");
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

inline float bf16_to_float(uint16_t bits) { return bit_cast<float>(uint32_t{bits} << 16); }

// To nearest, ties to even; NaN becomes CUDA's canonical one.
inline uint16_t float_to_bf16(float value) {
    if (value != value) return 0x7fff;
    const auto bits = bit_cast<uint32_t>(value);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The exponent's bias differs by 112, and a multiplication also mends subnormals.
inline float half_to_float(uint16_t bits) {
    const uint32_t magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
    const auto scaled = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
    const uint32_t special = (bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    return bit_cast<float>(scaled | special | sign);
}

inline uint16_t float_to_half(float value) {
    if (value != value) return 0x7fff;
    const auto bits = bit_cast<uint32_t>(value);
    const uint16_t sign = bits >> 16 & 0x8000;
    const float magnitude = fabsf(value);
    if (magnitude >= 65520.0f) return sign | 0x7c00;
    if (magnitude < 0x1p-14f) return sign | static_cast<uint16_t>(rintf(magnitude * 0x1p24f));
    const uint32_t rounded = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1);
    return sign | static_cast<uint16_t>((rounded - (112u << 23)) >> 13);
}

}  // namespace simt

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
    __half x, y;
};
using nv_bfloat16 = __nv_bfloat16;
using half = __half;

inline float __bfloat162float(__nv_bfloat16 v) { return simt::bf16_to_float(v.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return {simt::float_to_bf16(v)}; }
inline __nv_bfloat16 __float2bfloat16(float v) { return __float2bfloat16_rn(v); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }
inline float __half2float(__half v) { return simt::half_to_float(v.bits); }
inline __half __float2half_rn(float v) { return {simt::float_to_half(v)}; }
inline __half __float2half(float v) { return __float2half_rn(v); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }

inline unsigned __float_as_uint(float v) { return simt::bit_cast<unsigned>(v); }
inline float __uint_as_float(unsigned v) { return simt::bit_cast<float>(v); }
inline int __float_as_int(float v) { return simt::bit_cast<int>(v); }
inline float __int_as_float(int v) { return simt::bit_cast<float>(v); }

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }

template <typename T> constexpr T min(T a, T b) { return b < a ? b : a; }
template <typename T> constexpr T max(T a, T b) { return a < b ? b : a; }
inline float min(float a, float b) { return fminf(a, b); }  // as on the device: NaN loses
inline float max(float a, float b) { return fmaxf(a, b); }
inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }
inline float __fdividef(float a, float b) { return a / b; }
// glibc declares a function of this name and does not define it.
#define __expf(x) expf(x)
