// Small kernels with one planted fault each, and the same kernel without it. A line that ends in
// `//! <name>` is one that the report of fault <name> may give. Prints one line per run: name,
// broken, seed, mode, sum of `out`, bytes of `in` read, of `out` written and added to, kind
// ("clean" if none), line, address, lanes and message, by tabs.
#include <cstdio>
#include <vector>

#include "emulator.h"

using namespace reap::cuda;

struct Args {
    Global<const float> in;    // 256 floats
    Global<float> out;         // 256 floats, zeros
    Global<char> scratch;      // 1024 bytes that nobody wrote
};

template <bool broken> __global__ void missing_barrier(Args a) {
    const auto shared = cast<float>(shared_memory());
    const unsigned t = threadIdx.x;
    float sum = 0;
    for (unsigned step = 0; step < 2; ++step) {
        store_shared(shared + t, load_global(a.in + step * 64 + t));      //! missing_barrier
        if (!broken || step == 0) __syncthreads();
        sum += load_shared(shared + (t + 32) % 64);                       //! missing_barrier
        __syncthreads();
    }
    store_global(a.out + t, sum);
}

template <bool broken> __global__ void missing_syncwarp(Args a) {
    const auto shared = cast<float>(shared_memory());
    const unsigned t = threadIdx.x;
    store_shared(shared + t, 0.0f);
    __syncwarp();
    store_shared(shared + t, load_global(a.in + t));                      //! missing_syncwarp
    if (broken) __shfl_xor_sync(0xffffffff, t, 1);    // orders lanes, not their memory
    else __syncwarp();
    store_global(a.out + t, load_shared(shared + (t ^ 1)));               //! missing_syncwarp
}

template <bool broken> __global__ void syncwarp_for_a_barrier(Args a) {
    const auto shared = cast<float>(shared_memory());
    const unsigned t = threadIdx.x;
    if (t < 32) store_shared(shared + t, 0.0f);
    __syncthreads();
    if (t < 32) store_shared(shared + t, load_global(a.in + t));          //! syncwarp_for_a_barrier
    if (!broken) __syncthreads();
    __syncwarp();
    const float x = load_shared(shared + t % 32);                         //! syncwarp_for_a_barrier
    store_global(a.out + t, x);
}

template <bool broken> __global__ void half_a_warp(Args a) {
    const auto shared = cast<float>(shared_memory());
    const unsigned t = threadIdx.x, half = t % 32 < 16 ? 0x0000ffff : 0xffff0000;
    store_shared(shared + t, 0.0f);
    __syncwarp();
    store_shared(shared + t, load_global(a.in + t));                      //! half_a_warp
    __syncwarp(half);
    const float x = load_shared(shared + (t ^ (broken ? 16 : 8)));        //! half_a_warp
    store_global(a.out + t, x);
}

template <bool broken> __global__ void barrier_of_others(Args a) {
    const auto shared = cast<float>(shared_memory());
    const unsigned t = threadIdx.x;
    store_shared(shared + t, 0.0f);
    __syncthreads();
    store_shared(shared + t, load_global(a.in + t));                      //! barrier_of_others
    named_barrier(1 + t / 64, 64);
    const float x = load_shared(shared + (t ^ (broken ? 64 : 32)));       //! barrier_of_others
    store_global(a.out + t, x);
}

// Warp 0 tells warp 1, and warp 1 tells warp 2: what warp 0 wrote is over for warp 2.
template <bool broken> __global__ void word_of_mouth(Args a) {
    const auto shared = cast<float>(shared_memory());
    const unsigned t = threadIdx.x, warp = t / 32;
    store_shared(shared + t, 0.0f);
    __syncthreads();
    if (warp == 0) store_shared(shared + t, load_global(a.in + t));       //! word_of_mouth
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
    if (t == 0) store_shared(shared, 1.0f);                               //! late_reader
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
        if (t < 16) cp_async16(shared + t * 16, from, true);              //! early_overwrite
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        const float x = load_shared(cast<float>(shared) + (t ^ 32));      //! early_overwrite
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
        cp_async16(shared + (stage * 64 + t) * 16, from, true);           //! copy_no_barrier
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
template <bool broken> constexpr auto missing_wait = copies<broken ? no_wait : none>;
template <bool broken> constexpr auto missing_commit = copies<broken ? no_commit : none>;
template <bool broken> constexpr auto short_wait = copies<broken ? one_short : none>;
template <bool broken> constexpr auto copy_no_barrier = copies<broken ? no_barrier : none>;

template <bool broken> __global__ void copy_outlives_thread(Args a) {
    const unsigned t = threadIdx.x;
    const auto from = cast<const char>(a.in) + t * 16;
    cp_async16(shared_memory() + t * 16, from, true);                     //! copy_outlives_thread
    cp_async_commit();
    if (!broken) cp_async_wait<0>();
}

template <bool broken> __global__ void global_out_of_bounds(Args a) {
    const unsigned i = blockIdx.x * 64 + threadIdx.x + (broken ? 1 : 0);
    const float x = load_global(a.in + i);                                //! global_out_of_bounds
    store_global(a.out + i - (broken ? 1 : 0), x);
}

template <bool broken> __global__ void global_before_start(Args a) {
    const int t = static_cast<int>(threadIdx.x);
    const float x = load_global(a.in + t);
    store_global(a.out + t - (broken ? 1 : 0), x);                        //! global_before_start
}

template <bool broken> __global__ void slice_out_of_bounds(Args a) {
    const auto first = slice<float>(a.scratch, 0, 64, "first");
    const auto second = slice<float>(a.scratch, 256, 64, "second");
    const unsigned t = threadIdx.x;
    store_global(second + t, load_global(a.in + t));
    store_global(first + t + (broken ? 1 : 0), 1.0f);                     //! slice_out_of_bounds
}

template <bool broken> __global__ void shared_out_of_bounds(Args a) {
    const unsigned t = threadIdx.x;
    const auto shared = cast<float>(shared_memory()) + (broken ? 1 : 0);
    store_shared(shared + t * 8 + 7, load_global(a.in + t));              //! shared_out_of_bounds
}

template <bool broken> __global__ void misaligned_vector(Args a) {
    const unsigned t = threadIdx.x;
    const auto from = cast<const float4>(a.in + (broken ? 2 : 4)) + t % 8;
    const auto x = load_global(from);                                     //! misaligned_vector
    store_global(a.out + t, x.x);
}

template <bool broken> __global__ void misaligned_row(Args a) {
    const auto shared = shared_memory();
    const unsigned t = threadIdx.x;
    store_shared(cast<float2>(shared) + t, float2{});
    __syncthreads();
    uint32_t r[4];
    ldmatrix_x4(r, shared + t % 16 * 16 + (broken ? 8 : 0));              //! misaligned_row
    store_global(a.out + t, static_cast<float>(r[0]));
}

template <bool broken> __global__ void divergent_collective(Args a) {
    const unsigned t = threadIdx.x;
    float x = load_global(a.in + t);
    if (broken && t % 32 >= 16)
        x += __shfl_xor_sync(0xffffffff, x, 1);                           //! divergent_collective
    else
        x += __shfl_xor_sync(0xffffffff, x, 1);                           //! divergent_collective
    store_global(a.out + t, x);
}

template <bool broken> __global__ void divergent_mask(Args a) {
    const unsigned t = threadIdx.x;
    const unsigned mask = broken && t % 32 == 3 ? 0x0000ffff : 0xffffffff;
    store_global(a.out + t, static_cast<float>(__ballot_sync(mask, t & 1)));  //! divergent_mask
}

template <bool broken> __global__ void divergent_barrier(Args a) {
    const unsigned t = threadIdx.x;
    if (broken && t % 2) __syncthreads();                                 //! divergent_barrier
    else __syncthreads();                                                 //! divergent_barrier
    store_global(a.out + t, 1.0f);
}

template <bool broken> __global__ void collective_and_barrier(Args a) {
    const unsigned t = threadIdx.x;
    if (broken && t == 5) __syncthreads();                                //! collective_and_barrier
    __syncwarp();                                                         //! collective_and_barrier
    if (!broken || t != 5) __syncthreads();                               //! collective_and_barrier
    store_global(a.out + t, 1.0f);
}

template <bool broken> __global__ void shuffle_from_outsider(Args a) {
    const unsigned t = threadIdx.x;
    if (t % 32 < 16) {
        const float x = load_global(a.in + t);
        const float y = __shfl_xor_sync(0xffff, x, broken ? 16 : 8);      //! shuffle_from_outsider
        store_global(a.out + t, y);
    }
}

template <bool broken> __global__ void exited_lane(Args a) {
    const unsigned t = threadIdx.x;
    if (broken && t == 40) return;
    store_global(a.out + t, __shfl_xor_sync(0xffffffff, 1.0f, 2));        //! exited_lane
}

template <bool broken> __global__ void barrier_after_exit(Args a) {
    if (broken && threadIdx.x >= 32) return;
    __syncthreads();                                                      //! barrier_after_exit
    store_global(a.out + threadIdx.x, 1.0f);
}

template <bool broken> __global__ void deadlock(Args a) {
    const bool first = threadIdx.x < 32;
    named_barrier(broken && first ? 2 : 1, 64);                           //! deadlock
    named_barrier(broken && first ? 1 : 2, 64);
    store_global(a.out + threadIdx.x, 1.0f);
}

template <bool broken> __global__ void uninitialised_shared(Args a) {
    const auto shared = cast<float>(shared_memory());
    const unsigned t = threadIdx.x;
    if (!broken || t != 7) store_shared(shared + t, 0.0f);
    __syncthreads();
    store_global(a.out + t, load_shared(shared + (t + 1) % 64));          //! uninitialised_shared
}

template <bool broken> __global__ void uninitialised_global(Args a) {
    const auto sums = slice<float>(a.scratch, 512, 64, "sums");
    const unsigned t = threadIdx.x;
    if (!broken && t < 32) store_global(cast<float2>(sums) + t, float2{});
    __syncthreads();
    if (t < 32) red_add2(sums + t * 2, 1.0f, 2.0f);                       //! uninitialised_global
}

template <bool broken> __global__ void blocks_write_the_same(Args a) {
    const unsigned t = threadIdx.x, i = broken ? t : blockIdx.x * 64 + t;
    store_global(a.out + i, load_global(a.in + i));                       //! blocks_write_the_same
}

template <bool broken> __global__ void block_reads_another(Args a) {
    const unsigned t = threadIdx.x, me = blockIdx.x, other = broken ? (me + 1) % 4 : me;
    store_global(a.out + me * 64 + t, 1.0f);                              //! block_reads_another
    load_global(a.out + other * 64 + t);                                  //! block_reads_another
}

template <bool broken> __global__ void store_beside_atomics(Args a) {
    const unsigned t = threadIdx.x;
    if (broken && blockIdx.x == 2 && t == 3)
        store_global(a.out + 6, 1.0f);                                    //! store_beside_atomics
    else
        red_add2(a.out + t * 2, 1.0f, 1.0f);                              //! store_beside_atomics
}

// One of the blocks that add to the same sums reads them before the others are known to be done.
template <bool broken> __global__ void read_beside_atomics(Args a) {
    const unsigned t = threadIdx.x, i = broken ? t : blockIdx.x * 32 + t;
    red_add2(a.out + i * 2, 1.0f, 1.0f);                                  //! read_beside_atomics
    __syncthreads();
    if (blockIdx.x == 3) load_global(a.out + i * 2);                      //! read_beside_atomics
}

template <bool broken> __global__ void global_without_barrier(Args a) {
    const unsigned t = threadIdx.x;
    store_global(a.out + t, load_global(a.in + t));                       //! global_without_barrier
    if (!broken) __syncthreads();
    const float x = load_global(a.out + (t + 32) % 64);                   //! global_without_barrier
    store_global(a.out + 64 + t, x);
}

template <bool broken> __global__ void misaligned_copy(Args a) {
    const unsigned t = threadIdx.x;
    const auto from = cast<const char>(a.in) + t * 16 + (broken ? 4 : 0);
    cp_async16(shared_memory() + t * 16, from, t < 63);                   //! misaligned_copy
    cp_async_commit();
    cp_async_wait<0>();
    store_global(a.out + t, load_shared(cast<float>(shared_memory()) + t * 4));
}

template <bool broken> __global__ void store_to_input(Args a) {
    const auto in = const_cast<float*>(a.in.unchecked());
    store_global(broken ? Global<float>(in) : a.out, 1.0f);               //! store_to_input
}

template <bool broken> __global__ void trap(Args a) {
    trap_unless(!broken || load_global(a.in + threadIdx.x) < 63);         //! trap
}

template <bool broken> __global__ void runaway(Args a) {
    for (unsigned i = 0; i < 10 || broken; i += 2) load_global(a.in + i % 256);  //! runaway
}

template <bool broken> __global__ void idle(Args) {}

struct Case {
    const char* name;
    void (*kernels[2])(Args);   // healthy, broken
    unsigned blocks, threads;
    size_t shared_bytes, broken_shared_bytes;
};

#define CASE(kernel, blocks, threads, bytes) \
    {#kernel, {kernel<false>, kernel<true>}, blocks, threads, bytes, bytes}
const Case cases[] = {
    CASE(missing_barrier, 1, 64, 256),
    CASE(missing_syncwarp, 1, 64, 256),
    CASE(syncwarp_for_a_barrier, 1, 64, 128),
    CASE(half_a_warp, 1, 64, 256),
    CASE(barrier_of_others, 1, 128, 512),
    CASE(word_of_mouth, 1, 96, 384),
    CASE(late_reader, 1, 288, 16),
    CASE(racing_writes, 1, 64, 256),
    CASE(early_overwrite, 1, 64, 256),
    CASE(missing_wait, 1, 64, 2048),
    CASE(missing_commit, 1, 64, 2048),
    CASE(short_wait, 1, 64, 2048),
    CASE(copy_no_barrier, 1, 64, 2048),
    CASE(copy_outlives_thread, 1, 64, 1024),
    CASE(global_out_of_bounds, 4, 64, 0),
    CASE(global_before_start, 1, 64, 0),
    CASE(slice_out_of_bounds, 1, 64, 0),
    CASE(shared_out_of_bounds, 1, 64, 2048),
    CASE(misaligned_vector, 1, 64, 0),
    CASE(misaligned_row, 1, 64, 512),
    CASE(divergent_collective, 1, 64, 0),
    CASE(divergent_mask, 1, 64, 0),
    CASE(divergent_barrier, 1, 64, 0),
    CASE(collective_and_barrier, 1, 64, 0),
    CASE(shuffle_from_outsider, 1, 64, 0),
    CASE(exited_lane, 1, 64, 0),
    CASE(barrier_after_exit, 1, 64, 0),
    CASE(deadlock, 1, 64, 0),
    CASE(uninitialised_shared, 1, 64, 256),
    CASE(uninitialised_global, 1, 64, 0),
    CASE(blocks_write_the_same, 4, 64, 0),
    CASE(block_reads_another, 4, 64, 0),
    CASE(store_beside_atomics, 4, 64, 0),
    CASE(read_beside_atomics, 4, 32, 0),
    CASE(global_without_barrier, 1, 64, 0),
    CASE(misaligned_copy, 1, 64, 1024),
    CASE(store_to_input, 1, 1, 0),
    CASE(trap, 1, 64, 0),
    CASE(runaway, 1, 1, 0),
    {"too_much_shared", {idle<false>, idle<true>}, 1, 64, 99 * 1024, 99 * 1024 + 1},
};

void run(const Case& test, bool broken, uint64_t seed, bool eager) {
    std::vector<float> in(256), out(256);
    std::vector<char> scratch(1024);
    for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i);
    simt::Options options;
    options.seed = seed, options.eager = eager;
    options.shared_limit = 99 * 1024, options.access_limit = 100000;
    simt::Emulator emulator(options);
    emulator.add_buffer("in", in.data(), in.size() * sizeof(float), false);
    emulator.add_buffer("out", out.data(), out.size() * sizeof(float), true);
    emulator.add_buffer("scratch", scratch.data(), scratch.size(), true, false);
    const size_t bytes = broken ? test.broken_shared_bytes : test.shared_bytes;
    std::string kind = "clean", what;
    try {
        emulator.launch(test.kernels[broken], test.blocks, test.threads, bytes,
                        Args{in.data(), out.data(), scratch.data()});
    } catch (const simt::Fault& fault) {
        kind = name(fault.kind);
        what = std::to_string(fault.site.line());
        for (const std::string& word : {fault.address, fault.lanes, std::string(fault.what())})
            what += "\t" + word;
    }
    double sum = 0;
    for (float x : out) sum += x;
    const auto& to = emulator.counters.global["out"];
    std::printf("%s\t%d\t%d\t%s\t%g\t%d\t%d\t%d\t%s\t%s\n", test.name, broken,
                static_cast<int>(seed), eager ? "eager" : "lazy", sum,
                static_cast<int>(emulator.counters.global["in"].read),
                static_cast<int>(to.written), static_cast<int>(to.atomics), kind.c_str(),
                what.empty() ? "0\t\t\t" : what.c_str());
}

int main() {
    for (const Case& test : cases)
        for (uint64_t seed = 0; seed < 8; ++seed)
            for (bool eager : {false, true})
                for (bool broken : {false, true}) run(test, broken, seed, eager);
}
