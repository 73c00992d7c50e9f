// Errors of the CUDA runtime as exceptions.
#pragma once
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace reap::cuda {

// Throws std::runtime_error with the name of the error and of what failed.
inline void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // takes it away, or the next launch would find it
    throw std::runtime_error(std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error) + " in " + what);
}

}  // namespace reap::cuda
