#include "moe.h"

#include <sys/mman.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>

#include "isa.h"
#include "team.h"

namespace reap {
namespace {

constexpr size_t LINE = 64;
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
    int32_t* order;
    Block* blocks;
    int64_t* offsets;        // expert -> first sorted position; while sorting: -> next free one [E+1]
    char* scratch;           // one piece per thread
    size_t scratch_bytes;
    std::atomic<int64_t> next{0};
};

void lay_out(Run& run) {
    const Layer& layer = run.job.layer;
    const size_t T = layer.T, S = layer.T * layer.K, H = layer.H, E = layer.E;
    Job& job = run.job;
    job.slabs = ceil_div(layer.H, SLAB);
    job.inner_width = ceil_div(layer.I, 2) * 2;
    job.order = run.order = run.arena.take<int32_t>(S);
    job.blocks = run.blocks = run.arena.take<Block>(S / BLOCK_TOKENS + (S < E ? S : E));
    run.offsets = run.arena.take<int64_t>(E + 1);
    job.turns = run.arena.take<int64_t>(static_cast<size_t>(job.slabs));
    job.partials = layer.norms ? run.arena.take<float>(S * static_cast<size_t>(job.slabs) * 2) : nullptr;
    job.sums = layer.dtype == Dtype::f32 ? reinterpret_cast<float*>(layer.out) : run.arena.take<float>(T * H);
    run.scratch_bytes = run.kernels->scratch_bytes(layer);
    run.scratch = run.arena.take<char>(run.scratch_bytes * static_cast<size_t>(layer.threads));
    job.inner = run.arena.take<char>(S * static_cast<size_t>(job.inner_width * element_size(layer.dtype)));
}

// Slots sorted by expert, and each expert's cut into blocks of nearly equal numbers of whole vectors.
void route(Run& run) {
    const Layer& layer = run.job.layer;
    const int64_t S = layer.T * layer.K;
    const auto present = [&](int64_t id) { return id >= 0 && id < layer.E; };
    for (int64_t slot = 0; slot < S; ++slot)
        if (present(layer.top_k_index[slot])) ++run.offsets[layer.top_k_index[slot] + 1];
    for (int64_t e = 0; e < layer.E; ++e) run.offsets[e + 1] += run.offsets[e];

    int64_t blocks = 0;
    for (int64_t e = 0; e < layer.E; ++e) {
        const int64_t begin = run.offsets[e], end = run.offsets[e + 1];
        const int64_t parts = ceil_div(end - begin, BLOCK_TOKENS);
        const int64_t vectors = ceil_div(end - begin, PAD);
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t first = begin + vectors * part / parts * PAD;
            const int64_t last = part + 1 == parts ? end : begin + vectors * (part + 1) / parts * PAD;
            run.blocks[blocks++] = {first, static_cast<int32_t>(e), static_cast<int32_t>(last - first)};
        }
    }
    run.job.num_blocks = blocks;
    for (int64_t slot = 0; slot < S; ++slot)
        if (present(layer.top_k_index[slot])) run.order[run.offsets[layer.top_k_index[slot]]++] = static_cast<int32_t>(slot);

    // Few blocks: cut the inner size as well, so that every thread has a few tasks. The bits stay the same.
    const int64_t groups = ceil_div(layer.I, layer.gated ? GROUP / 2 : GROUP), wanted = 4 * layer.threads;
    const int64_t splits = blocks ? ceil_div(wanted, blocks) : 1;
    run.job.inner_splits = layer.threads == 1 ? 1 : splits < groups ? splits : groups;
}

// Every phase hands out its tasks in ascending order: `down` waits only for tasks handed out before.
void gate_up_phase(void* context, int member) {
    Run& run = *static_cast<Run*>(context);
    const Layer& layer = run.job.layer;
    if (layer.dtype == Dtype::f32 && layer.T) {  // the output is the sum, and fresh; the arena is zero
        const int64_t cells = layer.T * layer.H, first = cells * member / layer.threads;
        std::memset(run.job.sums + first, 0, static_cast<size_t>(cells * (member + 1) / layer.threads - first) * sizeof(float));
    }
    char* scratch = run.scratch + run.scratch_bytes * static_cast<size_t>(member);
    const int64_t tasks = run.job.num_blocks * run.job.inner_splits;
    for (int64_t task; (task = run.next.fetch_add(1, std::memory_order_relaxed)) < tasks;) run.kernels->gate_up(run.job, task, scratch);
}

void down_phase(void* context, int member) {
    Run& run = *static_cast<Run*>(context);
    char* scratch = run.scratch + run.scratch_bytes * static_cast<size_t>(member);
    const int64_t tasks = run.job.num_blocks * run.job.slabs;
    for (int64_t task; (task = run.next.fetch_add(1, std::memory_order_relaxed)) < tasks;) run.kernels->down(run.job, task, scratch);
}

void finish_phase(void* context, int member) {
    Run& run = *static_cast<Run*>(context);
    const Job& job = run.job;
    const Layer& layer = job.layer;
    run.kernels->finish(job, layer.T * member / layer.threads, layer.T * (member + 1) / layer.threads);
    if (!layer.norms || !job.num_blocks) return;
    const Block& last = job.blocks[job.num_blocks - 1];
    const int64_t positions = last.first + last.tokens;
    for (int64_t p = positions * member / layer.threads; p < positions * (member + 1) / layer.threads; ++p) {
        double square = 0;
        float peak = 0;
        for (int64_t slab = 0; slab < job.slabs; ++slab) {
            const float* cell = job.partials + (p * job.slabs + slab) * 2;
            square += cell[0];
            peak = cell[1] > peak ? cell[1] : peak;
        }
        const float norm = static_cast<float>(std::sqrt(square));
        layer.norms[job.order[p]] = norm;
        layer.peaks[job.order[p]] = std::isnan(norm) ? norm : peak;  // vector maxima drop NaN, sums keep it
    }
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
    route(run);
    for (auto phase : {gate_up_phase, down_phase, finish_phase}) {
        run.next = 0;
        run_team(layer.threads, phase, &run);
    }
    return run.arena.bytes();
}

}  // namespace reap
