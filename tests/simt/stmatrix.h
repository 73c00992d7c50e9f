// "Warp-level matrix store instruction: stmatrix" of the PTX ISA: ldmatrix the other way round.
#pragma once
#include <cstring>

#include "memory.h"
#include "warp.h"

namespace simt {

struct StoreMatrix {
    int64_t row;
    uint32_t registers[2];
};

namespace detail {

// Lanes 8j to 8j + 7 give the rows of 8x8 matrix j; what the other lanes give is ignored.
inline void store_matrices(Warp& warp, unsigned, void* const* all) {
    Block& block = here();
    Offsets offsets;
    offsets.fill(ABSENT);
    for (unsigned i = 0; i < 16; ++i) {
        const int64_t row = static_cast<StoreMatrix*>(all[i])->row;
        check_shared<Use::store>(row, 16, *warp.lanes[i], warp.lanes[i]->wait.site);
        offsets[i] = static_cast<uint32_t>(row);
        uint16_t elements[8];
        for (unsigned column = 0; column < 8; ++column) {  // element (r, c) is lane r / 2 + 4 c's
            const auto& lane = *static_cast<StoreMatrix*>(all[i % 8 / 2 + 4 * column]);
            elements[column] = static_cast<uint16_t>(lane.registers[i / 8] >> i % 2 * 16);
        }
        std::memcpy(block.shared + row, elements, 16);
    }
    if (block.options.profile) {
        SharedUse& use = block.counters.shared[running->wait.site.text()];
        use.what = "stmatrix";
        count_request(use, offsets, 16);
    }
}

}  // namespace detail

// .m8n8.x2.trans
inline void stmatrix_x2_trans(Shared<char> row, const uint32_t (&r)[2], Site site = Site::here()) {
    StoreMatrix mine{row.offset(), {r[0], r[1]}};
    gather("stmatrix.trans", site, FULL, mine, detail::store_matrices);
}

}  // namespace simt
