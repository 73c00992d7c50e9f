// What layer.cu offers to the binding; no CUDA header is needed to call it.
#pragma once
#include <cstddef>

#include "../layer.h"

namespace reap::cuda {

size_t workspace_bytes(const Layer&);

// Puts the layer on `stream`, a cudaStream_t of layer.device. Allocates nothing and waits for nothing.
// Throws std::runtime_error with the name of the CUDA error.
void run_layer(const Layer&, void* workspace, void* stream);

// GPUs that the driver shows to this build's CUDA runtime. Throws as run_layer does, where there is no
// driver or an old one.
int device_count();

}  // namespace reap::cuda
