// What the two grouped GEMMs share: which tile a block computes, how its operands come to shared
// memory, and the loop that multiplies them.
//
//     global --cp.async--> ring of STAGES slices in shared memory --ldmatrix--> registers --mma--> fp32
//
// A slice is TILE_K elements of k of all rows of a tile. It lies in rows of 128 bytes, whose
// 16-byte chunks are permuted by the row's number modulo 8: the 8 rows that ldmatrix reads at a time
// are then in different banks, and so are the 8 chunks of a row that cp.async writes.
//
// Four warps, two by two, of (ROWS / 2) x 64 elements each: the wider a warp's tile, the more
// multiplications per operand that it reads from shared memory, and 64 x 64 is what registers hold.
#pragma once
#include <type_traits>

#include "numbers.cuh"
#include "routing.cuh"

namespace reap::cuda {

constexpr int COLUMNS = 128;  // of a tile
constexpr int TILE_K = 64;    // elements of k in a slice
constexpr int THREADS = 128;
constexpr int WARP_COLUMNS = COLUMNS / 2;
constexpr int COLUMN_TILES = WARP_COLUMNS / 8;  // mma tiles side by side in a warp
constexpr int ROW_BYTES = 128;
constexpr int CHUNK_BYTES = 16;
constexpr int CHUNK_ELEMENTS = 8;
constexpr int ROW_CHUNKS = ROW_BYTES / CHUNK_BYTES;
constexpr int COPY_ROWS = THREADS / ROW_CHUNKS;  // rows that the block copies at a time
constexpr int PANEL_COLUMNS = ROW_BYTES / 2;     // of MN-major weights

// 96 KB at most, so that every chip from sm_80 runs every tile.
template <int ROWS> struct Ring {
    static constexpr int STAGES = ROWS == 32 ? 4 : 3;
    static constexpr int A_BYTES = ROWS * ROW_BYTES;
    static constexpr int B_BYTES = COLUMNS * ROW_BYTES;
    static constexpr int STAGE_BYTES = A_BYTES + B_BYTES;
    static constexpr int BYTES = STAGES * STAGE_BYTES;
    static_assert(BYTES <= 96 << 10);
};
static_assert(Ring<32>::BYTES <= Ring<128>::BYTES && Ring<64>::BYTES <= Ring<128>::BYTES);  // see with_rows()

// The accumulators of a warp: for each 16 rows a strip of fragments of 16 x 8. Lane l has of a
// fragment the elements 0, 1 of row l / 4 and 2, 3 of the row 8 below, columns 2 (l % 4) + {0, 1}.
template <int ROWS> using Accumulators = float[ROWS / 32][COLUMN_TILES][4];

__device__ __forceinline__ int fragment_row() { return lane_id() / 4; }
__device__ __forceinline__ int fragment_column() { return lane_id() % 4 * 2; }

// Where this warp's part of the tile starts.
template <int ROWS> __device__ __forceinline__ int warp_row() { return threadIdx.x / (2 * WARP) * (ROWS / 2); }
__device__ __forceinline__ int warp_column() { return threadIdx.x / WARP % 2 * WARP_COLUMNS; }

// Whether a sorted position is one of the tile's: the rows of its last tile that an expert does not
// fill compute along, but must leave no trace.
__device__ __forceinline__ bool is_real(int position, int end) { return position < end; }

// A block's tile: sorted positions from `first` to at most `end` of one expert, and columns.
struct Tile {
    int expert, first, end;
    int column;  // its number among the column tiles
};

// The order in which tiles are numbered, and so taken. Column tiles come in slabs, whose part of the output
// stays in the L2 cache while all rows pass by. In a slab tiles of an expert are neighbours. Among them row
// tiles run fastest, in groups whose rows stay in the cache while each column tile of the weights passes
// by once.
struct Walk {
    int E;
    int column_tiles;
    int slab;   // column tiles; the last slab may have fewer
    int group;  // row tiles
};

// False: there is no tile `number`.
__device__ __forceinline__ bool locate(Tile& tile, const Routing& routing, int number, const Walk& walk, int rows) {
    const int all = load_global(routing.first_tile + walk.E);
    if (number >= all * walk.column_tiles) return false;
    const int left = number / (all * walk.slab) * walk.slab;
    number -= all * left;
    const int across = max(min(walk.slab, walk.column_tiles - left), 1);  // what is divided by is not 0
    tile.expert = load_global(routing.tile_expert + number / across);
    const int first = load_global(routing.first_tile + tile.expert);
    const int row_tiles = load_global(routing.first_tile + tile.expert + 1) - first;
    int local = number - first * across;
    const int group_first = local / (walk.group * across) * walk.group;
    local -= group_first * across;
    const int height = min(walk.group, row_tiles - group_first);
    tile.column = left + local / height;
    tile.first = load_global(routing.offsets + tile.expert) + (group_first + local % height) * rows;
    tile.end = load_global(routing.offsets + tile.expert + 1);
    return true;
}

// Calls compute(rows) with the rows that are computed of a tile of ROWS: of 128, half or a quarter where its
// expert has no more left. Smaller tiles are bound by the bytes of the weights, which empty rows do not add to.
template <int ROWS, class Compute> __device__ __forceinline__ void with_rows(const Tile& tile, Compute compute) {
    if constexpr (ROWS == 128) {
        if (tile.end - tile.first <= 32) return compute(std::integral_constant<int, 32>());
        if (tile.end - tile.first <= 64) return compute(std::integral_constant<int, 64>());
    }
    compute(std::integral_constant<int, ROWS>());
}

// How the rows of the weights become columns of the result. Where gate and up are concatenated, 8
// columns of gate and 8 of up alternate, so that a warp has both halves of its activations.
struct Columns {
    int count;  // of gate (or all, if up is 0)
    int up;     // weight rows from gate to up where they are concatenated; else 0

    // The weight row of result column n, the first of `width` that are read at once. Past the last
    // column the last ones repeat.
    __device__ __forceinline__ int weight_row(int n, int width) const {
        if (up == 0) return min(n, count - width);
        return min(n / 16 * 8 + n % 8, count - width) + (n & 8 ? up : 0);
    }
};

// A projection's weights as the kernels take them; like Weights, but typed.
template <class T> struct Projection {
    Global<const T> data;  // [E, rows, k]
    Global<const T> bias;  // [E, rows], or null
    int64_t expert_stride, row_stride, k_stride;
    int64_t bias_expert_stride, bias_row_stride;
    Columns columns;
};

// Along which dimension the weights are contiguous and aligned to 16 bytes: k, rows, or none that
// one could rely on.
enum class Layout : int { k_major, mn_major, any };

__device__ __forceinline__ int chunk_offset(int row, int chunk) {
    return row * ROW_BYTES + ((chunk ^ (row % ROW_CHUNKS)) * CHUNK_BYTES);
}

// Each thread copies one chunk of row copy_row() and of every 16th row below.
__device__ __forceinline__ int copy_row() { return threadIdx.x / ROW_CHUNKS; }
__device__ __forceinline__ int copy_chunk() { return threadIdx.x % ROW_CHUNKS; }

// Copies slices of K-major operands with cp.async. Offsets in chunks reach 64 GB.
template <class T, int ROWS> struct KMajorSlice {
    Global<const char> base;            // advances slice by slice
    uint32_t offset[ROWS / COPY_ROWS];  // of this thread's chunks [16 bytes]
    int left;                           // elements of k from this thread's chunk on, a multiple of 8

    // row(i): the element where tile row i starts, counted from `data` and a multiple of 8.
    template <class Row>
    __device__ __forceinline__ KMajorSlice(Global<const T> data, int depth, Row row)
        : base(cast<const char>(data)), left(depth - copy_chunk() * CHUNK_ELEMENTS) {
#pragma unroll
        for (int i = 0; i < ROWS / COPY_ROWS; ++i)
            offset[i] = static_cast<uint32_t>(row(copy_row() + i * COPY_ROWS) / CHUNK_ELEMENTS) + copy_chunk();
    }

    __device__ __forceinline__ void fill(Shared<char> slice) {
        fill_part<0, ROWS>(slice);
        advance();
    }
    // Rows FIRST to LAST of it; and on to the next slice.
    template <int FIRST, int LAST> __device__ __forceinline__ void fill_part(Shared<char> slice) const {
        const Shared<char> to = slice + chunk_offset(copy_row(), copy_chunk());
#pragma unroll
        for (int i = FIRST / COPY_ROWS; i < LAST / COPY_ROWS; ++i)
            cp_async16(to + i * COPY_ROWS * ROW_BYTES, base + int64_t(offset[i]) * CHUNK_BYTES, left > 0);
    }
    __device__ __forceinline__ void advance() {
        base = base + ROW_BYTES;
        left -= TILE_K;
    }
};

// The same of MN-major weights: a slice is two panels of TILE_K values of k by PANEL_COLUMNS weight
// rows, so that each is in rows of 128 bytes again.
template <class T> struct MNMajorSlice {
    static constexpr int PANEL_CHUNKS = TILE_K / COPY_ROWS;  // of a thread in one panel
    Global<const char> base;
    int64_t advance;                    // bytes from slice to slice
    uint32_t offset[2 * PANEL_CHUNKS];  // of this thread's chunks [16 bytes]
    int left;                           // values of k from this thread's first on

    __device__ __forceinline__ MNMajorSlice(const Projection<T>& weights, Global<const T> data, int depth, int column)
        : base(cast<const char>(data)),
          advance(TILE_K * weights.k_stride * int64_t(sizeof(T))),
          left(depth - copy_row()) {
#pragma unroll
        for (int i = 0; i < 2 * PANEL_CHUNKS; ++i) {
            const int n = column + i / PANEL_CHUNKS * PANEL_COLUMNS + copy_chunk() * CHUNK_ELEMENTS;
            const int k = copy_row() + i % PANEL_CHUNKS * COPY_ROWS;
            const int64_t element = weights.columns.weight_row(n, CHUNK_ELEMENTS) + k * weights.k_stride;
            offset[i] = static_cast<uint32_t>(element / CHUNK_ELEMENTS);
        }
    }

    __device__ __forceinline__ void fill(Shared<char> slice) {
        const Shared<char> to = slice + chunk_offset(copy_row(), copy_chunk());
#pragma unroll
        for (int i = 0; i < 2 * PANEL_CHUNKS; ++i)
            cp_async16(to + i * COPY_ROWS * ROW_BYTES, base + int64_t(offset[i]) * CHUNK_BYTES,
                       left > i % PANEL_CHUNKS * COPY_ROWS);
        base = base + advance;
        left -= TILE_K;
    }
};

// Slices of rows of any strides and alignment, element by element through the registers.
template <class T, int ROWS> struct StridedSlice {
    Global<const T> row[ROWS / COPY_ROWS];  // where this thread's chunks start
    int64_t stride;
    int left;

    template <class Row>
    __device__ __forceinline__ StridedSlice(Global<const T> data, int depth, int64_t k_stride, Row start)
        : stride(k_stride), left(depth - copy_chunk() * CHUNK_ELEMENTS) {
#pragma unroll
        for (int i = 0; i < ROWS / COPY_ROWS; ++i)
            row[i] = data + (start(copy_row() + i * COPY_ROWS) + copy_chunk() * CHUNK_ELEMENTS * stride);
    }

    __device__ __forceinline__ void fill(Shared<char> slice) {
        const Shared<char> to = slice + chunk_offset(copy_row(), copy_chunk());
#pragma unroll 1  // few loads at a time, for few registers
        for (int i = 0; i < CHUNK_ELEMENTS / 2; ++i) {
            const int k = (i + copy_row()) % (CHUNK_ELEMENTS / 2) * 2;  // other rows, other banks
#pragma unroll
            for (int j = 0; j < ROWS / COPY_ROWS; ++j) {
                const T low = k < left ? load_global(row[j] + k * stride) : narrow<T>(0.0f);
                const T high = k + 1 < left ? load_global(row[j] + (k + 1) * stride) : narrow<T>(0.0f);
                store_shared(cast<uint32_t>(to + j * COPY_ROWS * ROW_BYTES) + k / 2, pack(low, high));
            }
        }
#pragma unroll
        for (int j = 0; j < ROWS / COPY_ROWS; ++j) row[j] = row[j] + TILE_K * stride;
        left -= TILE_K;
    }
};

// The weights of a tile that starts at result column `column`.
template <class T, Layout LAYOUT>
__device__ __forceinline__ auto weight_slices(const Projection<T>& weights, int expert, int column, int depth) {
    const Global<const T> data = weights.data + expert * weights.expert_stride;
    const auto row = [&](int i) { return weights.columns.weight_row(column + i, 1) * weights.row_stride; };
    if constexpr (LAYOUT == Layout::k_major) return KMajorSlice<T, COLUMNS>(data, depth, row);
    else if constexpr (LAYOUT == Layout::mn_major) return MNMajorSlice<T>(weights, data, depth, column);
    else return StridedSlice<T, COLUMNS>(data, depth, weights.k_stride, row);
}

// The accumulators start from the bias, or from 0.
template <class T, int ROWS>
__device__ __forceinline__ void start(Accumulators<ROWS>& acc, const Projection<T>& weights, int expert, int column) {
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            float bias = 0.0f;
            if (weights.bias) {
                const int row = weights.columns.weight_row(column + warp_column() + j * 8 + fragment_column() + c, 1);
                const int64_t element = expert * weights.bias_expert_stride + row * weights.bias_row_stride;
                bias = widen(load_global(weights.bias + element));
            }
#pragma unroll
            for (int i = 0; i < ROWS / 32; ++i) acc[i][j][c] = acc[i][j][c + 2] = bias;
        }
}

// acc += the slice's A [ROWS, TILE_K] B [TILE_K, COLUMNS], this warp's part. Calls meanwhile() while its
// first operands are on their way to registers.
template <class T, int ROWS, bool B_MN_MAJOR, class Meanwhile>
__device__ __forceinline__ void multiply_slice(Accumulators<ROWS>& acc, Shared<const char> a, Shared<const char> b,
                                               Meanwhile meanwhile) {
    const int lane = lane_id();
    const int a_row = warp_row<ROWS>() + lane % 16, a_chunk = lane / 16;
    const int b_row = warp_column() + lane % 8 + lane / 16 * 8, b_chunk = lane / 8 % 2;
    const Shared<const char> panel = b + warp_column() / PANEL_COLUMNS * (TILE_K * ROW_BYTES);
    constexpr int BELOW = 16 * ROW_BYTES;  // 16 rows further down chunks are permuted alike
#pragma unroll
    for (int k = 0; k < TILE_K / 16; ++k) {
        uint32_t left[ROWS / 32][4], right[COLUMN_TILES / 2][4];
#pragma unroll
        for (int i = 0; i < ROWS / 32; ++i) ldmatrix_x4(left[i], a + chunk_offset(a_row, 2 * k + a_chunk) + i * BELOW);
#pragma unroll
        for (int j = 0; j < COLUMN_TILES / 2; ++j)
            if constexpr (B_MN_MAJOR)
                ldmatrix_x4_trans(right[j], panel + chunk_offset(lane % 16, 2 * j + lane / 16) + k * BELOW);
            else ldmatrix_x4(right[j], b + chunk_offset(b_row, 2 * k + b_chunk) + j * BELOW);
        if (k == 0) meanwhile();
#pragma unroll
        for (int i = 0; i < ROWS / 32; ++i)
#pragma unroll
            for (int j = 0; j < COLUMN_TILES; ++j)
                mma_m16n8k16<T>(acc[i][j], left[i], right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
    }
}

// acc += A B over a number of slices. One barrier per slice serves twice: all copies of this slice have
// arrived, and no warp still reads the slice before, whose stage the next copies fill. Past the last
// slice those bring zeros that nobody reads: cheaper than a branch in the loop.
template <class T, int ROWS, bool B_MN_MAJOR, class A, class B>
__device__ __forceinline__ void multiply(Accumulators<ROWS>& acc, A& a, B& b, int slices) {
    using Ring = cuda::Ring<ROWS>;
    const Shared<char> first = shared_memory(), last = first + (Ring::STAGES - 1) * Ring::STAGE_BYTES;
    const auto fill = [&](Shared<char> stage) {
        a.fill(stage);
        b.fill(stage + Ring::A_BYTES);
        cp_async_commit();
    };
#pragma unroll
    for (int i = 0; i < Ring::STAGES - 1; ++i) fill(first + i * Ring::STAGE_BYTES);

    Shared<char> reading = first, writing = last;
    for (int slice = 0; slice < slices; ++slice) {
        cp_async_wait<Ring::STAGES - 2>();
        __syncthreads();
        multiply_slice<T, ROWS, B_MN_MAJOR>(acc, reading, reading + Ring::A_BYTES, [&] { fill(writing); });
        writing = reading;
        reading = reading == last ? first : reading + Ring::STAGE_BYTES;
    }
    cp_async_wait<0>();
}

}  // namespace reap::cuda
