// Faults of use: addresses, values that are not there, and lanes that are not.
// `//! <name>` marks a line that the report of fault <name> may give.
#pragma once
#include "faults_order.h"

template <bool broken> __global__ void global_out_of_bounds(Args a) {
    const unsigned i = blockIdx.x * 64 + threadIdx.x + (broken ? 1 : 0);
    const float x = load_global(a.in + i);  //! global_out_of_bounds
    store_global(a.out + i - (broken ? 1 : 0), x);
}

template <bool broken> __global__ void global_before_start(Args a) {
    const int t = static_cast<int>(threadIdx.x);
    const float x = load_global(a.in + t);
    store_global(a.out + t - (broken ? 1 : 0), x);  //! global_before_start
}

template <bool broken> __global__ void slice_out_of_bounds(Args a) {
    const auto first = slice<float>(a.scratch, 0, 64, "first");
    const auto second = slice<float>(a.scratch, 256, 64, "second");
    const unsigned t = threadIdx.x;
    store_global(second + t, load_global(a.in + t));
    store_global(first + t + (broken ? 1 : 0), 1.0f);  //! slice_out_of_bounds
}

template <bool broken> __global__ void shared_out_of_bounds(Args a) {
    const unsigned t = threadIdx.x;
    const auto shared = cast<float>(shared_memory()) + (broken ? 1 : 0);
    store_shared(shared + t * 8 + 7, load_global(a.in + t));  //! shared_out_of_bounds
}

template <bool broken> __global__ void shared_before_start(Args a) {
    const auto shared = cast<float>(shared_memory());
    const int t = static_cast<int>(threadIdx.x);
    store_shared(shared + t - (broken ? 1 : 0), load_global(a.in + t));  //! shared_before_start
}

template <bool broken> __global__ void misaligned_vector(Args a) {
    const unsigned t = threadIdx.x;
    const auto from = cast<const float4>(a.in + (broken ? 2 : 4)) + t % 8;
    const auto x = load_global(from);  //! misaligned_vector
    store_global(a.out + t, x.x);
}

// One that may start before the launch before it is over.
template <bool broken> __global__ void launch_not_waited_for(Args a) {
    const unsigned t = threadIdx.x;
    if (!broken || t % 32 != 5) wait_for_launch_before();
    store_global(a.out + t, load_global(a.in + t));  //! launch_not_waited_for
}

// The launch after it would not know that those before are over.
template <bool broken> __global__ void launch_ends_first(Args a) {
    const unsigned t = threadIdx.x;
    let_next_launch_start();
    if (broken && t % 32 == 5) return;
    wait_for_launch_before();
    store_global(a.out + t, load_global(a.in + t));
}

// On an sm_80, as all kernels here.
template <bool broken> __global__ void newer_instruction(Args a) {
    const unsigned t = threadIdx.x;
    if (broken) red_add4(a.out + t * 4, float4{1, 1, 1, 1});  //! newer_instruction
    else red_add(a.out + t, 1.0f);
}

template <bool broken> __global__ void misaligned_row(Args a) {
    const auto shared = shared_memory();
    const unsigned t = threadIdx.x;
    store_shared(cast<float2>(shared) + t, float2{});
    __syncthreads();
    uint32_t r[4];
    ldmatrix_x4(r, shared + t % 16 * 16 + (broken ? 8 : 0));  //! misaligned_row
    store_global(a.out + t, static_cast<float>(r[0]));
}

template <bool broken> __global__ void divergent_collective(Args a) {
    const unsigned t = threadIdx.x;
    float x = load_global(a.in + t);
    if (broken && t % 32 >= 16) x += __shfl_xor_sync(0xffffffff, x, 1);  //! divergent_collective
    else x += __shfl_xor_sync(0xffffffff, x, 1);                         //! divergent_collective
    store_global(a.out + t, x);
}

template <bool broken> __global__ void divergent_mask(Args a) {
    const unsigned t = threadIdx.x;
    const unsigned mask = broken && t % 32 == 3 ? 0x0000ffff : 0xffffffff;
    store_global(a.out + t, static_cast<float>(__ballot_sync(mask, t & 1)));  //! divergent_mask
}

template <bool broken> __global__ void divergent_barrier(Args a) {
    const unsigned t = threadIdx.x;
    if (broken && t % 2) __syncthreads();  //! divergent_barrier
    else __syncthreads();                  //! divergent_barrier
    store_global(a.out + t, 1.0f);
}

template <bool broken> __global__ void collective_and_barrier(Args a) {
    const unsigned t = threadIdx.x;
    if (broken && t == 5) __syncthreads();   //! collective_and_barrier
    __syncwarp();                            //! collective_and_barrier
    if (!broken || t != 5) __syncthreads();  //! collective_and_barrier
    store_global(a.out + t, 1.0f);
}

template <bool broken> __global__ void shuffle_from_outsider(Args a) {
    const unsigned t = threadIdx.x;
    if (t % 32 < 16) {
        const float x = load_global(a.in + t);
        const float y = __shfl_xor_sync(0xffff, x, broken ? 16 : 8);  //! shuffle_from_outsider
        store_global(a.out + t, y);
    }
}

template <bool broken> __global__ void outside_its_mask(Args a) {
    const unsigned t = threadIdx.x, mask = broken ? 0x0fffffff : 0xffffffff;
    const unsigned votes = __ballot_sync(mask, t % 2);  //! outside_its_mask
    store_global(a.out + t, static_cast<float>(votes));
}

template <bool broken> __global__ void two_on_a_line(Args a) {
    const unsigned t = threadIdx.x;
    const bool down = broken && t % 2;
    const bool any = down ? __any_sync(~0u, 1) : __all_sync(~0u, 1);  //! two_on_a_line
    store_global(a.out + t, any);
}

template <bool broken> __global__ void exited_lane(Args a) {
    const unsigned t = threadIdx.x;
    if (broken && t == 40) return;
    if (t == 40 || t == 41) __syncwarp(0x300);  //! exited_lane
    __syncthreads();
    store_global(a.out + t, 1.0f);
}

// 40 threads: the second warp has 8 lanes.
template <bool broken> __global__ void partial_warp(Args a) {
    const unsigned t = threadIdx.x, mask = broken || t < 32 ? 0xffffffff : 0xff;
    store_global(a.out + t, __shfl_xor_sync(mask, 1.0f, 2));  //! partial_warp
}

template <bool broken> __global__ void barrier_counts(Args a) {
    named_barrier(1, broken && threadIdx.x < 32 ? 96 : 64);  //! barrier_counts
    store_global(a.out + threadIdx.x, 1.0f);
}

template <bool broken> __global__ void barrier_after_exit(Args a) {
    if (broken && threadIdx.x >= 32) return;
    __syncthreads();  //! barrier_after_exit
    store_global(a.out + threadIdx.x, 1.0f);
}

template <bool broken> __global__ void deadlock(Args a) {
    const bool first = threadIdx.x < 32;
    named_barrier(broken && first ? 2 : 1, 64);  //! deadlock
    named_barrier(broken && first ? 1 : 2, 64);
    store_global(a.out + threadIdx.x, 1.0f);
}

// Memory that an earlier block wrote is not written.
template <bool broken> __global__ void uninitialised_shared(Args a) {
    const auto shared = cast<float>(shared_memory());
    const unsigned t = threadIdx.x;
    if (!broken || t != 7 || blockIdx.x != 2) store_shared(shared + t, 0.0f);
    __syncthreads();
    const float x = load_shared(shared + (t + 1) % 64);  //! uninitialised_shared
    store_global(a.out + blockIdx.x * 64 + t, x);
}

template <bool broken> __global__ void uninitialised_global(Args a) {
    const auto sums = slice<float>(a.scratch, 512, 64, "sums");
    const unsigned t = threadIdx.x;
    if (!broken && t < 32) store_global(cast<float2>(sums) + t, float2{});
    __syncthreads();
    if (t < 32) add_two(sums + t * 2, 1.0f, 2.0f);  //! uninitialised_global
}

template <bool broken> __global__ void misaligned_copy(Args a) {
    const unsigned t = threadIdx.x;
    const auto from = cast<const char>(a.in) + t * 16 + (broken ? 4 : 0);
    cp_async16(shared_memory() + t * 16, from, t < 63);  //! misaligned_copy
    cp_async_commit();
    cp_async_wait<0>();
    store_global(a.out + t, load_shared(cast<float>(shared_memory()) + t * 4));
}

template <bool broken> __global__ void store_to_input(Args a) {
    const auto in = const_cast<float*>(a.in.unchecked());
    store_global(broken ? Global<float>(in) : a.out, 1.0f);  //! store_to_input
}

template <bool broken> __global__ void trap(Args a) {
    trap_unless(!broken || load_global(a.in + threadIdx.x) < 63);  //! trap
}

template <bool broken> __global__ void runaway(Args a) {
    for (unsigned i = 0; i < 10 || broken; i += 2) load_global(a.in + i % 256);  //! runaway
}

template <bool broken> __global__ void runaway_votes(Args a) {
    const float x = load_global(a.in + threadIdx.x);
    while (__any_sync(0xffffffff, broken || x < 0)) continue;  //! runaway_votes
}
