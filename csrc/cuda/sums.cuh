// Weighted sums over an expert's slots, of rows of inner and of outputs, behind gate_up.
//
//     inner [S, pitch], w [2, S]  ->  channels [2, E, I] = sum of w h, and sums of w and of |w| [2, 2, E]
//     W [E, H, I], b [E, H]       ->  outputs [2, E, H] = W channels + b (sum of w)
//
// The down projection is linear, so that sums of outputs are its image of the sums of inner rows: the GEMMs know
// nothing of them, and their price is inner and the weights read once more. Sums are fp32 over PIECE rows, fp64 over
// these, in one order. What weighs 0 is left out, whatever it is.
#pragma once
#include "tiles.cuh"

namespace reap::cuda {

constexpr int SUM_WARPS = 8;
constexpr int SUM_THREADS = SUM_WARPS * WARP;
constexpr int SUM_COLUMNS = 2 * WARP;  // of a block: two per lane
constexpr int SUM_KINDS = 4;           // what a lane sums: its two columns, w and |w|
constexpr int PIECE = 16;              // rows
constexpr int SUM_BYTES = 2 * SUM_KINDS * SUM_THREADS * int(sizeof(double));
constexpr int PROJECT_ROWS = 4;             // of the weights, that a warp multiplies at a time
static_assert(SUM_WARPS == 2 * SUM_KINDS);  // a warp for each total

template <class T> struct SumArgs {
    Global<const T> inner;          // [S, pitch]
    Global<const int32_t> order;    // sorted position -> slot [S]
    Global<const int32_t> offsets;  // expert -> first sorted position [E+1]
    Global<const float> weights;    // [2, S]
    Global<float> channels;         // [2, E, I]
    Global<float> totals;           // sums of w, then of |w| [2, 2, E]
    int E, I, S, pitch;
    int blocks;  // per expert
};

template <class T> struct ProjectArgs {
    Global<const float> channels, totals;
    Projection<T> weights;  // rows H, k I
    Global<float> outputs;  // [2, E, H]
    int E, H, I;
    int blocks;  // per expert
};

// Two 16-bit numbers of a register.
template <class T> __device__ __forceinline__ float2 unpack(uint32_t word) {
    struct {
        T low, high;
    } pair;
    static_assert(sizeof pair == sizeof word);
    memcpy(&pair, &word, sizeof word);
    return {widen(pair.low), widen(pair.high)};
}

__device__ __forceinline__ float weighted(float weight, float x) { return weight == 0.0f ? 0.0f : weight * x; }

// Block: 64 columns of inner and all slots of an expert, a row per warp at a time.
template <class T> __global__ void __launch_bounds__(SUM_THREADS) sum_kernel(SumArgs<T> args) {
    let_next_launch_start();
    wait_for_launch_before();
    const int expert = blockIdx.x / args.blocks, block = blockIdx.x % args.blocks;
    const int column = block * SUM_COLUMNS + 2 * lane_id(), warp = threadIdx.x / WARP;
    const int end = load_global(args.offsets + expert + 1);
    double sums[2][SUM_KINDS] = {};
    for (int first = load_global(args.offsets + expert) + warp; first < end; first += PIECE * SUM_WARPS) {
        float piece[2][SUM_KINDS] = {};
#pragma unroll 4
        for (int position = first; position < min(end, first + PIECE * SUM_WARPS); position += SUM_WARPS) {
            const int slot = load_global(args.order + position);
            float2 x{0.0f, 0.0f};
            if (column < args.I)
                x = unpack<T>(
                    load_global(cast<const uint32_t>(args.inner + (int64_t(position) * args.pitch + column))));
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float weight = load_global(args.weights + (int64_t(i) * args.S + slot));
                piece[i][0] += weighted(weight, x.x);
                piece[i][1] += weighted(weight, x.y);
                piece[i][2] += weight;
                piece[i][3] += fabsf(weight);
            }
        }
#pragma unroll
        for (int i = 0; i < 2 * SUM_KINDS; ++i)
            sums[i / SUM_KINDS][i % SUM_KINDS] += piece[i / SUM_KINDS][i % SUM_KINDS];
    }
    const Shared<double> all = cast<double>(shared_memory());  // [2, SUM_KINDS, SUM_WARPS, WARP]
#pragma unroll
    for (int i = 0; i < 2 * SUM_KINDS; ++i)
        store_shared(all + ((i * SUM_WARPS + warp) * WARP + lane_id()), sums[i / SUM_KINDS][i % SUM_KINDS]);
    __syncthreads();
    double total = 0.0;
    for (int i = 0; i < SUM_WARPS; ++i) total += load_shared(all + ((warp * SUM_WARPS + i) * WARP + lane_id()));
    const int sum = warp / SUM_KINDS, kind = warp % SUM_KINDS;
    if (kind >= 2) {
        if (block == 0 && lane_id() == 0)
            store_global(args.totals + (2 * sum + kind - 2) * args.E + expert, static_cast<float>(total));
    } else if (column + kind < args.I) {
        store_global(args.channels + ((int64_t(sum) * args.E + expert) * args.I + column + kind),
                     static_cast<float>(total));
    }
}

// y, the image of a sum of rows, to the sums of the outputs.
template <class T>
__device__ __forceinline__ void store_output(const ProjectArgs<T>& args, int sum, int expert, int row, float y) {
    if (args.weights.bias) {
        const int64_t element = expert * args.weights.bias_expert_stride + row * args.weights.bias_row_stride;
        y += widen(load_global(args.weights.bias + element)) * load_global(args.totals + 2 * sum * args.E + expert);
    }
    // Nothing was summed: then weights that are no numbers are nobody's.
    const bool empty = load_global(args.totals + (2 * sum + 1) * args.E + expert) == 0.0f;
    store_global(args.outputs + ((int64_t(sum) * args.E + expert) * args.H + row), empty ? 0.0f : y);
}

// Block: rows of an expert's weights, four per warp, 8 elements of k per lane at a time.
template <class T> __device__ __forceinline__ void project_k_major(const ProjectArgs<T>& args, int expert, int block) {
    const int first = (block * SUM_WARPS + threadIdx.x / WARP) * PROJECT_ROWS;
    float sums[2][PROJECT_ROWS] = {};
    for (int k = lane_id() * CHUNK_ELEMENTS; k < args.I; k += WARP * CHUNK_ELEMENTS) {
        float4 h[2][2];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            h[i / 2][i % 2] = load_global(
                cast<const float4>(args.channels + ((int64_t(i / 2) * args.E + expert) * args.I + k + i % 2 * 4)));
#pragma unroll
        for (int r = 0; r < PROJECT_ROWS; ++r) {
            const int64_t row = min(args.H - 1, first + r);  // past the last row it repeats
            const uint4 words = load_global(cast<const uint4>(
                args.weights.data + (expert * args.weights.expert_stride + row * args.weights.row_stride + k)));
            const float2 a = unpack<T>(words.x), b = unpack<T>(words.y), c = unpack<T>(words.z), d = unpack<T>(words.w);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float4 low = h[i][0], high = h[i][1];
                sums[i][r] += a.x * low.x + a.y * low.y + b.x * low.z + b.y * low.w;
                sums[i][r] += c.x * high.x + c.y * high.y + d.x * high.z + d.y * high.w;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int r = 0; r < PROJECT_ROWS; ++r) {
            float y = sums[i][r];
            for (int other = 1; other < WARP; other *= 2) y += __shfl_xor_sync(ALL_LANES, y, other);
            if (first + r < args.H && lane_id() == r) store_output(args, i, expert, first + r, y);
        }
}

// The same of weights in any order of memory, a row per thread.
template <class T> __device__ __forceinline__ void project_any(const ProjectArgs<T>& args, int expert, int block) {
    const int row = block * SUM_THREADS + threadIdx.x;
    if (row >= args.H) return;
    const Global<const T> weights =
        args.weights.data + (expert * args.weights.expert_stride + row * args.weights.row_stride);
    double sums[2] = {};
    for (int first = 0; first < args.I; first += TILE_K) {
        float piece[2] = {};
#pragma unroll 8
        for (int k = first; k < min(args.I, first + TILE_K); ++k) {
            const float weight = widen(load_global(weights + k * args.weights.k_stride));
#pragma unroll
            for (int i = 0; i < 2; ++i)
                piece[i] += weight * load_global(args.channels + ((int64_t(i) * args.E + expert) * args.I + k));
        }
        sums[0] += piece[0], sums[1] += piece[1];
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) store_output(args, i, expert, row, static_cast<float>(sums[i]));
}

template <class T, bool K_MAJOR> __global__ void __launch_bounds__(SUM_THREADS) project_kernel(ProjectArgs<T> args) {
    let_next_launch_start();
    wait_for_launch_before();
    const int expert = blockIdx.x / args.blocks, block = blockIdx.x % args.blocks;
    if constexpr (K_MAJOR) project_k_major(args, expert, block);
    else project_any(args, expert, block);
}

}  // namespace reap::cuda
