// Top-k ids -> slots sorted by expert and the table of row tiles, in three launches.
//
//     count   chunk of slots -> how many of each expert
//     scan    how many of an expert there are in the chunks before
//     place   slot -> sorted position; expert -> row tiles
//
// Few slots are one launch of one block, which does the same between barriers.
//
// A stable counting sort by one warp per chunk: nothing is padded and no host reads a count. An
// expert of n slots has ceil(n / rows) row tiles, of which the last is partly empty. The host knows
// only a bound on their number; blocks above the true number leave at once.
#pragma once
#include "ptx.cuh"

namespace reap::cuda {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int CHUNK = 512;            // slots per warp, where a warp is a block
constexpr int ROUTE_CHUNK = 128;      // at most, where all warps are one block
constexpr int ROUTE_WARPS = 32;       // of that block, at most
constexpr int MAX_EXPERTS = 1 << 12;  // a warp counts them in shared memory

// Where the grouped GEMMs find their rows. A slot is token * K + k.
struct Routing {
    Global<const int32_t> order;        // sorted position -> slot; slots without expert come last [S]
    Global<const int32_t> offsets;      // expert -> first sorted position; [E] ends the last [E+1]
    Global<const int32_t> first_tile;   // expert -> first row tile; [E] is their number [E+1]
    Global<const int32_t> tile_expert;  // row tile -> expert [bound]
};

// What the router chose, in its dtype; >= E for none.
struct Ids {
    Global<const char> data;  // [S]
    bool wide;                // int64, else int32

    __device__ __forceinline__ int64_t at(int slot) const {
        if (wide) return load_global(cast<const int64_t>(data) + slot);
        return load_global(cast<const int32_t>(data) + slot);
    }
};

struct RoutingArgs {
    Ids ids;
    Global<int32_t> counts;                                   // expert, chunk -> slots, then slots before [E+1, chunks]
    Global<int32_t> totals;                                   // expert (E: none) -> slots [E+1]
    Global<int32_t> order, offsets, first_tile, tile_expert;  // as in Routing
    Global<int32_t> counters;                                 // of tiles that were taken; becomes 0 [launches]
    int E, S, chunk, chunks;
    int tile_rows;
    int launches;
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

// Calls visit(slot, expert, twins) for a chunk's slots in order, 32 at a time. `twins` are the lanes
// with the same expert; lanes past the last slot have expert -1.
template <class Visit> __device__ __forceinline__ void for_slots(const RoutingArgs& args, int chunk, Visit visit) {
    const int first = chunk * args.chunk;
    for (int done = 0; done < args.chunk && first + done < args.S; done += WARP) {
        const int slot = first + done + lane_id();
        int expert = -1;
        if (slot < args.S) {
            const int64_t id = args.ids.at(slot);
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

// How many of a chunk's slots each expert has [E+1].
__device__ __forceinline__ void count_chunk(const RoutingArgs& args, int chunk, Shared<int32_t> count) {
    for (int expert = lane_id(); expert <= args.E; expert += WARP) store_shared(count + expert, 0);
    __syncwarp();
    for_slots(args, chunk, [&](int, int expert, unsigned twins) {
        if (leads(expert, twins)) store_shared(count + expert, load_shared(count + expert) + __popc(twins));
        __syncwarp();
    });
}

// Puts a chunk's slots into order. next: expert -> its next position in this chunk [E+1].
__device__ __forceinline__ void place_chunk(const RoutingArgs& args, int chunk, Shared<int32_t> next) {
    for_slots(args, chunk, [&](int slot, int expert, unsigned twins) {
        const int rank = __popc(twins & ((1u << lane_id()) - 1));
        const int position = expert >= 0 ? load_shared(next + expert) : 0;
        __syncwarp();
        if (leads(expert, twins)) store_shared(next + expert, position + __popc(twins));
        __syncwarp();
        if (expert >= 0) store_global(args.order + position + rank, slot);
    });
}

// Calls visit(expert, position, first_tile, tiles) for the experts, a lane for each, and for E: where
// their slots and row tiles start, if expert e has total(e) slots.
template <class Total, class Visit>
__device__ __forceinline__ void for_experts(const RoutingArgs& args, Total total, Visit visit) {
    int start = 0, tile = 0;
    for (int first = 0; first <= args.E; first += WARP) {
        const int expert = first + lane_id();
        const int slots = expert < args.E ? total(expert) : 0;
        const int tiles = (slots + args.tile_rows - 1) / args.tile_rows;
        const int starts = inclusive_sum(slots), ends = inclusive_sum(tiles);
        if (expert <= args.E) visit(expert, start + starts - slots, tile + ends - tiles, tiles);
        start += last_lane(starts);
        tile += last_lane(ends);
    }
}

__device__ __forceinline__ void store_starts(const RoutingArgs& args, int expert, int position, int first_tile) {
    store_global(args.offsets + expert, position);
    store_global(args.first_tile + expert, first_tile);
}

__device__ __forceinline__ void store_tiles(const RoutingArgs& args, int expert, int first_tile, int tiles) {
    for (int i = 0; i < tiles; ++i) store_global(args.tile_expert + first_tile + i, expert);
}

// By one warp.
__device__ __forceinline__ void clear_counters(const RoutingArgs& args) {
    for (int i = lane_id(); i < args.launches; i += WARP) store_global(args.counters + i, 0);
}

// Block: a chunk.
__global__ void __launch_bounds__(WARP) count_kernel(RoutingArgs args) {
    let_next_launch_start();
    wait_for_launch_before();
    const Shared<int32_t> count = cast<int32_t>(shared_memory());  // [E+1]
    count_chunk(args, blockIdx.x, count);
    for (int expert = lane_id(); expert <= args.E; expert += WARP)
        store_global(args.counts + (int64_t(expert) * args.chunks + blockIdx.x), load_shared(count + expert));
}

// Block: an expert.
__global__ void __launch_bounds__(WARP) scan_kernel(RoutingArgs args) {
    let_next_launch_start();
    wait_for_launch_before();
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
    let_next_launch_start();
    wait_for_launch_before();
    const int block = blockIdx.x;
    const bool has_chunk = block < args.chunks;
    if (block == 0) clear_counters(args);
    const Shared<int32_t> next = cast<int32_t>(shared_memory());  // [E+1]
    const auto total = [&](int expert) { return load_global(args.totals + expert); };
    for_experts(args, total, [&](int expert, int position, int first_tile, int tiles) {
        if (block == 0) store_starts(args, expert, position, first_tile);
        if (expert == block) store_tiles(args, expert, first_tile, tiles);
        if (has_chunk)
            store_shared(next + expert, position + load_global(args.counts + (int64_t(expert) * args.chunks + block)));
    });
    __syncwarp();
    place_chunk(args, block, next);
}

// Block: all chunks, one per warp.
__global__ void __launch_bounds__(ROUTE_WARPS* WARP) route_kernel(RoutingArgs args) {
    let_next_launch_start();
    wait_for_launch_before();
    const int warp = threadIdx.x / WARP;
    const Shared<int32_t> starts = cast<int32_t>(shared_memory());  // [E+1]
    const Shared<int32_t> counts = starts + (args.E + 1);           // [chunks, E+1]
    const Shared<int32_t> mine = counts + warp * (args.E + 1);
    count_chunk(args, warp, mine);
    __syncthreads();
    for (int expert = threadIdx.x; expert <= args.E; expert += blockDim.x) {
        int before = 0;
        for (int chunk = 0; chunk < args.chunks; ++chunk) {
            const Shared<int32_t> count = counts + (chunk * (args.E + 1) + expert);
            const int here = load_shared(count);
            store_shared(count, before);
            before += here;
        }
        store_shared(starts + expert, before);
    }
    __syncthreads();
    if (warp == 0) {
        clear_counters(args);
        const auto total = [&](int expert) { return load_shared(starts + expert); };
        for_experts(args, total, [&](int expert, int position, int first_tile, int tiles) {
            store_starts(args, expert, position, first_tile);
            store_tiles(args, expert, first_tile, tiles);
            store_shared(starts + expert, position);
        });
    }
    __syncthreads();
    for (int expert = lane_id(); expert <= args.E; expert += WARP)
        store_shared(mine + expert, load_shared(mine + expert) + load_shared(starts + expert));
    __syncwarp();
    place_chunk(args, warp, mine);
}

}  // namespace reap::cuda
