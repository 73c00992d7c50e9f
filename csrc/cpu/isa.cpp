#include "isa.h"

#if defined(REAP_AVX2) || defined(REAP_AVX512) || defined(REAP_AVX512_BF16)
#define REAP_X86
#include <cpuid.h>
#endif

#include <cstring>
#include <stdexcept>
#include <string>

#include "engine.h"

namespace reap {

namespace avx512_bf16 {
extern const Kernels kernels[3];
}
namespace avx512 {
extern const Kernels kernels[3];
}
namespace avx2 {
extern const Kernels kernels[3];
}
namespace portable {
extern const Kernels kernels[3];
}

namespace {

struct Isa {
    const char* name;
    const Kernels* kernels;
    bool (*runs_here)();
};

#ifdef REAP_X86
bool has_f16c() {  // not all compilers have a name for it
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
// The compiler's runtime also asks whether the system saves the wide registers.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

// Best first.
const Isa ISAS[] = {
#ifdef REAP_AVX512_BF16
    {"avx512_bf16", avx512_bf16::kernels, has_avx512_bf16},
#endif
#ifdef REAP_AVX512
    {"avx512", avx512::kernels, has_avx512},
#endif
#ifdef REAP_AVX2
    {"avx2", avx2::kernels, has_avx2},
#endif
    {"portable", portable::kernels, [] { return true; }},
};

}  // namespace

const char* const* available_isas() {
    static const char* names[sizeof(ISAS) / sizeof(ISAS[0]) + 1] = {};
    static const bool filled = [] {
        int n = 0;
        for (const Isa& isa : ISAS)
            if (isa.runs_here()) names[n++] = isa.name;
        return true;
    }();
    (void)filled;
    return names;
}

const Kernels* find_kernels(const char* name) {
    for (const Isa& isa : ISAS)
        if (isa.runs_here() && (!name || !std::strcmp(name, isa.name))) return isa.kernels;
    throw std::invalid_argument(std::string("isa is '") + name + "', which this processor or build does not have");
}

}  // namespace reap
