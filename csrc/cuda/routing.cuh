// Top-k ids -> slots sorted by expert and the table of row tiles, in three launches.
//
//     count   chunk of slots -> how many of each expert
//     scan    how many of an expert there are in the chunks before
//     place   slot -> sorted position; expert -> row tiles
//
// A stable counting sort by one warp per chunk: nothing is padded and no host reads a count. An
// expert of n slots has ceil(n / rows) row tiles, of which the last is partly empty. The host knows
// only a bound on their number; blocks above the true number leave at once.
#pragma once
#include "ptx.cuh"

namespace reap::cuda {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int CHUNK = 512;             // slots per warp
constexpr int MAX_EXPERTS = 1 << 12;   // a warp counts them in shared memory

// Where the grouped GEMMs find their rows. A slot is token * K + k.
struct Routing {
    Global<const int32_t> order;        // sorted position -> slot; slots without expert come last [S]
    Global<const int32_t> offsets;      // expert -> first sorted position; [E] ends the last [E+1]
    Global<const int32_t> first_tile;   // expert -> first row tile; [E] is their number [E+1]
    Global<const int32_t> tile_expert;  // row tile -> expert [bound]
};

struct RoutingArgs {
    Global<const int64_t> ids;                              // [S]; >= E for none
    Global<int32_t> counts;                                 // expert, chunk -> slots, then slots before [E+1, chunks]
    Global<int32_t> totals;                                 // expert (E: none) -> slots [E+1]
    Global<int32_t> order, offsets, first_tile, tile_expert;  // as in Routing
    int E, S, chunks;
    int tile_rows;
};

__device__ __forceinline__ int lane_id() { return threadIdx.x % WARP; }

// The sum over this lane and those below.
__device__ __forceinline__ int inclusive_sum(int x) {
    for (int step = 1; step < WARP; step *= 2) {
        const int below = __shfl_up_sync(ALL_LANES, x, step);
        if (lane_id() >= step) x += below;
    }
    return x;
}

__device__ __forceinline__ int last_lane(int x) { return __shfl_sync(ALL_LANES, x, WARP - 1); }

// Calls visit(slot, expert, twins) for the chunk's slots in order, 32 at a time. `twins` are the
// lanes with the same expert; lanes past the last slot have expert -1.
template <class Visit> __device__ __forceinline__ void for_slots(const RoutingArgs& args, Visit visit) {
    const int first = blockIdx.x * CHUNK;
    for (int done = 0; done < CHUNK && first + done < args.S; done += WARP) {
        const int slot = first + done + lane_id();
        int expert = -1;
        if (slot < args.S) {
            const int64_t id = load_global(args.ids + slot);
            trap_unless(id >= 0);
            expert = id < args.E ? static_cast<int>(id) : args.E;
        }
        visit(slot, expert, __match_any_sync(ALL_LANES, expert));
    }
}

// One lane per expert: the lowest of those that share it.
__device__ __forceinline__ bool leads(int expert, unsigned twins) {
    return expert >= 0 && __ffs(twins) - 1 == lane_id();
}

// Block: a chunk.
__global__ void __launch_bounds__(WARP) count_kernel(RoutingArgs args) {
    const Shared<int32_t> count = cast<int32_t>(shared_memory());  // [E+1]
    for (int expert = lane_id(); expert <= args.E; expert += WARP) store_shared(count + expert, 0);
    __syncwarp();
    for_slots(args, [&](int, int expert, unsigned twins) {
        if (leads(expert, twins)) store_shared(count + expert, load_shared(count + expert) + __popc(twins));
        __syncwarp();
    });
    for (int expert = lane_id(); expert <= args.E; expert += WARP)
        store_global(args.counts + (int64_t(expert) * args.chunks + blockIdx.x), load_shared(count + expert));
}

// Block: an expert.
__global__ void __launch_bounds__(WARP) scan_kernel(RoutingArgs args) {
    const Global<int32_t> row = args.counts + int64_t(blockIdx.x) * args.chunks;
    int before = 0;
    for (int first = 0; first < args.chunks; first += WARP) {
        const int chunk = first + lane_id();
        const int here = chunk < args.chunks ? load_global(row + chunk) : 0;
        const int sum = inclusive_sum(here);
        if (chunk < args.chunks) store_global(row + chunk, before + sum - here);
        before += last_lane(sum);
    }
    if (lane_id() == 0) store_global(args.totals + blockIdx.x, before);
}

// Block: a chunk, and an expert's row tiles. Every warp sums the experts' totals again, which is
// cheaper than a launch.
__global__ void __launch_bounds__(WARP) place_kernel(RoutingArgs args) {
    const int block = blockIdx.x;
    const bool has_chunk = block < args.chunks;
    const Shared<int32_t> next = cast<int32_t>(shared_memory());  // expert -> its next position here [E+1]
    int start = 0, tile = 0;
    for (int first = 0; first <= args.E; first += WARP) {
        const int expert = first + lane_id();
        const int total = expert < args.E ? load_global(args.totals + expert) : 0;
        const int tiles = (total + args.tile_rows - 1) / args.tile_rows;
        const int starts = inclusive_sum(total), ends = inclusive_sum(tiles);
        if (expert <= args.E) {
            const int position = start + starts - total, first_tile = tile + ends - tiles;
            if (block == 0) {
                store_global(args.offsets + expert, position);
                store_global(args.first_tile + expert, first_tile);
            }
            if (expert == block)
                for (int i = 0; i < tiles; ++i) store_global(args.tile_expert + first_tile + i, expert);
            if (has_chunk)
                store_shared(next + expert, position + load_global(args.counts + (int64_t(expert) * args.chunks + block)));
        }
        start += last_lane(starts);
        tile += last_lane(ends);
    }
    __syncwarp();
    for_slots(args, [&](int slot, int expert, unsigned twins) {
        const int rank = __popc(twins & ((1u << lane_id()) - 1));
        const int position = expert >= 0 ? load_shared(next + expert) : 0;
        __syncwarp();
        if (leads(expert, twins)) store_shared(next + expert, position + __popc(twins));
        __syncwarp();
        if (expert >= 0) store_global(args.order + position + rank, slot);
    });
}

}  // namespace reap::cuda
