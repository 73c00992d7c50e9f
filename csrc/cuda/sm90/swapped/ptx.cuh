// Instructions of the swapped form (sm_90a), one wrapper each, named with their sections of the PTX ISA.
#pragma once
#include "../ptx.cuh"

#ifndef REAP_SIMT
namespace reap::cuda {

// "Warp-level matrix store instruction: stmatrix" with .trans: two 8x8 matrices of 16 bits; lanes 8j to 8j + 7
// give the rows of matrix j. Lane l has of each matrix the elements (2 (l % 4) + {0, 1}, l / 4).
__device__ __forceinline__ void stmatrix_x2_trans(Shared<char> row, const uint32_t (&r)[2]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(row)), "r"(r[0]),
                 "r"(r[1])
                 : "memory");
}

// "wgmma.mma_async": d [64, N] += a [64, 16] b [16, N], both operands by descriptor. In shared memory b is K-major,
// and so is a without A_MN_MAJOR. Warp w of the warpgroup has rows 16 w and on: d[j] is its fragment of the
// columns 8 j, as mma.m16n8k16 has it. What d has past N is left alone.
#define REAP_GROUP(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define REAP_OPERANDS_8 REAP_GROUP(0)
#define REAP_OPERANDS_16 REAP_OPERANDS_8, REAP_GROUP(1)
#define REAP_OPERANDS_24 REAP_OPERANDS_16, REAP_GROUP(2)
#define REAP_OPERANDS_32 REAP_OPERANDS_24, REAP_GROUP(3)
#define REAP_OPERANDS_40 REAP_OPERANDS_32, REAP_GROUP(4)
#define REAP_OPERANDS_48 REAP_OPERANDS_40, REAP_GROUP(5)
#define REAP_OPERANDS_56 REAP_OPERANDS_48, REAP_GROUP(6)
#define REAP_OPERANDS_64 REAP_OPERANDS_56, REAP_GROUP(7)
#define REAP_OPERANDS_72 REAP_OPERANDS_64, REAP_GROUP(8)
#define REAP_OPERANDS_80 REAP_OPERANDS_72, REAP_GROUP(9)
#define REAP_OPERANDS_88 REAP_OPERANDS_80, REAP_GROUP(10)
#define REAP_OPERANDS_96 REAP_OPERANDS_88, REAP_GROUP(11)
#define REAP_OPERANDS_104 REAP_OPERANDS_96, REAP_GROUP(12)
#define REAP_OPERANDS_112 REAP_OPERANDS_104, REAP_GROUP(13)
#define REAP_OPERANDS_120 REAP_OPERANDS_112, REAP_GROUP(14)
#define REAP_OPERANDS_128 REAP_OPERANDS_120, REAP_GROUP(15)
#define REAP_REGISTERS_8 "%0, %1, %2, %3"
#define REAP_REGISTERS_16 REAP_REGISTERS_8 ", %4, %5, %6, %7"
#define REAP_REGISTERS_24 REAP_REGISTERS_16 ", %8, %9, %10, %11"
#define REAP_REGISTERS_32 REAP_REGISTERS_24 ", %12, %13, %14, %15"
#define REAP_REGISTERS_40 REAP_REGISTERS_32 ", %16, %17, %18, %19"
#define REAP_REGISTERS_48 REAP_REGISTERS_40 ", %20, %21, %22, %23"
#define REAP_REGISTERS_56 REAP_REGISTERS_48 ", %24, %25, %26, %27"
#define REAP_REGISTERS_64 REAP_REGISTERS_56 ", %28, %29, %30, %31"
#define REAP_REGISTERS_72 REAP_REGISTERS_64 ", %32, %33, %34, %35"
#define REAP_REGISTERS_80 REAP_REGISTERS_72 ", %36, %37, %38, %39"
#define REAP_REGISTERS_88 REAP_REGISTERS_80 ", %40, %41, %42, %43"
#define REAP_REGISTERS_96 REAP_REGISTERS_88 ", %44, %45, %46, %47"
#define REAP_REGISTERS_104 REAP_REGISTERS_96 ", %48, %49, %50, %51"
#define REAP_REGISTERS_112 REAP_REGISTERS_104 ", %52, %53, %54, %55"
#define REAP_REGISTERS_120 REAP_REGISTERS_112 ", %56, %57, %58, %59"
#define REAP_REGISTERS_128 REAP_REGISTERS_120 ", %60, %61, %62, %63"
#define REAP_WGMMA_OF(TYPE, N, A, B, TRANSPOSED) \
    asm volatile( \
        "{\n" \
        ".reg .pred add;\n" \
        "setp.eq.u32 add, 0, 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" REAP_REGISTERS_##N \
        "}, " \
        "%" #A ", %" #B ", add, 1, 1, %" #TRANSPOSED \
        ", 0;\n" \
        "}" \
        : REAP_OPERANDS_##N \
        : "l"(a), "l"(b), "n"(static_cast<int>(A_MN_MAJOR)))
// The numbers are those of the operands behind the N / 2 of d.
#define REAP_WGMMA(WIDTH, A, B, TRANSPOSED) \
    if constexpr (N == WIDTH) { \
        if constexpr (std::is_same_v<T, bf16>) REAP_WGMMA_OF("bf16", WIDTH, A, B, TRANSPOSED); \
        else REAP_WGMMA_OF("f16", WIDTH, A, B, TRANSPOSED); \
    }

template <class T, bool A_MN_MAJOR, int N>
__device__ __forceinline__ void wgmma_m64k16(float (&d)[16][4], uint64_t a, uint64_t b) {
    static_assert(N % 8 == 0 && N >= 8 && N <= 128);
    REAP_WGMMA(8, 4, 5, 6)
    REAP_WGMMA(16, 8, 9, 10)
    REAP_WGMMA(24, 12, 13, 14)
    REAP_WGMMA(32, 16, 17, 18)
    REAP_WGMMA(40, 20, 21, 22)
    REAP_WGMMA(48, 24, 25, 26)
    REAP_WGMMA(56, 28, 29, 30)
    REAP_WGMMA(64, 32, 33, 34)
    REAP_WGMMA(72, 36, 37, 38)
    REAP_WGMMA(80, 40, 41, 42)
    REAP_WGMMA(88, 44, 45, 46)
    REAP_WGMMA(96, 48, 49, 50)
    REAP_WGMMA(104, 52, 53, 54)
    REAP_WGMMA(112, 56, 57, 58)
    REAP_WGMMA(120, 60, 61, 62)
    REAP_WGMMA(128, 64, 65, 66)
}
#undef REAP_WGMMA
#undef REAP_WGMMA_OF
#undef REAP_GROUP

}  // namespace reap::cuda
#endif
