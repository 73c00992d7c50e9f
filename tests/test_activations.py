"""Activation strings: what parses, what comes back, and what is refused."""

import math

import pytest

from reap_kernels import swiglu_clamped
from reap_kernels.activations import PLAIN, Activation, parse


@pytest.mark.parametrize("name", PLAIN)
def test_plain_names(name):
    assert parse(name) == Activation(name)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((1.702, 7, 1), "swiglu_clamped(1.702, 7.0, 1.0)"),
        ((1, math.inf, 0), "swiglu_clamped(1.0, inf, 0.0)"),
        ((0.1 + 0.2, 1e-30, -2.5), "swiglu_clamped(0.30000000000000004, 1e-30, -2.5)"),
    ],
)
def test_swiglu_clamped_is_canonical_and_exact(numbers, text):
    assert swiglu_clamped(*numbers) == text
    assert parse(text) == ("swiglu_clamped", *numbers)


def test_spaces_and_integers_are_read_alike():
    assert parse("swiglu_clamped( 1,7 , 0 )") == parse(swiglu_clamped(1, 7, 0))


def test_frozen():
    with pytest.raises(AttributeError):
        parse("silu").kind = "gelu"  # type: ignore[misc]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "swish",
        "SiLU",
        "silu()",
        "swiglu_clamped",
        "swiglu_clamped()",
        "swiglu_clamped(1, 7)",
        "swiglu_clamped(1, 7, 0, 0)",
        "swiglu_clamped(1, 7, 0",
        "swiglu_clamped(a, 7, 0)",
        "swiglu_clamped(inf, 7, 0)",
        "swiglu_clamped(1, 7, nan)",
        "swiglu_clamped(1, 0, 0)",
        "swiglu_clamped(1, -7, 0)",
        "swiglu_clamped(1, nan, 0)",
    ],
)
def test_refused_with_the_accepted_names(text):
    with pytest.raises(ValueError) as error:
        parse(text)
    message = str(error.value)
    assert message.startswith(f"activation is {text!r}, must be one of")
    assert all(name in message for name in (*PLAIN, "swiglu_clamped(alpha, limit, offset)"))
    assert "\n" not in message


def test_a_bad_number_is_refused_where_it_is_given():
    with pytest.raises(ValueError, match="limit > 0"):
        swiglu_clamped(1.0, -1.0, 0.0)
