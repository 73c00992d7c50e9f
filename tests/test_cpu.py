"""The native CPU backend: every instruction set that runs here, against the truth."""

import cases
import pytest

from reap_kernels import cpu, native
from reap_kernels.contract import make_call

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
ISAS = cpu.isas() if native.missing() is None else []


def call_of(inputs):
    flags = (inputs["gated"], inputs["interleaved"], inputs["transposed"], False)
    return make_call(tuple(inputs.values())[:7], inputs["activation"], flags)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_accurate(case, dtype, isa):
    inputs = cases.make(case, dtype)
    result, _ = cpu.execute(call_of(inputs), isa=isa)
    cases.assert_accurate(result, inputs)
