// The PTX instructions that the kernels use, one function each: the emulator's side of
// csrc/cuda/ptx.cuh. Section names are those of the PTX ISA.
#pragma once
#include <cstring>

#include "memory.h"
#include "types.h"
#include "warp.h"

namespace simt {

// "Data Movement and Conversion Instructions: cp.async": 16 bytes, or 16 zeros and no read. Until
// the issuing thread waits for its group the destination belongs to the copy; from then on it
// counts as written by that thread.
inline void finish_copy(Block& block, const Copy& copy) {
    if (copy.source) std::memcpy(block.shared + copy.offset, copy.source, 16);
    else std::memset(block.shared + copy.offset, 0, 16);
}

inline void cp_async16(Shared<char> to, Global<const char> from, bool real, Site site = Site::here()) {
    Lane& me = *running;
    Block& block = *me.block;
    if (real) detail::check_global<Use::load>(from, 16, site);
    detail::check_shared<Use::store>(to.offset(), 16, me, site);
    if (block.options.profile) me.warp->requests.add(me.lane, site, "cp.async", static_cast<uint32_t>(to.offset()), 16);
    const auto offset = static_cast<size_t>(to.offset());
    me.copies.push_back({offset, real ? from.unchecked() : nullptr, me.group, site});
    ++me.started;
    block.shared_shadow.set_in_flight(offset, true);
    if (block.options.eager) finish_copy(block, me.copies.back());
    else std::memset(block.shared + offset, 0xff, 16);
}

// "cp.async.commit_group": a group even if empty.
inline void cp_async_commit() { ++running->group; }

// "cp.async.wait_group": all but the N newest groups.
template <int N> void cp_async_wait(Site site = Site::here()) {
    Lane& me = *running;
    Block& block = *me.block;
    size_t done = 0;
    for (; done < me.copies.size() && me.copies[done].group + N < me.group; ++done) {
        const Copy& copy = me.copies[done];
        if (!block.options.eager) finish_copy(block, copy);
        block.shared_shadow.set_in_flight(copy.offset, false);
        detail::touch<Use::store>(block.shared_shadow, copy.offset, 16, me, site);
    }
    me.copies.erase(me.copies.begin(), me.copies.begin() + static_cast<ptrdiff_t>(done));
}

// "Warp Level Matrix Instructions: ldmatrix": lanes 8j to 8j + 7 give the rows of 8x8 matrix j.
struct LoadMatrix {
    int64_t row;
    uint32_t* registers;
};

template <bool transposed> void load_matrices(Warp& warp, unsigned, void* const* all) {
    Block& block = here();
    Offsets offsets;
    uint16_t matrix[4][8][8];
    for (unsigned i = 0; i < 32; ++i) {
        const int64_t row = static_cast<LoadMatrix*>(all[i])->row;
        detail::check_shared<Use::load>(row, 16, *warp.lanes[i], warp.lanes[i]->wait.site);
        std::memcpy(matrix[i / 8][i % 8], block.shared + row, 16);
        offsets[i] = static_cast<uint32_t>(row);
    }
    if (block.options.profile) {
        SharedUse& use = block.counters.shared[running->wait.site.text()];
        use.what = "ldmatrix";
        count_request(use, offsets, 16);
    }
    for (unsigned i = 0; i < 32; ++i) {
        const unsigned row = i / 4, column = i % 4 * 2;
        for (unsigned j = 0; j < 4; ++j) {
            const auto& m = matrix[j];
            const uint32_t low = transposed ? m[column][row] : m[row][column];
            const uint32_t high = transposed ? m[column + 1][row] : m[row][column + 1];
            static_cast<LoadMatrix*>(all[i])->registers[j] = high << 16 | low;
        }
    }
}

inline void ldmatrix_x4(uint32_t (&r)[4], Shared<const char> row, Site site = Site::here()) {
    LoadMatrix mine{row.offset(), r};
    gather("ldmatrix", site, FULL, mine, load_matrices<false>);
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], Shared<const char> row, Site site = Site::here()) {
    LoadMatrix mine{row.offset(), r};
    gather("ldmatrix.trans", site, FULL, mine, load_matrices<true>);
}

// "Warp Level Matrix Instructions: mma.m16n8k16": D = A B + D in fp32, A 16x16 by rows, B 16x8 by
// columns, of 16-bit elements. Lane 4g + t holds what the fragment layouts of the ISA give it.
struct MultiplyAdd {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
};

template <typename T> float widen(uint32_t bits) {
    if constexpr (std::is_same_v<T, __half>) return half_to_float(static_cast<uint16_t>(bits));
    else return bf16_to_float(static_cast<uint16_t>(bits));
}

template <typename T> void multiply_add(Warp&, unsigned, void* const* all) {
    typedef float Four __attribute__((vector_size(16)));
    float a[16][16];
    alignas(16) float b[16][8], d[16][8];
    for (unsigned i = 0; i < 32; ++i) {
        const auto& lane = *static_cast<MultiplyAdd*>(all[i]);
        const unsigned g = i / 4, t = i % 4 * 2;
        for (unsigned r = 0; r < 4; ++r) {
            float* const to = &a[g + r % 2 * 8][t + r / 2 * 8];
            to[0] = widen<T>(lane.a[r]), to[1] = widen<T>(lane.a[r] >> 16);
        }
        for (unsigned r = 0; r < 2; ++r) {
            b[t + r * 8][g] = widen<T>(lane.b[r]);
            b[t + r * 8 + 1][g] = widen<T>(lane.b[r] >> 16);
        }
    }
    for (unsigned m = 0; m < 16; ++m) {
        Four left = {}, right = {};
        for (unsigned k = 0; k < 16; ++k) {
            left += a[m][k] * reinterpret_cast<const Four&>(b[k][0]);
            right += a[m][k] * reinterpret_cast<const Four&>(b[k][4]);
        }
        reinterpret_cast<Four&>(d[m][0]) = left;
        reinterpret_cast<Four&>(d[m][4]) = right;
    }
    for (unsigned i = 0; i < 32; ++i) {
        float* const to = static_cast<MultiplyAdd*>(all[i])->d;
        for (unsigned r = 0; r < 4; ++r) to[r] += d[i / 4 + r / 2 * 8][i % 4 * 2 + r % 2];
    }
    ++here().counters.mma;
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site = Site::here()) {
    MultiplyAdd mine{d, a, {b0, b1}};
    gather("mma.m16n8k16", site, FULL, mine, multiply_add<T>);
}

// "Parallel Synchronization and Communication Instructions: red.add" of a float, and of four: one
// access of 16 bytes, each float added atomically, on chips that can.
inline void red_add(Global<float> p, float x, Site site = Site::here()) {
    detail::check_global<Use::atomic>(p, 4, site);
    *p.unchecked() += x;
}
// "atom.add", and what was there before. Blocks run one after the other here, and the first would count for
// all: so it answers as if they came in turns, and one counts to where it stands when the launch begins.
inline int atom_add(Global<int32_t> p, int x, Site site = Site::here()) {
    detail::check_global<Use::atomic>(p, 4, site);
    Block& block = here();
    const int start = block.counters_at_launch.emplace(p.unchecked(), *p.unchecked()).first->second;
    *p.unchecked() += x;
    return start + x * static_cast<int>(block.turns[p.unchecked()]++ * block.grid.x + block.index.x);
}

inline bool has_red_add4() { return here().options.sm >= 90; }
inline void red_add4(Global<float> p, float4 x, Site site = Site::here()) {
    if (!has_red_add4()) here().fail(Kind::launch, site, *running, "", "red of a vector on a chip older than sm_90");
    detail::check_global<Use::atomic>(p, 16, site);
    float* const to = p.unchecked();
    to[0] += x.x, to[1] += x.y, to[2] += x.z, to[3] += x.w;
}

// "Floating Point Instructions": min.NaN, max.NaN, ex2.approx, rcp.approx. The last two are exact
// here to the last bits, and the device's are not.
inline float min_nan(float x, float y) { return x != x || y != y ? NAN : fminf(x, y); }
inline float max_nan(float x, float y) { return x != x || y != y ? NAN : fmaxf(x, y); }
inline float exp2_approx(float x) { return exp2f(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }

// "griddepcontrol", .wait and .launch_dependents. Launches come one after the other here. Nobody can tell that from
// blocks that start beside those of the launch before: with Options::overlapped no lane touches global memory before
// it has waited, and every lane waits, so that no launch is over while one before it is not.
inline void wait_for_launch_before() { running->waited = true; }
inline void let_next_launch_start() { here().lets_next_start |= !running->waited; }

inline void trap_unless(bool condition, Site site = Site::here()) {
    if (!condition) here().fail(Kind::trap, site, *running, "", "a check of the kernel's own");
}

}  // namespace simt

namespace reap::cuda {
using bf16 = __nv_bfloat16;
using f16 = __half;

using simt::atom_add;
using simt::cast;
using simt::cp_async16;
using simt::cp_async_commit;
using simt::cp_async_wait;
using simt::exp2_approx;
using simt::Global;
using simt::has_red_add4;
using simt::ldmatrix_x4;
using simt::ldmatrix_x4_trans;
using simt::let_next_launch_start;
using simt::load_global;
using simt::load_shared;
using simt::max_nan;
using simt::min_nan;
using simt::mma_m16n8k16;
using simt::named_barrier;
using simt::reciprocal_approx;
using simt::red_add;
using simt::red_add4;
using simt::Shared;
using simt::shared_memory;
using simt::slice;
using simt::store_global;
using simt::store_shared;
using simt::trap_unless;
using simt::wait_for_launch_before;
}  // namespace reap::cuda
