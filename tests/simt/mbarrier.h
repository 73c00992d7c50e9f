// mbarriers, and the fences between what threads and what Hopper's engines see of shared memory:
// the emulator's side of csrc/cuda/sm90/ptx.cuh. Section names are those of the PTX ISA.
//
// A phase of an mbarrier is over after the arrivals it expects and the bytes it was told of. Whoever
// sees that knows what those who arrived had done before, and what the engines had copied for the
// phase. In the ISA's words threads work in the generic proxy, and TMA and wgmma in the async proxy; a
// fence.proxy.async has to stand between a write in one and a read in the other, where the writer
// still is or where the reader already knows of the write.
#pragma once
#include <map>
#include <set>
#include <vector>

#include "memory.h"
#include "ptx.h"
#include "warp.h"

namespace simt {

struct Mbarrier {
    uint32_t expected = 0, pending = 0;
    int64_t bytes = 0;        // announced and not copied yet; below 0: copied, not announced
    uint32_t phase = 0;       // the one that is going on, from 0
    uint32_t maker = 0;       // thread
    bool shown = false;       // to TMA, by a fence of the maker
    uint32_t engine = 0;      // stamps of TMA; the next one: of cp.async
    View arrivals, released;  // what is known of this phase, and of those that are over

    void complete_if_done(Block& block) {
        if (pending != 0 || bytes != 0) return;
        pending = expected;
        ++phase;
        arrivals.engines.resize(std::max<size_t>(arrivals.engines.size(), engine + 2));
        arrivals.engines[engine].fill(phase);
        arrivals.engines[engine + 1].fill(phase);
        released.join(arrivals, 0, block.threads);
        arrivals = View();
        arrivals.thread = MAX_ENGINES + MAX_THREADS;  // nobody
    }
};

// What a thread's fences have shown.
struct Fences {
    std::vector<uint32_t> times;  // of its own earlier writes
    View last;                    // of the writes that it knew of at its last fence
    bool any = false;
};

struct Engine {
    bool async_proxy;
};

struct WarpMultiplier;  // wgmma.h
struct GroupMultiplier;

// What Hopper's instructions remember about a block.
struct Hopper {
    std::map<int64_t, Mbarrier> mbarriers;  // by offset in shared memory
    std::vector<Fences> fences;             // by thread
    std::vector<Engine> engines;
    std::map<uint32_t, std::shared_ptr<WarpMultiplier>> warps;
    std::map<uint32_t, std::shared_ptr<GroupMultiplier>> groups;  // of four warps
    std::set<std::vector<int64_t>> hinted;                        // boxes: their tensor and place

    explicit Hopper(uint32_t threads) : fences(threads) {}

    uint32_t add_engine(bool async_proxy) {
        engines.push_back({async_proxy});
        return static_cast<uint32_t>(engines.size() - 1);
    }

    // Whether the async proxy, asked by `lane`, sees that write.
    bool shows(const Stamp& write, const Lane& lane) const {
        if (write.thread >= ENGINES && engines[write.thread - ENGINES].async_proxy) return true;
        const Fences& mine = fences[lane.view.thread];
        if (mine.any && mine.last.after(write)) return true;
        if (write.thread >= MAX_THREADS) return false;
        Stamp fence = write;
        for (uint32_t time : fences[write.thread].times) {
            fence.time = time;
            if (time >= write.time) return lane.view.after(fence);
        }
        return false;
    }
};

inline Hopper& hopper() {
    Block& block = here();
    if (!block.extension) block.extension = std::make_shared<Hopper>(block.threads);
    return *std::static_pointer_cast<Hopper>(block.extension);
}

inline uint32_t shared_address(Shared<const char> p) { return static_cast<uint32_t>(p.offset()); }

namespace detail {

inline Stamp engine_stamp(uint32_t engine, uint32_t time, Site site) {
    Stamp stamp = running->block->stamp(*running, site);
    stamp.thread = ENGINES + engine;
    stamp.time = time;
    return stamp;
}

inline Mbarrier& mbarrier(Shared<uint64_t> barrier, Site site) {
    check_shared<Use::load>(barrier.offset(), 8, *running, site);
    const auto found = hopper().mbarriers.find(barrier.offset());
    if (found == hopper().mbarriers.end())
        here().fail(Kind::mbarrier, site, *running, shared_address(barrier.offset()), "no mbarrier was made here");
    return found->second;
}

inline void arrive(Mbarrier& mbarrier, Block& block, const Lane& lane, Site site) {
    if (mbarrier.pending == 0)
        block.fail(Kind::mbarrier, site, lane, "",
                   "more than the " + std::to_string(mbarrier.expected) + " arrivals that a phase expects");
    --mbarrier.pending;
    mbarrier.complete_if_done(block);
}

}  // namespace detail

// "mbarrier.init"
inline void mbarrier_init(Shared<uint64_t> barrier, int arrivals, Site site = Site::here()) {
    Lane& me = *running;
    detail::check_shared<Use::store>(barrier.offset(), 8, me, site);
    Hopper& state = hopper();
    if (arrivals < 1 || arrivals >= 1 << 20 || state.mbarriers.count(barrier.offset()))
        here().fail(Kind::mbarrier, site, me, detail::shared_address(barrier.offset()),
                    "an mbarrier is made once, for 1 to 2^20 - 1 arrivals");
    Mbarrier& made = state.mbarriers[barrier.offset()];
    made.expected = made.pending = static_cast<uint32_t>(arrivals);
    made.maker = me.view.thread;
    made.engine = state.add_engine(true);
    state.add_engine(false);
    made.arrivals.thread = made.released.thread = MAX_ENGINES + MAX_THREADS;
}

// "membar / fence": .proxy.async, and .mbarrier_init, which is one for mbarriers alone.
inline void fence_mbarrier_init() {
    for (auto& [offset, mbarrier] : hopper().mbarriers) mbarrier.shown |= mbarrier.maker == running->view.thread;
}
inline void fence_proxy_async() {
    fence_mbarrier_init();
    Fences& mine = hopper().fences[running->view.thread];
    mine.times.push_back(here().tick());
    mine.last = running->view;
    mine.any = true;
}

// "mbarrier.arrive", without and with .expect_tx
inline void mbarrier_arrive(Shared<uint64_t> barrier, Site site = Site::here()) {
    Mbarrier& mbarrier = detail::mbarrier(barrier, site);
    mbarrier.arrivals.join(running->view, here().tick(), here().threads);
    detail::arrive(mbarrier, here(), *running, site);
}
inline void mbarrier_arrive_expect(Shared<uint64_t> barrier, int bytes, Site site = Site::here()) {
    Mbarrier& mbarrier = detail::mbarrier(barrier, site);
    mbarrier.bytes += bytes;
    if (mbarrier.bytes >= 1 << 20)
        here().fail(Kind::mbarrier, site, *running, detail::shared_address(barrier.offset()),
                    "a phase counts fewer than 2^20 bytes");
    mbarrier_arrive(barrier, site);
}

// "cp.async.mbarrier.arrive.noinc": one of the expected arrivals, when all copies that this thread
// has started have landed. Who waits for the phase knows of those since the last such instruction.
inline void cp_async_mbarrier_arrive(Shared<uint64_t> barrier, Site site = Site::here()) {
    Lane& me = *running;
    Block& block = *me.block;
    Mbarrier& mbarrier = detail::mbarrier(barrier, site);
    const Stamp now = detail::engine_stamp(mbarrier.engine + 1, mbarrier.phase + 1, site);
    const auto first = [&me] { return me.started - me.copies.size(); };  // before the oldest
    for (uint64_t i = std::max(first(), me.signalled); i < me.started; ++i)
        block.shared_shadow.touch<&Cell::note_write>(me.copies[i - first()].offset, 16, me.view, now);
    me.signalled = me.started;
    block.background.push_back([&block, &me, &mbarrier, site, first, last = me.started] {
        while (first() < last) {
            const Copy copy = me.copies.front();
            me.copies.erase(me.copies.begin());
            if (!block.options.eager) finish_copy(block, copy);
            block.shared_shadow.set_in_flight(copy.offset, false);
        }
        detail::arrive(mbarrier, block, me, site);
    });
}

// "mbarrier.try_wait", form with .parity: false at times though it is only early, as the ISA allows.
inline bool mbarrier_try_wait(Shared<uint64_t> barrier, uint32_t parity, Site site = Site::here()) {
    Mbarrier& mbarrier = detail::mbarrier(barrier, site);
    const std::function<bool()> over = [&] { return mbarrier.phase % 2 != parity; };
    if (!over() && here().chance(4)) return false;
    here().wait_until("mbarrier.try_wait", site, over);
    running->view.join(mbarrier.released, 0, here().threads);
    return true;
}

}  // namespace simt
