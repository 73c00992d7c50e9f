// The kernels of the instruction set that REAP_ISA names, for all model dtypes, as one table. Included
// once per translation unit, each compiled for its processor. Nothing in here may be shared between
// translation units (the linker could pick an AVX-512 copy of an inline function for all of them): all
// functions are static or templates in the instruction set's own namespace, and nothing of std is used.
#pragma once
#include "down.h"

namespace reap {
namespace REAP_ISA {

template <Dtype D> static void finish(const Job& job, int64_t first, int64_t last) {
    const Layer& layer = job.layer;
    if (D == Dtype::f32) return;  // sums are the output
    for (int64_t cell = first * layer.H; cell < last * layer.H; cell += W) {
        const int64_t rest = last * layer.H - cell;
        Number<D>::store(layer.out + cell * Number<D>::size, Number<Dtype::f32>::load(reinterpret_cast<const char*>(job.sums + cell), static_cast<int>(rest < W ? rest : W)),
                         static_cast<int>(rest < W ? rest : W));
    }
}

extern const Kernels kernels[3];
const Kernels kernels[3] = {  // in the order of Dtype
    {scratch_bytes<Dtype::bf16>, gate_up<Dtype::bf16>, down<Dtype::bf16>, finish<Dtype::bf16>},
    {scratch_bytes<Dtype::f16>, gate_up<Dtype::f16>, down<Dtype::f16>, finish<Dtype::f16>},
    {scratch_bytes<Dtype::f32>, gate_up<Dtype::f32>, down<Dtype::f32>, finish<Dtype::f32>},
};

}  // namespace REAP_ISA
}  // namespace reap
