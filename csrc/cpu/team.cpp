#include "team.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace reap {

void yield_processor() { sched_yield(); }

namespace {

struct Team {
    void (*work)(void*, int);
    void* context;
    int threads;
    std::atomic<int> next{0};
};

// Members are numbered as they come, so that each is served whatever the size of the pool.
void serve(void* argument) {
    Team& team = *static_cast<Team*>(argument);
    for (int member; (member = team.next.fetch_add(1)) < team.threads;) team.work(team.context, member);
}

void serve_with_own_threads(Team& team) {
    std::vector<std::thread> others;
    try {
        others.reserve(static_cast<size_t>(team.threads - 1));
        for (int i = 1; i < team.threads; ++i) others.emplace_back(serve, &team);
    } catch (const std::exception&) {  // no thread, no memory for one: those that run do the work
    }
    serve(&team);
    for (std::thread& other : others) other.join();
}

// torch's workers spin for a while after each parallel region; a second pool would compete with them for the
// cores. So we borrow the one that is there: GOMP_parallel is the ABI that compilers call (libgomp, and LLVM's
// runtime offers it too). It is found by name, because torch wheels rename the library's file.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel find_gomp() {
#ifdef REAP_OWN_THREADS  // sanitizers do not see through libgomp's barriers
    return nullptr;
#else
    return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#endif
}

std::atomic<bool> forked{false};  // libgomp's workers do not survive a fork, and it would wait for them
const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

void run_team(int threads, void (*work)(void*, int), void* context) {
    static const GompParallel gomp = find_gomp();
    Team team{work, context, threads};
    if (threads <= 1) serve(&team);
    else if (gomp && !forked) gomp(serve, &team, static_cast<unsigned>(threads), 0);
    else serve_with_own_threads(team);
}

}  // namespace reap
