// ../launch.cuh with Hopper's kernels for the two GEMMs.
//
// What Layer.wgmma needs, beside what run_layer() does: an sm_90, H a multiple of 8, hidden and both
// weights at multiples of 16 bytes, contiguous along one dimension and all other strides positive
// multiples of 8 that do not overlap and reach less than 2^40 bytes, those of hidden 64 GB; I a
// multiple of 8 too, where MN-major gate and up are concatenated. The launcher also makes tensor maps,
// and its kernels are called with sm90's arguments.
#pragma once
#include "../launch.cuh"
#include "gate_up.cuh"
#include "pingpong.cuh"
#include "swapped/down.cuh"
#include "swapped/gate_up.cuh"

namespace reap::cuda::sm90 {

static_assert(WGMMA_ROWS == TILE_ROWS && WGMMA_COLUMNS == TILE_COLUMNS && COOPERATIVE_COLUMNS == TILE_COLUMNS);

inline bool is_mn_major(const Weights& w) { return w.k_stride != 1; }

// A box of the weights: 64 rows by 64 k. Their dimensions by their strides, k or rows first.
inline TensorBox weight_box(const Weights& w, int64_t experts, int64_t halves, int64_t rows, int64_t k) {
    const int64_t half = rows * w.row_stride;
    TensorBox box{w.data, 4, {k, rows, halves, experts}, {1, w.row_stride, half, w.expert_stride}, {TILE_K, BOX, 1, 1}};
    if (is_mn_major(w))
        box = {w.data, 4, {rows, halves, k, experts}, {1, half, w.k_stride, w.expert_stride}, {BOX, 1, TILE_K, 1}};
    for (int i = 1; i < 4; ++i)  // a stride that nobody needs must be legal
        if (box.sizes[i] == 1) box.strides[i] = round_up(box.sizes[i - 1] * box.strides[i - 1], CHUNK_ELEMENTS);
    return box;
}

template <class T> struct Launches : cuda::Launches<T> {
    using cuda::Launches<T>::layer, cuda::Launches<T>::plan, cuda::Launches<T>::work;
    TensorMap up, inner, down_weights;

    // Makes all maps, so that nothing is launched if the driver refuses one.
    Launches(const Layer& layer, Global<char> memory) : cuda::Launches<T>(layer, memory) {
        const int64_t halves = layer.gated && !layer.interleaved ? 2 : 1;
        up = kept_tensor_map(weight_box(layer.gate_up, layer.E, halves, plan.rows / halves, layer.H));
        const int box_rows = plan.form == Form::swapped ? swapped::OCTET : GROUP_ROWS;
        inner = make_tensor_map(TensorBox{
            cast<const char>(work.inner), 2, {layer.I, plan.slots}, {1, plan.inner_pitch}, {TILE_K, box_rows}});
        down_weights = kept_tensor_map(weight_box(layer.down, layer.E, 1, layer.H, layer.I));
    }

    // Blocks are persistent: one for each processor, and no more than there can be tiles.
    int64_t blocks(int column_tiles) const {
        return std::min<int64_t>(layer.processors, plan.row_tiles * column_tiles);
    }

    // Hints pay where nearly all experts have slots (of two for each a seventh has none, by chance), and where the
    // cache has room for those of all blocks beside what is in use.
    Guess guess(const Walk& walk) const {
        const int64_t row_tiles = ceil_div(plan.slots, layer.E * TILE_ROWS);
        const bool pays = plan.slots >= 2 * layer.E && layer.processors * STAGES * B_BYTES <= layer.cache_bytes / 2;
        return {static_cast<int>(row_tiles), walk.slab, static_cast<int>(pays ? layer.E * row_tiles * walk.slab : 0)};
    }

    template <class Launcher> void gate_up(Launcher& launch) const {
        const GateUpArgs<T> general = this->gate_up_args();
        const GateUp<T> args{general, work.counters, up, guess(general.walk)};
        const int64_t count = blocks(args.args.walk.column_tiles);
        const bool mn_major = is_mn_major(layer.gate_up);
        if (plan.form == Form::swapped) {
            const auto kernel = mn_major ? swapped::gate_up_kernel<T, true> : swapped::gate_up_kernel<T, false>;
            return launch("gate_up", kernel, count, BLOCK, swapped::GATE_UP_BYTES, args);
        }
        const auto kernel = mn_major ? gate_up_kernel<T, true> : gate_up_kernel<T, false>;
        launch("gate_up", kernel, count, BLOCK, GATE_UP_BYTES, args);
    }

    template <class Launcher> void down(Launcher& launch, int64_t first_column, int64_t last_column) const {
        const DownArgs<T> general = this->down_args(first_column, last_column);
        const Down<T> args{general, work.counters + (1 + first_column / plan.slab), inner, down_weights,
                           guess(general.walk)};
        const int64_t count = blocks(args.args.walk.column_tiles);
        const bool mn_major = is_mn_major(layer.down);
        if (plan.form == Form::swapped) {
            const auto kernel = mn_major ? swapped::down_kernel<T, true> : swapped::down_kernel<T, false>;
            return launch("down", kernel, count, BLOCK, swapped::DOWN_BYTES, args);
        }
        if (plan.form == Form::pingpong) {
            const auto kernel = mn_major ? down_pingpong_kernel<T, true> : down_pingpong_kernel<T, false>;
            return launch("down", kernel, count, BLOCK, PINGPONG_BYTES, args);
        }
        const auto kernel = mn_major ? down_kernel<T, true> : down_kernel<T, false>;
        launch("down", kernel, count, BLOCK, DOWN_BYTES, args);
    }
};

template <class Launcher> void run_layer(Launcher& launch, const Layer& layer, char* workspace) {
    if (layer.dtype == Dtype::bf16) run<Launches<bf16>>(launch, layer, workspace);
    else run<Launches<f16>>(launch, layer, workspace);
}

}  // namespace reap::cuda::sm90
