// Threads: the pool of torch's own OpenMP runtime where there is one, otherwise threads of the call's own.
#pragma once
#include <cstdint>

namespace reap {

// Runs work(context, member) for every member of 0 .. threads-1, some of them at the same time; returns when all
// have ended. Safe to call from several threads at once and after fork. `work` must not throw, and one member
// must be able to do it all: where threads cannot be started there are fewer at a time.
void run_team(int threads, void (*work)(void* context, int member), void* context);

void yield_processor();

// Until `cell`, which only grows, has reached `value`.
static inline void wait_until(const int64_t* cell, int64_t value) {
    for (int spins = 0; __atomic_load_n(cell, __ATOMIC_ACQUIRE) < value; ++spins)
        if (spins > 64) yield_processor();
}

}  // namespace reap
