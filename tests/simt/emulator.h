// Runs kernels: `emulator.launch(kernel, grid, block, shared_bytes, arguments...)` does what
// kernel<<<grid, block, shared_bytes>>>(arguments...) would, one block after the other in an order
// that follows from the seed, and throws the first Fault. Nothing is shared between emulators, so
// several may run at once, each in a thread of its own.
//
// Races are found from what orders two accesses, not from the turns that lanes happen to take, so
// one run sees those of every schedule that touches the same addresses. What no run sees: the text
// of the inline assembly, which the wrappers of ptx.h stand in for, and what the compiler makes of
// the source; blocks that wait for each other, which never end here; time.
#pragma once
#include <deque>
#include <tuple>
#include <vector>

#include "memory.h"
#include "ptx.h"

namespace simt {

class Emulator {
public:
    Options options;
    Counters counters;

    explicit Emulator(Options wanted = {}) : options(wanted), block(options, counters), random(~wanted.seed) {
        std::swap(known_buffers, outer);
    }
    ~Emulator() { known_buffers = outer; }
    Emulator(const Emulator&) = delete;
    Emulator& operator=(const Emulator&) = delete;

    // A range that kernels may read and, if `writable`, write. Memory that is not `initialised` has
    // to be written before it is read.
    void add_buffer(const std::string& name, const void* address, size_t bytes, bool writable,
                    bool initialised = true) {
        const auto begin = reinterpret_cast<uintptr_t>(address);
        const uintptr_t shadow_begin = begin / CHUNK * CHUNK;
        Shadow* shadow = nullptr;
        if (writable || !initialised) shadow = &shadows.emplace_back(begin + bytes - shadow_begin, initialised);
        buffers.add({name, begin, begin + bytes, writable, shadow, shadow_begin, &counters.global[name]});
    }

    template <typename... Parameters, typename... Arguments>
    void launch(void (*kernel)(Parameters...), dim3 grid, dim3 size, size_t shared_bytes, Arguments&&... arguments) {
        check(grid, size, shared_bytes);
        // Kernels get copies of their parameters, each lane its own.
        const std::tuple<std::decay_t<Parameters>...> parameters(std::forward<Arguments>(arguments)...);
        run(grid, size, shared_bytes, [&] { std::apply(kernel, parameters); });
    }

private:
    void check(dim3 grid, dim3 size, size_t shared_bytes) const {
        const auto refuse = [](const std::string& what) { throw Fault(Kind::launch, Site(), "", "", what); };
        const uint64_t threads = uint64_t{size.x} * size.y * size.z;
        if (threads == 0 || threads > MAX_THREADS) refuse("a block of " + std::to_string(threads) + " threads");
        if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
            refuse("a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
                   std::to_string(grid.z) + " blocks");
        if (shared_bytes > options.shared_limit)
            refuse(std::to_string(shared_bytes) + " bytes of shared memory where " +
                   std::to_string(options.shared_limit) + " are allowed");
    }

    void run(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& kernel) {
        std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
        for (uint64_t i = 0; i < order.size(); ++i) order[i] = i;
        random.shuffle(order.data(), static_cast<uint32_t>(order.size()));
        block.configure(grid, size, shared_bytes, next_block);
        ++counters.launches;
        bool early = true;
        for (uint64_t i : order) {
            const uint3 index{static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                              static_cast<unsigned>(i / grid.x / grid.y)};
            ++counters.blocks;
            block.run(index, next_block++, kernel);
            early = early && block.lets_next_start;
        }
        counters.early.push_back(early);
    }

    Buffers buffers;
    Buffers* outer = &buffers;  // of the emulator that was in use before this one
    std::deque<Shadow> shadows;
    Block block;
    Random random;
    uint32_t next_block = 1;
};

}  // namespace simt
