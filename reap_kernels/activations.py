"""The activations of the expert's inner layer, as strings that are part of an op's schema."""

import math
from functools import lru_cache
from typing import NamedTuple

PLAIN = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


class Activation(NamedTuple):
    """One activation with its parameters; alpha, limit and offset matter to `swiglu_clamped` only.

    silu(x) = x * sigmoid(x); gelu is exact (erf), gelu_tanh its tanh approximation; relu2 is
    relu(x)^2. Gated experts compute act(g) * u, and with `swiglu_clamped`
    g' * sigmoid(alpha * g') * (u' + offset), where g' = min(g, limit) and
    u' = clamp(u, -limit, limit).
    """

    kind: str
    alpha: float = 1.0
    limit: float = math.inf
    offset: float = 0.0


def swiglu_clamped(alpha: float, limit: float, offset: float) -> str:
    """The canonical string of a clamped SwiGLU: `swiglu_clamped(1.702, 7, 1)` is gpt-oss.

    alpha and offset are finite, limit is positive and may be infinite; ValueError otherwise.
    """
    text = f"swiglu_clamped({float(alpha)!r}, {float(limit)!r}, {float(offset)!r})"
    parse(text)
    return text


@lru_cache(maxsize=64)
def parse(text: str) -> Activation:
    """`"silu"` or `"swiglu_clamped(1.702, 7.0, 1.0)"` -> Activation, otherwise ValueError."""
    if text in PLAIN:
        return Activation(text)
    name, _, arguments = text.partition("(")
    if name == "swiglu_clamped" and arguments.endswith(")"):
        try:
            alpha, limit, offset = (float(number) for number in arguments[:-1].split(","))
        except ValueError:
            pass
        else:
            if math.isfinite(alpha) and limit > 0 and math.isfinite(offset):
                return Activation(name, alpha, limit, offset)
    raise ValueError(
        f"activation is {text!r}, must be one of {', '.join(PLAIN)} or "
        "swiglu_clamped(alpha, limit, offset) with finite alpha and offset and limit > 0"
    )
