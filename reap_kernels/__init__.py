"""A mixture-of-experts layer that also returns the norm of every expert output."""

from reap_kernels.activations import swiglu_clamped
from reap_kernels.contract import Saliency, Summed
from reap_kernels.ops import backends, moe_saliency, moe_saliency_sums

__all__ = [
    "Saliency",
    "Summed",
    "backends",
    "moe_saliency",
    "moe_saliency_sums",
    "swiglu_clamped",
]
