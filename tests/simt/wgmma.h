// wgmma: a warpgroup multiplies what lies in shared memory while its threads go on. See "Asynchronous
// Warpgroup Level Matrix Instructions" of the PTX ISA.
//
// From wgmma to the wait for its group the accumulators hold a NaN of the emulator's own and what
// it reads must not change. Operands are read when issued (eager) or when waited for (lazy).
#pragma once
#include <deque>
#include <map>
#include <vector>

#include "mbarrier.h"

namespace simt {

// A matrix in shared memory, "Matrix descriptor format".
struct Descriptor {
    uint64_t bits;

    size_t start() const { return (bits & 0x3fff) << 4; }
    size_t leading() const { return (bits >> 16 & 0x3fff) << 4; }
    size_t stride() const { return (bits >> 32 & 0x3fff) << 4; }
    bool supported() const { return bits >> 62 == 1 && (bits >> 49 & 7) == 0; }

    // "Strides": atoms of 8 rows of 128 bytes, swizzled. Such a row holds 64 k of a K-major matrix, or
    // 64 rows or columns of an MN-major one.
    size_t element(unsigned mn, unsigned k, bool mn_major) const {
        const size_t at = mn_major ? mn / 64 * leading() + k / 8 * stride() + k % 8 * 128 + mn % 64 * 2
                                   : mn / 8 * stride() + mn % 8 * 128 + k * 2;
        return (start() + at) ^ ((start() + at) >> 7 & 7) << 4;
    }
};

struct WgmmaArguments {
    float* d;
    Descriptor a, b;
    bool add;
    unsigned columns;  // of b and d
    bool a_mn_major, b_mn_major;
    bool operator==(const WgmmaArguments& other) const {
        return a.bits == other.a.bits && b.bits == other.b.bits && add == other.add && columns == other.columns &&
               a_mn_major == other.a_mn_major && b_mn_major == other.b_mn_major;
    }
};

struct Operation {
    uint32_t number;  // in its warpgroup, from 1
    uint32_t group;   // of commits
    WgmmaArguments arguments;
    float (*widen)(uint32_t);
    size_t flight;
};

// Accumulators of a warp while wgmma works on them.
struct Flight {
    float* registers[32];
    unsigned columns;
    float value[16][256];     // [16, columns]
    uint32_t operations = 0;  // to do

    static constexpr uint32_t POISON = 0x7fc5dead;
    template <typename Visit> void each(Visit visit) {
        for (unsigned lane = 0; lane < 32; ++lane)
            for (unsigned i = 0; i < columns / 2; ++i)
                visit(registers[lane][i], value[lane / 4 + i % 4 / 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2]);
    }
};

struct WarpMultiplier {
    bool fenced = false;
    uint32_t issued = 0, group = 0;
    std::deque<Operation> operations;
    std::map<size_t, Flight> flights;
    size_t next_flight = 0;
};

// What the four warps of a group have in common.
struct GroupMultiplier {
    uint32_t engine;
    std::vector<WgmmaArguments> issued;
    struct Fetched {
        uint32_t number, uses;
        std::vector<float> b;  // [16, columns]
    };
    std::deque<Fetched> fetched;
};

namespace detail {

inline WarpMultiplier& warp_multiplier() {
    auto& found = hopper().warps[running->view.warp()];
    if (!found) found = std::make_shared<WarpMultiplier>();
    return *found;
}
inline GroupMultiplier& group_multiplier() {
    auto& found = hopper().groups[running->view.warp() / 4];
    if (!found) {
        found = std::make_shared<GroupMultiplier>();
        found->engine = hopper().add_engine(true);
    }
    return *found;
}

// wgmma reads 16 bytes from now on.
inline void check_operand(size_t at, const Stamp& now, Site site) {
    Lane& me = *running;
    Block& block = *me.block;
    Shadow& shadow = block.shared_shadow;
    const auto fail = [&](Kind kind, const std::string& what) {
        block.fail(kind, site, me, shared_address(static_cast<int64_t>(at)), "wgmma reads bytes " + what);
    };
    if (at + 16 > block.shared_bytes) fail(Kind::out_of_bounds, "past shared memory");
    const Stamp writer = shadow.writer(at);
    if (const Stamp* other = shadow.touch<&Cell::note_read>(at, 16, me.view, now))
        fail(Kind::race, "not ordered after " + block.describe(*other));
    if (shadow.in_flight(at)) fail(Kind::copy_in_flight, "that a copy still owns");
    if (!shadow.valid(at, 16)) fail(Kind::uninitialised, "that nobody wrote");
    if (!hopper().shows(writer, me)) fail(Kind::proxy, "without a fence after the write by " + block.describe(writer));
}

inline void check_operands(const Operation& op, Site site) {
    const Stamp now = engine_stamp(group_multiplier().engine, op.number, site);
    const WgmmaArguments& of = op.arguments;
    const auto check = [&](const Descriptor& matrix, unsigned first, unsigned last, bool mn_major) {
        for (unsigned mn = first; mn < last; mn += mn_major ? 8 : 1)
            for (unsigned k = 0; k < 16; k += mn_major ? 1 : 8)
                check_operand(matrix.element(mn, k, mn_major), now, site);
    };
    const unsigned first = running->view.warp() % 4 * 16;
    check(of.a, first, first + 16, of.a_mn_major);
    check(of.b, 0, of.columns, of.b_mn_major);
}

inline float operand(const Operation& op, const Descriptor& matrix, unsigned mn, unsigned k, bool mn_major) {
    uint16_t bits;
    std::memcpy(&bits, here().shared + matrix.element(mn, k, mn_major), 2);
    return op.widen(bits);
}

// B as numbers; its four readers share the work.
inline std::vector<float> fetch_b(const Operation& op) {
    GroupMultiplier& group = group_multiplier();
    for (auto at = group.fetched.begin(); at != group.fetched.end(); ++at) {
        if (at->number != op.number) continue;
        std::vector<float> b = at->b;
        if (++at->uses == 4) group.fetched.erase(at);
        return b;
    }
    const WgmmaArguments& of = op.arguments;
    std::vector<float> b(16 * of.columns);
    for (unsigned n = 0; n < of.columns; ++n)
        for (unsigned k = 0; k < 16; ++k) b[k * of.columns + n] = operand(op, of.b, n, k, of.b_mn_major);
    group.fetched.push_back({op.number, 1, b});
    return b;
}

inline void multiply(const Operation& op, Flight& flight) {
    typedef float Row __attribute__((vector_size(32), aligned(4), may_alias));
    const WgmmaArguments& of = op.arguments;
    const std::vector<float> b = fetch_b(op);
    const unsigned first = running->view.warp() % 4 * 16;
    if (!of.add) std::memset(flight.value, 0, sizeof(flight.value));
    for (unsigned m = 0; m < 16; ++m) {
        for (unsigned k = 0; k < 16; ++k) {
            const float a = operand(op, of.a, first + m, k, of.a_mn_major);
            for (unsigned n = 0; n < of.columns; n += 8)
                reinterpret_cast<Row&>(flight.value[m][n]) += a * reinterpret_cast<const Row&>(b[k * of.columns + n]);
        }
    }
}

// The flight of these accumulators, which starts now if they are not under way already.
inline size_t take_off(WarpMultiplier& warp, void* const* all, const WgmmaArguments& arguments, Site site) {
    const auto mine = [&](unsigned i) { return static_cast<const WgmmaArguments*>(all[i])->d; };
    for (auto& [number, flight] : warp.flights) {
        if (flight.registers[0] != mine(0)) continue;
        if (flight.columns != arguments.columns)
            here().fail(Kind::registers, site, *running, "", "accumulators that a wgmma of another shape works on");
        flight.each([&](float& held, float&) {
            if (bit_cast<uint32_t>(held) != Flight::POISON)
                here().fail(Kind::registers, site, *running, "", "accumulators changed while wgmma works on them");
        });
        return number;
    }
    if (!warp.fenced) here().fail(Kind::registers, site, *running, "", "wgmma on accumulators without wgmma.fence");
    Flight& flight = warp.flights[warp.next_flight];
    flight.columns = arguments.columns;
    for (unsigned i = 0; i < 32; ++i) flight.registers[i] = mine(i);
    flight.each([&](float& held, float& value) {
        if (arguments.add) value = held;
        held = bit_cast<float>(Flight::POISON);
    });
    return warp.next_flight++;
}

template <typename T> void start_wgmma(Warp&, unsigned, void* const* all) {
    const Site site = running->wait.site;
    WarpMultiplier& warp = warp_multiplier();
    GroupMultiplier& group = group_multiplier();
    const auto& arguments = *static_cast<const WgmmaArguments*>(all[0]);
    for (unsigned i = 1; i < 32; ++i)
        if (!(*static_cast<const WgmmaArguments*>(all[i]) == arguments))
            here().fail(Kind::divergence, site, *running, "", "lanes of a wgmma with different operands");
    if (running->view.warp() / 4 * 128 + 128 > here().threads)
        here().fail(Kind::divergence, site, *running, "", "wgmma by less than four warps");
    if (!arguments.a.supported() || !arguments.b.supported())
        here().fail(Kind::launch, site, *running, "",
                    "a descriptor without the 128-byte swizzle, or with a base offset");
    if (warp.issued == group.issued.size()) group.issued.push_back(arguments);
    else if (!(group.issued[warp.issued] == arguments))
        here().fail(Kind::divergence, site, *running, "", "warps of a wgmma with different operands");
    const size_t flight = take_off(warp, all, arguments, site);
    warp.operations.push_back({++warp.issued, warp.group, arguments, widen<T>, flight});
    ++warp.flights[flight].operations;
    check_operands(warp.operations.back(), site);
    if (here().options.eager) multiply(warp.operations.back(), warp.flights[flight]);
    here().counters.mma += arguments.columns / 8;  // of m16n8k16
}

template <int PENDING> void finish_wgmmas(Warp& lanes, unsigned, void* const*) {
    WarpMultiplier& warp = warp_multiplier();
    uint32_t done = 0;
    for (; !warp.operations.empty() && warp.operations.front().group + PENDING < warp.group;
         warp.operations.pop_front()) {
        const Operation& op = warp.operations.front();
        Flight& flight = warp.flights[op.flight];
        if (!here().options.eager) multiply(op, flight);
        done = op.number;
        if (--flight.operations != 0) continue;
        flight.each([](float& held, float& value) { held = value; });
        warp.flights.erase(op.flight);
        warp.fenced = false;
    }
    const size_t engine = group_multiplier().engine;
    for (Lane* lane : lanes.lanes) {
        auto& known = lane->view.engines;
        if (known.size() <= engine) known.resize(engine + 1);
        auto& part = known[engine][running->view.warp() % 4];
        part = std::max(part, done);
    }
}

}  // namespace detail

// "wgmma.fence"
inline void wgmma_fence(Site site = Site::here()) {
    int nothing = 0;
    gather("wgmma.fence", site, FULL, nothing,
           [](Warp&, unsigned, void* const*) { detail::warp_multiplier().fenced = true; });
}

// "wgmma.mma_async", m64nNk16, both operands in shared memory
template <typename T, bool B_MN_MAJOR, int BOXES>
void wgmma(float (&d)[BOXES][8][4], uint64_t a, uint64_t b, bool add, Site site) {
    WgmmaArguments mine{&d[0][0][0], {a}, {b}, add, 64 * BOXES, false, B_MN_MAJOR};
    gather("wgmma", site, FULL, mine, detail::start_wgmma<T>);
}
template <typename T, bool B_MN_MAJOR>
void wgmma_m64n192k16(float (&d)[3][8][4], uint64_t a, uint64_t b, bool add, Site site = Site::here()) {
    wgmma<T, B_MN_MAJOR>(d, a, b, add, site);
}
template <typename T, bool B_MN_MAJOR>
void wgmma_m64n256k16(float (&d)[4][8][4], uint64_t a, uint64_t b, bool add, Site site = Site::here()) {
    wgmma<T, B_MN_MAJOR>(d, a, b, add, site);
}

// The same, m64nNk16: b is K-major, and the product is added.
template <typename T, bool A_MN_MAJOR, int N>
void wgmma_m64k16(float (&d)[16][4], uint64_t a, uint64_t b, Site site = Site::here()) {
    static_assert(N % 8 == 0 && N >= 8 && N <= 128);
    WgmmaArguments mine{&d[0][0], {a}, {b}, true, N, A_MN_MAJOR, false};
    gather("wgmma", site, FULL, mine, detail::start_wgmma<T>);
}

// "wgmma.commit_group": a group even if empty.
inline void wgmma_commit(Site site = Site::here()) {
    int nothing = 0;
    gather("wgmma.commit_group", site, FULL, nothing,
           [](Warp&, unsigned, void* const*) { ++detail::warp_multiplier().group; });
}

// "wgmma.wait_group": all but the newest groups. Nothing is done before all four warps have come.
template <int PENDING> void wgmma_wait(Site site = Site::here()) {
    uint32_t last = 0;
    for (const Operation& op : detail::warp_multiplier().operations)
        if (op.group + PENDING < detail::warp_multiplier().group) last = op.number;
    const uint32_t first_warp = running->view.warp() / 4 * 4;
    const std::function<bool()> come = [=, &warps = hopper().warps] {
        for (uint32_t warp = first_warp; warp < first_warp + 4; ++warp) {
            const auto found = warps.find(warp);
            if (last > 0 && (found == warps.end() || found->second->issued < last)) return false;
        }
        return true;
    };
    here().wait_until("wgmma.wait_group", site, come);
    int nothing = 0;
    gather("wgmma.wait_group", site, FULL, nothing, detail::finish_wgmmas<PENDING>);
}

}  // namespace simt
