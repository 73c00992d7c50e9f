// One layer as launches: route, or count, scan and place if there are many slots; gate_up; where
// sums over slots are asked for, sum and project; down, finish; in deterministic mode down and finish once per slab. On
// the host, for any launcher:
//
//     launch("name of the kernel", kernel, blocks, threads, bytes of shared memory, arguments)
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "down.cuh"
#include "finish.cuh"
#include "gate_up.cuh"
#include "sm90/forms.cuh"
#include "sums.cuh"

namespace reap::cuda {

constexpr int ANY_ROWS = 64;                          // of tiles whose operands come through registers
constexpr int WITHOUT_ASKING = 48 << 10;              // bytes of shared memory that a kernel always has
constexpr int WGMMA_ROWS = 128, WGMMA_COLUMNS = 256;  // of the tiles of sm90/, those of down aside

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Whether `count` rows of `size` elements can be copied 16 bytes at a time: elements are contiguous, no
// copy crosses the end of a row, and offsets in chunks fit 32 bits.
inline bool even_rows(const char* data, int64_t size, int64_t stride, int64_t count, int64_t row_stride) {
    return reinterpret_cast<uintptr_t>(data) % CHUNK_BYTES == 0 && stride == 1 && size % CHUNK_ELEMENTS == 0 &&
           row_stride % CHUNK_ELEMENTS == 0 && count * row_stride < CHUNK_ELEMENTS * (int64_t(1) << 32);
}

// `half`: rows that are contiguous in the result, those of gate where gate and up are concatenated.
inline Layout layout_of(const Weights& w, int64_t rows, int64_t half, int64_t k) {
    if (w.expert_stride % CHUNK_ELEMENTS != 0) return Layout::any;
    if (even_rows(w.data, k, w.k_stride, rows, w.row_stride)) return Layout::k_major;
    if (even_rows(w.data, half, w.row_stride, k, w.k_stride)) return Layout::mn_major;
    return Layout::any;
}

// How a layer is cut: everything that the host decides.
struct Plan {
    int64_t slots;
    bool one_block;         // sorts all slots
    int64_t chunk, chunks;  // slots per warp that sorts them, and the number of such warps
    int64_t rows;           // of gate_up_proj
    int tile_rows;          // of both GEMMs, which share one table of row tiles
    int up_columns, down_columns;
    Form form;          // of Hopper's kernels
    int64_t row_tiles;  // a bound
    Layout gate_up, down;
    int64_t inner_pitch;  // elements
    int64_t slab;         // columns of the output at a time
    int64_t walked;       // of its column tiles, those that down does before others
    int64_t pitch;        // of `combined` [elements]
    int64_t combined_rows;
    int64_t parts;  // partials per slot
};

// Bytes that pass the cache while down adds to the output, `columns` columns at a time: the weights; inner,
// once for each slab; rows of the sums, read and written as often as they have left the cache. Between two
// experts of a token others pass, each with rows of inner and of the sums, and weights; what the last of
// them touched is in the cache.
inline double bytes_of_down(const Layer& layer, const Plan& plan, int64_t columns) {
    const double rows = double(plan.slots) / layer.E;
    const double stream = 2.0 * layer.I * (rows + columns), sums = 4.0 * layer.T * columns;
    const double away = std::max(0.0, 1 - rows / layer.T);  // chance that an expert is none of a token's
    int64_t passed = 0;                                     // experts, the most whose bytes are all in the cache
    for (int64_t high = layer.E; passed < high;) {
        const int64_t middle = (passed + high + 1) / 2;
        if (middle * stream + sums * (1 - std::pow(away, middle)) < layer.cache_bytes) passed = middle;
        else high = middle - 1;
    }
    const double missed = std::pow(away, passed);
    return 2.0 * layer.E * layer.I * layer.H + ceil_div(layer.H, columns) * 2.0 * plan.slots * layer.I +
           8.0 * layer.H * (layer.T + (plan.slots - layer.T) * missed);
}

// The column tiles of a slab that down does before others: fewer where that saves a twentieth of the bytes.
inline int64_t tiles_at_a_time(const Layer& layer, const Plan& plan) {
    const int64_t all = ceil_div(plan.slab, plan.down_columns);
    if (layer.deterministic) return all;  // nothing is added to
    int64_t best = all;
    double least = 0.95 * bytes_of_down(layer, plan, all * plan.down_columns);
    for (int64_t parts = 2; parts <= all; parts *= 2) {
        const int64_t tiles = ceil_div(all, parts);
        const double bytes = bytes_of_down(layer, plan, tiles * plan.down_columns);
        if (bytes < least) best = tiles, least = bytes;
    }
    return best;
}

inline Plan make_plan(const Layer& layer) {
    Plan plan;
    plan.slots = layer.T * layer.K;
    const int64_t tables = WITHOUT_ASKING / sizeof(int32_t) / (layer.E + 1);  // in the block's shared memory
    plan.chunk = round_up(ceil_div(plan.slots, std::min<int64_t>(ROUTE_WARPS, tables - 1)), WARP);
    plan.one_block = plan.chunk <= ROUTE_CHUNK;
    if (!plan.one_block) plan.chunk = CHUNK;
    plan.chunks = ceil_div(plan.slots, plan.chunk);
    plan.rows = layer.gated ? 2 * layer.I : layer.I;
    const bool halves = layer.gated && !layer.interleaved;
    plan.gate_up = layout_of(layer.gate_up, plan.rows, halves ? layer.I : plan.rows, layer.H);
    if (!even_rows(layer.hidden, layer.H, 1, layer.T, layer.hidden_stride)) plan.gate_up = Layout::any;
    plan.down = layout_of(layer.down, layer.H, layer.H, layer.I);

    // Few rows are bound by the bytes of the weights: then empty rows cost little, and deep rings
    // keep the copies coming. Copies through registers have one size, for theirs are scarce.
    plan.tile_rows = plan.slots <= 24 * layer.E ? 32 : plan.slots <= 96 * layer.E ? 64 : 128;
    if (plan.gate_up == Layout::any || plan.down == Layout::any) plan.tile_rows = ANY_ROWS;
    plan.up_columns = plan.down_columns = COLUMNS;
    if (layer.wgmma) plan.tile_rows = WGMMA_ROWS, plan.up_columns = WGMMA_COLUMNS;
    plan.row_tiles = std::min(plan.slots, (plan.slots + layer.E * (plan.tile_rows - 1)) / plan.tile_rows);
    plan.form = layer.wgmma ? sm90::form_of(layer, plan.row_tiles) : Form::automatic;
    if (layer.wgmma) plan.down_columns = sm90::columns_of_down(plan.form);
    plan.inner_pitch = round_up(layer.I, CHUNK_ELEMENTS);

    plan.slab = layer.H;
    plan.pitch = round_up(layer.H, 8);
    plan.combined_rows = layer.T;
    plan.parts = ceil_div(layer.H, PARTIAL_COLUMNS);
    if (layer.deterministic) {  // the bytes of inner once more, but at least one column tile
        const int64_t tiles = std::max<int64_t>(plan.inner_pitch * 2 / 4 / plan.down_columns, 1);
        plan.slab = plan.pitch = std::min(tiles * plan.down_columns, round_up(layer.H, plan.down_columns));
        plan.combined_rows = plan.slots;
    }
    plan.walked = tiles_at_a_time(layer, plan);
    return plan;
}

// Launches whose blocks take their tiles in turn: gate_up, and down once per slab.
inline int64_t counters_of(const Layer& layer, const Plan& plan) { return 1 + ceil_div(layer.H, plan.slab); }

// The workspace, cut into arrays that start at multiples of 256 bytes.
template <class T> struct Workspace {
    Global<int32_t> counts, totals, order, offsets, first_tile, tile_expert, counters;
    Global<T> inner;
    Global<float2> partials;
    Global<float> combined, sum_totals;
    size_t bytes = 0;

    Workspace(const Layer& layer, const Plan& plan, Global<char> memory) {
        cut(counts, memory, (layer.E + 1) * plan.chunks, "counts");
        cut(totals, memory, layer.E + 1, "totals");
        cut(order, memory, plan.slots, "order");
        cut(offsets, memory, layer.E + 1, "offsets");
        cut(first_tile, memory, layer.E + 1, "first_tile");
        cut(tile_expert, memory, plan.row_tiles, "tile_expert");
        cut(counters, memory, counters_of(layer, plan), "counters");
        cut(inner, memory, plan.slots * plan.inner_pitch, "inner");
        cut(partials, memory, plan.slots * plan.parts, "partials");
        cut(combined, memory, plan.combined_rows * plan.pitch, "combined");
        if (layer.sum_weights) cut(sum_totals, memory, 4 * layer.E, "sum_totals");
    }

private:
    template <class U> void cut(Global<U>& array, Global<char> memory, int64_t count, const char* name) {
        array = slice<U>(memory, bytes, count, name);
        bytes += round_up(count * sizeof(U), 256);
    }
};

inline size_t workspace_size(const Layer& layer) {
    return Workspace<bf16>(layer, make_plan(layer), nullptr).bytes;  // f16 is as wide
}

template <class T> Projection<T> projection(const Weights& w, Columns columns) {
    return {reinterpret_cast<const T*>(w.data),
            reinterpret_cast<const T*>(w.bias),
            w.expert_stride,
            w.row_stride,
            w.k_stride,
            w.bias_expert_stride,
            w.bias_row_stride,
            columns};
}

// Row tiles of an expert side by side: at least as many as make the blocks that run at a time, two
// per processor, cover about as many columns as rows; and more if their rows leave a fifth of the
// cache to the weights that pass by. An expert that is one group reads its weights once.
inline int group_of(const Layer& layer, const Plan& plan, int64_t depth) {
    const int64_t fitting = layer.cache_bytes * 4 / 5 / (plan.tile_rows * depth * 2);
    const auto square = static_cast<int64_t>(std::sqrt(2.0 * layer.processors));
    return static_cast<int>(std::min(std::max({fitting, square, int64_t(1)}), plan.row_tiles));
}

// Calls visit with the layout and the rows of a tile as constants.
template <class Visit> void with_constants(Layout layout, int rows, Visit visit) {
    using std::integral_constant;
    const auto with_rows = [&](auto constant) {
        if (rows == 32) return visit(constant, integral_constant<int, 32>());
        if (rows == 64) return visit(constant, integral_constant<int, 64>());
        return visit(constant, integral_constant<int, 128>());
    };
    if (layout == Layout::k_major) return with_rows(integral_constant<Layout, Layout::k_major>());
    if (layout == Layout::mn_major) return with_rows(integral_constant<Layout, Layout::mn_major>());
    return visit(integral_constant<Layout, Layout::any>(), integral_constant<int, ANY_ROWS>());
}

// The arguments of one layer's kernels, and their launches.
template <class T> struct Launches {
    const Layer& layer;
    Plan plan;
    Workspace<T> work;

    Launches(const Layer& layer, Global<char> memory)
        : layer(layer), plan(make_plan(layer)), work(layer, plan, memory) {}

    template <class Launcher> void route(Launcher& launch) const {
        RoutingArgs args;
        args.ids = ids();
        args.counts = work.counts, args.totals = work.totals, args.order = work.order, args.offsets = work.offsets;
        args.first_tile = work.first_tile, args.tile_expert = work.tile_expert;
        args.E = layer.E, args.S = plan.slots, args.chunk = plan.chunk, args.chunks = plan.chunks;
        args.counters = work.counters, args.launches = counters_of(layer, plan);
        args.tile_rows = plan.tile_rows;
        const int shared = (layer.E + 1) * sizeof(int32_t);
        if (plan.one_block)
            return launch("route", route_kernel, 1, plan.chunks * WARP, (plan.chunks + 1) * shared, args);
        launch("count", count_kernel, plan.chunks, WARP, shared, args);
        launch("scan", scan_kernel, layer.E + 1, WARP, 0, args);
        launch("place", place_kernel, std::max(plan.chunks, layer.E), WARP, shared, args);
    }

    GateUpArgs<T> gate_up_args() const {
        const bool halves = layer.gated && !layer.interleaved;
        const Columns columns{static_cast<int>(halves ? layer.I : plan.rows), static_cast<int>(halves ? layer.I : 0)};
        GateUpArgs<T> args;
        args.hidden = reinterpret_cast<const T*>(layer.hidden);
        args.hidden_stride = layer.hidden_stride;
        args.weights = projection<T>(layer.gate_up, columns);
        args.inner = work.inner;
        args.routing = routing();
        args.gate = gate();
        args.pairing = halves ? Pairing::halves : layer.gated ? Pairing::neighbours : Pairing::none;
        args.K = layer.K, args.H = layer.H, args.I = layer.I;
        args.pitch = plan.inner_pitch;
        // Of inner: of its padding too.
        const int64_t tiles = ceil_div(layer.gated ? 2 * plan.inner_pitch : plan.inner_pitch, plan.up_columns);
        args.walk = walk(tiles, tiles, layer.H);
        args.tiles = plan.row_tiles * args.walk.column_tiles;
        args.zero = {cast<float4>(work.combined), layer.deterministic ? 0 : plan.combined_rows * plan.pitch / 4};
        return args;
    }

    template <class Launcher> void gate_up(Launcher& launch) const {
        const GateUpArgs<T> args = gate_up_args();
        const int64_t shares = ceil_div(args.zero.count, THREADS * ZERO_STEPS);
        with_constants(plan.gate_up, plan.tile_rows, [&](auto layout, auto rows) {
            launch("gate_up", gate_up_kernel<T, rows(), layout()>, args.tiles + shares, THREADS, Ring<rows()>::BYTES,
                   args);
        });
    }

    template <class Launcher> void sums(Launcher& launch) const {
        SumArgs<T> sum;
        sum.inner = work.inner;
        sum.order = work.order, sum.offsets = work.offsets;
        sum.weights = layer.sum_weights;
        sum.channels = layer.channel_sums, sum.totals = work.sum_totals;
        sum.E = layer.E, sum.I = layer.I, sum.S = plan.slots, sum.pitch = plan.inner_pitch;
        sum.blocks = ceil_div(layer.I, SUM_COLUMNS);
        launch("sum", sum_kernel<T>, layer.E * sum.blocks, SUM_THREADS, SUM_BYTES, sum);

        const bool k_major = plan.down == Layout::k_major;
        ProjectArgs<T> args;
        args.channels = layer.channel_sums, args.totals = work.sum_totals;
        args.weights = projection<T>(layer.down, {static_cast<int>(layer.H), 0});
        args.outputs = layer.output_sums;
        args.E = layer.E, args.H = layer.H, args.I = layer.I;
        args.blocks = ceil_div(layer.H, k_major ? SUM_WARPS * PROJECT_ROWS : SUM_THREADS);
        const auto kernel = k_major ? project_kernel<T, true> : project_kernel<T, false>;
        launch("project", kernel, layer.E * args.blocks, SUM_THREADS, 0, args);
    }

    DownArgs<T> down_args(int64_t first_column, int64_t last_column) const {
        DownArgs<T> args;
        args.inner = work.inner;
        args.weights = projection<T>(layer.down, {static_cast<int>(layer.H), 0});
        args.routing = routing();
        args.combine.order = work.order;
        args.combine.gates = {static_cast<const char*>(layer.top_k_weights), layer.gates};
        args.combine.combined = work.combined;
        args.combine.partials = work.partials;
        args.combine.pitch = plan.pitch;
        args.combine.K = layer.K, args.combine.S = plan.slots, args.combine.H = layer.H;
        args.combine.first_column = first_column;
        args.combine.deterministic = layer.deterministic;
        args.I = layer.I;
        args.inner_pitch = plan.inner_pitch;
        const int64_t tiles = ceil_div(last_column - first_column, plan.down_columns);
        args.walk = walk(tiles, std::min(plan.walked, tiles), layer.I);
        return args;
    }

    template <class Launcher> void down(Launcher& launch, int64_t first_column, int64_t last_column) const {
        const DownArgs<T> args = down_args(first_column, last_column);
        with_constants(plan.down, plan.tile_rows, [&](auto layout, auto rows) {
            launch("down", down_kernel<T, rows(), layout()>, plan.row_tiles * args.walk.column_tiles, THREADS,
                   Ring<rows()>::BYTES, args);
        });
    }

    template <class Launcher> void finish(Launcher& launch, int64_t first_column, int64_t last_column) const {
        FinishArgs<T> args;
        args.combined = work.combined;
        args.partials = work.partials;
        args.ids = ids();
        args.order = work.order, args.offsets = work.offsets;
        args.out = reinterpret_cast<T*>(layer.out);
        args.norms = layer.norms, args.peaks = layer.peaks;
        args.pitch = plan.pitch;
        args.tokens = layer.T, args.K = layer.K, args.E = layer.E, args.H = layer.H, args.S = plan.slots;
        args.parts = last_column == layer.H ? plan.parts : 0;
        args.first_column = first_column, args.last_column = last_column;
        args.deterministic = layer.deterministic;
        launch("finish", finish_kernel<T>, std::max(layer.T, ceil_div(plan.slots, FINISH_THREADS)), FINISH_THREADS, 0,
               args);
    }

    // Of column tiles, `slab` of them at a time, whose rows have `depth` elements.
    Walk walk(int64_t column_tiles, int64_t slab, int64_t depth) const {
        return {static_cast<int>(layer.E), static_cast<int>(column_tiles), static_cast<int>(slab),
                group_of(layer, plan, depth)};
    }

    Ids ids() const { return {static_cast<const char*>(layer.top_k_index), layer.wide_ids}; }
    Routing routing() const { return {work.order, work.offsets, work.first_tile, work.tile_expert}; }

    Gate gate() const {
        if (layer.activation == Activation::swiglu_clamped)
            return {layer.activation, layer.alpha, layer.limit, layer.offset};
        return {layer.activation, 1.0f, std::numeric_limits<float>::infinity(), 0.0f};
    }
};

template <class Launches, class Launcher> void run(Launcher& launch, const Layer& layer, Global<char> memory) {
    const Launches launches(layer, memory);
    launches.route(launch);
    launches.gate_up(launch);
    if (layer.sum_weights) launches.sums(launch);
    for (int64_t first = 0; first < layer.H; first += launches.plan.slab) {
        const int64_t last = std::min(first + launches.plan.slab, layer.H);
        launches.down(launch, first, last);
        launches.finish(launch, first, last);
    }
}

// Needs T > 0, a 16-bit dtype, norms and peaks, at most MAX_EXPERTS experts and 2^30 slots, and a
// workspace of workspace_size(layer) bytes, 256-byte aligned.
template <class Launcher> void run_layer(Launcher& launch, const Layer& layer, char* workspace) {
    if (layer.dtype == Dtype::bf16) run<Launches<bf16>>(launch, layer, workspace);
    else run<Launches<f16>>(launch, layer, workspace);
}

}  // namespace reap::cuda
