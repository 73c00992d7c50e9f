// How one call is cut into blocks. "lanes" are the tokens that one SIMD register holds; a block is up
// to BLOCK_TOKENS slots of one expert, and everything is computed block by block.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../layer.h"

namespace reap {

constexpr int SLAB = 96;   // columns of `out` that one down task owns; see down.h
constexpr int GROUP = 48;  // weight rows that share one pass over the packed tokens
constexpr int BLOCK_TOKENS = 160;
constexpr int K_LANES_TOKENS = 32;  // up to here a block takes the path of k_lanes.h
constexpr int PAD = 16;             // most lanes of any instruction set

struct Block {
    int64_t first;  // sorted position of its first slot
    int64_t row;    // of partials, for its first slot
    int64_t inner;  // byte of Job::inner where its part begins
    int32_t expert, tokens;
};

// What the kernels of every instruction set work on: the call, its routing and the arena.
struct Job {
    Layer layer;
    const int32_t* order;  // sorted position -> slot [S]
    const Block* blocks;   // ascending by expert [num_blocks]
    int64_t* progress;     // block -> its tasks that are done, and one more when its norms are [num_blocks]
    int64_t num_blocks;
    int64_t ahead;         // blocks that gate_up runs ahead of down
    int64_t rows;          // slots that inner and partials have room for
    int64_t inner_splits;  // gate_up tasks per block
    int64_t slabs;         // ceil(H / SLAB)
    char* inner;           // activated inner tensor of some blocks [rows, inner_width] model dtype
    int64_t inner_width;   // I, rounded up to even
    float* sums;           // layer output before rounding [T, H] fp32
    float* partials;       // (sum of squares, max) per slot and slab [rows, slabs, 2] fp32, or null
    int64_t* next_block;   // slab -> the block that may add to it [slabs]
    int64_t buffers;       // blocks that inner has room for; b has that of b % buffers
    float* block_sums;     // of the rows of inner of a block [buffers, 2, inner_width], or null: no sums
    double* running;       // sums of the last expert so far [2, I] and [2, H], or null
};

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t element_size(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// The kernels of one instruction set and model dtype. `scratch` is this thread's, of scratch_bytes(layer).
struct Kernels {
    size_t (*scratch_bytes)(const Layer&);
    void (*gate_up)(const Job&, int64_t block, int64_t part, char* scratch);  // part of I -> inner
    void (*down)(const Job&, int64_t block, int64_t slab, char* scratch);     // slab of H -> sums, partials
    void (*finish)(const Job&, int64_t first, int64_t last);                  // tokens: sums -> out
};

}  // namespace reap
