// What layer.cpp offers to the binding. The arithmetic is in kernels.h, once per instruction set.
#pragma once
#include <cstddef>

#include "../layer.h"

namespace reap {

// Instruction sets that this build and this processor have, best first; ends with null.
const char* const* available_isas();

// Runs the layer with an instruction set of available_isas() (null: the best) and returns the bytes of memory
// that it used besides its arguments. Throws std::bad_alloc before anything is written if they are not to be had,
// std::invalid_argument for an unknown or unavailable instruction set.
size_t run_layer(const Layer& layer, const char* isa);

}  // namespace reap
