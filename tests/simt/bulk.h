// Hopper's bulk copies from shared to global memory, of any multiple of 16 bytes. See "cp.async.bulk",
// "cp.reduce.async.bulk" and "Bulk async-group" in the PTX ISA.
//
// Each thread's copies read shared memory in the async proxy, at once (eager) or when the thread waits
// for it (lazy); until then what they read must not change. What they write counts as written by the
// thread when it starts them: nobody here reads it before the launch is over.
#pragma once
#include "mbarrier.h"

namespace simt {

namespace detail {

// The source is read by the engine of this thread from now on.
inline void check_source(Shared<const char> from, size_t bytes, Site site) {
    Lane& me = *running;
    Block& block = *me.block;
    Shadow& shadow = block.shared_shadow;
    const auto fail = [&](Kind kind, size_t at, const std::string& what) {
        block.fail(kind, site, me, shared_address(static_cast<int64_t>(at)), "a bulk copy reads bytes " + what);
    };
    const auto start = static_cast<size_t>(from.offset());
    if (start % 16 != 0) fail(Kind::misaligned, start, "from an address that is not a multiple of 16");
    if (from.offset() < 0 || start + bytes > block.shared_bytes) fail(Kind::out_of_bounds, start, "past shared memory");
    if (me.bulk_engine < 0) me.bulk_engine = static_cast<int>(hopper().add_engine(true));
    const auto engine = static_cast<uint32_t>(me.bulk_engine);
    const Stamp now = engine_stamp(engine, ++me.bulk_started, site);
    for (size_t at = start; at < start + bytes; at += 16) {
        const Stamp writer = shadow.writer(at);
        if (const Stamp* other = shadow.touch<&Cell::note_read>(at, 16, me.view, now))
            fail(Kind::race, at, "not ordered after " + block.describe(*other));
        if (shadow.in_flight(at)) fail(Kind::copy_in_flight, at, "that a copy still owns");
        if (!shadow.valid(at, 16)) fail(Kind::uninitialised, at, "that nobody wrote");
        if (!hopper().shows(writer, me))
            fail(Kind::proxy, at, "without a fence after the write by " + block.describe(writer));
    }
}

template <typename T, typename Move>
void start_bulk(Use use, Global<T> to, Shared<T> from, int bytes, Site site, Move move) {
    Lane& me = *running;
    if (bytes <= 0 || bytes % 16 != 0)
        here().fail(Kind::launch, site, me, "", "a bulk copy of " + std::to_string(bytes) + " bytes");
    const auto size = static_cast<size_t>(bytes);
    for (size_t at = 0; at < size; at += 16) {
        const auto target = cast<char>(to) + static_cast<int64_t>(at);
        if (use == Use::atomic) check_global<Use::atomic>(target, 16, site);
        else check_global<Use::store>(target, 16, site);
    }
    check_source(cast<char>(from), size, site);
    const char* const source = here().shared + from.offset();
    const std::function<void()> work = [=] { move(to.unchecked(), source, size); };
    if (here().options.eager) work();
    me.bulk.push_back({here().options.eager ? nullptr : work, me.bulk_group, me.bulk_started, site});
}

}  // namespace detail

// "cp.reduce.async.bulk", .add of .f32
inline void bulk_add(Global<float> to, Shared<float> from, int bytes, Site site = Site::here()) {
    detail::start_bulk(Use::atomic, to, from, bytes, site, [](float* target, const char* source, size_t size) {
        for (size_t i = 0; i < size / sizeof(float); ++i) {
            float x;
            std::memcpy(&x, source + i * sizeof(float), sizeof(float));
            target[i] += x;
        }
    });
}

// "cp.async.bulk", from shared to global memory
template <typename T> void bulk_store(Global<T> to, Shared<T> from, int bytes, Site site = Site::here()) {
    detail::start_bulk(Use::store, to, from, bytes, site,
                       [](T* target, const char* source, size_t size) { std::memcpy(target, source, size); });
}

// "cp.async.bulk.commit_group": a group even if empty.
inline void bulk_commit() { ++running->bulk_group; }

// "cp.async.bulk.wait_group.read 0": what is in a group has been read.
inline void bulk_wait_read() {
    Lane& me = *running;
    size_t done = 0;
    for (; done < me.bulk.size() && me.bulk[done].group < me.bulk_group; ++done) {
        const BulkCopy& copy = me.bulk[done];
        if (copy.work) copy.work();
        auto& known = me.view.engines;
        const auto engine = static_cast<size_t>(me.bulk_engine);
        if (known.size() <= engine) known.resize(engine + 1);
        known[engine].fill(copy.number);
    }
    me.bulk.erase(me.bulk.begin(), me.bulk.begin() + static_cast<ptrdiff_t>(done));
}

}  // namespace simt
