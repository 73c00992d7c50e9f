// Stacks that take turns on one OS thread. A switch saves what the calling convention says a callee
// must keep, and costs a few nanoseconds; ucontext, the portable way, makes two system calls.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__) || defined(SIMT_UCONTEXT)
#define SIMT_PORTABLE_FIBERS
#include <ucontext.h>
#endif

namespace simt {

#ifdef SIMT_PORTABLE_FIBERS

class Fiber {
public:
    void start(char* stack, size_t bytes, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = bytes;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    void switch_to(Fiber& next) { swapcontext(&context, &next.context); }

private:
    ucontext_t context;
};

#else

// Saves the caller's registers on its stack, the stack's address in *from, and goes on at `to`. The
// jump in place of a return is for the branch predictor, whose return stack knows one fiber only.
__attribute__((naked, noinline, used)) inline void switch_stacks(void** /*from*/, void* /*to*/) {
    asm("pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
        "movq %rsp, (%rdi)\n\t"
        "movq %rsi, %rsp\n\t"
        "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\t"
        "popq %rcx\n\tjmpq *%rcx");
}

class Fiber {
public:
    void start(char* stack, size_t bytes, void (*entry)()) {
        // As if `entry` had just been called: 8 below a multiple of 16, with six registers to pop.
        auto top = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15};
        auto** frame = reinterpret_cast<void**>(top - 8) - 7;
        for (int i = 0; i < 6; ++i) frame[i] = nullptr;
        frame[6] = reinterpret_cast<void*>(entry);
        frame[7] = nullptr;
        position = frame;
    }
    void switch_to(Fiber& next) { switch_stacks(&position, next.position); }

private:
    void* position = nullptr;
};

#endif

// Stacks for `count` fibers, each above a page that may not be touched. An odd number of pages each
// and the stagger keep the tops of the stacks, where fibers live, from sharing sets of the caches.
class Stacks {
public:
    explicit Stacks(size_t count) : count(count) {
        void* memory =
            mmap(nullptr, count * stride, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        base = static_cast<char*>(memory);
        for (size_t i = 0; i < count; ++i) mprotect(base + i * stride, page, PROT_NONE);
    }
    ~Stacks() { munmap(base, count * stride); }
    Stacks(const Stacks&) = delete;
    Stacks& operator=(const Stacks&) = delete;

    char* stack(size_t i) const { return base + i * stride + page; }
    size_t bytes(size_t i) const { return stride - page - i * 448 % 4096; }
    size_t size() const { return count; }

private:
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t stride = 65536 + page * (65536 % (2 * page) == 0 ? 3 : 2);
    size_t count;
    char* base;
};

}  // namespace simt
