// What happens before what inside one kernel launch, and so which two accesses are a race.
//
// A block counts its synchronisations; an access is stamped with the count. A barrier of the whole
// block orders everything stamped so far before whatever its threads do next; __syncwarp does that
// inside a warp. Synchronisation of other groups (named barriers, mbarriers) carries one time per
// thread, as vector clocks do. Launches are ordered, blocks of one launch are not.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "fault.h"

namespace simt {

// Who a stamp names: a thread of the block, or several.
constexpr uint32_t MAX_THREADS = 1024;
constexpr uint32_t SEVERAL_IN_WARP = 1024;  // + warp
constexpr uint32_t SEVERAL_WARPS = 1056;    // atomic additions that a barrier of all ends,
constexpr uint32_t SEVERAL_BLOCKS = 1057;   // and those that the launch's end does
constexpr uint32_t ENGINES = 1058;          // + number: what works beside the threads, see View
constexpr uint32_t MAX_ENGINES = 2048 - ENGINES;

struct Stamp {
    uint64_t block : 26;  // counts all blocks that ran; 0 is "never"
    uint64_t time : 26;   // synchronisations that the block had seen
    uint64_t thread : 11;
    uint64_t atomic : 1;
    Site site;

    Stamp() : block(0), time(0), thread(0), atomic(0) {}
};

// What one thread knows to be over.
struct View {
    uint32_t block = 0;        // this block
    uint32_t first_block = 0;  // of this launch
    uint32_t thread = 0;
    uint32_t everyone = 0;        // times up to here are over for the whole block
    uint32_t my_warp = 0;         // ... and up to here for this thread's warp
    std::vector<uint32_t> known;  // ... and for each thread of the block; empty until needed
    // The same of engines that copy or multiply on behalf of threads. They count their own work, in
    // four parts each; a piece of work is over when it is over in every part.
    std::vector<std::array<uint32_t, 4>> engines;

    uint32_t warp() const { return thread / 32; }

    bool after(const Stamp& stamp) const {
        if (stamp.block != block) return stamp.block < first_block;
        if (stamp.thread == SEVERAL_BLOCKS) return false;
        if (stamp.thread >= ENGINES) {
            const size_t engine = stamp.thread - ENGINES;
            return engine < engines.size() &&
                   *std::min_element(engines[engine].begin(), engines[engine].end()) >= stamp.time;
        }
        if (stamp.time <= everyone || stamp.thread == thread) return true;
        const bool lane = stamp.thread / 32 == warp() || stamp.thread == SEVERAL_IN_WARP + warp();
        return (lane && stamp.time <= my_warp) || (!known.empty() && knows(stamp));
    }

    // Learns what `other` knows, and that `other` is over up to `time`. For any group.
    void join(const View& other, uint32_t time, uint32_t threads) {
        if (known.empty()) known.resize(threads, 0);
        for (uint32_t i = 0; i < threads; ++i) {
            uint32_t theirs = std::max(other.everyone, i == other.thread ? time : 0);
            if (i / 32 == other.warp()) theirs = std::max(theirs, other.my_warp);
            if (!other.known.empty()) theirs = std::max(theirs, other.known[i]);
            known[i] = std::max(known[i], theirs);
        }
        join_engines(other);
    }
    void join_engines(const View& other) {
        if (engines.size() < other.engines.size()) engines.resize(other.engines.size());
        for (size_t i = 0; i < other.engines.size(); ++i)
            for (size_t part = 0; part < 4; ++part)
                engines[i][part] = std::max(engines[i][part], other.engines[i][part]);
    }

private:
    bool knows(const Stamp& stamp) const {
        size_t first = 0, last = known.size();
        if (stamp.thread < MAX_THREADS) {
            first = stamp.thread, last = first + 1;
        } else if (stamp.thread < SEVERAL_WARPS) {
            first = (stamp.thread - SEVERAL_IN_WARP) * 32, last = std::min(last, first + 32);
        }
        for (size_t i = first; i < last; ++i)
            if (known[i] < stamp.time) return false;
        return true;
    }
};

// Readers that no cell has room for: the last of each warp.
using Crowd = std::array<Stamp, 32>;

// The accesses to one piece of memory that later ones must be ordered after: the last write and the
// reads since. Lanes of one warp are merged, as they are where __syncwarp or a barrier follows.
struct Cell {
    Stamp write, read[2];
    int32_t crowd = -1;  // index of its Crowd

    // Each returns the access that races with this one, or null after taking note of this one.
    const Stamp* note_read(const View& view, const Stamp& now, std::vector<Crowd>& crowds) {
        if (!view.after(write)) return &write;
        for (Stamp& reader : read) {
            if (view.after(reader)) {
                reader = now;
                return nullptr;
            }
        }
        for (Stamp& reader : read) {
            if (merge(reader, view, now)) return nullptr;
            // A read by a block that is over makes any write of this launch a race.
            if (reader.block != now.block) return nullptr;
        }
        if (crowd < 0) {
            crowd = static_cast<int32_t>(crowds.size());
            crowds.emplace_back();
        }
        Stamp& reader = crowds[static_cast<size_t>(crowd)][view.warp()];
        if (view.after(reader)) reader = now;
        else merge(reader, view, now);
        return nullptr;
    }

    const Stamp* note_write(const View& view, const Stamp& now, std::vector<Crowd>& crowds) {
        if (!view.after(write)) return &write;
        if (const Stamp* reader = end_reads(view, crowds)) return reader;
        write = now;
        return nullptr;
    }

    const Stamp* note_atomic(const View& view, const Stamp& now, std::vector<Crowd>& crowds) {
        const bool ordered = view.after(write);
        if (!ordered && !write.atomic) return &write;
        if (const Stamp* reader = end_reads(view, crowds)) return reader;
        const bool same_block = write.block == now.block && write.thread != SEVERAL_BLOCKS;
        write = now;
        write.atomic = 1;
        if (!ordered) write.thread = same_block ? SEVERAL_WARPS : SEVERAL_BLOCKS;
        return nullptr;
    }

private:
    // Makes one stamp of two reads of one warp, or of one engine.
    static bool merge(Stamp& reader, const View& view, const Stamp& now) {
        if (now.thread >= ENGINES) {
            if (reader.block != now.block || reader.thread != now.thread) return false;
            reader = now;
            return true;
        }
        const bool lane = reader.thread < MAX_THREADS && reader.thread / 32 == view.warp();
        if (reader.block != now.block || !(lane || reader.thread == SEVERAL_IN_WARP + view.warp())) return false;
        reader = now;
        reader.thread = SEVERAL_IN_WARP + view.warp();
        return true;
    }

    // The reader that is not over yet, or null after forgetting all.
    const Stamp* end_reads(const View& view, std::vector<Crowd>& crowds) {
        for (const Stamp& reader : read)
            if (!view.after(reader)) return &reader;
        if (crowd >= 0) {
            Crowd& more = crowds[static_cast<size_t>(crowd)];
            for (const Stamp& reader : more)
                if (!view.after(reader)) return &reader;
            more.fill(Stamp());
        }
        read[0] = read[1] = Stamp();
        return nullptr;
    }
};

}  // namespace simt
