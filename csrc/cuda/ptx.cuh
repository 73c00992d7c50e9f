// Every access to memory, and every instruction that CUDA C++ has no name for: one function each.
//
// The kernels reach memory through these functions alone. Where REAP_SIMT is defined the same names
// come from an emulator that runs the kernels' source on a CPU and checks each access.
// Quoted titles are sections of the PTX ISA, chapter "Instruction Set".
#pragma once
#ifdef REAP_SIMT
#include "simt/ptx.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>

namespace reap::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

// The emulator's are classes that can be moved and compared, but not dereferenced.
template <class T> using Global = T*;
template <class T> using Shared = T*;

template <class U, class T> __host__ __device__ __forceinline__ U* cast(T* p) { return reinterpret_cast<U*>(p); }

// An array within a buffer; the emulator gives it bounds and a name of its own.
template <class U> U* slice(char* whole, size_t offset, size_t /*count*/, const char* /*name*/) {
    return reinterpret_cast<U*>(whole + offset);
}

// 2 to 16 bytes, aligned to their size.
template <class T> __device__ __forceinline__ T load_global(const T* p) { return *p; }
template <class T> __device__ __forceinline__ T load_shared(const T* p) { return *p; }
template <class T> __device__ __forceinline__ void store_global(T* p, T value) { *p = value; }
template <class T> __device__ __forceinline__ void store_shared(T* p, T value) { *p = value; }

// The block's dynamic shared memory.
__device__ __forceinline__ Shared<char> shared_memory() {
    extern __shared__ __align__(1024) char memory[];
    return memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// "Data Movement and Conversion Instructions: cp.async": 16 bytes from global to shared memory, past
// the registers and the L1 cache; zeros where `real` is false, and then nothing is read (ignore-src).
__device__ __forceinline__ void cp_async16(Shared<char> to, Global<const char> from, bool real) {
    asm volatile(
        "{\n"
        ".reg .pred zeros;\n"
        "setp.eq.u32 zeros, %2, 0;\n"
        "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, zeros;\n"
        "}\n" ::"r"(shared_address(to)),
        "l"(from), "r"(static_cast<uint32_t>(real))
        : "memory");
}

// "... cp.async.commit_group": what this thread started since the last one is a group, also if it is
// nothing.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// "... cp.async.wait_group": until at most the newest N groups of this thread are under way.
template <int N> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

// "Warp-level matrix load instruction: ldmatrix": four 8x8 matrices of 16 bits; lanes 8j..8j+7 give
// the rows of matrix j. Lane l gets of each matrix the elements (l / 4, 2 (l % 4) + {0, 1}).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], Shared<const char> row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// "... ldmatrix" with .trans: the same, but lane l gets the elements (2 (l % 4) + {0, 1}, l / 4).
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], Shared<const char> row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// "Matrix Fragments for mma.m16n8k16 with floating point type": d += a b, row-major a [16, 16], column-major b [16, 8],
// d fp32 [16, 8].
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<f16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// "Parallel Synchronization and Communication Instructions: red": adds to a float, atomically.
__device__ __forceinline__ void red_add(Global<float> p, float x) {
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;\n" ::"l"(p), "f"(x) : "memory");
}

// "... atom": the same, and what was there before.
__device__ __forceinline__ int atom_add(Global<int32_t> p, int x) {
    int before;
    asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;\n" : "=r"(before) : "l"(p), "r"(x) : "memory");
    return before;
}

// "... red", vector form: to four adjacent floats, 16-byte aligned, each of them atomically. From sm_90
// on; what other chips get of it traps.
__device__ __forceinline__ constexpr bool has_red_add4() {
#if __CUDA_ARCH__ >= 900
    return true;
#else
    return false;
#endif
}
__device__ __forceinline__ void red_add4(Global<float> p, float4 x) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(p), "f"(x.x), "f"(x.y), "f"(x.z),
                 "f"(x.w)
                 : "memory");
#else
    asm volatile("trap;\n");
#endif
}

// "Floating Point Instructions: min, max" with .NaN: NaN if either is NaN, which fminf and fmaxf lose.
__device__ __forceinline__ float min_nan(float x, float y) {
    float z;
    asm("min.NaN.f32 %0, %1, %2;\n" : "=f"(z) : "f"(x), "f"(y));
    return z;
}
__device__ __forceinline__ float max_nan(float x, float y) {
    float z;
    asm("max.NaN.f32 %0, %1, %2;\n" : "=f"(z) : "f"(x), "f"(y));
    return z;
}

// "Floating Point Instructions: ex2, rcp": 2^x within 2 ulp and 1/x within 1 ulp; subnormals are 0.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
}

// "Parallel Synchronization and Communication Instructions: griddepcontrol", .wait: until the launch before
// this one is over and what it wrote can be seen. Every thread of every kernel waits, and touches no global
// memory before. So no launch is over before the one before it is, and what waits for the last launch waits
// for all of them: what any earlier one wrote can be seen, what any earlier one reads can be overwritten.
// Older chips start no launch before the last one is over.
__device__ __forceinline__ void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// "... griddepcontrol", .launch_dependents: blocks of the next launch may start where there is room, once all
// blocks of this one have said so, or are over. None is then left to start, whose room they could take: a
// kernel says so at once, and the next one makes itself ready and waits. Not the last, whose next is not ours.
__device__ __forceinline__ void let_next_launch_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// "Miscellaneous Instructions: trap": the launch fails unless `holds`.
__device__ __forceinline__ void trap_unless(bool holds) {
    if (!holds) asm volatile("trap;\n");
}

}  // namespace reap::cuda
#endif
