"""Multi-token-prediction (MTP) layers: where a checkpoint keeps one, and how it is run.

transformers leaves them out when it loads a model. An MTP layer guesses the token after the next
one (DeepSeek-V3, arXiv 2412.19437, section 2.2): for every token that has a next one,

    h = project([norm(embedding of the next token); norm(the token's last hidden state)])

goes through a decoder layer, a norm and the model's head. The last hidden state is that after the
model's final norm: the authors' own code of DeepSeek-R1 and the engines that serve these families
agree on it, and on the order of the two halves. They do not agree on how several MTP layers follow
one another, so that a checkpoint with more than one is refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from reap.errors import ReapError
from reap.model.config import text_config

MTP = re.compile(r"mtp|nextn")  # how parts of names begin in most families
_STACKED = re.compile(r"(?:.*?\.)?layers\.(\d+)(?=\.)")


class UnsupportedMtpError(ReapError):
    """The checkpoint has an MTP layer with experts, and it is not known how to run it."""


@dataclass(frozen=True)
class Family:
    """A row: how some model types name the parts of their MTP layer.

    `root` is the prefix of its tensors, in which {depth} is the number of the model's layers, and
    all other names follow it. `blocks` are the decoder layers, in their order; a block may be the
    root itself. `copies` are embedding and head, which are the model's. `attention` is the blocks'
    kind where the model has several; without it they are like the model's last layer. `stack_norm`
    is the prefix of the norm behind them in the model's own class.
    """

    types: tuple[str, ...]
    root: str
    blocks: tuple[str, ...]
    embedding_norm: str
    hidden_norm: str
    projection: str
    final_norm: str
    copies: tuple[str, ...] = ()
    attention: str | None = None
    stack_norm: str = "norm."


_NUMBERED_ON = Family(  # DeepSeek-V3: one more layer of the model's stack, with some parts more
    types=("deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa"),
    root="model.layers.{depth}",
    blocks=("",),
    embedding_norm="enorm",
    hidden_norm="hnorm",
    projection="eh_proj",
    final_norm="shared_head.norm",
    copies=("embed_tokens", "shared_head.head"),
)
FAMILIES = (
    _NUMBERED_ON,
    replace(_NUMBERED_ON, types=("hy_v3",), final_norm="final_layernorm"),
    Family(
        types=("qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text", "mellum"),
        root="mtp",
        blocks=("layers.0",),
        embedding_norm="pre_fc_norm_embedding",
        hidden_norm="pre_fc_norm_hidden",
        projection="fc",
        final_norm="norm",
        copies=("embed_tokens", "lm_head"),
        attention="full_attention",
    ),
    Family(  # attention and experts are layers of their own
        types=("nemotron_h",),
        root="mtp.layers",
        blocks=("0", "1"),
        embedding_norm="0.enorm",
        hidden_norm="0.hnorm",
        projection="0.eh_proj",
        final_norm="1.final_layernorm",
        stack_norm="norm_f.",
    ),
)


@dataclass(frozen=True)
class Place:
    """The MTP layer of one checkpoint, under the prefix `root`.

    `beside` and `inside` are its tensors -> the parameters of `Mtp`, and those of a stack of its
    blocks, that they are before any conversion; `copied` are of the model's embedding and head.
    """

    family: Family
    root: str
    beside: Mapping[str, str]
    inside: Mapping[str, str]
    copied: tuple[str, ...] = ()

    @property
    def tensors(self) -> tuple[str, ...]:
        return (*self.beside, *self.inside, *self.copied)

    def in_file(self, module: str) -> str:
        """The checkpoint's name of a module of the stack, such as layers.0.mlp.experts."""
        _, number, rest = module.split(".", 2)
        return _dotted(self.root, self.family.blocks[int(number)], rest)


def find_mtp(config: Any, names: Collection[str]) -> Place | None:
    """Where the MTP layer with experts is in a checkpoint with these tensors; None without one.

    UnsupportedMtpError where it is not known how to run it.
    """
    text = text_config(config)
    depth = getattr(text, "num_hidden_layers", None) or 0
    roots = {name: root for name in names if (root := _root(name, depth)) is not None}
    extra = {root for name, root in roots.items() if ".experts." in name}
    if not extra:
        return None
    family = next((row for row in FAMILIES if text.model_type in row.types), None)
    if family is None:
        raise UnsupportedMtpError(
            f"{min(extra)}: it is not known how {text.model_type} models run it"
        )
    root = family.root.format(depth=depth)
    parts = _parts(family, root)
    found: dict[str, dict[str, str]] = {"beside": {}, "inside": {}, "copied": {}}
    stacks = {root.rpartition(".")[0] for root in extra}
    for name in (name for name, at in roots.items() if at.rpartition(".")[0] in stacks):
        # A block may be the root, under which the other parts lie too: the longest prefix counts.
        prefix = max(filter(name.startswith, parts), key=len, default=None)
        if prefix is None:
            raise UnsupportedMtpError(
                f"{min(extra)}: {name} is none of the tensors of the one such layer that "
                f"{text.model_type} models are known to have"
            )
        where, new = parts[prefix]
        found[where][name] = new + name.removeprefix(prefix)
    return Place(family, root, found["beside"], found["inside"], tuple(found["copied"]))


def _parts(family: Family, root: str) -> dict[str, tuple[str, str]]:
    """Prefix of tensors -> whether they are inside the stack, and what they are called there."""
    beside = {
        family.embedding_norm: "embedding_norm.",
        family.hidden_norm: "hidden_norm.",
        family.projection: "projection.",
    }
    inside = {block: f"layers.{number}." for number, block in enumerate(family.blocks)}
    inside[family.final_norm] = family.stack_norm
    return {
        **{_dotted(root, part, ""): ("copied", "") for part in family.copies},
        **{_dotted(root, part, ""): ("inside", new) for part, new in inside.items()},
        **{_dotted(root, part, ""): ("beside", new) for part, new in beside.items()},
    }


def _dotted(*parts: str) -> str:
    """With a dot at the end where the last part is empty."""
    return ".".join([*filter(None, parts), *parts[-1:][: not parts[-1]]])


def _root(name: str, depth: int) -> str | None:
    """The prefix of the MTP layer that a tensor belongs to, if it does."""
    if "mtp" in name or "nextn" in name:
        parts = name.split(".")
        named = next((end for end, part in enumerate(parts, 1) if MTP.match(part)), None)
        if named is not None:
            return ".".join(parts[:named])
    stacked = _STACKED.match(name)
    return stacked[0] if stacked and 0 < depth <= int(stacked[1]) else None
