"""Which tokens count: padding on either side, cached decoding, and masks that cannot be read."""

from __future__ import annotations

import functools
import re
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from brute import check, run
from tiny import tiny_inputs, tiny_model
from torch import Tensor, nn

from reap.errors import ReapError
from reap.observation.padding import Padding
from reap.observation.patch import observe


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_the_same_as_none(side: str) -> None:
    """Rows padded to a common length count as the same rows without padding."""
    model = tiny_model("qwen3_moe")
    padded = tiny_inputs(model, lengths=[9, 5, 1], side=side)
    with observe(model) as stats:
        run(model, padded)
    with observe(model) as alone:
        for ids, mask in zip(padded["input_ids"], padded["attention_mask"], strict=True):
            run(model, {"input_ids": ids[mask.bool()][None]})
    assert stats.tokens == alone.tokens == 15
    for name in stats.layers:
        assert torch.equal(stats[name].count, alone[name].count)
        check(stats[name], {"weighted_sum": alone[name].weighted_sum}, rtol=1e-5)


def test_generation_counts_every_token_once() -> None:
    """Left padded, cached decoding: B x 1 tokens against a mask that grows."""
    model = tiny_model("qwen3_moe")
    inputs = tiny_inputs(model, lengths=[6, 4], side="left")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**inputs, **options)
    with observe(model) as stats:
        actual = model.generate(**inputs, **options)
    assert torch.equal(actual, expected)
    assert stats.tokens == (6 + 4) + 2 * 3  # the last new token is never fed back


class Cache:
    def __init__(self, length: int) -> None:
        self.length = length

    def get_seq_length(self) -> int:
        return self.length


class Model(nn.Module):
    """A model whose experts ask which of `tokens` tokens are real."""

    def __init__(self, padding: Padding, tokens: int) -> None:
        super().__init__()
        self.padding, self.tokens = padding, tokens

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor | None:
        return self.padding.real(self.tokens, torch.device("cpu"))


class Outer(Model):
    """A model around it, which passes something else on."""

    def __init__(self, padding: Padding, inner: Model) -> None:
        super().__init__(padding, 0)
        self.inner, self.passed = inner, {"input_ids": None}

    def forward(  # type: ignore[override]
        self, input_ids: Any = None, attention_mask: Any = None
    ) -> Tensor | None:
        return self.inner(**self.passed)


IDS = torch.zeros(2, 3, dtype=torch.int64)
MASK = torch.tensor([[1, 1, 1], [0, 1, 1]])
GROWN = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])  # two tokens in the cache before these


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"input_ids": IDS}, None),
        ({"input_ids": IDS, "attention_mask": MASK}, MASK),
        ({"input_ids": IDS, "attention_mask": MASK.bool()}, MASK),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 3)}, None),
        ({"inputs_embeds": torch.zeros(2, 3, 8), "attention_mask": MASK}, MASK),
        ({"input_ids": IDS, "attention_mask": GROWN, "past_key_values": Cache(2)}, None),
        ({"input_ids": IDS, "attention_mask": GROWN.flip(1), "past_key_values": Cache(2)},
         GROWN.flip(1)[:, 2:]),
        ({"input_ids": IDS, "attention_mask": GROWN.flip(1), "past_key_values": object()},
         GROWN.flip(1)[:, 2:]),
        *(({"input_ids": IDS, "attention_mask": GROWN, "use_cache": True, name: Cache(2)}, None)
          for name in ("cache", "cache_params", "memory")),
        ({"input_ids": IDS, "attention_mask": MASK, "use_cache": True, "cache": None}, MASK),
    ],
)  # fmt: skip
def test_which_tokens_are_real(given: dict[str, Any], expected: Tensor | None) -> None:
    padding = Padding()
    model = Model(padding, tokens=6)
    with ExitStack() as undo:
        padding.install([model], undo)
        real = model(**given)
        if expected is None:
            assert real is None
        else:
            assert torch.equal(real, expected.flatten().bool())
    assert not model._forward_hooks and not model._forward_pre_hooks


class Renamed(nn.Module):
    """A decorator still takes the name that an argument had before, and the signature does not."""

    def __init__(self, padding: Padding) -> None:
        super().__init__()
        self.padding = padding

    def written(self, input_ids: Any, attention_mask: Any, cache: Any = None) -> Tensor | None:
        return self.padding.real(6, torch.device("cpu"))

    @functools.wraps(written)
    def forward(self, ids: Any, mask: Any, past_key_values: Any = None) -> Tensor | None:
        return self.written(ids, mask, past_key_values)


def test_an_argument_by_its_old_name() -> None:
    padding = Padding()
    model = Renamed(padding)
    with ExitStack() as undo:
        padding.install([model], undo)
        assert model(IDS, GROWN, past_key_values=Cache(2)) is None
        with pytest.raises(ReapError, match="after 0 in the cache"):
            model(IDS, GROWN)


@pytest.mark.parametrize(
    ("given", "tokens", "message"),
    [
        # Lengths that agree by coincidence: the mask of 3 columns does not cover 3 tokens after 2.
        (
            {"input_ids": IDS, "attention_mask": MASK, "past_key_values": Cache(2)},
            6,
            "2 in the cache",
        ),
        ({"input_ids": IDS, "attention_mask": GROWN}, 6, "after 0 in the cache"),
        ({"input_ids": IDS, "attention_mask": GROWN, "use_cache": True}, 6, "after 0 in the cache"),
        ({"input_ids": IDS, "attention_mask": MASK.repeat(2, 1)}, 6, "attention_mask [4, 3]"),
        ({"attention_mask": MASK}, 6, "without input_ids"),
        ({"input_ids": IDS, "attention_mask": MASK}, 4, "experts with 4"),
        ({"input_ids": IDS, "attention_mask": MASK[:, None, None]}, 6, "[batch, length]"),
        ({"input_ids": IDS, "attention_mask": {"full_attention": MASK}}, 6, "[batch, length]"),
    ],
)
def test_padding_that_cannot_be_told(given: dict[str, Any], tokens: int, message: str) -> None:
    padding = Padding()
    model = Model(padding, tokens)
    with ExitStack() as undo, pytest.raises(ReapError, match=re.escape(message)):
        padding.install([model], undo)
        model(**given)


@pytest.mark.parametrize("passed", [{"pixel_values": IDS}, {"input_ids": IDS[:, :2]}])
def test_an_inner_model_with_other_tokens(passed: dict[str, Any]) -> None:
    """As many tokens as in the mask prove nothing when they are not the tokens of the mask."""
    padding = Padding()
    model = Outer(padding, Model(padding, tokens=6))
    model.passed = passed
    with ExitStack() as undo, pytest.raises(ReapError, match="Model in it with"):
        padding.install([model, model.inner], undo)
        model(input_ids=IDS, attention_mask=MASK)


@pytest.mark.parametrize(("canvas", "masked"), [(9, False), (5, False), (5, True)])
def test_a_canvas_beside_a_padded_prompt(canvas: int, masked: bool) -> None:
    """Its tokens are not the prompt's, even where as many: all count, but those that a mask
    of their own leaves out."""
    model = tiny_model("diffusion_gemma")
    inputs = tiny_inputs(model, lengths=[9, 5])
    inputs["decoder_input_ids"] = inputs["input_ids"][:, :canvas]
    if masked:
        own = torch.ones(2, canvas, dtype=torch.int64)
        own[1, -2:] = 0
        inputs["decoder_attention_mask"] = torch.cat([inputs["attention_mask"], own], 1)
    with observe(model) as stats:
        run(model, inputs)
    assert stats.tokens == 9 + 5 + 2 * canvas - (2 if masked else 0)
    unmasked = {name: x for name, x in inputs.items() if "mask" not in name}
    with observe(model) as all_stats:
        run(model, unmasked)
    assert all_stats.tokens == 2 * 9 + 2 * canvas


def test_a_static_cache_counts_what_is_not_padded() -> None:
    """`generate` prepares the mask itself; where that proves that nothing is padded, all counts."""
    model = tiny_model("qwen3_moe")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with observe(model) as stats:
        model.generate(
            **tiny_inputs(model, lengths=[6, 6]), **options, cache_implementation="static"
        )
    assert stats.tokens == 2 * 6 + 2 * 3
    padded = tiny_inputs(model, lengths=[6, 4], side="left")
    with observe(model), pytest.raises(ReapError, match="without a static cache"):
        model.generate(**padded, **options, cache_implementation="static")


def test_a_composite_model_that_is_given_no_mask() -> None:
    """It hands its language model a prepared one."""
    model = tiny_model("gemma4")
    with observe(model) as stats:
        run(model, {"input_ids": tiny_inputs(model, lengths=[9, 9])["input_ids"]})
    assert stats.tokens == 18


FULL = torch.ones(2, 1, 3, 3, dtype=torch.bool)
CAUSAL = FULL.tril()
ADDED = torch.where(CAUSAL, 0.0, -1e9)
LEFT_PADDED = CAUSAL & torch.tensor([True, True, False, True, True, True]).view(2, 1, 1, 3)
WINDOW = CAUSAL.triu(-1)


@pytest.mark.parametrize(
    ("mask", "refused"),
    [
        (FULL, False),
        (CAUSAL, False),
        (ADDED, False),
        ({"sliding_attention": WINDOW, "full_attention": CAUSAL}, False),
        (LEFT_PADDED, True),
        (WINDOW, True),
        (torch.where(LEFT_PADDED, 0.0, -1e9), True),
        (CAUSAL[:, :, :2], True),
        ("a mask of another kind", True),
    ],
    ids=["full", "causal", "added", "by kind", "padded", "window", "added, padded", "odd", "kind"],
)
def test_prepared_masks(mask: Any, refused: bool) -> None:
    """In an outer model, which does not say what its caller gave."""
    padding = Padding()
    model = Model(padding, 6)
    with ExitStack() as undo:
        padding.install([model], undo)
        if refused:
            with pytest.raises(ReapError, match="cannot tell padding: the attention_mask of Model"):
                model(IDS, mask)
        else:
            assert model(IDS, mask) is None


@pytest.mark.parametrize(("given", "refused"), [({}, False), ({"decoder_mask": MASK}, True)])
def test_prepared_masks_in_a_model_that_was_given_none(
    given: dict[str, Any], refused: bool
) -> None:
    """What it prepares for a model inside says nothing of padding, unless it had a mask at all."""

    class Preparing(Outer):
        def forward(self, input_ids: Any = None, **kwargs: Any) -> Tensor | None:  # type: ignore[override]
            return self.inner(input_ids=input_ids, attention_mask=LEFT_PADDED)

    padding = Padding()
    model = Preparing(padding, Model(padding, 6))
    with ExitStack() as undo:
        padding.install([model, model.inner], undo)
        if refused:
            with pytest.raises(ReapError, match="cannot tell padding"):
                model(IDS, **given)
        else:
            assert model(IDS, **given) is None
