// The main loop that both grouped GEMMs share on Hopper: a ring of stages in shared memory between
// one warpgroup that loads and two that multiply.
//
//     producer    wait until empty   load A and B of 64 elements of k        -> full
//     consumers   wait until full    4 wgmmas, done when the next are queued -> empty
//
// Blocks are persistent: the producer is ahead in the next tile while the consumers are still in
// the epilogue of the last. Which tile is next a counter says that all blocks share: blocks that have
// tiles with the same weights started them at nearly the same time, and so find each other's operands in
// the L2 cache. (At a fixed stride they drift apart.) The producer takes the tiles, and says with each
// stage which one it is of. Rows in shared memory are 128 bytes, their 16-byte chunks swizzled by
// row as TMA and wgmma know it ("128-byte swizzling mode") and as chunk_offset() has it.
// A [128, 64] is K-major. B comes in boxes of 64 columns and 64 k, K-major or MN-major: the rows in
// shared memory are columns of the product, or k.
#pragma once
#include "../tiles.cuh"
#include "ptx.cuh"

namespace reap::cuda::sm90 {

constexpr int TILE_ROWS = 128;
constexpr int TILE_COLUMNS = 256;
constexpr int BOX = 64;  // columns
constexpr int BOX_BYTES = BOX * ROW_BYTES;
constexpr int GROUP_BYTES = 8 * ROW_BYTES;  // the swizzle's period
constexpr int A_BYTES = TILE_ROWS * ROW_BYTES;
constexpr int GROUP_ROWS = TILE_ROWS / 2;  // of a warpgroup that multiplies
constexpr int B_BYTES = TILE_COLUMNS * ROW_BYTES;
constexpr int STAGE_BYTES = A_BYTES + B_BYTES;
constexpr int STAGES = 4;

// Where the results of the consumer warps, on their way out, follow a ring of such stages.
constexpr int staged_at(int stage_bytes) {
    return (STAGES * (stage_bytes + 2 * int(sizeof(uint64_t)) + int(sizeof(int4))) + 2 * int(sizeof(int4)) + 127) /
           128 * 128;
}
constexpr int STAGED_AT = staged_at(STAGE_BYTES);

constexpr int STRIP_ROWS = 16;  // of a tile's, in one warp
constexpr int WARPGROUP = 4 * WARP;
constexpr int CONSUMERS = 2;                        // warpgroups, of 64 rows each
constexpr int BLOCK = WARPGROUP * (1 + CONSUMERS);  // threads, the producer's first
// Together 504 of the 512 registers that an SM has for a lane of each warp in a row of four.
constexpr int PRODUCER_REGISTERS = 40;
constexpr int CONSUMER_REGISTERS = 232;

// Of a warp's 16 rows: four strips of 64 columns in fragments.
using Accumulators = float[TILE_COLUMNS / BOX][BOX / 8][4];

// A stage of the ring, and the parity of the phase in which its barriers are.
struct PipelineState {
    int stage = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

struct Ring {
    Shared<char> stages;  // A, B of each
    int stage_bytes;
    Shared<uint64_t> full, empty;  // [STAGES]
    Shared<int4> tiles;            // of the stages: a Tile; expert -1 after the last [STAGES]
    Shared<int> taken;             // numbers of the producer's next tiles [2]

    __device__ __forceinline__ Shared<char> a(int stage) const { return stages + stage * stage_bytes; }
    __device__ __forceinline__ Shared<char> b(int stage) const { return a(stage) + A_BYTES; }
};

// The block's ring, ready for all of its threads. A stage is full after `arrivals` of the producer
// and empty after one of each of `warps` consumer warps.
__device__ __forceinline__ Ring make_ring(int arrivals, int stage_bytes, int warps) {
    Ring ring;
    ring.stages = shared_memory();
    ring.stage_bytes = stage_bytes;
    ring.full = cast<uint64_t>(ring.stages + STAGES * stage_bytes);
    ring.empty = ring.full + STAGES;
    ring.tiles = cast<int4>(ring.empty + STAGES);
    ring.taken = cast<int>(ring.tiles + STAGES);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            mbarrier_init(ring.full + stage, arrivals);
            mbarrier_init(ring.empty + stage, warps);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    return ring;
}

__device__ __forceinline__ void wait(Shared<uint64_t> barrier, uint32_t parity) {
    while (!mbarrier_try_wait(barrier, parity)) {
    }
}

// Until the consumers have left the stage; in the first round nobody was ever there.
__device__ __forceinline__ void wait_empty(const Ring& ring, PipelineState state) {
    wait(ring.empty + state.stage, state.parity ^ 1);
}

// For a producer that copies by cp.async: until what it copied has been used, so that no thread ends
// before its copies have. `state` is the stage that nothing was copied to.
__device__ __forceinline__ void drain(const Ring& ring, PipelineState state) {
    for (int i = 1; i < STAGES; ++i) {
        state.advance();
        wait_empty(ring, state);
    }
}

// A block's first tile is that of its own number, the others a counter gives out.
__device__ __forceinline__ int take_tile(Global<int32_t> counter) { return gridDim.x + atom_add(counter, 1); }

// One thread of the producer says which tile the stage is of, before it arrives there.
__device__ __forceinline__ void announce(const Ring& ring, PipelineState state, const Tile& tile) {
    store_shared(ring.tiles + state.stage, int4{tile.expert, tile.first, tile.end, tile.column});
}
__device__ __forceinline__ void announce_end(const Ring& ring, PipelineState state) {
    store_shared(ring.tiles + state.stage, int4{-1, 0, 0, 0});
}

// For consumers: the tile of this stage. False: there is none. One lane reads, as one leaves the stage,
// and what it shuffles the compiler knows to be the same in all. (To be asked at the end of a loop over
// tiles: where one begins with the wait, nvcc 13 keeps the accumulators in memory.)
__device__ __forceinline__ bool next_tile(Tile& tile, const Ring& ring, PipelineState state) {
    wait(ring.full + state.stage, state.parity);
    int4 told{};
    if (lane_id() == 0) told = load_shared(ring.tiles + state.stage);
    tile.expert = __shfl_sync(ALL_LANES, told.x, 0);
    tile.first = __shfl_sync(ALL_LANES, told.y, 0);
    tile.end = __shfl_sync(ALL_LANES, told.z, 0);
    tile.column = __shfl_sync(ALL_LANES, told.w, 0);
    return tile.expert >= 0;
}

// "Matrix descriptor format" of wgmma: start address, and two strides, in units of 16 bytes. The
// stride dimension goes from 8 rows in shared memory to the next 8; the leading dimension of MN-major
// operands from one box to the next, of K-major ones it is not used.
__device__ __forceinline__ uint64_t descriptor(Shared<char> tile) {
    constexpr uint64_t SWIZZLE_128 = uint64_t(1) << 62;
    constexpr uint64_t STRIDE = uint64_t(GROUP_BYTES / 16) << 32;
    constexpr uint64_t LEADING = uint64_t(BOX_BYTES / 16) << 16;
    return SWIZZLE_128 | STRIDE | LEADING | (shared_address(tile) & 0x3ffff) >> 4;
}

// From 64 rows of A to the next, in the unit of descriptors.
constexpr int GROUP_NEXT = GROUP_ROWS * ROW_BYTES / 16;

// The loop over `slices` > 0 of k: products(a, b, add) issues the wgmmas of 16 k, and queued() is called
// when all have been. GATHERED: A came by cp.async, which wgmma does not see without a fence; what
// TMA wrote it sees as it is.
template <bool B_MN_MAJOR, bool GATHERED, class Products, class Queued>
__device__ __forceinline__ void multiply_slices(const Ring& ring, PipelineState& state, int slices, Products products,
                                                Queued queued) {
    constexpr int A_NEXT = 16 * 2 / 16;  // 16 k further along the rows, in 16 bytes
    constexpr int B_NEXT = B_MN_MAJOR ? 16 * ROW_BYTES / 16 : A_NEXT;
    const bool leader = lane_id() == 0;
    int previous = 0;
    for (int slice = 0; slice < slices; ++slice) {
        wait(ring.full + state.stage, state.parity);
        if constexpr (GATHERED) fence_proxy_async();
        const uint64_t a = descriptor(ring.a(state.stage)), b = descriptor(ring.b(state.stage));
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < TILE_K / 16; ++k) products(a + k * A_NEXT, b + k * B_NEXT, slice > 0 || k > 0);
        wgmma_commit();
        wgmma_wait<1>();
        if (slice > 0 && leader) mbarrier_arrive(ring.empty + previous);
        previous = state.stage;
        state.advance();
    }
    queued();
    wgmma_wait<0>();
    if (leader) mbarrier_arrive(ring.empty + previous);
}

// acc = A B of this warpgroup's 64 rows.
template <class T, bool B_MN_MAJOR, bool GATHERED>
__device__ __forceinline__ void multiply(Accumulators& acc, const Ring& ring, PipelineState& state, int slices) {
    const int group = threadIdx.x / WARPGROUP - 1;
    multiply_slices<B_MN_MAJOR, GATHERED>(
        ring, state, slices,
        [&](uint64_t a, uint64_t b, bool add) { wgmma_m64n256k16<T, B_MN_MAJOR>(acc, a + group * GROUP_NEXT, b, add); },
        [] {});
}

// Past slices of a tile that this warpgroup has no row of.
__device__ __forceinline__ void pass_over(const Ring& ring, PipelineState& state, int slices) {
    for (int slice = 0; slice < slices; ++slice) {
        wait(ring.full + state.stage, state.parity);
        if (lane_id() == 0) mbarrier_arrive(ring.empty + state.stage);
        state.advance();
    }
}

// Rows of the tile that are real.
__device__ __forceinline__ int rows_of(const Tile& tile) { return min(tile.end - tile.first, TILE_ROWS); }

// This warp's number among the consumers'. From a shuffle, so that addresses made of it are not kept in
// registers during the main loop.
__device__ __forceinline__ int consumer_warp() { return __shfl_sync(ALL_LANES, (threadIdx.x - WARPGROUP) / WARP, 0); }

// Whether the tile has rows of this warpgroup: the last one of an expert may have 64 or fewer. Those
// of the other are then neither loaded nor multiplied.
__device__ __forceinline__ bool has_rows(const Tile& tile) {
    return is_real(tile.first + consumer_warp() / 4 * GROUP_ROWS, tile.end);
}

// This warp's first row of the tile.
__device__ __forceinline__ int consumer_row() { return (threadIdx.x - WARPGROUP) / WARP * 16; }

// Calls visit(i, at) for the boxes of one stage of B, 64 k from `k` on. They are 64 columns each of the result from
// `column` on; where gate and up are concatenated, half of them are columns of the gate and the others those of the up
// projection, `column` counts both, and the map has a dimension of halves.
template <bool B_MN_MAJOR, int BOXES, class Visit>
__device__ __forceinline__ void for_boxes(int expert, int column, int k, bool halves, Visit visit) {
    const int boxes = halves ? BOXES / 2 : BOXES;
#pragma unroll
    for (int i = 0; i < BOXES; ++i) {
        const int n = (halves ? column / 2 : column) + i % boxes * BOX, half = i / boxes;
        const int at[4] = {B_MN_MAJOR ? n : k, B_MN_MAJOR ? half : n, B_MN_MAJOR ? k : half, expert};
        visit(i, at);
    }
}

template <bool B_MN_MAJOR, int BOXES = TILE_COLUMNS / BOX>
__device__ __forceinline__ void load_weights(Shared<char> b, const TensorMap& map, Shared<uint64_t> full, int expert,
                                             int column, int k, bool halves) {
    for_boxes<B_MN_MAJOR, BOXES>(expert, column, k, halves,
                                 [&](int i, const int (&at)[4]) { tma_load(b + i * BOX_BYTES, map, full, at); });
}

// Where the first tiles are if all experts have as many slots.
struct Guess {
    int row_tiles;     // of each expert
    int column_tiles;  // of a slab
    int tiles;         // that hints are for, from the first on
};

// By one thread, before the routing is known: hints for the weights that fill the ring at first. Where the guess is
// wrong they cost a little of the memory's time.
template <bool B_MN_MAJOR, int BOXES = TILE_COLUMNS / BOX>
__device__ __forceinline__ void prefetch_weights(const TensorMap& map, const Guess& guess, int first_column, int depth,
                                                 bool halves) {
    prefetch_map(map);
    const int number = blockIdx.x;
    if (number >= guess.tiles) return;
    const int expert = number / (guess.row_tiles * guess.column_tiles);
    const int column = first_column + number / guess.row_tiles % guess.column_tiles * (BOXES * BOX);
#pragma unroll 1
    for (int k = 0; k < min(depth, STAGES * TILE_K); k += TILE_K)
        for_boxes<B_MN_MAJOR, BOXES>(expert, column, k, halves,
                                     [&](int, const int (&at)[4]) { tma_prefetch(map, at); });
}

// Where the columns of 64 s + 8 j of the tile are among the result's: as they are, or in halves,
// whose groups of 8 columns alternate in the result (see Columns).
__device__ __forceinline__ int result_group(int s, int j, bool halves) {
    const int group = s * 8 + j;
    return halves ? group % 16 * 2 + group / 16 : group;
}

// Adds the bias, if there is one. (Accumulators that start from it, as on other chips, make ptxas run
// the wgmmas one by one.)
template <class T, int STRIPS>
__device__ __forceinline__ void add_bias(float (&acc)[STRIPS][BOX / 8][4], const Projection<T>& weights, int expert,
                                         int column) {
    if (!weights.bias) return;
#pragma unroll
    for (int s = 0; s < STRIPS; ++s)
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int n = column + result_group(s, j, weights.columns.up != 0) * 8 + fragment_column() + c;
                const int64_t row = weights.columns.weight_row(n, 1) * weights.bias_row_stride;
                const float bias = widen(load_global(weights.bias + (expert * weights.bias_expert_stride + row)));
                acc[s][j][c] += bias, acc[s][j][c + 2] += bias;
            }
}

}  // namespace reap::cuda::sm90
