// Calls of the CPU engine, compiled with -finstrument-functions, whose threads stop for a while where a function begins
// or ends, by chance: the others run ahead as far as the engine lets them. Exits with 1 once a result has other bits
// than one thread's, with 0 after argv[1] stops without; a call that never ends is killed by SIGPROF. argv[2] is the
// wait that is out of order.
#include <sys/time.h>
#include <time.h>

#include <atomic>
#include <cstdlib>
#include <random>
#include <vector>

#include "cpu/engine.h"

int mutant = 0;

namespace {

// Many small blocks, so that much of the time goes to what they share: buffers, sums and norms.
constexpr int64_t T = 4000, K = 3, E = 4, H = 100, I = 2;
constexpr int THREADS = 2, ONE_IN = 20;
constexpr long STOPPED = 1500000;  // nanoseconds

struct Result {
    std::vector<float> out = std::vector<float>(T * H), norms = std::vector<float>(T * K),
                       peaks = std::vector<float>(T * K);
    bool operator==(const Result& other) const {
        return out == other.out && norms == other.norms && peaks == other.peaks;
    }
};

struct Inputs {
    std::vector<float> hidden = values(T * H), gate_up = values(E * 2 * I * H), down = values(E * H * I),
                       gates = values(T * K);
    std::vector<int64_t> experts = other();

    static std::vector<int64_t> other() {  // than another slot of the token has
        std::vector<int64_t> all(T * K);
        for (int64_t slot = 0; slot < T * K; ++slot) all[static_cast<size_t>(slot)] = (slot / K + slot % K) % E;
        return all;
    }

    static std::vector<float> values(int64_t size) {
        static std::minstd_rand random(1);
        std::vector<float> all(static_cast<size_t>(size));
        for (float& x : all) x = static_cast<float>(random() % 1999) / 999 - 1;
        return all;
    }
};

const char* bytes(const std::vector<float>& x) { return reinterpret_cast<const char*>(x.data()); }

Result run(const Inputs& in, int threads) {
    Result result;
    reap::Layer layer = {};
    layer.T = T, layer.K = K, layer.E = E, layer.H = H, layer.I = I;
    layer.dtype = reap::Dtype::f32;
    layer.gated = true;
    layer.threads = threads;
    layer.hidden = bytes(in.hidden);
    layer.hidden_stride = H;
    layer.gate_up = {bytes(in.gate_up), 2 * I * H, H, 1, nullptr, 0, 0};
    layer.down = {bytes(in.down), H * I, I, 1, nullptr, 0, 0};
    layer.top_k_index = in.experts.data();
    layer.top_k_weights = in.gates.data();
    layer.out = reinterpret_cast<char*>(result.out.data());
    layer.norms = result.norms.data();
    layer.peaks = result.peaks.data();
    reap::run_layer(layer, "portable");
    return result;
}

std::atomic<int> stops{0};
thread_local bool stoppable = false;  // only the caller, so that the others have the time
std::minstd_rand chance(7);

}  // namespace

// What -finstrument-functions calls where a function of the engine begins and ends.
extern "C" {
__attribute__((no_instrument_function)) void __cyg_profile_func_enter(void*, void*) {
    if (!stoppable || chance() % ONE_IN) return;
    ++stops;
    const timespec time = {0, STOPPED};
    nanosleep(&time, nullptr);
}
__attribute__((no_instrument_function)) void __cyg_profile_func_exit(void*, void*) {
    __cyg_profile_func_enter(nullptr, nullptr);
}
}

int main(int, char** arguments) {
    const Inputs inputs;
    const Result expected = run(inputs, 1);
    stoppable = true;
    mutant = std::atoi(arguments[2]);
    const int enough = std::atoi(arguments[1]);
    bool same = true;
    while (same && stops < enough) {
        const itimerval patience = {{0, 0}, {0, 500000}};  // microseconds of all threads; a call takes some 10,000
        setitimer(ITIMER_PROF, &patience, nullptr);
        same = run(inputs, THREADS) == expected;
    }
    return same ? 0 : 1;
}
