// Small kernels with one planted fault each, and the same kernel without it. Prints one line per
// run: name, broken, seed, mode, sum of `out`, bytes of `in` read, of `out` written and added to,
// kind ("clean" if none), place, address, lanes and message, by tabs.
#include <cstdio>
#include <vector>

#include "faults_order.h"
#include "faults_use.h"

__global__ void idle(Args) {}

struct Launch {
    unsigned blocks, threads;
    size_t shared_bytes;
};

struct Case {
    const char* name;
    void (*kernels[2])(Args);  // healthy, broken
    Launch launches[2];
};

#define CASE(kernel, ...) \
    { \
        #kernel, {kernel<false>, kernel<true>}, { \
            {__VA_ARGS__}, { __VA_ARGS__ } \
        } \
    }
const Case cases[] = {
    CASE(missing_barrier, 1, 64, 256),
    CASE(missing_syncwarp, 1, 64, 256),
    CASE(syncwarp_for_a_barrier, 1, 64, 128),
    CASE(half_a_warp, 1, 64, 256),
    CASE(reader_outside_mask, 1, 32, 16),
    CASE(lane_left_out, 1, 32, 128),
    CASE(parts_of_a_vector, 1, 64, 1024),
    CASE(barrier_of_others, 1, 128, 512),
    CASE(word_of_mouth, 1, 96, 384),
    CASE(late_reader, 1, 288, 16),
    CASE(racing_writes, 1, 64, 256),
    CASE(early_overwrite, 1, 64, 256),
    CASE(missing_wait, 1, 64, 2048),
    CASE(missing_commit, 1, 64, 2048),
    CASE(short_wait, 1, 64, 2048),
    CASE(copy_no_barrier, 1, 64, 2048),
    CASE(barrier_before_wait, 1, 64, 1024),
    CASE(copy_outlives_thread, 1, 64, 1024),
    CASE(global_out_of_bounds, 4, 64, 0),
    CASE(global_before_start, 1, 64, 0),
    CASE(slice_out_of_bounds, 1, 64, 0),
    CASE(shared_out_of_bounds, 1, 64, 2048),
    CASE(shared_before_start, 1, 64, 256),
    CASE(misaligned_vector, 1, 64, 0),
    CASE(newer_instruction, 1, 64, 0),
    CASE(misaligned_row, 1, 64, 512),
    CASE(divergent_collective, 1, 64, 0),
    CASE(divergent_mask, 1, 64, 0),
    CASE(divergent_barrier, 1, 64, 0),
    CASE(collective_and_barrier, 1, 32, 0),
    CASE(shuffle_from_outsider, 1, 64, 0),
    CASE(outside_its_mask, 1, 32, 0),
    CASE(two_on_a_line, 1, 32, 0),
    CASE(partial_warp, 1, 40, 0),
    CASE(barrier_counts, 1, 64, 0),
    CASE(exited_lane, 1, 64, 0),
    CASE(barrier_after_exit, 1, 64, 0),
    CASE(deadlock, 1, 64, 0),
    CASE(uninitialised_shared, 4, 64, 256),
    CASE(uninitialised_global, 1, 64, 0),
    CASE(blocks_write_the_same, 4, 64, 0),
    CASE(block_reads_another, 4, 64, 0),
    CASE(store_beside_atomics, 4, 64, 0),
    CASE(read_beside_atomics, 2, 32, 0),
    CASE(global_without_barrier, 1, 64, 0),
    CASE(misaligned_copy, 1, 64, 1024),
    CASE(store_to_input, 1, 1, 0),
    CASE(launch_not_waited_for, 1, 64, 0),
    CASE(launch_ends_first, 1, 64, 0),
    CASE(trap, 1, 64, 0),
    CASE(runaway, 1, 1, 0),
    CASE(runaway_votes, 1, 32, 0),
    {"too_much_shared", {idle, idle}, {{1, 64, 99 * 1024}, {1, 64, 99 * 1024 + 1}}},
    {"too_many_threads", {idle, idle}, {{1, 1024, 0}, {1, 1025, 0}}},
    {"no_block", {idle, idle}, {{1, 1, 0}, {0, 1, 0}}},
};

void run(const Case& test, bool broken, uint64_t seed, bool eager) {
    std::vector<float> in(256), out(256);
    std::vector<char> scratch(1024);
    for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i);
    simt::Options options;
    options.seed = seed, options.eager = eager, options.sm = 80;
    options.overlapped = std::string(test.name).rfind("launch_", 0) == 0;
    options.shared_limit = 99 * 1024, options.access_limit = 100000;
    simt::Emulator emulator(options);
    emulator.add_buffer("in", in.data(), in.size() * sizeof(float), false);
    emulator.add_buffer("out", out.data(), out.size() * sizeof(float), true);
    emulator.add_buffer("scratch", scratch.data(), scratch.size(), true, false);
    std::string kind = "clean", what;
    try {
        const auto [blocks, threads, bytes] = test.launches[broken];
        emulator.launch(test.kernels[broken], blocks, threads, bytes, Args{in.data(), out.data(), scratch.data()});
    } catch (const simt::Fault& fault) {
        kind = name(fault.kind);
        what = fault.site.text();
        for (const std::string& word : {fault.address, fault.lanes, std::string(fault.what())}) what += "\t" + word;
    }
    double sum = 0;
    for (float x : out) sum += x;
    const auto& to = emulator.counters.global["out"];
    std::printf("%s\t%d\t%d\t%s\t%g\t%d\t%d\t%d\t%s\t%s\n", test.name, broken, static_cast<int>(seed),
                eager ? "eager" : "lazy", sum, static_cast<int>(emulator.counters.global["in"].read),
                static_cast<int>(to.written), static_cast<int>(to.atomics), kind.c_str(),
                what.empty() ? "\t\t\t" : what.c_str());
}

int main() {
    for (const Case& test : cases)
        for (uint64_t seed = 0; seed < 8; ++seed)
            for (bool eager : {false, true})
                for (bool broken : {false, true}) run(test, broken, seed, eager);
}
