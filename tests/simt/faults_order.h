// Faults of order: accesses that nothing, or too little, puts one after the other.
// `//! <name>` marks a line that the report of fault <name> may give.
#pragma once
#include "emulator.h"

using namespace reap::cuda;

struct Args {
    Global<const float> in;  // 256 floats
    Global<float> out;       // 256 floats, zeros
    Global<char> scratch;    // 1024 bytes that nobody wrote
};

// To two adjacent floats.
inline void add_two(Global<float> p, float x, float y, simt::Site site = simt::Site::here()) {
    red_add(p, x, site);
    red_add(p + 1, y, site);
}

template <bool broken> __global__ void missing_barrier(Args a) {
    const auto shared = cast<float>(shared_memory());
    const unsigned t = threadIdx.x;
    float sum = 0;
    for (unsigned step = 0; step < 2; ++step) {
        store_shared(shared + t, load_global(a.in + step * 64 + t));  //! missing_barrier
        if (!broken || step == 0) __syncthreads();
        sum += load_shared(shared + (t + 32) % 64);  //! missing_barrier
        __syncthreads();
    }
    store_global(a.out + t, sum);
}

template <bool broken> __global__ void missing_syncwarp(Args a) {
    const auto shared = cast<float>(shared_memory());
    const unsigned t = threadIdx.x;
    store_shared(shared + t, 0.0f);
    __syncwarp();
    store_shared(shared + t, load_global(a.in + t));  //! missing_syncwarp
    if (broken) __shfl_xor_sync(0xffffffff, t, 1);    // orders lanes, not their memory
    else __syncwarp();
    store_global(a.out + t, load_shared(shared + (t ^ 1)));  //! missing_syncwarp
}

template <bool broken> __global__ void syncwarp_for_a_barrier(Args a) {
    const auto shared = cast<float>(shared_memory());
    const unsigned t = threadIdx.x;
    if (t < 32) store_shared(shared + t, 0.0f);
    __syncthreads();
    if (t < 32) store_shared(shared + t, load_global(a.in + t));  //! syncwarp_for_a_barrier
    if (!broken) __syncthreads();
    __syncwarp();
    const float x = load_shared(shared + t % 32);  //! syncwarp_for_a_barrier
    store_global(a.out + t, x);
}

template <bool broken> __global__ void half_a_warp(Args a) {
    const auto shared = cast<float>(shared_memory());
    const unsigned t = threadIdx.x, half = t % 32 < 16 ? 0x0000ffff : 0xffff0000;
    store_shared(shared + t, 0.0f);
    __syncwarp();
    store_shared(shared + t, load_global(a.in + t));  //! half_a_warp
    __syncwarp(half);
    const float x = load_shared(shared + (t ^ (broken ? 16 : 8)));  //! half_a_warp
    store_global(a.out + t, x);
}

// Of the readers of a word, one has no part in the synchronisation before it is changed.
template <bool broken> __global__ void reader_outside_mask(Args a) {
    const auto shared = cast<float>(shared_memory());
    const unsigned t = threadIdx.x;
    if (t == 0) store_shared(shared, load_global(a.in + 5));
    __syncwarp();
    if (t >= 15) store_global(a.out + t, load_shared(shared));  //! reader_outside_mask
    if (!broken || t >= 16) __syncwarp(broken ? 0xffff0000 : 0xffffffff);
    if (t == 16) store_shared(shared, 1.0f);  //! reader_outside_mask
}

template <bool broken> __global__ void lane_left_out(Args a) {
    const auto shared = cast<float>(shared_memory());
    const unsigned t = threadIdx.x;
    store_shared(shared + t, 0.0f);
    __syncwarp();
    store_shared(shared + t, load_global(a.in + t));  //! lane_left_out
    if (broken && t == 0) return;
    __syncwarp(broken ? 0xfffffffe : 0xffffffff);
    const float x = load_shared(shared + (t + 31) % 32);  //! lane_left_out
    store_global(a.out + t, x);
}

// Written 16 bytes at a time, read 4 at a time.
template <bool broken> __global__ void parts_of_a_vector(Args a) {
    const auto shared = cast<float>(shared_memory());
    const unsigned t = threadIdx.x;
    store_shared(cast<float4>(shared) + t, float4{});
    __syncthreads();
    const auto four = load_global(cast<const float4>(a.in) + t);
    store_shared(cast<float4>(shared) + t, four);  //! parts_of_a_vector
    if (!broken) __syncthreads();
    if (t < 32) return;
    const float x = load_shared(shared + (t - 32) * 4);  //! parts_of_a_vector
    store_global(a.out + t, x);
}

template <bool broken> __global__ void barrier_of_others(Args a) {
    const auto shared = cast<float>(shared_memory());
    const unsigned t = threadIdx.x;
    store_shared(shared + t, 0.0f);
    __syncthreads();
    store_shared(shared + t, load_global(a.in + t));  //! barrier_of_others
    named_barrier(1 + t / 64, 64);
    const float x = load_shared(shared + (t ^ (broken ? 64 : 32)));  //! barrier_of_others
    store_global(a.out + t, x);
}

// Warp 0 tells warp 1, and warp 1 tells warp 2: what warp 0 wrote is over for warp 2.
template <bool broken> __global__ void word_of_mouth(Args a) {
    const auto shared = cast<float>(shared_memory());
    const unsigned t = threadIdx.x, warp = t / 32;
    store_shared(shared + t, 0.0f);
    __syncthreads();
    if (warp == 0) store_shared(shared + t, load_global(a.in + t));  //! word_of_mouth
    if (warp == 1 && broken) named_barrier(2, 64);
    if (warp < 2) named_barrier(1, 64);
    if (warp == 2 || (warp == 1 && !broken)) named_barrier(2, 64);
    if (warp == 2) store_global(a.out + t, load_shared(shared + t % 32));  //! word_of_mouth
}

// Seven warps read a word that one then changes, and a ninth has no part in it.
template <bool broken> __global__ void late_reader(Args a) {
    const auto shared = cast<float>(shared_memory());
    const unsigned t = threadIdx.x, warp = t / 32;
    if (t == 0) store_shared(shared, load_global(a.in + 5));
    __syncthreads();
    if (warp > 0 && warp < 8) store_global(a.out + t, load_shared(shared));  //! late_reader
    if (warp < 8 && (!broken || warp != 4)) named_barrier(1, broken ? 224 : 256);
    if (t == 0) store_shared(shared, 1.0f);  //! late_reader
}

template <bool broken> __global__ void racing_writes(Args a) {
    const auto shared = cast<float>(shared_memory());
    const unsigned t = threadIdx.x;
    store_shared(shared + (broken ? t % 32 : t), load_global(a.in + t));  //! racing_writes
    __syncthreads();
    store_global(a.out + t, load_shared(shared + t % 32));
}

template <bool broken> __global__ void early_overwrite(Args a) {
    const auto shared = shared_memory();
    const unsigned t = threadIdx.x;
    for (unsigned step = 0; step < 3; ++step) {
        const auto from = cast<const char>(a.in + step * 64) + t % 16 * 16;
        if (t < 16) cp_async16(shared + t * 16, from, true);  //! early_overwrite
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        const float x = load_shared(cast<float>(shared) + (t ^ 32));  //! early_overwrite
        store_global(a.out + t, x);
        if (!broken) __syncthreads();
    }
}

// One kernel, four ways to use a copy too soon.
enum Mistake { none, no_wait, no_commit, one_short, no_barrier };
template <Mistake mistake> __global__ void copies(Args a) {
    const auto shared = shared_memory();
    const unsigned t = threadIdx.x;
    store_shared(cast<float4>(shared) + t, float4{});
    store_shared(cast<float4>(shared) + 64 + t, float4{});
    __syncthreads();
    for (unsigned stage = 0; stage < 2; ++stage) {
        const auto from = cast<const char>(a.in) + (stage * 64 + t) % 64 * 16;
        cp_async16(shared + (stage * 64 + t) * 16, from, true);  //! copy_no_barrier
        if (mistake != no_commit || stage == 0) cp_async_commit();
    }
    if (mistake == one_short) cp_async_wait<1>();
    else if (mistake != no_wait) cp_async_wait<0>();
    if (mistake != no_barrier) __syncthreads();
    const unsigned other = 64 + (t + 32) % 64;
    const auto from = cast<float4>(shared) + other;
    const auto got = load_shared(from);  //! missing_wait missing_commit short_wait copy_no_barrier
    store_global(a.out + t, got.x);
    cp_async_commit();
    cp_async_wait<0>();
}
template <bool broken> constexpr auto missing_wait = copies < broken ? no_wait : none > ;
template <bool broken> constexpr auto missing_commit = copies < broken ? no_commit : none > ;
template <bool broken> constexpr auto short_wait = copies < broken ? one_short : none > ;
template <bool broken> constexpr auto copy_no_barrier = copies < broken ? no_barrier : none > ;

// All have waited when all read, but only the barrier after the wait shows a copy to others.
template <bool broken> __global__ void barrier_before_wait(Args a) {
    const unsigned t = threadIdx.x;
    cp_async16(shared_memory() + t * 16, cast<const char>(a.in) + t * 16, true);
    cp_async_commit();
    if (broken) __syncthreads();
    cp_async_wait<0>();
    __shfl_xor_sync(0xffffffff, t, 1);
    if (!broken) __syncthreads();
    const auto got = load_shared(cast<float4>(shared_memory()) + (t ^ 1));  //! barrier_before_wait
    store_global(a.out + t, got.x);
}

template <bool broken> __global__ void copy_outlives_thread(Args a) {
    const unsigned t = threadIdx.x;
    const auto from = cast<const char>(a.in) + t * 16;
    cp_async16(shared_memory() + t * 16, from, true);  //! copy_outlives_thread
    cp_async_commit();
    if (!broken) cp_async_wait<0>();
}

template <bool broken> __global__ void blocks_write_the_same(Args a) {
    const unsigned t = threadIdx.x, i = broken ? t : blockIdx.x * 64 + t;
    store_global(a.out + i, load_global(a.in + i));  //! blocks_write_the_same
}

template <bool broken> __global__ void block_reads_another(Args a) {
    const unsigned t = threadIdx.x, me = blockIdx.x, other = broken ? (me + 1) % 4 : me;
    store_global(a.out + me * 64 + t, 1.0f);  //! block_reads_another
    load_global(a.out + other * 64 + t);      //! block_reads_another
}

template <bool broken> __global__ void store_beside_atomics(Args a) {
    const unsigned t = threadIdx.x;
    if (broken && blockIdx.x == 2 && t == 3) store_global(a.out + 6, 1.0f);  //! store_beside_atomics
    else add_two(a.out + t * 2, 1.0f, 1.0f);                                 //! store_beside_atomics
}

// One of the blocks that add to the same sums reads them before the others are known to be done.
template <bool broken> __global__ void read_beside_atomics(Args a) {
    const unsigned t = threadIdx.x, i = broken ? t : blockIdx.x * 32 + t;
    add_two(a.out + i * 2, 1.0f, 1.0f);  //! read_beside_atomics
    __syncthreads();
    if (blockIdx.x == 1) load_global(a.out + i * 2);  //! read_beside_atomics
}

template <bool broken> __global__ void global_without_barrier(Args a) {
    const unsigned t = threadIdx.x;
    store_global(a.out + t, load_global(a.in + t));  //! global_without_barrier
    if (!broken) __syncthreads();
    const float x = load_global(a.out + (t + 32) % 64);  //! global_without_barrier
    store_global(a.out + 64 + t, x);
}
