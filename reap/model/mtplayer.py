"""A multi-token-prediction (MTP) layer as a module: made, checked and loaded like the model's own.

    mtp = reap.load_mtp(model)  # of a model that was loaded from a folder
    with reap.observe(model, mtp=mtp) as stats:
        ...

`reap.model.mtp` says where a checkpoint keeps the layer.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from reap.errors import first_line
from reap.model.experts import Experts, find_experts, layer_info, pretrained
from reap.model.info import LayerInfo
from reap.model.mtp import Place, UnsupportedMtpError, find_mtp

# Fields of a configuration that count or list the kinds of layers: what they are where every layer
# has experts and is whole ...
_SPARSE: dict[str, Any] = {
    "first_k_dense_replace": 0,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_EACH = {"mlp_layer_types": "sparse", "indexer_types": "full"}
# ... and the fields that say it of MTP layers.
_OF_MTP = {
    "layer_types": "mtp_layer_types",
    "mlp_layer_types": "mtp_mlp_layer_types",
    "layers_block_type": "mtp_layers_block_type",
}


class Mtp(nn.Module):
    """One MTP layer. `layers` describes its experts, by the checkpoint's names.

    It is run as a model of one layer by its own class, of which `stack` is an instance, so that
    masks, positions and kinds of attention are those of its architecture.
    """

    def __init__(self, place: Place, stack: nn.Module) -> None:
        super().__init__()
        self.place, self.stack = place, stack
        norm: Any = stack.get_submodule(place.family.stack_norm.rstrip("."))
        self.embedding_norm, self.hidden_norm = copy.deepcopy(norm), copy.deepcopy(norm)
        self.width: int = norm.weight.shape[0]  # H
        like = {"device": norm.weight.device, "dtype": norm.weight.dtype}
        self.projection = nn.Linear(2 * self.width, self.width, bias=False, **like)

    def take(self, weights: Mapping[str, Tensor]) -> set[str]:
        """The weights beside the stack; names of those that are not all of them, or do not fit."""
        own = {n: p for n, p in self.named_parameters() if not n.startswith("stack.")}
        fits = {
            name: weight
            for name, weight in weights.items()
            if name in own and weight.shape == own[name].shape and weight.is_floating_point()
        }
        self.load_state_dict(fits, strict=False)
        return (own.keys() | weights.keys()) - fits.keys()

    @property
    def experts(self) -> list[Experts]:
        found = find_experts(self.stack)
        return [replace(one, name=self.place.in_file(one.name)) for one in found]

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        return tuple(layer_info(one, self.stack.config) for one in self.experts)

    def forward(
        self,
        hidden_states: Tensor,  # [B,L,H], after the model's final norm
        next_embeddings: Tensor,  # [B,L,H], of the token after each
        attention_mask: Tensor | None = None,  # [B,L], 0 for padding
        position_ids: Tensor | None = None,
    ) -> Tensor:  # [B,L,H]: the model's head makes of it the logits of the token after the next one
        device = self.projection.weight.device
        halves = (
            self.embedding_norm(next_embeddings.to(device)),
            self.hidden_norm(hidden_states.to(device)),
        )
        given = {"attention_mask": attention_mask, "position_ids": position_ids}
        placed = {name: x.to(device) for name, x in given.items() if x is not None}
        joined = self.projection(torch.cat(halves, dim=-1))
        return self.stack(inputs_embeds=joined, use_cache=False, **placed)[0]


def configuration(place: Place, config: Any) -> Any:
    """That of the model's stack, for a stack of the MTP layer's blocks."""
    new, count = copy.deepcopy(config), len(place.family.blocks)
    depth = config.num_hidden_layers
    kinds: dict[str, Any] = {
        name: value[-1:] * count
        for name, value in config.to_dict().items()
        if isinstance(value, list) and len(value) == depth
    }
    kinds |= {name: [kind] * count for name, kind in _EACH.items() if name in kinds}
    if place.family.attention and "layer_types" in kinds:
        kinds["layer_types"] = [place.family.attention] * count
    said = {name: getattr(config, of_mtp, None) for name, of_mtp in _OF_MTP.items()}
    kinds |= {name: list(value) for name, value in said.items() if value}
    kinds |= {name: value for name, value in _SPARSE.items() if hasattr(config, name)}
    # The embedding is the model's: none of the size of a vocabulary is made for nothing.
    kinds |= {"num_hidden_layers": count, "vocab_size": 1, "pad_token_id": None}
    for name, value in kinds.items():
        setattr(new, name, value)
    return new


def device_of(stack: Any) -> torch.device:
    """Where the stack's hidden states come out: of offloaded weights, where they are run."""
    device = next(reversed(list(stack.parameters()))).device
    if device.type != "meta":
        return device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def stack_of(model: nn.Module) -> Any:
    """The layers of the language model, with their embedding and final norm."""
    inner: Any = pretrained(model)
    return inner.get_decoder()


def mtp_on_meta(model: nn.Module, names: Collection[str]) -> Mtp | None:
    """The MTP layer of a checkpoint of `model` with these tensors, without memory for its weights;
    None where there is none with experts.

    UnsupportedMtpError when it is not known how to run it.
    """
    place = find_mtp(pretrained(model).config, names)
    if place is None:
        return None
    stack = stack_of(model)
    try:
        with torch.device("meta"):
            return Mtp(place, type(stack)(configuration(place, stack.config)))
    except Exception as error:  # whatever the class makes of such a configuration
        raise UnsupportedMtpError(f"{place.root}: {first_line(error)}") from error


def embedding_names(stack: Any) -> set[str]:
    """The parameters of the stack's embedding, which is the model's and in no layer."""
    embedding = stack.get_input_embeddings()
    return {f"{name}.weight" for name, module in stack.named_modules() if module is embedding}
