#include "routing.h"

namespace reap {

size_t most_blocks(const Layer& layer) {
    const size_t S = layer.T * layer.K, E = layer.E;
    return S / BLOCK_TOKENS + (S < E ? S : E);
}

// A stable counting sort. Blocks of an expert have nearly equal numbers of whole vectors.
int64_t route(const Layer& layer, const Routing& routing) {
    const int64_t S = layer.T * layer.K;
    const auto ids = static_cast<const int64_t*>(layer.top_k_index);
    const auto present = [&](int64_t id) { return id >= 0 && id < layer.E; };
    for (int64_t slot = 0; slot < S; ++slot)
        if (present(ids[slot])) ++routing.offsets[ids[slot] + 1];
    for (int64_t e = 0; e < layer.E; ++e) routing.offsets[e + 1] += routing.offsets[e];

    int64_t blocks = 0;
    for (int64_t e = 0; e < layer.E; ++e) {
        const int64_t begin = routing.offsets[e], end = routing.offsets[e + 1];
        const int64_t parts = ceil_div(end - begin, BLOCK_TOKENS);
        const int64_t vectors = ceil_div(end - begin, PAD);
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t first = begin + vectors * part / parts * PAD;
            const int64_t last = part + 1 == parts ? end : begin + vectors * (part + 1) / parts * PAD;
            routing.blocks[blocks++] = {first, 0, 0, static_cast<int32_t>(e), static_cast<int32_t>(last - first)};
        }
    }
    for (int64_t slot = 0; slot < S; ++slot)
        if (present(ids[slot])) routing.order[routing.offsets[ids[slot]]++] = static_cast<int32_t>(slot);
    return blocks;
}

}  // namespace reap
