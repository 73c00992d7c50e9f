// The forms of Hopper's kernels, and which of them takes the least time. On the host.
//
// swapped       both products with their operands swapped, see swapped/tile.cuh: few rows for each expert
// cooperative   down in tiles of 256 columns, which both warpgroups share: after a tile's products come its results
// pingpong      down in tiles of 192, of one warpgroup each: its results leave while the other has the tensor cores
#pragma once
#include <algorithm>
#include <cstdint>

#include "../../layer.h"

namespace reap::cuda::sm90 {

constexpr int COOPERATIVE_COLUMNS = 256, PINGPONG_COLUMNS = 192;

// Whether the operands are swapped: where an expert's weights take longer to come from memory than a processor then
// takes to multiply by them. All forms wait for them there, and this one moves and multiplies no rows that only fill a
// group of 64. Above, the others read less of shared memory for a product. In cycles, for 16 k of 256 rows of weights
// and all tokens of an expert:
//
//     memory    16 * 256 * 2 bytes, of which a processor of an H100 gets 14.5 a cycle (3.35 TB/s, 132, 1.755 GHz)
//     shared    128 bytes a cycle: of each tile both operands are written, and four wgmmas read 64 rows of weights
//               and all tokens each, 32 * (2 * 256 + 5 * tokens) bytes in all. (Tensor cores take 2 cycles for each
//               token, which is never longer.)
//
// An expert's last tile is half full on average, and so are its last 8 tokens.
inline bool is_swapped(const Layer& layer) {
    constexpr int ROWS = 128, WEIGHT_ROWS = 256, OCTET = 8;
    const double rows = double(layer.T) * layer.K / layer.E, tiles = rows / ROWS + 0.5;
    const double memory = 16 * WEIGHT_ROWS * 2 / 14.5;
    const double shared = 32 * (2 * WEIGHT_ROWS * tiles + 5 * (rows + OCTET / 2.0)) / 128;
    return shared < memory;
}

// Of down's other two forms, time is counted in bytes that a processor loads meanwhile. A tile loads its operands, and
// its results take as long as RESULT_COST times their bytes; in the cooperative form the two follow each other, in the
// other they overlap, but for the last results. Wide tiles load less: at 256 columns a column of a slice costs 1.5 of
// its own bytes, at 192 it costs 1.67. So the results are worth hiding where I is small.

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

// The form of a layer whose row tiles are at most so many.
inline Form form_of(const Layer& layer, int64_t row_tiles) {
    if (layer.form != Form::automatic) return layer.form;
    if (is_swapped(layer)) return Form::swapped;
    const int64_t in_turns = time_of_down(layer, row_tiles, PINGPONG_COLUMNS);
    return in_turns < time_of_down(layer, row_tiles, COOPERATIVE_COLUMNS) ? Form::pingpong : Form::cooperative;
}

inline int columns_of_down(Form form) { return form == Form::pingpong ? PINGPONG_COLUMNS : COOPERATIVE_COLUMNS; }

}  // namespace reap::cuda::sm90
