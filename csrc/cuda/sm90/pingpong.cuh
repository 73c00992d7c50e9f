// down in the ping-pong form: the two warpgroups that multiply have tiles of their own, 128 rows by 192
// columns, and take turns.
//
//     group 0   multiply tile 0 | epilogue 0      | multiply tile 2 | epilogue 2
//     group 1                   | multiply tile 1 | epilogue 1      | multiply tile 3
//
// While one is in its epilogue, the tensor cores work for the other. The ring's stages are of one tile
// after the other, so that between two of its own a group passes over those of a tile. It must not wait
// for them before its turn: a phase has only a parity, and the one to come looks like the last but one.
#pragma once
#include "down.cuh"
#include "forms.cuh"

namespace reap::cuda::sm90 {

constexpr int TURN_STRIPS = PINGPONG_COLUMNS / BOX;  // with 128 rows, 192 accumulators of each thread
constexpr int TURN_STAGE_BYTES = A_BYTES + PINGPONG_COLUMNS * ROW_BYTES;
constexpr int TURN_STAGED_AT = staged_at(TURN_STAGE_BYTES);
constexpr int TURNS_AT = TURN_STAGED_AT + CONSUMERS * WARPGROUP / WARP * ADDED_STRIP_BYTES;
constexpr int PINGPONG_BYTES = TURNS_AT + CONSUMERS * (sizeof(uint64_t) + sizeof(int));

// Whose turn it is, as one of the groups sees it.
struct Turns {
    Shared<uint64_t> mine, others;  // a phase is over when a turn is given to this group, to the other
    Shared<int> said, told;         // 1: this group, the other, has found no tile in its turn
    uint32_t parity;                // of the phase of `mine` that is to come

    // Nobody gives group 0 its first turn.
    __device__ __forceinline__ explicit Turns(int group) : parity(1 - group) {
        const auto given = cast<uint64_t>(shared_memory() + TURNS_AT);
        const auto ended = cast<int>(given + CONSUMERS);
        mine = given + group, others = given + (1 - group);
        said = ended + group, told = ended + (1 - group);
    }
    // By one thread, before the barrier of make_ring().
    __device__ __forceinline__ void make() const {
        mbarrier_init(mine, WARPGROUP / WARP);
        store_shared(said, 0);
    }
    __device__ __forceinline__ void take() {
        wait(mine, parity);
        parity ^= 1;
    }
    __device__ __forceinline__ void give() const {
        if (lane_id() == 0) mbarrier_arrive(others);
    }
};

// The tile that comes with the turn, of which `state` is the first stage. False: there is none, for the other
// group either. As in next_tile(), one lane reads what another warp may change after this one's arrival.
__device__ __forceinline__ bool take_turn(Tile& tile, const Ring& ring, PipelineState state, Turns& turns) {
    turns.take();
    int told = 0;
    if (lane_id() == 0) told = load_shared(turns.told);
    if (__shfl_sync(ALL_LANES, told, 0) != 0) return false;
    if (next_tile(tile, ring, state)) return true;
    if (threadIdx.x % WARPGROUP == 0) store_shared(turns.said, 1);
    turns.give();
    return false;
}

// Past the stages of the other group's tile.
__device__ __forceinline__ void pass_over(PipelineState& state, int slices) {
    const int stage = state.stage + slices;
    state.stage = stage % STAGES;
    state.parity ^= stage / STAGES & 1;
}

// A tile of which GROUPS times 64 rows are real. Gives the turn when all products are queued, so that those of
// the other group follow without a gap.
template <class T, bool B_MN_MAJOR, int GROUPS>
__device__ __forceinline__ void compute_tile(const DownArgs<T>& args, const Tile& tile, const Ring& ring,
                                             PipelineState& state, int slices, const Turns& turns,
                                             const BulkStaging& staged) {
    const int column = args.combine.first_column + tile.column * PINGPONG_COLUMNS;
    const int first = tile.first + consumer_row() % GROUP_ROWS;
    int slots[GROUPS];  // of this lane's rows; they come during the main loop
#pragma unroll
    for (int m = 0; m < GROUPS; ++m)
        slots[m] = find_slot(args.combine, first + m * GROUP_ROWS + lane_id() % STRIP_ROWS, tile.end);
    // From 0, and not from nothing: else nvcc 13 takes them for the last tile's and keeps those in registers.
    float acc[GROUPS][TURN_STRIPS][BOX / 8][4];
#pragma unroll
    for (int m = 0; m < GROUPS; ++m)
#pragma unroll
        for (int i = 0; i < PINGPONG_COLUMNS / 2; ++i) acc[m][i / 32][i / 4 % 8][i % 4] = 0.0f;
    multiply_slices<B_MN_MAJOR, false>(
        ring, state, slices,
        [&](uint64_t a, uint64_t b, bool) {
#pragma unroll
            for (int m = 0; m < GROUPS; ++m) wgmma_m64n192k16<T, B_MN_MAJOR>(acc[m], a + m * GROUP_NEXT, b, true);
        },
        [&] { turns.give(); });
#pragma unroll
    for (int m = 0; m < GROUPS; ++m) {
        add_bias(acc[m], args.weights, tile.expert, column);
        const Rows rows = find_rows(args.combine, slots[m]);
#pragma unroll
        for (int s = 0; s < TURN_STRIPS; ++s)
            combine_strip(acc[m][s], args.combine, rows, staged, first + m * GROUP_ROWS, tile.end, column + s * BOX);
    }
}

template <class T, bool B_MN_MAJOR>
__device__ __forceinline__ void compute_in_turns(const DownArgs<T>& args, const Ring& ring) {
    const BulkStaging staged{shared_memory() + (TURN_STAGED_AT + consumer_warp() * ADDED_STRIP_BYTES)};
    const int slices = (args.I + TILE_K - 1) / TILE_K, group = consumer_warp() / 4;
    Turns turns(group);
    PipelineState state;
    if (group == 1) pass_over(state, slices);
    Tile tile;
    for (bool more = take_turn(tile, ring, state, turns); more; more = take_turn(tile, ring, state, turns)) {
        if (is_real(tile.first + GROUP_ROWS, tile.end))
            compute_tile<T, B_MN_MAJOR, 2>(args, tile, ring, state, slices, turns, staged);
        else compute_tile<T, B_MN_MAJOR, 1>(args, tile, ring, state, slices, turns, staged);
        pass_over(state, slices);
    }
    bulk_wait_read();  // shared memory is the block's no longer than its threads are there
}

template <class T, bool B_MN_MAJOR>
__global__ void __launch_bounds__(BLOCK, 1) down_pingpong_kernel(const __grid_constant__ Down<T> down) {
#ifdef REAP_HOPPER
    let_next_launch_start();
    if (threadIdx.x == 0) {
        Turns(0).make();
        Turns(1).make();
    }
    const Ring ring = make_ring(1, TURN_STAGE_BYTES, WARPGROUP / WARP);
    if (threadIdx.x < WARPGROUP) {
        release_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) prefetch_down<T, B_MN_MAJOR, PINGPONG_COLUMNS>(down);
        wait_for_launch_before();
        if (threadIdx.x == 0) load_down<T, B_MN_MAJOR, PINGPONG_COLUMNS, GROUP_ROWS>(down, ring);
    } else {
        acquire_registers<CONSUMER_REGISTERS>();
        wait_for_launch_before();
        compute_in_turns<T, B_MN_MAJOR>(down.args, ring);
    }
#else
    trap_unless(false);
#endif
}

}  // namespace reap::cuda::sm90
