"""The native CPU backend: csrc/cpu, compiled once per instruction set and chosen at run time."""

import torch

from reap_kernels import native
from reap_kernels.contract import Call, Saliency, Summed

NAME = "cpu"


def available() -> str | None:
    return native.missing()


def unsupported(call: Call) -> str | None:
    dtype, device = call.hidden_states.dtype, call.hidden_states.device
    if device.type != "cpu":
        return f"tensors are on {device}, not on the CPU"
    if dtype not in native.DTYPES:
        return f"no kernels for {dtype}"
    if call.T * call.K >= 2**31:
        return f"{call.T * call.K} slots, at most {2**31 - 1} per call"
    return None


def run(call: Call) -> Saliency | Summed:
    """Always deterministic: the same bits at any number of threads (torch.get_num_threads())."""
    return execute(call)[0]


def execute(
    call: Call, *, isa: str | None = None, threads: int | None = None, norms: bool = True
) -> tuple[Saliency | Summed, int]:
    """`run` with an instruction set of `isas()` (None: the best), a number of threads, and with
    norms and peaks left out (they are then 0) to measure their price. Also returns the bytes that
    were allocated besides the results; MemoryError if they are not to be had, before any work.

    They are one allocation of

      R * I * size          the activated inner tensor, I rounded up to even, in the model dtype
      R * ceil(H/96) * 8    norms and peaks in parts
      T * H * 4             sums of the layer output, if the model dtype is not fp32
      S * 4 + E * 8 + ...   routing
      B * I * 8             where sums are asked for: those of a block, of B = ceil(R/160) and, if
      (I + H) * 16          R is S, up to E more; and those of the expert whose blocks are at work
      threads * scratch     packed tokens of a block (160 by H of four bytes, two bytes in bf16 on
                            avx512_bf16), a tile of weights (48 by 128, with such pairs by
                            512) and two of sums (48 by 160)

    each rounded up to a cache line, where R = min(S, 2560 * threads) slots are in the making at a
    time: nothing of size S*H, S*I, E*T or of the weights. Copied are ids that are not int64, gates
    that are not fp32, either if not contiguous, and hidden states that are not row-major.
    """
    module, call = native.module(), native.plain(call, wide=True)
    saliency = native.empty(call)
    threads = torch.get_num_threads() if threads is None else threads
    layer = native.layer(module, call, saliency, threads=threads, norms=norms)
    if not norms:
        saliency.norms.zero_()
        saliency.peaks.zero_()
    return saliency, module.run_layer(layer, isa)


def isas() -> list[str]:
    """The instruction sets that this build and this processor have, best first."""
    return native.module().available_isas()
