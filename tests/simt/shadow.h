// The emulator's notes on a range of memory, one chunk per 16 bytes: which bytes hold a value, what
// accesses they have seen, whether an asynchronous copy owns them. Most chunks are touched as a
// whole and need one cell; the first smaller access splits a chunk into cells of two bytes.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "order.h"

namespace simt {

constexpr size_t CHUNK = 16, GRANULE = 2;

class Shadow {
public:
    Shadow(size_t bytes, bool initialised) : chunks((bytes + CHUNK - 1) / CHUNK, Chunk{initialised}) {}

    // An access is 2 to 16 bytes, aligned to its size: it lies in one chunk.
    bool valid(size_t offset, size_t bytes) const {
        const unsigned mask = bits(offset, bytes);
        return (chunks[offset / CHUNK].valid & mask) == mask;
    }
    void set_valid(size_t offset, size_t bytes, bool valid) {
        Chunk& chunk = chunks[offset / CHUNK];
        const unsigned mask = bits(offset, bytes);
        chunk.valid = static_cast<uint16_t>(valid ? chunk.valid | mask : chunk.valid & ~mask);
    }
    bool in_flight(size_t offset) const { return chunks[offset / CHUNK].in_flight; }
    void set_in_flight(size_t offset, bool flag) { chunks[offset / CHUNK].in_flight = flag; }

    // The racing access, or null; `note` is one of Cell's.
    using Note = const Stamp* (Cell::*)(const View&, const Stamp&, std::vector<Crowd>&);
    template <Note note> const Stamp* touch(size_t offset, size_t bytes, const View& view, const Stamp& now) {
        Chunk& chunk = chunks[offset / CHUNK];
        if (bytes == CHUNK && chunk.split < 0) return (chunk.whole.*note)(view, now, crowds);
        if (chunk.split < 0) split(chunk);
        auto& cells = pieces[static_cast<size_t>(chunk.split)];
        const size_t first = offset % CHUNK / GRANULE;
        for (size_t i = first; i < first + bytes / GRANULE; ++i)
            if (const Stamp* other = (cells[i].*note)(view, now, crowds)) return other;
        return nullptr;
    }

    // The thread that last wrote (or is writing) the chunk of `offset`.
    const Stamp& writer(size_t offset) const {
        const Chunk& chunk = chunks[offset / CHUNK];
        const size_t piece = offset % CHUNK / GRANULE;
        return chunk.split < 0 ? chunk.whole.write : pieces[static_cast<size_t>(chunk.split)][piece].write;
    }

    // As new, for the next block.
    void clear(size_t bytes) {
        std::fill_n(chunks.begin(), (bytes + CHUNK - 1) / CHUNK, Chunk{false});
        pieces.clear();
        crowds.clear();
    }

private:
    struct Chunk {
        uint16_t valid;  // a bit per byte
        bool in_flight = false;
        int32_t split = -1;  // index of its pieces
        Cell whole;
        explicit Chunk(bool valid) : valid(valid ? 0xffff : 0) {}
    };

    static unsigned bits(size_t offset, size_t bytes) { return ((1u << bytes) - 1) << offset % CHUNK; }
    void split(Chunk& chunk) {
        chunk.split = static_cast<int32_t>(pieces.size());
        pieces.emplace_back();
        for (Cell& cell : pieces.back()) {
            cell = chunk.whole;
            if (cell.crowd < 0) continue;
            cell.crowd = static_cast<int32_t>(crowds.size());
            crowds.push_back(Crowd(crowds[static_cast<size_t>(chunk.whole.crowd)]));
        }
    }

    std::vector<Chunk> chunks;
    std::vector<std::array<Cell, CHUNK / GRANULE>> pieces;
    std::vector<Crowd> crowds;
};

}  // namespace simt
