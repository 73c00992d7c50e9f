"""A mixture-of-experts layer that also returns the norm of every expert output."""

from reap_kernels.activations import swiglu_clamped
from reap_kernels.contract import Saliency
from reap_kernels.ops import backends, moe_saliency

__all__ = ["Saliency", "backends", "moe_saliency", "swiglu_clamped"]
