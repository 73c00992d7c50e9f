// What the lanes of a warp, or the threads of a block, do together: CUDA's own intrinsics. As CUDA
// documents them, __syncwarp orders memory and the others do not.
#pragma once
#include "block.h"

namespace simt {

constexpr unsigned FULL = 0xffffffff;

// Gathers the arguments of all lanes in `mask`; the last to come runs `collective` for everybody.
template <typename Arguments>
void gather(const char* what, Site site, unsigned mask, Arguments& mine,
            void (*collective)(Warp&, unsigned mask, void* const* arguments)) {
    here().gather(what, site, mask, &mine, collective);
}

template <typename T> struct Shuffle {
    T value, result;
    int source;
};

inline int my_lane() { return static_cast<int>(running->lane); }

template <typename T> T shuffle(const char* what, Site site, unsigned mask, T value, int source) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    Shuffle<T> mine{value, value, source};
    gather(what, site, mask, mine, [](Warp& warp, unsigned mask, void* const* all) {
        for (unsigned i = 0; i < 32; ++i) {
            if (!(mask & 1u << i)) continue;
            auto& to = *static_cast<Shuffle<T>*>(all[i]);
            if (!(mask & 1u << to.source)) {
                const Wait& wait = warp.lanes[i]->wait;
                here().fail(
                    Kind::divergence, wait.site, *warp.lanes[i], "",
                    std::string(wait.what) + " from lane " + std::to_string(to.source) + ", which takes no part");
            }
            to.result = static_cast<Shuffle<T>*>(all[to.source])->value;
        }
    });
    return mine.result;
}

struct Vote {
    uint64_t value;
    unsigned result;
};

// Bits of the lanes whose value equals `value` of the asking lane.
inline unsigned match(const char* what, Site site, unsigned mask, uint64_t value) {
    Vote mine{value, 0};
    gather(what, site, mask, mine, [](Warp&, unsigned mask, void* const* all) {
        for (unsigned i = 0; i < 32; ++i) {
            for (unsigned j = 0; (mask & 1u << i) && j < 32; ++j) {
                if (!(mask & 1u << j)) continue;
                auto& to = *static_cast<Vote*>(all[i]);
                to.result |= unsigned{static_cast<Vote*>(all[j])->value == to.value} << j;
            }
        }
    });
    return mine.result;
}

inline unsigned ballot(const char* what, Site site, unsigned mask, bool predicate) {
    const unsigned same = match(what, site, mask, predicate);
    return predicate ? same : mask & ~same;
}

// bar.sync with an id and a count of threads (PTX ISA, "barrier").
inline void named_barrier(int id, int threads, Site site = Site::here()) {
    here().barrier(static_cast<uint32_t>(id), static_cast<uint32_t>(threads), "bar.sync", site);
}

}  // namespace simt

inline void __syncthreads(simt::Site site = simt::Site::here()) {
    simt::here().barrier(0, simt::here().threads, "__syncthreads", site);
}

inline void __syncwarp(unsigned mask = simt::FULL, simt::Site site = simt::Site::here()) {
    // CUDA's default names all lanes; those that a last, partial warp lacks are not meant.
    mask &= simt::running->warp->exist;
    simt::Vote nothing{};
    const auto order = [](simt::Warp& warp, unsigned mask, void* const*) { simt::here().order_warp(warp, mask); };
    simt::gather("__syncwarp", site, mask, nothing, +order);
}

// Of the lanes in groups of `width`; a source outside the group is the lane itself.
template <typename T>
T __shfl_sync(unsigned mask, T v, int lane, int width = 32, simt::Site site = simt::Site::here()) {
    const int me = simt::my_lane(), first = me & -width;
    return simt::shuffle("__shfl_sync", site, mask, v, first | (lane & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, simt::Site site = simt::Site::here()) {
    const int me = simt::my_lane(), first = me & -width, from = me ^ bits;
    return simt::shuffle("__shfl_xor_sync", site, mask, v, from < first + width ? from : me);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, simt::Site site = simt::Site::here()) {
    const int me = simt::my_lane(), first = me & -width, from = me - static_cast<int>(delta);
    return simt::shuffle("__shfl_up_sync", site, mask, v, from >= first ? from : me);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, simt::Site site = simt::Site::here()) {
    const int me = simt::my_lane(), first = me & -width, from = me + static_cast<int>(delta);
    return simt::shuffle("__shfl_down_sync", site, mask, v, from < first + width ? from : me);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Site site = simt::Site::here()) {
    return simt::ballot("__ballot_sync", site, mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate, simt::Site site = simt::Site::here()) {
    return simt::ballot("__any_sync", site, mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate, simt::Site site = simt::Site::here()) {
    return simt::ballot("__all_sync", site, mask, predicate != 0) == mask;
}
template <typename T> unsigned __match_any_sync(unsigned mask, T value, simt::Site site = simt::Site::here()) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    return simt::match("__match_any_sync", site, mask, bits);
}
