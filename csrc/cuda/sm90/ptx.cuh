// Instructions that Hopper added (sm_90a), one wrapper each, named with their sections of the PTX
// ISA. A ring of tiles in shared memory needs three kinds: mbarriers say when a stage is full or
// empty, TMA fills it, wgmma reads it. The last two work beside the threads, in what the ISA calls
// the async proxy.
#pragma once
#include <cstdint>

#include "../ptx.cuh"

// Kernels are for Hopper alone; what other chips get of them traps.
#if defined(REAP_SIMT) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define REAP_HOPPER
#endif

namespace reap::cuda {

// A tensor of 16-bit elements in global memory, and the box of it that one load brings to shared
// memory with 128-byte swizzle. Fastest dimension first.
struct TensorBox {
    Global<const char> data;  // 16-byte aligned
    int rank;                 // 2 to 4
    int64_t sizes[4];
    int64_t strides[4];  // elements; the first is 1, the others multiples of 8
    int box[4];          // the first is 64
};

}  // namespace reap::cuda

#ifdef REAP_SIMT
#include "simt/hopper.h"
#else
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <array>
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../check.h"

namespace reap::cuda {

using TensorMap = CUtensorMap;

// The map of a tensor for TMA. The driver makes it (cuTensorMapEncodeTiled in the CUDA driver API); it
// is looked up in the driver that is loaded, so that nothing links to one. Touches no GPU, so a stream
// that is being captured does not mind.
inline TensorMap make_tensor_map(const TensorBox& tensor) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result{};
        check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
              "cudaGetDriverEntryPointByVersion");
        if (result != cudaDriverEntryPointSuccess)
            throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled: update it");
        return reinterpret_cast<Encode>(found);
    }();
    cuuint64_t sizes[4], strides[4];
    cuuint32_t box[4];
    const cuuint32_t every[4] = {1, 1, 1, 1};
    for (int i = 0; i < tensor.rank; ++i) {
        sizes[i] = tensor.sizes[i];
        strides[i] = 2 * tensor.strides[i];
        box[i] = tensor.box[i];
    }
    TensorMap map;
    const CUresult error =
        encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, tensor.rank, const_cast<char*>(tensor.data), sizes, strides + 1,
               box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (error != CUDA_SUCCESS)
        throw std::runtime_error("cuTensorMapEncodeTiled fails with CUresult " + std::to_string(error));
    return map;
}

// The same of a tensor that many calls name, such as weights: a thread keeps the maps that it has had
// made. A map is all of its TensorBox and nothing else, so that none gets stale.
inline TensorMap kept_tensor_map(const TensorBox& tensor) {
    constexpr size_t MOST = 1024;
    thread_local std::map<std::array<int64_t, 14>, TensorMap> kept;
    const auto& [data, rank, sizes, strides, box] = tensor;
    const std::array<int64_t, 14> key{reinterpret_cast<int64_t>(data),
                                      rank,
                                      sizes[0],
                                      sizes[1],
                                      sizes[2],
                                      sizes[3],
                                      strides[0],
                                      strides[1],
                                      strides[2],
                                      strides[3],
                                      box[0],
                                      box[1],
                                      box[2],
                                      box[3]};
    if (const auto found = kept.find(key); found != kept.end()) return found->second;
    if (kept.size() == MOST) kept.clear();
    return kept[key] = make_tensor_map(tensor);
}

// "mbarrier.init": the phase completes at `arrivals` arrivals and when no bytes are awaited.
__device__ __forceinline__ void mbarrier_init(Shared<uint64_t> barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// "mbarrier.arrive": release of what this thread wrote, to those who wait.
__device__ __forceinline__ void mbarrier_arrive(Shared<uint64_t> barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// "mbarrier.arrive", form with .expect_tx: awaits `bytes` more from TMA, and arrives.
__device__ __forceinline__ void mbarrier_arrive_expect(Shared<uint64_t> barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// "cp.async.mbarrier.arrive": arrives once all earlier cp.async of this thread have landed. With
// .noinc the arrival is one of those that the barrier was initialised with.
__device__ __forceinline__ void cp_async_mbarrier_arrive(Shared<uint64_t> barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// "mbarrier.try_wait": whether the phase of this parity is over; suspends a while until it is.
__device__ __forceinline__ bool mbarrier_try_wait(Shared<uint64_t> barrier, uint32_t parity) {
    uint32_t over;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n"
        "}"
        : "=r"(over)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return over;
}

// "membar/fence": orders this thread's view of shared memory before what wgmma and TMA do with it.
// Data written by st.shared or cp.async needs one on its way to wgmma.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// "membar/fence": makes initialised mbarriers visible to TMA.
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// "barrier": bar.sync of `threads` threads, whole warps; orders their memory accesses.
__device__ __forceinline__ void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// "cp.async.bulk.tensor": the box of the map at these coordinates (fastest first) into shared
// memory; elements outside of the tensor become zeros and count as bytes of the barrier as well.
template <int RANK>
__device__ __forceinline__ void tma_load(Shared<char> to, const TensorMap& map, Shared<uint64_t> barrier,
                                         const int (&at)[RANK]) {
    static_assert(RANK >= 2 && RANK <= 4);
    const auto address = reinterpret_cast<uint64_t>(&map);
    if constexpr (RANK == 2)
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
            " [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
            "l"(address), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1])
            : "memory");
    else if constexpr (RANK == 3)
        asm volatile(
            "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
            " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
            "l"(address), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2])
            : "memory");
    else
        asm volatile(
            "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
            " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
            "l"(address), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
            : "memory");
}

// "cp.async.bulk.prefetch.tensor": a hint that tma_load will want the box, which then waits in the L2 cache.
__device__ __forceinline__ void tma_prefetch(const TensorMap& map, const int (&at)[4]) {
    asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];" ::"l"(&map), "r"(at[0]),
                 "r"(at[1]), "r"(at[2]), "r"(at[3])
                 : "memory");
}

// "prefetch" with .tensormap: a hint that the map itself will be wanted. A map is one of a kernel's parameters.
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// "cp.reduce.async.bulk": adds `bytes` of floats from shared to global memory, each of them atomically
// (relaxed, of GPU scope); both addresses and `bytes` are multiples of 16. Subnormals become 0.
__device__ __forceinline__ void bulk_add(Global<float> to, Shared<float> from, int bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
                 "r"(shared_address(from)), "r"(bytes)
                 : "memory");
}

// "cp.async.bulk": the same, but a copy.
template <class T> __device__ __forceinline__ void bulk_store(Global<T> to, Shared<T> from, int bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)),
                 "r"(bytes)
                 : "memory");
}

// "cp.async.bulk.commit_group": what this thread started since the last one is a group.
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// "cp.async.bulk.wait_group" with .read: until all groups of this thread have read their sources.
__device__ __forceinline__ void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// "setmaxnreg": gives back registers, or takes them, to have COUNT per thread of the warpgroup.
template <int COUNT> __device__ __forceinline__ void release_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void acquire_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// "wgmma.fence": before the first wgmma, and between other accesses to its registers and a wgmma.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// "wgmma.commit_group": the wgmmas since the last one become a group.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// "wgmma.wait_group": at most PENDING groups of this warpgroup are still at work.
template <int PENDING> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// "wgmma.mma_async": d [64, N] += a [64, 16] b [16, N], both operands by descriptor. In shared
// memory a is K-major, and so is b without B_MN_MAJOR. Warp w of the warpgroup has rows 16 w
// and on: d[s][j] is its fragment of the columns 64 s + 8 j, as mma.m16n8k16 has it.
#define REAP_D1(s, j) "+f"(d[s][j][0]), "+f"(d[s][j][1]), "+f"(d[s][j][2]), "+f"(d[s][j][3])
#define REAP_D4(s, j) REAP_D1(s, j), REAP_D1(s, j + 1), REAP_D1(s, j + 2), REAP_D1(s, j + 3)
#define REAP_D8(s) REAP_D4(s, 0), REAP_D4(s, 4)
#define REAP_96 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
    "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, " \
    "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
    "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, " \
    "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, " \
    "%87, %88, %89, %90, %91, %92, %93, %94, %95"
#define REAP_128 \
    REAP_96 \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, " \
    "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, " \
    "%125, %126, %127"
#define REAP_WGMMA(SHAPE, TYPE, D, A, B, MAJOR, ADD, ...) \
    asm volatile( \
        "{\n" \
        ".reg .pred add;\n" \
        "setp.ne.b32 add, " ADD \
        ", 0;\n" \
        "wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {" D "}, " A ", " B ", add, 1, 1, 0, " MAJOR \
        ";\n}" \
        : __VA_ARGS__ \
        : "l"(a), "l"(b), "n"(static_cast<int>(B_MN_MAJOR)), "r"(static_cast<int>(add)))
#define REAP_N192(TYPE) \
    REAP_WGMMA("m64n192k16", TYPE, REAP_96, "%96", "%97", "%98", "%99", REAP_D8(0), REAP_D8(1), REAP_D8(2))
#define REAP_N256(TYPE) \
    REAP_WGMMA("m64n256k16", TYPE, REAP_128, "%128", "%129", "%130", "%131", REAP_D8(0), REAP_D8(1), REAP_D8(2), \
               REAP_D8(3))

template <class T, bool B_MN_MAJOR>
__device__ __forceinline__ void wgmma_m64n192k16(float (&d)[3][8][4], uint64_t a, uint64_t b, bool add) {
    if constexpr (std::is_same_v<T, bf16>) REAP_N192("bf16");
    else REAP_N192("f16");
}
template <class T, bool B_MN_MAJOR>
__device__ __forceinline__ void wgmma_m64n256k16(float (&d)[4][8][4], uint64_t a, uint64_t b, bool add) {
    if constexpr (std::is_same_v<T, bf16>) REAP_N256("bf16");
    else REAP_N256("f16");
}
#undef REAP_N256
#undef REAP_N192
#undef REAP_WGMMA
#undef REAP_128
#undef REAP_96
#undef REAP_D8
#undef REAP_D4
#undef REAP_D1

}  // namespace reap::cuda
#endif
