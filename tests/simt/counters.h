// What a launch costs, counted: bytes of global memory per buffer, and wavefronts of shared memory
// per line of the kernel.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "fault.h"

namespace simt {

struct Traffic {
    uint64_t read = 0, written = 0, atomics = 0;  // bytes that lanes asked for
};

// One line's accesses to shared memory. A warp's request takes as many wavefronts as its busiest
// bank has different words; conflicts are those beyond what the bytes need in any arrangement.
struct SharedUse {
    std::string what;
    uint64_t requests = 0, wavefronts = 0, conflicts = 0;
};

struct Counters {
    uint64_t launches = 0, blocks = 0, mma = 0;
    uint64_t hinted = 0, met = 0;             // bytes of boxes that a block said it would load, and then loaded
    std::vector<bool> early;                  // of each launch: whether the next may start beside it
    std::map<std::string, Traffic> global;    // by buffer
    std::map<std::string, SharedUse> shared;  // by "file:line"; only with Options::profile
};

constexpr uint32_t ABSENT = ~0u;
using Offsets = std::array<uint32_t, 32>;  // of a warp's lanes; ABSENT where a lane has no part

// A request of 8 bytes a lane is served by half warps, of 16 by quarters; 32 banks of 4 bytes.
inline void count_request(SharedUse& use, const Offsets& offsets, uint32_t bytes) {
    const size_t lanes = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
    ++use.requests;
    for (size_t first = 0; first < 32; first += lanes) {
        std::vector<uint32_t> words;
        for (size_t i = first; i < first + lanes; ++i)
            for (uint32_t b = 0; offsets[i] != ABSENT && b < std::max(bytes, 4u); b += 4)
                words.push_back((offsets[i] + b) / 4);
        std::sort(words.begin(), words.end());
        words.erase(std::unique(words.begin(), words.end()), words.end());
        std::array<uint64_t, 32> banks{};
        for (uint32_t word : words) ++banks[word % 32];
        const uint64_t wavefronts = *std::max_element(banks.begin(), banks.end());
        use.wavefronts += wavefronts;
        use.conflicts += wavefronts - (words.size() + 31) / 32;
    }
}

// The accesses of one warp between two collectives. Lanes run one by one here, so the n-th access
// of each lane on one line is taken to be the same instruction.
class Requests {
public:
    void add(uint32_t lane, Site site, const char* what, uint32_t offset, uint32_t bytes) {
        auto& line = lines[site];
        const size_t n = line.done[lane]++;
        if (line.requests.size() <= n) line.requests.emplace_back().fill(ABSENT);
        line.requests[n][lane] = offset;
        line.what = what;
        line.bytes = bytes;
    }
    void flush(Counters& counters) {
        for (auto& [site, line] : lines) {
            SharedUse& use = counters.shared[site.text()];
            use.what = line.what;
            for (const Offsets& offsets : line.requests) count_request(use, offsets, line.bytes);
        }
        lines.clear();
    }

private:
    struct Line {
        const char* what;
        uint32_t bytes;
        std::array<size_t, 32> done{};
        std::vector<Offsets> requests;
    };
    std::map<Site, Line> lines;
};

}  // namespace simt
