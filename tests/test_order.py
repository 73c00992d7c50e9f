"""Where down goes slab by slab. That its kernel does, and what passes a cache then, is in
test_triton.py."""

import offline
import pytest

from bench.shapes import REAL
from reap_kernels.triton import configs, order

H100 = configs.CACHE["sm_90"]


def call(name: str, T: int):
    shape = REAL[name]
    return offline.call(offline.Variant("", H=shape.H, I=shape.I), T=T, K=shape.K, E=shape.E)


def chosen(made) -> configs.Config:
    config = configs.choose(made, "sm_90", configs.SHARED_LIMIT["sm_90"], H100)
    assert config is not None
    return config


@pytest.mark.parametrize(
    ("name", "T", "width"),
    [
        ("qwen3-30b-a3b", 4096, 2048),  # all sums stay in the cache
        ("qwen3-30b-a3b", 8192, 1024),
        ("qwen3-30b-a3b", 16384, 512),
        ("qwen3-30b-a3b", 1 << 20, 2048),  # no slab would
        ("qwen3-next", 16384, 512),
        *((name, T, None) for name in ("deepseek-v3", "mixtral-8x7b", "gpt-oss-120b")
          for T in (1, 4096, 8192, 16384, 32768)),
    ],
)  # fmt: skip
def test_slabs_are_where_they_pay(name, T, width):
    made = call(name, T)
    for deterministic in (False, True):  # where the sums are of slots, in slabs of their own
        config = chosen(made._replace(deterministic=deterministic))
        columns = min(config.slab * config.down.block_n, made.H)
        assert columns == (made.H if deterministic else width or made.H)


def test_slabs_are_only_where_loads_can_leave_the_cache_first():
    made = call("qwen3-30b-a3b", 16384)
    for family, slabs in (("sm_80", False), ("sm_90", True), ("sm_100", True), ("gfx942", False)):
        config = configs.choose(made, family, configs.SHARED_LIMIT[family], H100)
        assert config is not None
        assert (config.slab * config.down.block_n < made.H) == slabs


def test_a_slab_is_chosen_by_its_bytes():
    made = call("qwen3-30b-a3b", 16384)
    assert order.down_bytes(made, 2048, H100) == pytest.approx(2.75e9, rel=0.01)
    assert order.down_bytes(made, 512, H100) == pytest.approx(1.48e9, rel=0.01)
    assert order.slab_tiles(made, 256, 0) == 8  # a cache of an unknown size
