// One block of threads: a fiber per lane, taking turns on one OS thread. A lane runs until it has
// to wait for others; which lane is next follows from the seed.
#pragma once
#include <cstdlib>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "counters.h"
#include "fault.h"
#include "fiber.h"
#include "order.h"
#include "shadow.h"
#include "types.h"

namespace simt {

enum class Use { load, store, atomic, hint };

struct GlobalAccess {
    uint3 block;
    Use use;
    uint64_t address;
    uint32_t bytes;
};

struct Options {
    uint64_t seed = 0;                                         // of the order of blocks, warps and lanes
    bool eager = false;                                        // cp.async copies when issued; else when waited for
    bool profile = false;                                      // count wavefronts of shared memory (slow)
    int sm = 90;                                               // compute capability of the chip
    bool overlapped = false;                                   // a launch may start before the one before it is over
    size_t shared_limit = 232448;                              // bytes of dynamic shared memory that a block may have
    uint64_t access_limit = 1u << 31;                          // accesses and collectives of one block's lanes
    std::function<void(const GlobalAccess&)> watch = nullptr;  // is told of each, in order
};

class Random {
public:
    explicit Random(uint64_t seed) : state(seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du) {}
    uint64_t next() {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        return state;
    }
    uint32_t below(uint32_t n) { return static_cast<uint32_t>((next() >> 32) * n >> 32); }
    template <typename T> void shuffle(T* items, uint32_t n) {
        for (uint32_t i = n; i > 1; --i) std::swap(items[i - 1], items[below(i)]);
    }

private:
    uint64_t state;
};

class Block;
struct Warp;

// A cp.async that was issued and not waited for.
struct Copy {
    size_t offset;       // in shared memory
    const char* source;  // of 16 bytes; null: zeros
    uint32_t group;
    Site site;
};

// A bulk copy to global memory whose source was not waited for.
struct BulkCopy {
    std::function<void()> work;  // to do; null: done
    uint32_t group, number;
    Site site;
};

// What a lane waits for.
struct Wait {
    const char* what = nullptr;  // null: it can run
    Site site;
    unsigned mask = 0;  // of a warp collective; 0: something else
    void* arguments = nullptr;
    const std::function<bool()>* condition = nullptr;
};

struct Lane {
    Fiber fiber;
    Block* block;
    Warp* warp;
    uint32_t lane;  // in its warp
    uint3 index;    // threadIdx
    View view;
    Wait wait;
    bool waited;                 // for the launch before
    std::vector<Copy> copies;    // oldest first
    uint32_t group = 0;          // of cp.async: the one that is open
    uint64_t started = 0;        // of all its cp.async; the last of them are `copies`
    uint64_t signalled = 0;      // up to here an mbarrier was told of them
    std::vector<BulkCopy> bulk;  // oldest first
    uint32_t bulk_group = 0;     // the one that is open
    uint32_t bulk_started = 0;
    int bulk_engine = -1;  // the number of what reads for them; -1: none yet

    unsigned bit() const { return 1u << lane; }
};

struct Warp {
    Lane* lanes[32];
    unsigned exist = 0, exited = 0, gathered = 0;  // a bit per lane
    unsigned ready = 0;                            // a bit per place in `order`
    uint8_t order[32], place[32];                  // place -> lane, lane -> place
    Requests requests;
};

struct Barrier {
    uint32_t expected = 0;
    std::vector<Lane*> arrived;
};

__attribute__((tls_model("initial-exec"))) inline thread_local Lane* running = nullptr;

class Block {
public:
    const Options& options;
    Counters& counters;
    dim3 grid{0}, size{0};
    uint3 index{};
    uint32_t threads = 0;
    size_t shared_bytes = 0;
    Shadow shared_shadow;
    char* const shared;

    Block(const Options& options, Counters& counters)
        : options(options),
          counters(counters),
          shared_shadow(options.shared_limit, false),
          shared(static_cast<char*>(std::aligned_alloc(1024, (options.shared_limit | 1023) + 1))),
          random(options.seed) {}
    ~Block() { std::free(shared); }
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;

    void configure(dim3 grid_size, dim3 block_size, size_t bytes, uint32_t first_block);
    void run(uint3 block_index, uint32_t number, const std::function<void()>& kernel);

    // --- for lanes ---
    void barrier(uint32_t id, uint32_t count, const char* what, Site site);
    void gather(const char* what, Site site, unsigned mask, void* arguments,
                void (*collective)(Warp&, unsigned mask, void* const* arguments));
    void wait_until(const char* what, Site site, const std::function<bool()>& condition);

    Stamp stamp(const Lane& lane, Site site) const {
        Stamp stamp;
        stamp.block = lane.view.block, stamp.time = time, stamp.thread = lane.view.thread;
        stamp.site = site;
        return stamp;
    }
    // Everything that `lanes` did is over for each of them.
    void order_group(const std::vector<Lane*>& group);
    void order_warp(Warp& warp, unsigned mask);
    uint32_t tick() { return time++; }
    bool chance(uint32_t n) { return random.below(n) == 0; }
    void count_step(Site site) {
        if (++steps > options.access_limit)
            fail(Kind::runaway, site, *running, "", "more accesses and collectives than the limit");
    }

    std::string describe(const Lane& lane) const;
    std::string describe(const Stamp& stamp) const;
    [[noreturn]] void fail(Kind kind, Site site, const Lane& lane, const std::string& address,
                           const std::string& what) const {
        throw Fault(kind, site, describe(lane), address, what);
    }

    // Work of engines other than lanes, done one by one when no lane can run.
    std::vector<std::function<void()>> background;
    bool lets_next_start = false;                          // and did so before any of its lanes waited
    std::map<const int32_t*, int32_t> counters_at_launch;  // that atom_add has seen
    std::map<const int32_t*, uint32_t> turns;              // of this block at them
    std::shared_ptr<void> extension;                       // what a chip's own instructions remember about this block

private:
    static void lane_main();
    void suspend();
    Lane* next();
    void resume(Lane& lane);
    void exit_lane();
    void complete(Barrier& barrier);
    void order_engines();
    void complete_gather(Site site, unsigned mask, void (*collective)(Warp&, unsigned, void* const*));
    std::string block_name() const;
    [[noreturn]] void stuck() const;

    Random random;
    std::unique_ptr<Stacks> stacks;
    std::vector<Lane> lanes;
    std::vector<Warp> warps;
    Barrier barriers[16];
    Fiber outside;
    const std::function<void()>* body = nullptr;
    std::exception_ptr failure;
    uint32_t time = 1, live = 0, first_block = 1;
    uint64_t steps = 0;
};

inline Block& here() { return *running->block; }

}  // namespace simt

#include "schedule.h"

#define threadIdx (::simt::running->index)
#define blockIdx (::simt::here().index)
#define blockDim (::simt::here().size)
#define gridDim (::simt::here().grid)
