// Small kernels for Hopper with one planted fault each, and the same kernel without it. A line that
// ends in `//! name`, or follows a line of only that, is one that the report of fault `name` may give. Prints one line
// per run: name, broken, seed, mode, sum of `out`, kind ("clean" if none), place and message, by tabs.
#include <cstdio>
#include <vector>

#include "../../csrc/cuda/sm90/ptx.cuh"
#include "emulator.h"

using namespace reap::cuda;

struct Args {
    Global<const char> in;    // 8 rows of 64 bf16, all 1
    Global<float> out;        // 128 floats, zeros
    TensorMap map, beyond;    // of `in`, boxes of 8 rows; the same with 9 rows in the tensor
    TensorMap map4, beyond4;  // the same with dimensions of 1
};

constexpr int BOX = 1024, BARRIERS = 40 << 10;  // bytes of a box, where the mbarriers are
const int origin[2] = {0, 0};

inline Shared<uint64_t> barrier(int n) { return cast<uint64_t>(shared_memory() + BARRIERS) + n; }
inline void wait(Shared<uint64_t> mbarrier, uint32_t parity, simt::Site site = simt::Site::here()) {
    while (!mbarrier_try_wait(mbarrier, parity, site)) {
    }
}
inline void make(int n, int arrivals) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < n; ++i) mbarrier_init(barrier(i), arrivals);
        fence_mbarrier_init();
    }
    __syncthreads();
}
inline float first_of(Shared<char> box) {  // of this thread's chunk
    const uint4 chunk =
        load_shared(cast<uint4>(box) + threadIdx.x % 64);  //! wrong_phase turn_not_waited_for stage_of_the_other_freed
    return simt::bf16_to_float(static_cast<uint16_t>(chunk.x));
}
inline void put(Args& a, float value) { store_global(a.out + threadIdx.x, value); }

// --- mbarriers ---

template <bool broken> __global__ void never_made(Args) {
    if (threadIdx.x == 0) {
        if (broken) store_shared(barrier(0), uint64_t{32});
        else mbarrier_init(barrier(0), 32);
    }
    __syncthreads();
    mbarrier_arrive(barrier(0));  //! never_made
}

template <bool broken> __global__ void made_twice(Args) {
    make(1, 32);
    if (threadIdx.x == 0) mbarrier_init(barrier(broken ? 0 : 1), 32);  //! made_twice
}

template <bool broken> __global__ void arrival_too_many(Args) {
    make(1, 1);
    if (threadIdx.x != 0) return;
    mbarrier_arrive_expect(barrier(0), broken ? 16 : 0);
    mbarrier_arrive(barrier(0));  //! arrival_too_many
}

template <bool broken> __global__ void arrival_too_few(Args) {
    make(1, 32);
    if (!broken || threadIdx.x != 7) mbarrier_arrive(barrier(0));
    wait(barrier(0), 0);  //! arrival_too_few
}

template <bool broken> __global__ void bytes_that_never_come(Args a) {
    make(1, 1);
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(barrier(0), BOX + (broken ? 16 : 0));
        tma_load(shared_memory(), a.map, barrier(0), origin);
    }
    wait(barrier(0), 0);  //! bytes_that_never_come
}

template <bool broken> __global__ void wrong_phase(Args a) {
    store_shared(cast<uint4>(shared_memory()) + threadIdx.x, uint4{});
    make(1, 1);
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(barrier(0), BOX);
        tma_load(shared_memory(), a.map, barrier(0), origin);  //! wrong_phase
    }
    wait(barrier(0), broken);
    put(a, first_of(shared_memory()));
}

template <bool broken> __global__ void no_wait_for_others(Args a) {
    store_shared(cast<float>(shared_memory()) + threadIdx.x, 0.0f);
    make(1, 32);
    store_shared(cast<float>(shared_memory()) + threadIdx.x, 1.0f);  //! no_wait_for_others
    mbarrier_arrive(barrier(0));
    if (!broken) wait(barrier(0), 0);
    put(a, load_shared(cast<float>(shared_memory()) + (threadIdx.x + 1) % 32));  //! no_wait_for_others
}

// One lane arrives for its warp, and what the others wrote is over if the warp met before.
template <bool broken> __global__ void elected_arrival(Args a) {
    const auto shared = cast<float>(shared_memory());
    const unsigned t = threadIdx.x;
    store_shared(shared + t, 0.0f);
    make(1, 1);
    if (t < 32) {
        store_shared(shared + t, 1.0f);  //! elected_arrival
        if (!broken) __syncwarp();
        if (t == 0) mbarrier_arrive(barrier(0));
    } else {
        wait(barrier(0), 0);
        put(a, load_shared(shared + (t - 32)));  //! elected_arrival
    }
}

// One lane waits for its warp, and the others know when they have met it.
template <bool broken> __global__ void elected_wait(Args a) {
    const auto shared = cast<float>(shared_memory());
    const unsigned t = threadIdx.x;
    store_shared(shared + t, 0.0f);
    make(1, 32);
    if (t < 32) {
        store_shared(shared + t, 1.0f);  //! elected_wait
        mbarrier_arrive(barrier(0));
    } else {
        if (t == 32) wait(barrier(0), 0);
        if (!broken) __syncwarp();
        put(a, load_shared(shared + (t - 32)));  //! elected_wait
    }
}

// --- TMA ---

template <bool broken> __global__ void barrier_not_shown(Args a) {
    if (threadIdx.x == 0) mbarrier_init(barrier(0), 1);
    if (threadIdx.x == 0 && !broken) fence_mbarrier_init();
    __syncthreads();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(barrier(0), BOX);
        tma_load(shared_memory(), a.map, barrier(0), origin);  //! barrier_not_shown
    }
    wait(barrier(0), 0);
}

template <bool broken> __global__ void box_misaligned(Args a) {
    make(1, 1);
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(barrier(0), BOX);
        tma_load(shared_memory() + (broken ? 64 : 128), a.map, barrier(0), origin);  //! box_misaligned
    }
    wait(barrier(0), 0);
}

template <bool broken> __global__ void box_past_shared(Args a) {
    make(1, 1);
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(barrier(0), BOX);
        tma_load(shared_memory() + (broken ? 41 << 10 : 39 << 10), a.map, barrier(0), origin);  //! box_past_shared
    }
    wait(barrier(0), 0);
}

template <bool broken> __global__ void tensor_past_buffer(Args a) {
    make(1, 1);
    if (threadIdx.x == 0) {
        const int at[2] = {0, 4};
        mbarrier_arrive_expect(barrier(0), BOX);
        tma_load(shared_memory(), broken ? a.beyond : a.map, barrier(0), at);  //! tensor_past_buffer
    }
    wait(barrier(0), 0);
}

template <bool broken> __global__ void box_over_box(Args a) {
    make(1, 1);
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(barrier(0), 2 * BOX);
        tma_load(shared_memory(), a.map, barrier(0), origin);
        tma_load(shared_memory() + (broken ? BOX / 2 : BOX), a.map, barrier(0), origin);  //! box_over_box
    }
    wait(barrier(0), 0);
}

template <bool broken> __global__ void box_over_readers(Args a) {
    make(2, 1);
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(barrier(0), BOX);
        tma_load(shared_memory(), a.map, barrier(0), origin);
    }
    wait(barrier(0), 0);
    put(a, first_of(shared_memory()));
    if (!broken) __syncthreads();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(barrier(1), BOX);
        tma_load(shared_memory(), a.map, barrier(1), origin);  //! box_over_readers
    }
    wait(barrier(1), 0);
}

template <bool broken> __global__ void box_after_the_end(Args a) {
    make(1, 1);
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(barrier(0), BOX);
        tma_load(shared_memory(), a.map, barrier(0), origin);
    }
    if (!broken) wait(barrier(0), 0);
}

// --- cp.async that signals an mbarrier ---

template <bool broken> __global__ void signal_before_copy(Args a) {
    make(1, 64);
    if (broken) cp_async_mbarrier_arrive(barrier(0));
    cp_async16(shared_memory() + threadIdx.x * 16, a.in + threadIdx.x * 16, true);  //! signal_before_copy
    if (!broken) cp_async_mbarrier_arrive(barrier(0));
    wait(barrier(0), 0);
    const uint4 chunk = load_shared(cast<uint4>(shared_memory()) + (threadIdx.x + 1) % 64);  //! signal_before_copy
    put(a, simt::bf16_to_float(static_cast<uint16_t>(chunk.x)));
}

template <bool broken> __global__ void thread_ends_first(Args a) {
    make(1, 64);
    cp_async16(shared_memory() + threadIdx.x * 16, a.in + threadIdx.x * 16, true);  //! thread_ends_first
    cp_async_mbarrier_arrive(barrier(0));
    if (!broken || threadIdx.x >= 32) wait(barrier(0), 0);
}

// --- launches that start early ---

template <bool broken> __global__ void launch_loads_early(Args a) {
    make(1, 1);
    const int at[4] = {0, 4, 0, 0}, all[4] = {0, 0, 0, 0};
    let_next_launch_start();
    if (threadIdx.x == 0) tma_prefetch(a.map4, at);  // half of the box is outside of the tensor
    if (!broken) wait_for_launch_before();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(barrier(0), BOX);
        tma_load(shared_memory(), a.map4, barrier(0), all);  //! launch_loads_early
    }
    wait(barrier(0), 0);
    put(a, first_of(shared_memory()));
}

template <bool broken> __global__ void hint_past_buffer(Args a) {
    const int at[4] = {0, 4, 0, 0};
    tma_prefetch(broken ? a.beyond4 : a.map4, at);  //! hint_past_buffer
}

// --- wgmma ---

constexpr int A = 0, B = 8 << 10;  // [64, 64] and [256, 64] bf16, all 1

inline uint64_t rows_at(int offset) { return uint64_t{1} << 62 | uint64_t{64} << 32 | offset >> 4; }

inline void store_operands() {
    for (int i = threadIdx.x; i < 2560; i += blockDim.x)
        store_shared(cast<uint4>(shared_memory()) + i, uint4{0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80});
}

// Shows what was stored to wgmma: before or after the stores, or never.
template <bool before, bool after> void multiply_after(Args& a) {
    if (before) fence_proxy_async();
    store_operands();
    if (after) fence_proxy_async();
    __syncthreads();
    float d[4][8][4];
    wgmma_fence();
    wgmma_m64n256k16<bf16, false>(d, rows_at(A), rows_at(B), false);  //! unfenced_stores early_fence
    wgmma_commit();
    wgmma_wait<0>();
    put(a, d[0][0][0]);
}
template <bool broken> __global__ void unfenced_stores(Args a) { multiply_after<false, !broken>(a); }
template <bool broken> __global__ void early_fence(Args a) { multiply_after<broken, !broken>(a); }

// The operands by cp.async: who waits for them fences.
template <bool broken> __global__ void unfenced_copies(Args a) {
    make(1, 128);
    for (int i = threadIdx.x; i < 2560; i += blockDim.x) cp_async16(shared_memory() + i * 16, a.in + i % 64 * 16, true);
    cp_async_mbarrier_arrive(barrier(0));
    wait(barrier(0), 0);
    if (!broken) fence_proxy_async();
    float d[4][8][4];
    wgmma_fence();
    wgmma_m64n256k16<bf16, false>(d, rows_at(A), rows_at(B), false);  //! unfenced_copies
    wgmma_commit();
    wgmma_wait<0>();
    put(a, d[0][0][0]);
}

enum Mistake { none, no_fence, touch, no_wait, short_wait, odd_lane, odd_warp, no_swizzle, past_b };

// Two products of 16 ones each; then the last operand is overwritten.
template <Mistake mistake> void multiply_twice(Args& a) {
    store_operands();
    fence_proxy_async();
    __syncthreads();
    const bool odd = mistake == odd_lane ? threadIdx.x == 9 : mistake == odd_warp && threadIdx.x / 32 == 2;
    const uint64_t left = mistake == no_swizzle ? rows_at(A) << 2 >> 2 : rows_at(odd ? A + 32 : A);
    float d[4][8][4] = {};
    if (mistake != no_fence) wgmma_fence();
    //! missing_wgmma_fence lanes_differ warps_differ no_swizzle_mode unwritten_operand
    wgmma_m64n256k16<bf16, false>(d, left, rows_at(mistake == past_b ? B + 2048 : B), false);
    wgmma_commit();
    if (mistake == touch) d[3][7][3] = 0;
    wgmma_m64n256k16<bf16, false>(d, rows_at(A + 32), rows_at(B + 32), true);  //! touched_in_flight
    wgmma_commit();
    if (mistake == short_wait) wgmma_wait<1>();
    else if (mistake != no_wait) wgmma_wait<0>();
    __syncthreads();
    if (threadIdx.x == 0)
        store_shared(cast<float>(shared_memory() + (B + 32)), 2.0f);  //! missing_wgmma_wait short_wgmma_wait
    put(a, d[3][7][3]);
}
template <bool broken> __global__ void missing_wgmma_fence(Args a) { multiply_twice<broken ? no_fence : none>(a); }
template <bool broken> __global__ void touched_in_flight(Args a) { multiply_twice<broken ? touch : none>(a); }
template <bool broken> __global__ void missing_wgmma_wait(Args a) { multiply_twice<broken ? no_wait : none>(a); }
template <bool broken> __global__ void short_wgmma_wait(Args a) { multiply_twice<broken ? short_wait : none>(a); }
template <bool broken> __global__ void lanes_differ(Args a) { multiply_twice<broken ? odd_lane : none>(a); }
template <bool broken> __global__ void warps_differ(Args a) { multiply_twice<broken ? odd_warp : none>(a); }
template <bool broken> __global__ void no_swizzle_mode(Args a) { multiply_twice<broken ? no_swizzle : none>(a); }
template <bool broken> __global__ void unwritten_operand(Args a) { multiply_twice<broken ? past_b : none>(a); }

// A ring of one stage for its first row: given back before the product is known to be done.
template <bool broken> __global__ void released_too_soon(Args a) {
    make(2, 1);
    store_operands();
    fence_proxy_async();
    __syncthreads();
    if (threadIdx.x >= 128) {
        if (threadIdx.x != 128) return;
        wait(barrier(0), 0);
        mbarrier_arrive_expect(barrier(1), BOX);
        tma_load(shared_memory(), a.map, barrier(1), origin);  //! released_too_soon
        return;
    }
    float d[4][8][4];
    wgmma_fence();
    wgmma_m64n256k16<bf16, false>(d, rows_at(A), rows_at(B), false);
    wgmma_commit();
    if (!broken) wgmma_wait<0>();
    named_barrier(1, 128);
    if (threadIdx.x == 0) mbarrier_arrive(barrier(0));
    if (broken) wgmma_wait<0>();
    put(a, d[0][0][0]);
    wait(barrier(1), 0);
}

// Accumulators of two products at a time.
template <bool broken> __global__ void second_product_touched(Args a) {
    store_operands();
    fence_proxy_async();
    __syncthreads();
    float c[3][8][4] = {}, d[3][8][4] = {};
    wgmma_fence();
    for (int k = 0; k < 2; ++k) {
        wgmma_m64n192k16<bf16, false>(c, rows_at(A + 32 * k), rows_at(B + 32 * k), true);
        wgmma_m64n192k16<bf16, false>(d, rows_at(A + 32 * k), rows_at(B + 32 * k), true);  //! second_product_touched
        wgmma_commit();
        if (broken && k == 0) d[2][7][3] = 0;
    }
    wgmma_wait<0>();
    put(a, d[2][7][3]);
}

// --- groups that take turns at a ring of one stage ---

// Loads two boxes, each into what the last one's reader has left: barrier 0 when full, 1 when empty.
inline void load_two_boxes(Args& a) {
    for (int i = 0; i < 2; ++i) {
        if (i == 1) wait(barrier(1), 0);
        mbarrier_arrive_expect(barrier(0), BOX);
        tma_load(shared_memory(), a.map, barrier(0), origin);  //! turn_not_waited_for stage_of_the_other_freed
    }
}

// The second box is the second warp's. Before its turn, which barrier 2 gives, the phase that it waits for looks
// as if it were over; barrier 3 has it look before anything is loaded.
template <bool broken> __global__ void turn_not_waited_for(Args a) {
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp < 2) store_shared(cast<uint4>(shared_memory()) + threadIdx.x, uint4{});
    make(4, 1);
    if (warp == 2) {
        if (lane != 0) return;
        wait(barrier(3), 0);
        load_two_boxes(a);
        return;
    }
    if (warp == 1) {
        if (lane == 0) mbarrier_arrive(barrier(3));
        if (!broken) wait(barrier(2), 0);
    }
    wait(barrier(0), warp);
    put(a, first_of(shared_memory()));
    __syncwarp();
    if (lane != 0) return;
    mbarrier_arrive(barrier(1));
    if (warp == 0) mbarrier_arrive(barrier(2));
}

// The first box is the first warp's to read and to leave.
template <bool broken> __global__ void stage_of_the_other_freed(Args a) {
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    make(2, 1);
    if (warp == 2) {
        if (lane == 0) load_two_boxes(a);
        return;
    }
    wait(barrier(0), 0);
    if (warp == 0) put(a, first_of(shared_memory()));
    __syncwarp();
    if (lane == 0 && warp == broken) mbarrier_arrive(barrier(1));
    wait(barrier(0), 1);
}

template <bool broken> __global__ void half_a_warpgroup(Args a) {
    store_operands();
    fence_proxy_async();
    __syncthreads();
    if (broken && threadIdx.x / 32 >= 2) return;
    float d[4][8][4];
    wgmma_fence();
    wgmma_m64n256k16<bf16, false>(d, rows_at(A), rows_at(B), false);
    wgmma_commit();
    wgmma_wait<0>();  //! half_a_warpgroup
    put(a, d[0][0][0]);
}

// Widths that are not the widest, and an A whose rows in shared memory are k.
enum Narrow { right, no_token, no_weights, other_width, held };

// Two products of 16 ones each, [64, 24].
template <Narrow mistake> void multiply_narrow(Args& a) {
    const int bytes = B + (mistake == no_token ? 2048 : 3072);
    for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x)
        store_shared(cast<uint4>(shared_memory()) + i, uint4{0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80});
    fence_proxy_async();
    __syncthreads();
    float d[16][4] = {};
    const uint64_t left = rows_at(mistake == no_weights ? B + 2048 : A);
    wgmma_fence();
    wgmma_m64k16<bf16, true, 24>(d, left, rows_at(B));  //! unwritten_token unwritten_weights
    wgmma_commit();
    d[mistake == held ? 2 : 3][1] = 0;  // the fourth octet is nobody's
    constexpr int N = mistake == other_width ? 16 : 24;
    wgmma_m64k16<bf16, true, N>(d, rows_at(A), rows_at(B));  //! touched_octet another_width
    wgmma_commit();
    wgmma_wait<0>();
    put(a, d[2][1]);
}
template <bool broken> __global__ void unwritten_token(Args a) { multiply_narrow<broken ? no_token : right>(a); }
template <bool broken> __global__ void unwritten_weights(Args a) { multiply_narrow<broken ? no_weights : right>(a); }
template <bool broken> __global__ void touched_octet(Args a) { multiply_narrow<broken ? held : right>(a); }
template <bool broken> __global__ void another_width(Args a) { multiply_narrow<broken ? other_width : right>(a); }

// --- stmatrix ---

enum Matrix { whole, odd_row, row_past_shared, unfenced, unmet, lane_missing };

// Two matrices whose rows are pairs of 0 and 1 in bf16, which are 1 in fp32, and a copy of them.
template <Matrix mistake> void store_matrices(Args& a) {
    const unsigned t = threadIdx.x, ones = t / 4 % 2 ? 0x3f803f80 : 0;
    if (mistake == lane_missing && t == 9) return;
    const int at = mistake == row_past_shared ? BARRIERS + 1024 - 8 * 16 : mistake == odd_row ? 8 : 0;
    const Shared<char> row = shared_memory() + (at + t % 16 * 16);
    stmatrix_x2_trans(row, {ones, ones});  //! stmatrix_odd_row stmatrix_past_shared stmatrix_lane_missing
    if (mistake != unfenced) fence_proxy_async();
    if (mistake != unmet) __syncwarp();
    if (t != 0) return;
    bulk_store(a.out, Shared<float>(0), 256);  //! stmatrix_unfenced stmatrix_unmet
    bulk_commit();
    bulk_wait_read();
}
template <bool broken> __global__ void stmatrix_odd_row(Args a) { store_matrices<broken ? odd_row : whole>(a); }
template <bool broken> __global__ void stmatrix_past_shared(Args a) {
    store_matrices<broken ? row_past_shared : whole>(a);
}
template <bool broken> __global__ void stmatrix_unfenced(Args a) { store_matrices<broken ? unfenced : whole>(a); }
template <bool broken> __global__ void stmatrix_unmet(Args a) { store_matrices<broken ? unmet : whole>(a); }
template <bool broken> __global__ void stmatrix_lane_missing(Args a) {
    store_matrices<broken ? lane_missing : whole>(a);
}

// --- bulk copies to global memory ---

enum Slip {
    fine,
    no_proxy_fence,
    no_meeting,
    no_read_wait,
    no_return,
    half_a_chunk,
    odd_source,
    odd_target,
    past_target,
    past_source,
    to_input,
    from_nothing
};

// Lane i writes 16 bytes of ones, and adds those of the next lane to its own of `out`; twice, in the same
// place.
template <Slip slip> void add_twice(Args& a) {
    const auto mine = cast<float4>(shared_memory()) + threadIdx.x;
    const int next = (threadIdx.x + 1) % 32, bytes = slip == half_a_chunk ? 24 : 16;
    const int source = slip == odd_source ? 16 * next + 8 : slip == past_source ? (BARRIERS + 1024) : 16 * next;
    Global<float> target = a.out + 4 * threadIdx.x;
    if (slip == odd_target) target = target + 2;
    if (slip == past_target) target = target + 228;
    if (slip == to_input) target = reinterpret_cast<float*>(const_cast<char*>(a.in.unchecked()));
    for (int round = 0; round < 2; ++round) {
        if (slip != from_nothing || threadIdx.x % 2)
            store_shared(mine, float4{1, 1, 1, 1});  //! bulk_unmet bulk_overwritten bulk_met_too_late
        if (slip != no_proxy_fence) fence_proxy_async();
        if (slip != no_meeting || round == 0) __syncwarp();
        const Shared<float> from(source);
        //! bulk_unfenced bulk_unmet bulk_met_too_late bulk_half_a_chunk bulk_odd_source bulk_odd_target
        //! bulk_past_target bulk_past_source bulk_to_input bulk_from_nothing
        bulk_add(target, from, bytes);
        bulk_commit();
        if (slip != no_read_wait || round == 1) bulk_wait_read();
        if (slip != no_return) __syncwarp();
    }
}
template <bool broken> __global__ void bulk_unfenced(Args a) { add_twice<broken ? no_proxy_fence : fine>(a); }
template <bool broken> __global__ void bulk_unmet(Args a) { add_twice<broken ? no_meeting : fine>(a); }
template <bool broken> __global__ void bulk_overwritten(Args a) { add_twice<broken ? no_read_wait : fine>(a); }
template <bool broken> __global__ void bulk_met_too_late(Args a) { add_twice<broken ? no_return : fine>(a); }
template <bool broken> __global__ void bulk_half_a_chunk(Args a) { add_twice<broken ? half_a_chunk : fine>(a); }
template <bool broken> __global__ void bulk_odd_source(Args a) { add_twice<broken ? odd_source : fine>(a); }
template <bool broken> __global__ void bulk_odd_target(Args a) { add_twice<broken ? odd_target : fine>(a); }
template <bool broken> __global__ void bulk_past_target(Args a) { add_twice<broken ? past_target : fine>(a); }
template <bool broken> __global__ void bulk_past_source(Args a) { add_twice<broken ? past_source : fine>(a); }
template <bool broken> __global__ void bulk_to_input(Args a) { add_twice<broken ? to_input : fine>(a); }
template <bool broken> __global__ void bulk_from_nothing(Args a) { add_twice<broken ? from_nothing : fine>(a); }

// The same once, by a copy.
template <bool commits, bool waits> void copy_once(Args& a) {
    store_shared(cast<float4>(shared_memory()) + threadIdx.x, float4{1, 1, 1, 1});
    fence_proxy_async();
    //! bulk_not_committed bulk_not_waited
    bulk_store(a.out + 4 * threadIdx.x, cast<float>(shared_memory()) + 4 * threadIdx.x, 16);
    if (commits) bulk_commit();
    if (waits) bulk_wait_read();
}
template <bool broken> __global__ void bulk_not_committed(Args a) { copy_once<!broken, true>(a); }
template <bool broken> __global__ void bulk_not_waited(Args a) { copy_once<true, !broken>(a); }

struct Case {
    const char* name;
    void (*kernels[2])(Args);  // healthy, broken
    unsigned threads;
};

#define CASE(kernel, threads) {#kernel, {kernel<false>, kernel<true>}, threads}
const Case cases[] = {
    CASE(never_made, 32),
    CASE(made_twice, 32),
    CASE(arrival_too_many, 32),
    CASE(arrival_too_few, 32),
    CASE(bytes_that_never_come, 32),
    CASE(wrong_phase, 64),
    CASE(no_wait_for_others, 32),
    CASE(elected_arrival, 64),
    CASE(elected_wait, 64),
    CASE(barrier_not_shown, 32),
    CASE(box_misaligned, 32),
    CASE(box_past_shared, 32),
    CASE(tensor_past_buffer, 32),
    CASE(box_over_box, 32),
    CASE(box_over_readers, 64),
    CASE(box_after_the_end, 32),
    CASE(signal_before_copy, 64),
    CASE(thread_ends_first, 64),
    CASE(launch_loads_early, 64),
    CASE(hint_past_buffer, 32),
    CASE(unfenced_stores, 128),
    CASE(early_fence, 128),
    CASE(unfenced_copies, 128),
    CASE(missing_wgmma_fence, 128),
    CASE(touched_in_flight, 128),
    CASE(missing_wgmma_wait, 128),
    CASE(short_wgmma_wait, 128),
    CASE(lanes_differ, 128),
    CASE(warps_differ, 128),
    CASE(no_swizzle_mode, 128),
    CASE(unwritten_operand, 128),
    CASE(released_too_soon, 160),
    CASE(half_a_warpgroup, 128),
    CASE(unwritten_token, 128),
    CASE(unwritten_weights, 128),
    CASE(touched_octet, 128),
    CASE(another_width, 128),
    CASE(stmatrix_odd_row, 32),
    CASE(stmatrix_past_shared, 32),
    CASE(stmatrix_unfenced, 32),
    CASE(stmatrix_unmet, 32),
    CASE(stmatrix_lane_missing, 32),
    CASE(second_product_touched, 128),
    CASE(turn_not_waited_for, 96),
    CASE(stage_of_the_other_freed, 96),
    CASE(bulk_unfenced, 32),
    CASE(bulk_unmet, 32),
    CASE(bulk_overwritten, 32),
    CASE(bulk_met_too_late, 32),
    CASE(bulk_half_a_chunk, 32),
    CASE(bulk_odd_source, 32),
    CASE(bulk_odd_target, 32),
    CASE(bulk_past_target, 32),
    CASE(bulk_past_source, 32),
    CASE(bulk_to_input, 32),
    CASE(bulk_from_nothing, 32),
    CASE(bulk_not_committed, 32),
    CASE(bulk_not_waited, 32),
};

void run(const Case& test, bool broken, uint64_t seed, bool eager) {
    alignas(16) static uint16_t in[512];
    for (uint16_t& one : in) one = 0x3f80;
    std::vector<float> out(256);
    simt::Options options;
    options.seed = seed, options.eager = eager, options.access_limit = 1000000;
    options.overlapped = std::string(test.name).rfind("launch_", 0) == 0;
    simt::Emulator emulator(options);
    emulator.add_buffer("in", in, sizeof(in), false);
    emulator.add_buffer("out", out.data(), out.size() * sizeof(float), true);
    const Global<const char> data = reinterpret_cast<const char*>(in);
    const auto map = [&](int64_t rows) { return make_tensor_map(TensorBox{data, 2, {64, rows}, {1, 64}, {64, 8}}); };
    const auto map4 = [&](int64_t rows) {
        return make_tensor_map(TensorBox{data, 4, {64, rows, 1, 1}, {1, 64, 1024, 1024}, {64, 8, 1, 1}});
    };
    std::string kind = "clean", what = "\t";
    try {
        emulator.launch(test.kernels[broken], 1, test.threads, BARRIERS + 1024,
                        Args{data, out.data(), map(8), map(9), map4(8), map4(9)});
    } catch (const simt::Fault& fault) {
        kind = name(fault.kind);
        what = fault.site.text() + "\t" + fault.what();
    }
    double sum = 0;
    for (float x : out) sum += x;
    std::printf("%s\t%d\t%d\t%s\t%g\t%s\t%s\n", test.name, broken, static_cast<int>(seed), eager ? "eager" : "lazy",
                sum, kind.c_str(), what.c_str());
}

int main() {
    for (const Case& test : cases)
        for (uint64_t seed = 0; seed < 6; ++seed)
            for (bool eager : {false, true})
                for (bool broken : {false, true}) run(test, broken, seed, eager);
}
