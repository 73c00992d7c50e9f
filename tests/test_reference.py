"""The specification against slot-by-slot arithmetic in fp64."""

import cases
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from reap_kernels import moe_saliency, reference
from reap_kernels.contract import make_call


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_accurate(case, dtype):
    inputs = cases.make(case, dtype)
    cases.assert_accurate(moe_saliency(**inputs, backend="reference"), inputs)


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_fp64_is_the_truth(case):
    inputs = cases.make(case, torch.float64)
    result = moe_saliency(**inputs, backend="reference")
    for ours, exact in zip(result, cases.truth(inputs), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


def test_no_tensor_of_all_slots_is_made():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, torch.Tensor) and tensor._base is None:
                    self.numel = max(self.numel, tensor.numel())
            return result

    case = cases.Case("", T=512, K=4, E=8, H=32, I=16)
    inputs = cases.make(case, torch.bfloat16)
    call = make_call(**inputs)
    with Largest() as seen:
        reference.run(call)
    assert case.T * case.H <= seen.numel < case.T * case.K * case.H / 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_accurate_on_a_gpu(case, dtype):
    inputs = cases.make(case, dtype, device="cuda")
    cases.assert_accurate(moe_saliency(**inputs, backend="reference"), inputs)
