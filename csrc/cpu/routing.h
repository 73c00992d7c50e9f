// Top-k ids -> slots sorted by expert, and each expert's cut into blocks.
#pragma once
#include <cstddef>

#include "job.h"

namespace reap {

struct Routing {
    int32_t* order;    // sorted position -> slot; slots without expert are not in it [S]
    Block* blocks;     // ascending by expert [most_blocks(layer)]
    int64_t* offsets;  // zeros, for the sort: expert -> next free sorted position [E+1]
};

// A bound on the number of blocks.
size_t most_blocks(const Layer&);

// Returns the number of blocks. Where a block's rows of inner and partials are is left open.
int64_t route(const Layer&, const Routing&);

}  // namespace reap
