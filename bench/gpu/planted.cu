// Faults for `make gpu-sanitize`: a tool that finds none in this program proves nothing by finding none in
// ours. `planted TOOL` runs one kernel, under a name that all filters of kernels let through.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

namespace reap {

constexpr int THREADS = 64;
enum Fault { OUTSIDE, RACE, UNINITIALIZED, DIVERGENT };

__global__ void gate_up_kernel(Fault fault, float* data, int size) {
    __shared__ float shared[THREADS];
    shared[threadIdx.x] = static_cast<float>(threadIdx.x);
    if (fault == OUTSIDE) data[size + threadIdx.x] = 1.f;
    if (fault == RACE) data[threadIdx.x] = shared[(threadIdx.x + 32) % THREADS];  // of another warp, without a barrier
    if (fault == UNINITIALIZED && data[threadIdx.x] > 1e30f) data[threadIdx.x] = 0.f;
    if (fault == DIVERGENT && threadIdx.x < THREADS - 16) __syncthreads();
}

}  // namespace reap

int main(int count, char** arguments) {
    const char* tools[] = {"memcheck", "racecheck", "initcheck", "synccheck"};  // in the order of Fault
    for (int fault = 0; count == 2 && fault < 4; ++fault) {
        if (std::strcmp(arguments[1], tools[fault]) != 0) continue;
        float* data = nullptr;
        if (cudaMalloc(&data, reap::THREADS * sizeof(float)) != cudaSuccess) return 3;
        reap::gate_up_kernel<<<1, reap::THREADS>>>(static_cast<reap::Fault>(fault), data, reap::THREADS);
        std::printf("ran with %s\n", cudaGetErrorName(cudaDeviceSynchronize()));
        return 0;
    }
    return 2;
}
