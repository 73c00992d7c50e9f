// The layer output from fp32 sums to the model dtype.
#pragma once
#include "numbers.h"

namespace reap {
namespace REAP_ISA {

// Tokens from `first` to `last`.
template <Dtype D> static void finish(const Job& job, int64_t first, int64_t last) {
    const Layer& layer = job.layer;
    if (D == Dtype::f32) return;  // sums are the output
    const char* const sums = reinterpret_cast<const char*>(job.sums);
    const int64_t end = last * layer.H;
    for (int64_t cell = first * layer.H; cell < end; cell += W) {
        const int n = static_cast<int>(end - cell < W ? end - cell : W);
        Number<D>::store(layer.out + cell * Number<D>::size, Number<Dtype::f32>::load(sums + cell * 4, n), n);
    }
}

}  // namespace REAP_ISA
}  // namespace reap
