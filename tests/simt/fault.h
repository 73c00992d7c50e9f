// What the emulator says when a kernel breaks a rule: which rule, where in the source, who, and at
// which address.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace simt {

// A line of the kernel's source. As a default argument it is the line of the call. One word, since
// every shadow cell remembers several; user addresses have 47 bits on the systems this runs on.
class Site {
public:
    Site() = default;
    static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        Site site;
        site.word = reinterpret_cast<uint64_t>(file) << 16 | static_cast<uint16_t>(line);
        return site;
    }
    const char* file() const { return reinterpret_cast<const char*>(word >> 16); }
    int line() const { return static_cast<int>(word & 0xffff); }
    std::string text() const {
        if (word == 0) return "(nowhere)";
        std::string path = file();
        return path.substr(path.rfind('/') + 1) + ":" + std::to_string(line());
    }
    bool operator==(Site other) const { return word == other.word; }
    bool operator!=(Site other) const { return word != other.word; }
    bool operator<(Site other) const { return word < other.word; }

private:
    uint64_t word = 0;
};

enum class Kind {
    out_of_bounds,   // an address outside its buffer, or outside shared memory
    misaligned,      // an address that is not a multiple of the access's size
    read_only,       // a store to a buffer that the kernel may only read
    uninitialised,   // a read of bytes that nobody wrote
    race,            // two accesses, one a write, that nothing orders
    copy_in_flight,  // a touch of bytes that an asynchronous copy still owns
    divergence,      // lanes that should be at one collective are at several
    exited_lane,     // a collective that waits for a lane that is gone
    deadlock,        // nobody can go on
    trap,            // the kernel's own check
    runaway,         // a loop without end: more work than Options::access_limit
    launch,          // a configuration that the hardware refuses
    mbarrier,        // one that was not made, is made twice, or gets more than it expects
    proxy,           // a write that a fence should have shown to the engine that reads it
    registers,       // accumulators used without a fence, or while wgmma works on them
};

inline const char* name(Kind kind) {
    static const char* const names[] = {"out_of_bounds",  "misaligned", "read_only",   "uninitialised", "race",
                                        "copy_in_flight", "divergence", "exited_lane", "deadlock",      "trap",
                                        "runaway",        "launch",     "mbarrier",    "proxy",         "registers"};
    return names[static_cast<int>(kind)];
}

struct Fault : std::runtime_error {
    Kind kind;
    Site site;
    std::string lanes;    // "block (0, 0, 0) thread 37 (warp 1 lane 5)"
    std::string address;  // "inner + 128", "shared + 4096", or empty

    Fault(Kind kind, Site site, std::string lanes, std::string address, const std::string& what)
        : std::runtime_error(std::string(name(kind)) + " at " + site.text() + ": " + what +
                             (address.empty() ? "" : ", at " + address) + (lanes.empty() ? "" : ", " + lanes)),
          kind(kind),
          site(site),
          lanes(std::move(lanes)),
          address(std::move(address)) {}
};

}  // namespace simt
