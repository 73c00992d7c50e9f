"""What a router's tensors are called, and how they lie: for checkpoints and for modules alike.

The tables speak of the end of a tensor's name: what follows the block's module, or a place beside
it. A tensor of a router that is in no table is an error, because to cut it, or not, could be wrong.
"""

from __future__ import annotations

import re

import numpy as np

# Of a router's tensors, the given axis runs over the experts.
ROUTER: tuple[tuple[str, int], ...] = (
    (r"(gate|router)(\.(gate|wg|layer|proj|linear|classifier))?\.(weight|bias)", 0),
    (r"gate_weight|router_bias", 0),
    (
        r"((gate|router|experts)\.)?(e_score_correction_bias|expert_biase?s?|per_expert_scale|balancing_biases)",
        0,
    ),
    (r"(gate\.)?moe_statics\.e_score_correction_bias", 1),
    (r"gate\.router_mlp\.out_proj\.(weight|bias)", 0),
)
# Whatever else is in a router may speak of single experts, whatever its sizes.
IN_ROUTER = re.compile(r"(gate|router)\.")
# Where a block is no module of its own, its router is one of these children of the decoder layer.
ROUTER_IN_LAYER = re.compile(r"(gate|router|experts|expert_bias|e_score_correction_bias)(\.|$)")
# Routers with rows after those of the routed experts (a skip class, shared experts), by model type:
# these stay, at the end.
TAILED = {"zaya", "inkling_mm_model", "inkling_text", "longcat_flash"}
# Token -> expert ids, instead of a router (DeepSeek-V4's hash layers).
TOKEN_TABLE = re.compile(r"gate\.tid2eid")
# Parts of a block that hold nothing per routed expert, whatever their sizes.
SHARED = re.compile(
    r"(shared?_(experts?|mlp|expert_gate)|fc[12]_latent_proj|(pre|post)_expert_norm|experts\.post_expert_norm"
    r"|.*norm|router\.scale|gate\.down_proj|gate\.router_mlp|gate\.router_states_scale)(\..*)?"
)


def remapped(table: np.ndarray, kept: tuple[int, ...]) -> np.ndarray:
    """A table [tokens, K] of expert ids with the kept experts' new numbers.

    Hash routing has no runner-up: a slot whose expert is gone goes to a kept one that the token
    does not have yet, chosen by token number so that the orphaned tokens spread evenly.
    """
    place = np.full(int(max(table.max(initial=0), max(kept))) + 1, -1, dtype=table.dtype)
    place[list(kept)] = np.arange(len(kept))
    new = place[table]
    for row in np.flatnonzero((new < 0).any(axis=1)):
        free = np.setdiff1d(np.arange(len(kept)), new[row])
        gone = np.flatnonzero(new[row] < 0)
        new[row, gone] = np.roll(free, -(row % len(free)))[: len(gone)]
    return new
