// The engine's launches on a CUDA stream.
#include <cuda_runtime.h>

#include "check.h"
#include "engine.h"
#include "sm90/launch.cuh"

namespace reap::cuda {
namespace {

struct StreamLauncher {
    cudaStream_t stream;
    bool overlaps;         // a launch is made ready before the last one is over, for which its kernels wait
    bool started = false;  // what is before the first launch is not ours

    template <class Args>
    void operator()(const char* name, void (*kernel)(Args), int64_t blocks, int threads, int shared_bytes, Args args) {
        if (blocks > std::numeric_limits<int>::max()) check(cudaErrorInvalidConfiguration, name);
        if (shared_bytes > WITHOUT_ASKING)
            check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), name);
        cudaLaunchAttribute early{};
        early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        early.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t launch{};
        launch.gridDim = dim3(static_cast<unsigned>(blocks)), launch.blockDim = dim3(threads);
        launch.dynamicSmemBytes = shared_bytes, launch.stream = stream;
        launch.attrs = &early, launch.numAttrs = overlaps && started;
        check(cudaLaunchKernelEx(&launch, kernel, args), name);
        started = true;
    }
};

}  // namespace

size_t workspace_bytes(const Layer& layer) { return workspace_size(layer); }

void run_layer(const Layer& layer, void* workspace, void* stream) {
    check(cudaSetDevice(layer.device), "cudaSetDevice");
    StreamLauncher launch{static_cast<cudaStream_t>(stream), layer.sm >= 90};
    if (layer.wgmma) sm90::run_layer(launch, layer, static_cast<char*>(workspace));
    else run_layer(launch, layer, static_cast<char*>(workspace));
}

int device_count() {
    int count = 0;
    check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    return count;
}

}  // namespace reap::cuda
