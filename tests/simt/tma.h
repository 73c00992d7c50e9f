// Hopper's TMA: boxes of tensors in global memory, with the 128-byte swizzle. See "Tensors" and
// "cp.async.bulk.tensor" in the PTX ISA, and cuTensorMapEncodeTiled in the driver API.
#pragma once
#include <vector>

#include "mbarrier.h"

namespace simt {

struct TensorMap {
    Global<const char> data;
    int rank = 0;
    int64_t sizes[5], strides[5], box[5];  // fastest first; strides in bytes
};

// What the driver would refuse, and a stride of 0, which its documentation does not mention.
template <typename Box> TensorMap make_tensor_map(const Box& tensor) {
    const auto refuse = [](const std::string& what) {
        throw Fault(Kind::launch, Site(), "", "", "a tensor map " + what);
    };
    TensorMap map;
    map.data = tensor.data;
    map.rank = tensor.rank;
    if (reinterpret_cast<uintptr_t>(map.data.unchecked()) % 16 != 0)
        refuse("of an address that is not a multiple of 16");
    for (int i = 0; i < map.rank; ++i) {
        map.sizes[i] = tensor.sizes[i], map.strides[i] = 2 * tensor.strides[i], map.box[i] = tensor.box[i];
        if (map.sizes[i] < 1 || map.sizes[i] > int64_t{1} << 32) refuse("of an impossible size");
        if (map.box[i] < 1 || map.box[i] > 256) refuse("with a box of more than 256 elements");
        if (i > 0 && (map.strides[i] % 16 != 0 || map.strides[i] <= 0 || map.strides[i] >= int64_t{1} << 40))
            refuse("with a stride of " + std::to_string(map.strides[i]) + " bytes");
    }
    if (map.strides[0] != 2) refuse("whose first dimension is not contiguous");
    if (2 * map.box[0] > 128) refuse("with a row of a box wider than the swizzle");
    return map;
}

// None is kept: a buffer is known only as long as its emulator.
template <typename Box> TensorMap kept_tensor_map(const Box& tensor) { return make_tensor_map(tensor); }

namespace detail {

// The bytes of a box as they lie in shared memory, but for the swizzle. Elements outside of the
// tensor are zeros, memory that nobody wrote is NaN. Calls touch() for each piece that is read.
template <typename Touch> std::vector<char> read_box(const TensorMap& map, const int64_t (&at)[5], Touch touch) {
    int64_t rows = 1;
    for (int i = 1; i < map.rank; ++i) rows *= map.box[i];
    std::vector<char> bytes(static_cast<size_t>(rows * map.box[0] * 2));
    for (int64_t row = 0; row < rows; ++row) {
        bool inside = true;
        int64_t offset = 0;
        for (int64_t i = 1, rest = row; i < map.rank; rest /= map.box[i], ++i) {
            const int64_t place = at[i] + rest % map.box[i];
            inside &= 0 <= place && place < map.sizes[i];
            offset += place * map.strides[i];
        }
        const int64_t first = std::max<int64_t>(at[0], 0);
        const int64_t last = std::min(at[0] + map.box[0], map.sizes[0]);
        for (int64_t n = first, step; inside && n < last; n += step) {
            const Global<const char> from = map.data + (offset + 2 * n);
            const auto address = reinterpret_cast<uintptr_t>(from.unchecked());
            step = address % 16 == 0 && n + 8 <= last ? 8 : 1;
            const auto size = static_cast<size_t>(2 * step);
            const Buffer* home = from.home();
            const bool known = home && home->begin <= address && address + size <= home->end;
            char* const to = &bytes[static_cast<size_t>(2 * (row * map.box[0] + n - at[0]))];
            if (known && home->shadow && !home->shadow->valid(address - home->shadow_begin, size)) {
                std::memset(to, 0xff, size);
                continue;
            }
            touch(from, size);
            std::memcpy(to, from.unchecked(), size);
        }
    }
    return bytes;
}

// The tensor and the place of a box.
template <int RANK> std::vector<int64_t> name_of(const TensorMap& map, const int (&at)[RANK]) {
    std::vector<int64_t> name(at, at + RANK);
    name.push_back(reinterpret_cast<int64_t>(map.data.unchecked()));
    return name;
}

// Chunk j of the row of 128 bytes lies where chunk j ^ row % 8 would, rows counted from address 0.
inline size_t swizzled(size_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void claim(size_t offset, const Stamp& now, Site site) {
    Lane& me = *running;
    Block& block = *me.block;
    Shadow& shadow = block.shared_shadow;
    if (offset + 16 > block.shared_bytes)
        block.fail(Kind::out_of_bounds, site, me, shared_address(offset), "a copy past shared memory");
    if (const Stamp* other = shadow.touch<&Cell::note_write>(offset, 16, me.view, now))
        block.fail(Kind::race, site, me, shared_address(offset),
                   "a copy to bytes not ordered after " + block.describe(*other));
    if (shadow.in_flight(offset))
        block.fail(Kind::copy_in_flight, site, me, shared_address(offset), "a copy over another one");
    shadow.set_in_flight(offset, true);
    shadow.set_valid(offset, 16, false);
    std::memset(block.shared + offset, 0xff, 16);
}

}  // namespace detail

// "cp.async.bulk.tensor": the bytes belong to the copy until the barrier's phase is over.
template <int RANK>
void tma_load(Shared<char> to, const TensorMap& map, Shared<uint64_t> barrier, const int (&at)[RANK],
              Site site = Site::here()) {
    Lane& me = *running;
    Block& block = *me.block;
    Mbarrier& mbarrier = detail::mbarrier(barrier, site);
    if (!mbarrier.shown)
        block.fail(Kind::proxy, site, me, detail::shared_address(barrier.offset()),
                   "no fence has shown this mbarrier to TMA");
    if (map.rank != RANK) block.fail(Kind::launch, site, me, "", "a tensor map of another rank");
    if (to.offset() % 128 != 0)
        block.fail(Kind::misaligned, site, me, detail::shared_address(to.offset()),
                   "a box starts at a multiple of 128");
    int64_t place[5] = {};
    for (int i = 0; i < RANK; ++i) place[i] = at[i];
    const auto read = [site](Global<const char> from, size_t size) {
        detail::check_global<Use::load>(from, size, site);
    };
    const std::vector<char> bytes = detail::read_box(map, place, read);
    if (hopper().hinted.erase(detail::name_of(map, at))) block.counters.met += bytes.size();
    const auto start = static_cast<size_t>(to.offset());
    const Stamp now = detail::engine_stamp(mbarrier.engine, mbarrier.phase + 1, site);
    for (size_t i = 0; i < bytes.size(); i += 16) detail::claim(start + i, now, site);
    const auto land = [&block, start](const std::vector<char>& bytes) {
        for (size_t i = 0; i < bytes.size(); i += 16)
            std::memcpy(block.shared + detail::swizzled(start + i), &bytes[i], 16);
    };
    if (block.options.eager) land(bytes);
    const size_t size = bytes.size();
    block.background.push_back([=, &block, &mbarrier] {
        if (!block.options.eager) land(detail::read_box(map, place, [](Global<const char>, size_t) {}));
        for (size_t i = start; i < start + size; i += 16) {
            block.shared_shadow.set_in_flight(i, false);
            block.shared_shadow.set_valid(i, 16, true);
        }
        mbarrier.bytes -= static_cast<int64_t>(size);
        mbarrier.complete_if_done(block);
    });
}

// "cp.async.bulk.prefetch.tensor": a hint, which may come before the wait for the launch before. Counted are whole
// boxes; what of them lies outside of the tensor is not read.
inline void tma_prefetch(const TensorMap& map, const int (&at)[4], Site site = Site::here()) {
    Block& block = here();
    if (map.rank != 4) block.fail(Kind::launch, site, *running, "", "a tensor map of another rank");
    const int64_t place[5] = {at[0], at[1], at[2], at[3], 0};
    const auto hint = [site](Global<const char> from, size_t size) {
        detail::check_global<Use::hint>(from, size, site);
    };
    block.counters.hinted += detail::read_box(map, place, hint).size();
    hopper().hinted.insert(detail::name_of(map, at));
}

// "prefetch" with .tensormap
inline void prefetch_map(const TensorMap&) {}

}  // namespace simt
