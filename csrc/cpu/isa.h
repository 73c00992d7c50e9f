// The kernel tables of this build, and which of them the processor can run.
#pragma once
#include "job.h"

namespace reap {

// By model dtype; null picks the best. Throws std::invalid_argument for one that is not there.
const Kernels* find_kernels(const char* isa);

}  // namespace reap
