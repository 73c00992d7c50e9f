"""Tiny random models of every mixture-of-experts architecture that transformers has, on CPU.

    model = tiny_model("qwen3_moe")                     # seeded, fp32, in eval mode
    model = tiny_model("gpt_oss", num_hidden_layers=2)  # any field of the (text) config
    model(**tiny_inputs(model))                         # ids [2, 9] int64, an all-ones mask
    model(**tiny_inputs(model, lengths=[9, 5]))         # right padded; side="left" pads left

`model_types()` lists the architectures on transformers' experts interface. Nothing is downloaded:
a configuration is the architecture's default one, its sizes shrunk by name (`SIZES`), and
`EXCEPTIONS` holds the few fields that a name cannot tell. Weights are drawn so that every norm is
of order one and routers are diverse. A test of an architecture that the installed release does not
have is skipped.
"""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from reap.versions import SINCE, TESTED

VOCAB = 96
EXPERTS = r"num_experts|num_local_experts|n_routed_experts|moe_num_experts"
LAYERS = 4

# A field of a configuration, anywhere in it, whose name matches is set to the value.
SIZES: dict[str, Any] = {
    r"vocab_size(_per_layer_input)?|unpadded_vocab_size|codebook_size": VOCAB,
    r"num_hidden_layers|depth|n_layers|encoder_layers": LAYERS,
    r"num_layers": 2,
    r"(expert_)?ffn_hidden_size": 20,
    r"(vision_|text_|thinker_|out_|projector_|moe_)?hidden_size|d_model|output_dim": 32,
    r"projection_hidden_dim|adapter_(in_dim|input_size|out_dim)": 32,
    r"num_attention_heads|encoder_attention_heads|num_heads|swa_num_attention_heads": 4,
    r"num_key_value_heads|swa_num_key_value_heads": 2,
    r"(swa_|v_|mamba_)?head_dim|linear_(key_|value_)?head_dim|mamba_d_head": 8,
    r"linear_num_heads|linear_num_value_heads|index_n_heads": 4,
    r"linear_num_key_heads|n_groups": 2,
    r"qk_nope_head_dim|qk_rope_head_dim": 8,
    r"qk_head_dim|mamba_d_state|ssm_state_size": 16,
    r"index_head_dim": 16,
    r"mamba_n_heads|mamba_num_heads": 8,
    r"mamba_dt_rank|rel_extent|d_rel|gated_norm_rank|hc_lowrank|router_hidden_size": 8,
    r"q_lora_rank|kv_lora_rank|o_lora_rank|hidden_size_per_layer_input": 16,
    r"(dense_|shared_expert_|shared_experts_|shared_|projection_)?intermediate_size|mlp_dim": 24,
    r"moe_intermediate_size|moe_shared_expert_intermediate_size|encoder_ffn_dim": 20,
    EXPERTS: 8,
    r"num_experts_per_tok(en)?|moe_k|moe_topk": 2,
    r"n_group|num_expert_group": 1,
    r"topk_group": 1,
    r"first_k_dense_replace|num_dense_layers": 1,
    r"sliding_window|sliding_window_size": 4,
    r"max_position_embeddings|model_max_length|max_source_positions": 64,
    r"image_size": 32,
    r"num_code_groups|num_quantizers": 2,
    r"index_topk|index_topk_blocks|index_kpool": 4,
    r"chunk_size|mamba_chunk_size|block_size|canvas_length": 8,
    r"num_nextn_predict_layers": 0,
}

# What names cannot tell: model type -> fields of its text configuration (a dotted path starts at
# the top).
_FROM_DENSE = ["dense", "sparse", "sparse", "sparse"]
_MROPE = {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [2, 1, 1]}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "cohere2_moe": {"logit_scale": 1.0},
    "deepseek_ocr2": {"mlp_layer_types": _FROM_DENSE, "num_experts_per_tok": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {
            "hidden_size": 32,
            "ffn_hidden_size": 20,
            "moe_num_experts": 8,
            "moe_top_k": 2,
        },
    },
    "diffusion_gemma": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 20},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "doge": {"is_moe": True},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {"head_dim": 16},
    "ernie4_5_vl_moe": {
        "rope_parameters": {**_MROPE, "mrope_section": [1, 1, 2]},
        "moe_intermediate_size": [20, 12],
    },
    "gemma4": {
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 20,
        "enable_moe_block": True,
    },
    "glm4v_moe": {"rope_parameters": {**_MROPE, "partial_rotary_factor": 0.5}, "head_dim": 16},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "glm5_next": {"qk_rope_head_dim": 0},
    "hy_v4_vl": {"rope_parameters": _MROPE},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 8, "moe_topk": 2},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"zero_expert_num": 2},
    "mistral4": {
        "rope_parameters": {
            "rope_theta": 1e4,
            "rope_type": "default",
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 64,
            "llama_4_scaling_beta": 0.1,
        }
    },
    "muse_spark": {"audio_config.hidden_sizes": [8, 8, 8, 8], "audio_config.depths": [1, 1, 1, 1]},
    "mistral_large4": {"kv_source_layers": [0, 1, 2, 3]},
    "qwen3_omni_moe_thinker": {".vision_start_token_id": 94},
    "qwen4_exp": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "step3p7": {"sliding_window": 4, "swiglu_limits": [None, None, 0.5, 0.5]},
    "zaya": {"num_experts_per_tok": 1},
}
# Classes that the auto mappings do not name (or name a wrapper around).
CLASSES: dict[str, str] = {
    "dots3_note": "Dots3NoteForConditionalGeneration",
    "inkling_text": "InklingForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen3_omni_moe_thinker": "Qwen3OmniMoeThinkerForConditionalGeneration",
    "qwen4_exp": "Qwen4ExpForConditionalGeneration",
}
# Modelling file -> the model type to build, where they differ (a thinker is what takes text).
RENAMED = {"inkling": "inkling_text", "qwen3_omni_moe": "qwen3_omni_moe_thinker"}


@cache
def model_types() -> tuple[str, ...]:
    """Every model type whose modelling file puts an experts class on the experts interface."""
    found = []
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        if re.search(r"^@use_experts_implementation", path.read_text(), re.M):
            name = path.stem.removeprefix("modeling_")
            found.append(RENAMED.get(name, name))
    return tuple(found)


def _shrink(fields: dict[str, Any], layers: tuple[int, ...] | None = None) -> dict[str, Any]:
    """The same fields with small sizes; what has one entry per layer keeps those of `layers`."""
    depth = fields.get("num_hidden_layers")
    if isinstance(depth, int) and depth > LAYERS:
        layers = (0, *range(depth - LAYERS + 1, depth))  # the first and the last: dense then sparse
    small = {}
    for name, value in fields.items():
        if name == "per_layer_config" and isinstance(value, dict) and layers:
            table = {int(layer): _shrink(entry) for layer, entry in value.items()}
            value = {str(new): table[old] for new, old in enumerate(layers) if old in table}
        elif isinstance(value, dict) and "model_type" in value:
            value = _shrink(value)
        elif isinstance(value, list | tuple) and layers and len(value) == depth:
            value = [value[i] for i in layers]
        elif isinstance(value, int) and not isinstance(value, bool):
            if name.endswith("token_id") and value >= VOCAB:
                value = VOCAB - 1
            value = next((v for k, v in SIZES.items() if re.fullmatch(k, name)), value)
        small[name] = value
    heads = fields.get("num_attention_heads")
    if heads is not None and fields.get("num_key_value_heads") == heads:
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small


def _skip_if_too_old(model_type: str) -> None:
    """End the test where an older release lacks the type, or has it otherwise than tests need it.

    The newest release has all that tests name: there, a name that it does not know is an error.
    """
    release = transformers.__version__
    newest = Version(release) >= Version(TESTED["transformers"][1])
    missing = model_type not in CONFIG_MAPPING and not newest
    if missing or Version(release) < Version(SINCE.get(model_type, "0")):
        first = f", as {SINCE[model_type]} has it" if model_type in SINCE else ""
        pytest.skip(f"transformers {release} has no {model_type}{first}")


def tiny_config(model_type: str, **overrides: Any) -> transformers.PreTrainedConfig:
    """The default configuration of `model_type`, shrunk; overrides: fields of its text part."""
    _skip_if_too_old(model_type)
    cls = CONFIG_MAPPING[model_type]
    default = cls()
    aliases = type(default.get_text_config()).attribute_map
    fields = _shrink(default.to_dict())
    text = fields["text_config"] if isinstance(fields.get("text_config"), dict) else fields
    for path, value in {**EXCEPTIONS.get(model_type, {}), **overrides}.items():
        *parents, leaf = path.split(".")
        # A field with two names is stored under one of them.
        leaf = leaf if parents else aliases.get(leaf, leaf)
        target = fields if parents else text
        for parent in filter(None, parents):
            target = target[parent]
        target[leaf] = value
    return cls(**fields)


def _model_class(model_type: str) -> type[nn.Module]:
    for mapping in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "TOKEN_CLASSIFICATION"):
        names = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {})
        if model_type in names:
            return getattr(transformers, CLASSES.get(model_type, names[model_type]))
    return getattr(transformers, CLASSES[model_type])


def tiny_model(
    model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> nn.Module:
    """A seeded random model of `model_type` in eval mode, on CPU."""
    config = tiny_config(model_type, **overrides)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _model_class(model_type)(config)
    _draw_weights(model, seed)
    return _cast(model, dtype).eval()


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`model` in `dtype`, except what it says must stay in fp32."""
    model.to(dtype)
    for part in model.modules():
        for word in getattr(part, "_keep_in_fp32_modules_strict", None) or ():
            for name, tensor in [*part.named_parameters(), *part.named_buffers()]:
                if word in name:
                    tensor.data = tensor.data.float()
    return model


@torch.no_grad()
def _draw_weights(model: nn.Module, seed: int) -> None:
    """Matrices get variance 1/fan_in (activations keep their size), biases are small."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            if "bias" in name.rsplit(".", 1)[-1]:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        else:
            fan_in = parameter.shape[-1]
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(fan_in))
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            buffer.add_(torch.randn(buffer.shape, generator=generator) * 0.1)
        elif name.endswith(
            "tid2eid"
        ):  # routing by a table, token id -> experts: K different experts per token
            draw = torch.rand(buffer.shape[0], SIZES[EXPERTS], generator=generator)
            buffer.copy_(draw.argsort(1)[:, : buffer.shape[1]])


def tiny_inputs(
    model: nn.Module,
    *,
    batch: int = 2,
    length: int = 9,
    lengths: list[int] | None = None,
    side: str = "right",
    seed: int = 1,
) -> dict[str, torch.Tensor]:
    """input_ids [B,L] int64 (never a special token) and attention_mask [B,L] int64."""
    lengths = lengths or [length] * batch
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(20, VOCAB - 10, (len(lengths), width), generator=generator)
    mask = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, n in enumerate(lengths):
        mask[row, :n] = 1
    if side == "left":
        mask = mask.flip(1)
    return {"input_ids": ids, "attention_mask": mask}
