// The bias of a projection, as both projections add it.
#pragma once
#include "numbers.h"

namespace reap {
namespace REAP_ISA {

// That of one row, in all lanes; zeros where there is none.
template <Dtype D> static inline vf bias_of(const Weights& w, int64_t expert, int64_t row) {
    if (!w.bias) return set1(0.0f);
    return set1(scalar<D>(w.bias + (expert * w.bias_expert_stride + row * w.bias_row_stride) * Number<D>::size));
}

}  // namespace REAP_ISA
}  // namespace reap
