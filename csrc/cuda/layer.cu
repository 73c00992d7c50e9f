// The engine's launches on a CUDA stream.
#include <cuda_runtime.h>

#include "check.h"
#include "engine.h"
#include "sm90/launch.cuh"

namespace reap::cuda {
namespace {

struct StreamLauncher {
    cudaStream_t stream;

    template <class Args>
    void operator()(const char* name, void (*kernel)(Args), int64_t blocks, int threads, int shared_bytes, Args args) {
        if (blocks > std::numeric_limits<int>::max()) check(cudaErrorInvalidConfiguration, name);
        if (shared_bytes > WITHOUT_ASKING)
            check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), name);
        kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(args);
        check(cudaGetLastError(), name);
    }
};

}  // namespace

size_t workspace_bytes(const Layer& layer) { return workspace_size(layer); }

void run_layer(const Layer& layer, void* workspace, void* stream) {
    check(cudaSetDevice(layer.device), "cudaSetDevice");
    StreamLauncher launch{static_cast<cudaStream_t>(stream)};
    if (layer.wgmma)
        sm90::run_layer(launch, layer, static_cast<char*>(workspace));
    else
        run_layer(launch, layer, static_cast<char*>(workspace));
}

int device_count() {
    int count = 0;
    check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    return count;
}

}  // namespace reap::cuda
