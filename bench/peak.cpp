// Two roofs of a machine, measured: multiply-adds from registers, and reads from memory.
// Independent of the kernels under test: nothing here is shared with them.
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
#define IN_REGISTER "v"
constexpr int kBytes = 64;
#elif defined(__AVX__)
#define IN_REGISTER "x"
constexpr int kBytes = 32;
#elif defined(__x86_64__)
#define IN_REGISTER "x"
constexpr int kBytes = 16;
#else
#define IN_REGISTER "w"
constexpr int kBytes = 16;
#endif
typedef float Vector __attribute__((vector_size(kBytes)));
constexpr int kLanes = kBytes / sizeof(float);
// Enough independent sums to cover latency times issue width, few enough to stay in registers.
constexpr int kSums = kBytes == 64 ? 24 : 12;

struct Fp32 {
    static constexpr int flops = 2 * kLanes;
    static Vector fma(Vector sum, Vector a, Vector b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
struct Bf16 {
    static constexpr int flops = 4 * kLanes;
    static Vector fma(Vector sum, Vector a, Vector b) {
        return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
};
#else
using Bf16 = Fp32;  // without bf16 arithmetic a bf16 kernel computes in fp32
#endif

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

template <class Op> double flops_of_one_thread(double seconds) {
    Vector sums[kSums] = {}, a = {}, b = {};
    asm volatile("" : "+" IN_REGISTER(a), "+" IN_REGISTER(b));  // unknown to the compiler, zero in fact
    double flops = 0, start = now(), elapsed = 0;
    while ((elapsed = now() - start) < seconds) {
        for (int repeat = 0; repeat < 4096; ++repeat) {
#pragma GCC unroll 24
            for (int i = 0; i < kSums; ++i) sums[i] = Op::fma(sums[i], a, b);
#pragma GCC unroll 24
            for (int i = 0; i < kSums; ++i) asm volatile("" : "+" IN_REGISTER(sums[i]));
        }
        flops += 4096.0 * kSums * Op::flops;
    }
    return flops / elapsed;
}

double bytes_of_one_thread(const char* data, size_t bytes) {
    Vector sums[8] = {};
    double start = now();
    for (size_t at = 0; at + 8 * kBytes <= bytes; at += 8 * kBytes)
        for (int i = 0; i < 8; ++i) {
            Vector v;
            std::memcpy(&v, data + at + i * kBytes, kBytes);
            sums[i] += v;
        }
    for (int i = 0; i < 8; ++i) asm volatile("" ::IN_REGISTER(sums[i]));
    return bytes / (now() - start);
}

template <class Body> double sum_over_threads(int threads, Body body) {
    std::vector<double> rates(threads);
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t) pool.emplace_back([&, t] { rates[t] = body(t); });
    double total = 0;
    for (int t = 0; t < threads; ++t) pool[t].join(), total += rates[t];
    return total;
}

}  // namespace

// FLOP/s of all threads together.
extern "C" double fma_peak(int bf16, int threads, double seconds) {
    return sum_over_threads(
        threads, [=](int) { return bf16 ? flops_of_one_thread<Bf16>(seconds) : flops_of_one_thread<Fp32>(seconds); });
}

// Bytes/s of all threads together, each reading its own part of `data` once.
extern "C" double read_bandwidth(const char* data, size_t bytes, int threads) {
    const size_t part = bytes / threads;
    return sum_over_threads(threads, [=](int t) { return bytes_of_one_thread(data + t * part, part); });
}
