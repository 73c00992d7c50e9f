"""Means against the exact formula in fp64 and against plain torch; the same bits however cut."""

from __future__ import annotations

import pytest
import torch

from reap.merging.averaging import WIDE, average


def parts(dtype: torch.dtype, count: int = 5, size: int = 4099) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(size, generator=generator).to(dtype) for _ in range(count)]


SHARES = [0.37, 0.0, 0.011, 0.5, 0.119]


@pytest.mark.parametrize("dtype", WIDE)
def test_rounded_once(dtype: torch.dtype) -> None:
    given = parts(dtype)
    exact = sum(share * part.double() for share, part in zip(SHARES, given, strict=True))
    assert isinstance(exact, torch.Tensor)
    plain = torch.zeros_like(given[0])
    for share, part in zip(SHARES, given, strict=True):
        plain += share * part
    found = average(given, SHARES)
    assert found.dtype == dtype

    def error(x: torch.Tensor) -> float:
        return float((x.double() - exact).abs().max())

    assert error(found) <= error(plain)
    if dtype != torch.float64:  # the nearest number there is, but where two are almost as near
        nearest = exact.to(dtype)
        assert float((found != nearest).double().mean()) < 1e-3
        assert error(found) <= error(nearest) * (1 + 1e-3)


@pytest.mark.parametrize("dtype", WIDE)
def test_bits_do_not_depend_on_how_it_is_cut(dtype: torch.dtype) -> None:
    given = parts(dtype)
    whole = average(given, SHARES)
    for step in (1, 7, 1000):
        cut = [
            average([part[start : start + step] for part in given], SHARES)
            for start in range(0, len(whole), step)
        ]
        assert torch.equal(torch.cat(cut), whole)
    assert torch.equal(average([p[::2] for p in given], SHARES), whole[::2])


def test_what_is_given_stays_as_it_was() -> None:
    given = parts(torch.float32)
    before = [part.clone() for part in given]
    average(given, SHARES)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_one_expert_is_itself() -> None:
    (only,) = parts(torch.bfloat16, 1)
    assert torch.equal(average([only], [1.0]), only)
