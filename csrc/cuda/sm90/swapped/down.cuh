// ../../down.cuh for Hopper with its operands swapped: y of a token is a column of the product.
//
// Its sizes are sums over lanes, by shuffles, and over the four warps of a warpgroup, in a fixed order through shared
// memory; gate * y is turned there into rows of 128 columns, which bulk copies add to the output.
#pragma once
#include "../down.cuh"
#include "tile.cuh"

namespace reap::cuda::sm90::swapped {

// Columns of a warpgroup: bytes from token to token of staged rows. Two tokens on, a row is 8 banks further.
constexpr int OUTPUT_COLUMNS = BOXES * BOX;
constexpr int OUTPUT_PITCH = OUTPUT_COLUMNS * int(sizeof(float)) + CHUNK_BYTES;
constexpr int OUTPUT_BUFFERS = BUFFERS * OCTET * OUTPUT_PITCH;  // of a warpgroup
constexpr int DOWN_BYTES = STAGED_AT + CONSUMERS * OUTPUT_BUFFERS;

// Sum of squares and largest |y| by box and token: of each warp [4][OCTETS][BOXES][OCTET], before rows are staged.
constexpr int OCTET_SIZES = BOXES * OCTET;
constexpr int WARP_SIZES = OCTETS * OCTET_SIZES;
static_assert(BOX == PARTIAL_COLUMNS && 4 * WARP_SIZES * int(sizeof(float2)) <= OUTPUT_BUFFERS);

__device__ __forceinline__ float2 join(float2 a, float2 b) { return {a.x + b.x, max_nan(a.y, b.y)}; }

// Two lanes whose numbers differ by `bit` join what they have: the lower one of `a`, the higher one of `b`.
__device__ __forceinline__ float2 fold(float2 a, float2 b, int bit) {
    const bool high = lane_id() & bit;
    const float2 mine = high ? b : a, other = high ? a : b;
    return join(mine, {__shfl_xor_sync(ALL_LANES, other.x, bit), __shfl_xor_sync(ALL_LANES, other.y, bit)});
}

__device__ __forceinline__ float2 size_of(float x, float y) { return {x * x + y * y, max_nan(fabsf(x), fabsf(y))}; }

// Of 16 rows of each box of an octet: in lanes 0 to 15, whose bit 3 is the box and bits 1, 0, 2 the token.
__device__ __forceinline__ float2 octet_size(const Octet& octet) {
    float2 box_size[BOXES];
#pragma unroll
    for (int box = 0; box < BOXES; ++box)
        box_size[box] = fold(size_of(octet[box][0], octet[box][2]), size_of(octet[box][1], octet[box][3]), 4);
    const float2 size = fold(box_size[0], box_size[1], 8);
    return fold(size, size, 16);
}

// The sizes of a tile's tokens to the partials, from column `column` on.
__device__ __forceinline__ void measure(const Accumulators& acc, const Combine& args, Shared<float2> sizes,
                                        const Tile& tile, int column) {
    const int octets = octets_of(tile);
    const int token = lane_id() % 4 * 2 + lane_id() / 4 % 2, box = lane_id() / 8 % 2;
    const Shared<float2> mine = sizes + (warp_of_group() * WARP_SIZES + box * OCTET + token);
    bulk_wait_read();  // for the rows that lay here before
    meet();
    for (int number = 0; number < octets; ++number) {
        Octet octet;
        pick_octet(octet, acc, number);
        const float2 size = octet_size(octet);
        if (lane_id() < OCTET_SIZES) store_shared(mine + number * OCTET_SIZES, size);
    }
    meet();
    for (int i = threadIdx.x % WARPGROUP; i < octets * OCTET_SIZES; i += WARPGROUP) {
        float2 size = load_shared(sizes + i);
#pragma unroll
        for (int warp = 1; warp < 4; ++warp) size = join(size, load_shared(sizes + (warp * WARP_SIZES + i)));
        const int position = tile.first + i / OCTET_SIZES * OCTET + i % OCTET, n = column + i / OCTET % BOXES * BOX;
        if (is_real(position, tile.end) && n < args.H)
            store_global(args.partials + (int64_t(n / PARTIAL_COLUMNS) * args.S + position), size);
    }
}

// What is past the last column becomes 0.
__device__ __forceinline__ void clear_past(Accumulators& acc, int H, int column) {
    if (column + OUTPUT_COLUMNS <= H) return;
#pragma unroll
    for (int box = 0; box < BOXES; ++box)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            if (column + box * BOX + box_row() + half * 8 >= H)
#pragma unroll
                for (int i = 0; i < OCTETS; ++i) acc[box][i][2 * half] = acc[box][i][2 * half + 1] = 0.0f;
}

// gate * y of an octet to its staged rows, from column `column` of them on.
__device__ __forceinline__ void stage_octet(const Octet& octet, const float (&gates)[2], Shared<char> buffer,
                                            int column) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        const auto row = cast<float>(buffer + (fragment_column() + c) * OUTPUT_PITCH) + column;
#pragma unroll
        for (int box = 0; box < BOXES; ++box)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                store_shared(row + (box * BOX + half * 8), gates[c] * octet[box][2 * half + c]);
    }
}

// Slots and gates of the tile's tokens: a lane of each warp has those of its number, and of every 32nd after.
struct Tokens {
    int slots[TILE_ROWS / WARP];
    float gates[TILE_ROWS / WARP];

    __device__ __forceinline__ void find_slots(const Combine& args, const Tile& tile) {
#pragma unroll
        for (int i = 0; i < TILE_ROWS / WARP; ++i)
            slots[i] = find_slot(args, tile.first + i * WARP + lane_id(), tile.end);
    }
    __device__ __forceinline__ void find_gates(const Combine& args) {
#pragma unroll
        for (int i = 0; i < TILE_ROWS / WARP; ++i) gates[i] = args.gates.at(slots[i]);
    }
    // Of an octet's token. All lanes ask.
    __device__ __forceinline__ int slot(int octet, int token) const {
        return __shfl_sync(ALL_LANES, pick(slots, octet * OCTET / WARP), (octet * OCTET + token) % WARP);
    }
    __device__ __forceinline__ float gate(int octet, int token) const {
        return __shfl_sync(ALL_LANES, pick(gates, octet * OCTET / WARP), (octet * OCTET + token) % WARP);
    }
};

// Norms, peaks and gate * y of this warpgroup's columns, from `column` on.
__device__ __forceinline__ void combine(const Accumulators& acc, const Combine& args, const Tokens& tokens,
                                        Shared<char> buffers, const Tile& tile, int column) {
    measure(acc, args, cast<float2>(buffers), tile, column);
    const int bytes = min(OUTPUT_COLUMNS, args.H - column) * int(sizeof(float));
    const Global<float> slab = args.combined + (column - args.first_column);
    const int mine = box_row();
    const auto fill = [&](const Octet& octet, Shared<char> buffer, int number) {
        const float gates[2] = {tokens.gate(number, fragment_column()), tokens.gate(number, fragment_column() + 1)};
        stage_octet(octet, gates, buffer, mine);
    };
    const auto send = [&](Shared<char> buffer, int number) {
        const int slot = tokens.slot(number, lane_id() % OCTET);
        const Global<float> target = slab + output_row(args, slot) * args.pitch;
        const auto row = cast<float>(buffer + lane_id() * OUTPUT_PITCH);
        if (lane_id() < OCTET && is_real(tile.first + number * OCTET + lane_id(), tile.end)) {
            if (args.deterministic) bulk_store(target, row, bytes);
            else bulk_add(target, row, bytes);
        }
    };
    send_octets<OUTPUT_PITCH>(acc, octets_of(tile), buffers, fill, send);
}

template <class T, bool A_MN_MAJOR>
__device__ __forceinline__ void compute_down(const DownArgs<T>& args, const Ring& ring) {
    const Boxes boxes(false);
    const Shared<char> buffers = shared_memory() + (STAGED_AT + warpgroup() * OUTPUT_BUFFERS);
    const int slices = (args.I + TILE_K - 1) / TILE_K;
    PipelineState state;
    Tile tile;
    for (bool more = next_tile(tile, ring, state); more; more = next_tile(tile, ring, state)) {
        Tokens tokens;
        tokens.find_slots(args.combine, tile);  // come during the main loop
        Accumulators acc;
        swapped::multiply<T, A_MN_MAJOR, false>(acc, ring, state, slices, boxes, octets_of(tile));
        tokens.find_gates(args.combine);
        const int first = args.combine.first_column + tile.column * TILE_COLUMNS;
        add_bias(acc, args.weights, boxes, tile.expert, first);
        const int column = first + warpgroup() * OUTPUT_COLUMNS;
        if (column >= args.combine.H) continue;
        clear_past(acc, args.combine.H, column);
        combine(acc, args.combine, tokens, buffers, tile, column);
    }
    bulk_wait_read();  // shared memory is the block's no longer than its threads are there
}

template <class T, bool A_MN_MAJOR>
__global__ void __launch_bounds__(BLOCK, 1) down_kernel(const __grid_constant__ Down<T> down) {
#ifdef REAP_HOPPER
    let_next_launch_start();
    const Ring ring = make_ring(1, STAGE_BYTES, CONSUMERS * WARPGROUP / WARP);
    if (threadIdx.x < WARPGROUP) {
        release_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) prefetch_down<T, A_MN_MAJOR, TILE_COLUMNS>(down);
        wait_for_launch_before();
        if (threadIdx.x == 0) load_down<T, A_MN_MAJOR, TILE_COLUMNS, OCTET>(down, ring);
    } else {
        acquire_registers<CONSUMER_REGISTERS>();
        wait_for_launch_before();
        swapped::compute_down<T, A_MN_MAJOR>(down.args, ring);
    }
#else
    trap_unless(false);
#endif
}

}  // namespace reap::cuda::sm90::swapped
