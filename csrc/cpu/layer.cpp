// The layer on the CPU: its memory, and the order of its tasks.
#include "engine.h"

#include <sys/mman.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "isa.h"
#include "routing.h"
#include "team.h"

namespace reap {
namespace {

constexpr size_t LINE = 64;
constexpr int64_t AHEAD = 8;  // blocks per thread that gate_up runs ahead of down
constexpr size_t PAGE = 4096, LARGE = 8 << 20;

// Fresh memory costs a fault per page, and the sums are visited in all of theirs for every expert. Only advice, so
// its failure does not matter.
void prefer_large_pages(void* memory, size_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + PAGE - 1) / PAGE * PAGE;
    if (bytes >= LARGE) madvise(reinterpret_cast<void*>(begin), bytes - PAGE, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};

// All memory of a call, in one zeroed allocation: pieces are first counted, then handed out.
class Arena {
public:
    // The address of a piece, aligned to a cache line; null while counting.
    template <class T> T* take(size_t count) {
        char* const piece = base_ ? base_ + used_ : nullptr;
        used_ += (count * sizeof(T) + LINE - 1) / LINE * LINE;
        return reinterpret_cast<T*>(piece);
    }
    void allocate() {
        used_ += LINE;  // to align, and for vectors that are read past the end of the last piece
        memory_.reset(std::calloc(used_ + LINE, 1));
        if (!memory_) throw std::bad_alloc();
        prefer_large_pages(memory_.get(), used_ + LINE);
        base_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory_.get()) + LINE - 1) / LINE * LINE);
        bytes_ = used_ + LINE;
        used_ = 0;
    }
    size_t bytes() const { return bytes_; }

private:
    std::unique_ptr<void, Free> memory_;
    char* base_ = nullptr;
    size_t used_ = 0, bytes_ = 0;
};

struct Run {
    Job job;
    const Kernels* kernels;
    Arena arena;
    Routing routing;
    bool all_fit;       // inner has a row for every slot
    int64_t row_bytes;  // of inner
    char* scratch;      // one piece per thread
    size_t scratch_bytes;
    std::atomic<int64_t> next{0};
};

void lay_out(Run& run) {
    const Layer& layer = run.job.layer;
    const size_t T = layer.T, S = layer.T * layer.K, H = layer.H, E = layer.E;
    const size_t blocks = most_blocks(layer);
    Job& job = run.job;
    job.slabs = ceil_div(layer.H, SLAB);
    job.inner_width = ceil_div(layer.I, 2) * 2;
    job.ahead = AHEAD * layer.threads;
    const size_t ahead = 2 * static_cast<size_t>(job.ahead);
    run.all_fit = S <= ahead * BLOCK_TOKENS;
    job.rows = run.all_fit ? S : ahead * BLOCK_TOKENS;
    const size_t buffers = run.all_fit ? blocks : ahead;
    job.buffers = static_cast<int64_t>(buffers);
    job.order = run.routing.order = run.arena.take<int32_t>(S);
    job.blocks = run.routing.blocks = run.arena.take<Block>(blocks);
    job.progress = run.arena.take<int64_t>(blocks);
    run.routing.offsets = run.arena.take<int64_t>(E + 1);
    job.next_block = run.arena.take<int64_t>(static_cast<size_t>(job.slabs));
    job.partials = layer.norms ? run.arena.take<float>(static_cast<size_t>(job.rows * job.slabs) * 2) : nullptr;
    job.sums = layer.dtype == Dtype::f32 ? reinterpret_cast<float*>(layer.out) : run.arena.take<float>(T * H);
    run.scratch_bytes = run.kernels->scratch_bytes(layer);
    run.scratch = run.arena.take<char>(run.scratch_bytes * static_cast<size_t>(layer.threads));
    run.row_bytes = job.inner_width * element_size(layer.dtype);
    job.inner = run.arena.take<char>(static_cast<size_t>(job.rows * run.row_bytes) + buffers * LINE);
    const bool sums = layer.sum_weights;
    job.block_sums = sums ? run.arena.take<float>(buffers * 2 * static_cast<size_t>(job.inner_width)) : nullptr;
    job.running = sums ? run.arena.take<double>(2 * (static_cast<size_t>(layer.I) + H)) : nullptr;
}

// Each block's part of inner and partials: a buffer of its own, or, where all together are too many, that of the
// block 2 * ahead before it. A line between buffers is for vectors that are read past the end of one: the next is
// being written meanwhile.
void assign_buffers(const Run& run) {
    for (int64_t number = 0; number < run.job.num_blocks; ++number) {
        Block& block = run.routing.blocks[number];
        const int64_t buffer = number % run.job.buffers;
        block.row = run.all_fit ? block.first : buffer * BLOCK_TOKENS;
        block.inner = block.row * run.row_bytes + buffer * static_cast<int64_t>(LINE);
    }
}

// Few blocks: cut the inner size as well, so that every thread has a few tasks. The bits stay the same.
int64_t count_splits(const Layer& layer, int64_t blocks) {
    if (layer.threads == 1) return 1;
    const int64_t groups = ceil_div(layer.I, layer.gated ? GROUP / 2 : GROUP), wanted = 4 * layer.threads;
    const int64_t splits = blocks ? ceil_div(wanted, blocks) : 1;
    return splits < groups ? splits : groups;
}

// All slabs' parts of the norms of a block's slots, in the order of the columns.
void reduce_norms(const Job& job, const Block& block) {
    for (int lane = 0; lane < block.tokens; ++lane) {
        const float* cells = job.partials + (block.row + lane) * job.slabs * 2;
        double square = 0;
        float peak = 0;
        for (int64_t slab = 0; slab < job.slabs; ++slab, cells += 2) {
            square += cells[0];
            peak = cells[1] > peak ? cells[1] : peak;
        }
        const int32_t slot = job.order[block.first + lane];
        const float norm = static_cast<float>(std::sqrt(square));
        job.layer.norms[slot] = norm;
        job.layer.peaks[slot] = std::isnan(norm) ? norm : peak;  // vector maxima drop NaN, sums keep it
    }
}

void run_gate_up(const Run& run, int64_t block, int64_t part, char* scratch) {
    const Job& job = run.job;
    const int64_t before = block - 2 * job.ahead;  // the block that had this one's buffer
    if (before >= 0) wait_until(job.progress + before, job.inner_splits + job.slabs + 1);
    run.kernels->gate_up(job, block, part, scratch);
    __atomic_fetch_add(job.progress + block, 1, __ATOMIC_RELEASE);
}

void run_down(const Run& run, int64_t block, int64_t slab, char* scratch) {
    const Job& job = run.job;
    wait_until(job.progress + block, job.inner_splits);
    run.kernels->down(job, block, slab, scratch);
    if (__atomic_add_fetch(job.progress + block, 1, __ATOMIC_ACQ_REL) < job.inner_splits + job.slabs) return;
    if (job.partials) reduce_norms(job, job.blocks[block]);
    __atomic_fetch_add(job.progress + block, 1, __ATOMIC_RELEASE);
}

// In step s, gate_up of block s and down of the block `ahead` before it. Tasks are handed out in this order and
// wait only for tasks handed out before, so nobody waits forever; and as those are several blocks back, hardly ever.
void work(void* context, int member) {
    Run& run = *static_cast<Run*>(context);
    const Job& job = run.job;
    char* scratch = run.scratch + run.scratch_bytes * static_cast<size_t>(member);
    const int64_t each = job.inner_splits + job.slabs, tasks = job.num_blocks ? (job.num_blocks + job.ahead) * each : 0;
    for (int64_t task; (task = run.next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        const int64_t step = task / each, part = task % each;
        if (part < job.inner_splits) {
            if (step < job.num_blocks) run_gate_up(run, step, part, scratch);
        } else if (step >= job.ahead) {
            run_down(run, step - job.ahead, part - job.inner_splits, scratch);
        }
    }
}

// The output is the sum in fp32, and fresh memory; the arena is zero.
void clear(void* context, int member) {
    const Run& run = *static_cast<Run*>(context);
    const Layer& layer = run.job.layer;
    const int64_t cells = layer.T * layer.H, first = cells * member / layer.threads;
    std::memset(run.job.sums + first, 0,
                static_cast<size_t>(cells * (member + 1) / layer.threads - first) * sizeof(float));
}

void finish(void* context, int member) {
    const Run& run = *static_cast<Run*>(context);
    const Layer& layer = run.job.layer;
    run.kernels->finish(run.job, layer.T * member / layer.threads, layer.T * (member + 1) / layer.threads);
}

}  // namespace

size_t run_layer(const Layer& layer, const char* isa) {
    Run run = {};
    run.job.layer = layer;
    run.kernels = &find_kernels(isa)[static_cast<int>(layer.dtype)];
    lay_out(run);
    run.arena.allocate();
    lay_out(run);
    if (layer.norms) {
        std::memset(layer.norms, 0, static_cast<size_t>(layer.T * layer.K) * sizeof(float));
        std::memset(layer.peaks, 0, static_cast<size_t>(layer.T * layer.K) * sizeof(float));
    }
    if (layer.sum_weights) {
        std::memset(layer.channel_sums, 0, static_cast<size_t>(2 * layer.E * layer.I) * sizeof(float));
        std::memset(layer.output_sums, 0, static_cast<size_t>(2 * layer.E * layer.H) * sizeof(float));
    }
    run.job.num_blocks = route(layer, run.routing);
    run.job.inner_splits = count_splits(layer, run.job.num_blocks);
    assign_buffers(run);
    if (layer.dtype == Dtype::f32 && layer.T) run_team(layer.threads, clear, &run);
    run_team(layer.threads, work, &run);
    if (layer.dtype != Dtype::f32) run_team(layer.threads, finish, &run);
    return run.arena.bytes();
}

}  // namespace reap
