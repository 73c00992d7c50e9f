// How the lanes of a block take turns, wait for each other, and get stuck. Bodies of block.h.
#pragma once
#include <cstring>
#include <map>
#include <tuple>

#include "block.h"

namespace simt {

inline void Block::configure(dim3 grid_size, dim3 block_size, size_t bytes, uint32_t first) {
    grid = grid_size, size = block_size, shared_bytes = bytes, first_block = first;
    threads = size.x * size.y * size.z;
    counters_at_launch.clear();
    if (!stacks || stacks->size() < threads) stacks = std::make_unique<Stacks>(threads);
    lanes.resize(threads);
    warps.resize((threads + 31) / 32);
}

inline void Block::run(uint3 block_index, uint32_t number, const std::function<void()>& kernel) {
    index = block_index, body = &kernel;
    time = 1, live = threads, steps = 0, failure = nullptr;
    for (Barrier& barrier : barriers) barrier = Barrier();
    background.clear();
    lets_next_start = false;
    turns.clear();
    extension.reset();
    std::memset(shared, 0xff, shared_bytes);
    shared_shadow.clear(shared_bytes);
    for (uint32_t w = 0; w < warps.size(); ++w) {
        Warp& warp = warps[w] = Warp();
        for (uint8_t i = 0; i < 32; ++i) warp.order[i] = i;
        random.shuffle(warp.order, 32);
        for (uint8_t i = 0; i < 32; ++i) {
            const uint8_t lane = warp.order[i];
            warp.place[lane] = i;
            if (w * 32 + lane >= threads) continue;
            warp.lanes[lane] = &lanes[w * 32 + lane];
            warp.exist |= 1u << lane;
            warp.ready |= 1u << i;
        }
    }
    for (uint32_t t = 0; t < threads; ++t) {
        Lane& lane = lanes[t];
        lane.block = this, lane.warp = &warps[t / 32], lane.lane = t % 32;
        lane.index = {t % size.x, t / size.x % size.y, t / size.x / size.y};
        lane.view = View();
        lane.view.block = number, lane.view.first_block = first_block, lane.view.thread = t;
        lane.wait = Wait();
        lane.waited = !options.overlapped;
        lane.copies.clear();
        lane.group = 0;
        lane.started = lane.signalled = 0;
        lane.bulk.clear();
        lane.bulk_group = lane.bulk_started = 0, lane.bulk_engine = -1;
        lane.fiber.start(stacks->stack(t), stacks->bytes(t), lane_main);
    }
    running = warps[random.below(static_cast<uint32_t>(warps.size()))].lanes[0];
    running = next();
    outside.switch_to(running->fiber);
    running = nullptr;
    if (failure) std::rethrow_exception(failure);
    for (Warp& warp : warps) warp.requests.flush(counters);
}

inline void Block::lane_main() {
    Block& block = here();
    Lane& me = *running;
    Fiber* next = &block.outside;
    try {
        (*block.body)();
        block.exit_lane();
        if (block.live != 0) next = &(running = block.next())->fiber;
    } catch (...) {
        block.failure = std::current_exception();
    }
    me.fiber.switch_to(*next);
    std::abort();  // nobody switches to a lane that is over
}

inline void Block::exit_lane() {
    Lane& me = *running;
    Warp& warp = *me.warp;
    if (!me.copies.empty())
        fail(Kind::copy_in_flight, me.copies.front().site, me, "",
             "the thread ends before this cp.async was waited for");
    if (!me.bulk.empty())
        fail(Kind::copy_in_flight, me.bulk.front().site, me, "",
             "the thread ends before this bulk copy is known to have read its source");
    if (!me.waited)
        fail(Kind::race, Site(), me, "",
             "the thread ends without a wait for the launch before, which may be over later than its own");
    warp.exited |= me.bit();
    if (--live == 0 && !background.empty())
        fail(Kind::copy_in_flight, Site(), me, "", "the block ends while engines work for it");
    for (unsigned i = 0; i < 32; ++i) {
        if (!(warp.gathered & 1u << i) || !(warp.lanes[i]->wait.mask & me.bit())) continue;
        const Wait& wait = warp.lanes[i]->wait;
        fail(Kind::exited_lane, wait.site, me, "",
             std::string("lanes wait at ") + wait.what + " for a lane that returned");
    }
}

// The lane to run when the running one cannot: of its own warp while one is ready, else of another.
inline Lane* Block::next() {
    const auto take = [](Warp& warp) {
        const int place = __builtin_ctz(warp.ready);
        warp.ready &= warp.ready - 1;
        return warp.lanes[warp.order[place]];
    };
    if (running->warp->ready) return take(*running->warp);
    const auto count = static_cast<uint32_t>(warps.size());
    for (;;) {
        for (uint32_t i = 0, first = random.below(count); i < count; ++i) {
            Warp& warp = warps[(first + i) % count];
            if (warp.ready) return take(warp);
        }
        bool woken = false;
        for (Lane& lane : lanes) {
            if (!lane.wait.condition || !(*lane.wait.condition)()) continue;
            resume(lane);
            woken = true;
        }
        if (woken) continue;
        if (background.empty()) stuck();
        const uint32_t i = random.below(static_cast<uint32_t>(background.size()));
        const auto work = std::move(background[i]);
        background.erase(background.begin() + i);
        work();
    }
}

inline void Block::suspend() {
    Lane& me = *running;
    running = next();
    if (running != &me) me.fiber.switch_to(running->fiber);
}

inline void Block::resume(Lane& lane) {
    lane.wait = Wait();
    lane.warp->ready |= 1u << lane.warp->place[lane.lane];
}

inline void Block::gather(const char* what, Site site, unsigned mask, void* arguments,
                          void (*collective)(Warp&, unsigned, void* const*)) {
    Lane& me = *running;
    Warp& warp = *me.warp;
    count_step(site);
    if (!(mask & me.bit())) fail(Kind::divergence, site, me, "", std::string(what) + " by a lane outside its mask");
    if (mask & (warp.exited | ~warp.exist))
        fail(Kind::exited_lane, site, me, "",
             std::string(what) + " with a lane in its mask that returned or never was");
    me.wait = {what, site, mask, arguments, nullptr};
    warp.gathered |= me.bit();
    if ((warp.gathered & mask) != mask) suspend();
    else complete_gather(site, mask, collective);
}

// Run by the last lane to come, for all.
inline void Block::complete_gather(Site site, unsigned mask, void (*collective)(Warp&, unsigned, void* const*)) {
    Lane& me = *running;
    Warp& warp = *me.warp;
    const char* const what = me.wait.what;
    void* all[32] = {};
    for (unsigned i = 0; i < 32; ++i) {
        if (!(mask & 1u << i)) continue;
        const Wait& wait = warp.lanes[i]->wait;
        if (wait.site != site || wait.mask != mask || wait.what != what)
            fail(Kind::divergence, site, me, "",
                 std::string(what) + " while " + describe(*warp.lanes[i]) + " is at " + wait.what + " of " +
                     wait.site.text());
        all[i] = wait.arguments;
    }
    if (options.profile) warp.requests.flush(counters);
    collective(warp, mask, all);
    warp.gathered &= ~mask;
    for (unsigned i = 0; i < 32; ++i)
        if (mask & 1u << i) resume(*warp.lanes[i]);
    // The last to come goes on, but for some times when the seed gives another warp the turn.
    if (random.below(8) == 0) {
        running = warps[random.below(static_cast<uint32_t>(warps.size()))].lanes[0];
        Lane* chosen = next();
        running = chosen;
        if (chosen != &me) me.fiber.switch_to(chosen->fiber);
    } else {
        warp.ready &= ~(1u << warp.place[me.lane]);
    }
}

inline void Block::barrier(uint32_t id, uint32_t count, const char* what, Site site) {
    Lane& me = *running;
    Barrier& barrier = barriers[id];
    count_step(site);
    if (!barrier.arrived.empty()) {
        const Lane& first = *barrier.arrived.front();
        const bool same_warp = first.warp == me.warp;
        if (barrier.expected != count || ((id == 0 || same_warp) && first.wait.site != site))
            fail(Kind::divergence, site, me, "",
                 std::string(what) + " while " + describe(first) + " is at " + first.wait.what + " of " +
                     first.wait.site.text());
    }
    barrier.expected = count;
    barrier.arrived.push_back(&me);
    me.wait = {what, site, 0, nullptr, nullptr};
    if (barrier.arrived.size() == count) complete(barrier);
    suspend();
}

inline void Block::complete(Barrier& barrier) {
    if (barrier.expected == threads) {
        for (Lane& lane : lanes) lane.view.everyone = time;
        order_engines();
        ++time;
    } else {
        order_group(barrier.arrived);
    }
    for (Lane* lane : barrier.arrived) resume(*lane);
    barrier.arrived.clear();
    if (options.profile)
        for (Warp& warp : warps) warp.requests.flush(counters);
}

inline void Block::wait_until(const char* what, Site site, const std::function<bool()>& condition) {
    count_step(site);
    if (condition()) return;
    running->wait = {what, site, 0, nullptr, &condition};
    suspend();
}

inline void Block::order_group(const std::vector<Lane*>& group) {
    View all;
    all.thread = group.front()->view.thread;
    for (const Lane* lane : group) all.join(lane->view, time, threads);
    for (Lane* lane : group) lane->view.join(all, time, threads);
    ++time;
}

// What one thread knows about engines, all know after a barrier of the whole block.
inline void Block::order_engines() {
    View all;
    for (const Lane& lane : lanes) all.join_engines(lane.view);
    if (all.engines.empty()) return;
    for (Lane& lane : lanes) lane.view.engines = all.engines;
}

inline void Block::order_warp(Warp& warp, unsigned mask) {
    std::vector<Lane*> group;
    bool vectors = mask != warp.exist;
    for (unsigned i = 0; i < 32; ++i) {
        if (!(mask & 1u << i)) continue;
        group.push_back(warp.lanes[i]);
        vectors |= !warp.lanes[i]->view.known.empty() || !warp.lanes[i]->view.engines.empty();
    }
    if (vectors) return order_group(group);
    for (Lane* lane : group) lane->view.my_warp = time;
    ++time;
}

inline std::string Block::block_name() const {
    return "block (" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

inline std::string Block::describe(const Lane& lane) const {
    const uint32_t t = lane.view.thread;
    return block_name() + " thread " + std::to_string(t) + " (warp " + std::to_string(t / 32) + " lane " +
           std::to_string(t % 32) + ")";
}

inline std::string Block::describe(const Stamp& stamp) const {
    std::string who;
    if (stamp.thread < MAX_THREADS) who = "thread " + std::to_string(stamp.thread);
    else if (stamp.thread < SEVERAL_WARPS) who = "lanes of warp " + std::to_string(stamp.thread - SEVERAL_IN_WARP);
    else if (stamp.thread >= ENGINES) who = "an engine, started";
    else who = "several warps";
    if (stamp.block != running->view.block) who += " of another block";
    return who + " at " + stamp.site.text();
}

// Says where everybody is. Lanes of one warp at different places have diverged; whole warps at
// different places wait for each other.
inline void Block::stuck() const {
    std::map<std::pair<std::string, Site>, std::vector<const Lane*>> groups;
    bool diverged = false, gone = live != threads;
    for (const Lane& lane : lanes) {
        if (!lane.wait.what) continue;
        groups[{lane.wait.what, lane.wait.site}].push_back(&lane);
    }
    std::string who;
    std::map<const Warp*, Site> places;
    for (const auto& [place, group] : groups) {
        who += std::string(who.empty() ? "" : "; ") + place.first + " of " + place.second.text() + " holds " +
               std::to_string(group.size()) + " threads, first " + std::to_string(group.front()->view.thread);
        for (const Lane* lane : group) {
            const auto [at, fresh] = places.emplace(lane->warp, place.second);
            diverged |= !fresh && at->second != place.second;
        }
    }
    const auto& [place, group] = *groups.begin();
    const bool conditions = group.front()->wait.condition != nullptr;
    const Kind kind = diverged ? Kind::divergence : gone && !conditions ? Kind::exited_lane : Kind::deadlock;
    if (gone) who += "; " + std::to_string(threads - live) + " threads returned";
    fail(kind, place.second, *group.front(), "", who);
}

}  // namespace simt
