// The two forms of down on Hopper, and which of them takes less time. On the host.
//
// cooperative   tiles of 256 columns, which both warpgroups share: after a tile's products come its results
// pingpong      tiles of 192, of one warpgroup each: its results leave while the other has the tensor cores
//
// Time is counted in bytes that a processor loads meanwhile. A tile loads its operands, and its results take
// as long as RESULT_COST times their bytes; in the cooperative form the two follow each other, in the
// other they overlap, but for the last results. Wide tiles load less: at 256 columns a column of a slice
// costs 1.5 of its own bytes, at 192 it costs 1.67. So the results are worth hiding where I is small.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../../layer.h"

namespace reap::cuda::sm90 {

constexpr int COOPERATIVE_COLUMNS = 256, PINGPONG_COLUMNS = 192;

// A byte of results to one of operands. On an H100 a processor loaded 61 bytes per ns (measured where I is 14,336: 0.8
// us for a slice of 48 KB); bulk reductions reach 29 (not measured here, but published: 3.8 TB/s for 132 of them).
constexpr int64_t RESULT_COST = 2;

// Of `down` in tiles of so many columns, by blocks that take `row_tiles` rows of tiles in turn.
inline int64_t time_of_down(const Layer& layer, int64_t row_tiles, int columns) {
    constexpr int64_t ROWS = 128, SLICE = 64;
    const int64_t slices = (layer.I + SLICE - 1) / SLICE, across = (layer.H + columns - 1) / columns;
    const int64_t rounds = (row_tiles * across + layer.processors - 1) / layer.processors;  // tiles of a block
    const int64_t loads = slices * (ROWS + columns) * SLICE * 2, results = RESULT_COST * ROWS * columns * 4;
    if (columns == COOPERATIVE_COLUMNS) return rounds * (loads + results);
    return rounds * std::max(loads, (loads + results) / 2) + std::min(loads, results);
}

// Columns of down's tiles.
inline int columns_of_down(const Layer& layer, int64_t row_tiles) {
    bool pingpong = layer.form == Form::pingpong;
    if (layer.form == Form::automatic)
        pingpong =
            time_of_down(layer, row_tiles, PINGPONG_COLUMNS) < time_of_down(layer, row_tiles, COOPERATIVE_COLUMNS);
    return pingpong ? PINGPONG_COLUMNS : COOPERATIVE_COLUMNS;
}

}  // namespace reap::cuda::sm90
