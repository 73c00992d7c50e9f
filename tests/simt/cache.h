// What reaches memory past an L2 cache: a model of the cache, fed with what the emulator saw.
//
// Sectors of 32 bytes, fully associative, least recently used first out. Blocks start in the order of
// their index, as many at a time as the chip holds, and take turns of a few requests each. A sector
// that is read or added to and is not there is fetched; one that was changed is written when it leaves.
#pragma once
#include <cstdint>
#include <list>
#include <unordered_map>
#include <vector>

namespace simt {

struct Access {
    uint64_t address;
    uint32_t bytes;
    bool reads, writes;  // an atomic does both
};

class Cache {
public:
    uint64_t fetched = 0, written = 0;  // bytes

    explicit Cache(uint64_t bytes) : room(bytes / SECTOR) {}

    void touch(const Access& access) {
        const uint64_t last = (access.address + access.bytes - 1) / SECTOR;
        for (uint64_t sector = access.address / SECTOR; sector <= last; ++sector) touch(sector, access);
    }
    void write_back() {
        while (!order.empty()) evict();
    }

private:
    static constexpr uint64_t SECTOR = 32;
    struct Entry {
        uint64_t sector;
        bool changed;
    };

    void touch(uint64_t sector, const Access& access) {
        const auto found = where.find(sector);
        if (found != where.end()) {
            order.splice(order.begin(), order, found->second);
        } else {
            if (access.reads) fetched += SECTOR;
            order.push_front({sector, false});
            where[sector] = order.begin();
            if (order.size() > room) evict();
        }
        order.front().changed |= access.writes;
    }
    void evict() {
        if (order.back().changed) written += SECTOR;
        where.erase(order.back().sector);
        order.pop_back();
    }

    const uint64_t room;
    std::list<Entry> order;  // newest first
    std::unordered_map<uint64_t, std::list<Entry>::iterator> where;
};

// The blocks of one launch, `together` at a time.
inline void replay(Cache& cache, const std::vector<std::vector<Access>>& blocks, size_t together) {
    constexpr size_t TURN = 64;  // requests of a block before the next one's
    struct Place {
        size_t block, done;
    };
    std::vector<Place> places;
    size_t started = 0;
    while (started < blocks.size() && places.size() < together) places.push_back({started++, 0});
    while (!places.empty()) {
        for (size_t i = 0; i < places.size();) {
            Place& place = places[i];
            const auto& requests = blocks[place.block];
            for (size_t n = 0; n < TURN && place.done < requests.size(); ++n) cache.touch(requests[place.done++]);
            if (place.done < requests.size()) {
                ++i;
            } else if (started < blocks.size()) {
                place = {started++, 0};
                ++i;
            } else {
                places.erase(places.begin() + static_cast<std::ptrdiff_t>(i));
            }
        }
    }
}

}  // namespace simt
