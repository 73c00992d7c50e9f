// The kernels of the instruction set that REAP_ISA names, for all model dtypes, as one table. Included
// once per translation unit, each compiled for its processor. Nothing in here may be shared between
// translation units (the linker could pick an AVX-512 copy of an inline function for all of them): all
// functions are static or templates in the instruction set's own namespace, and nothing of std is used.
#pragma once
#include "down.h"
#include "finish.h"
#include "gate_up.h"

namespace reap {
namespace REAP_ISA {

extern const Kernels kernels[3];
// In the order of Dtype.
const Kernels kernels[3] = {
    {scratch_bytes<Dtype::bf16>, gate_up<Dtype::bf16>, down<Dtype::bf16>, finish<Dtype::bf16>},
    {scratch_bytes<Dtype::f16>, gate_up<Dtype::f16>, down<Dtype::f16>, finish<Dtype::f16>},
    {scratch_bytes<Dtype::f32>, gate_up<Dtype::f32>, down<Dtype::f32>, finish<Dtype::f32>},
};

}  // namespace REAP_ISA
}  // namespace reap
