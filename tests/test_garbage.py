"""The cyclic collector rests for a while, and is as it was after that."""

import gc

import pytest

from reap.files.garbage import uncollected


@pytest.mark.parametrize("enabled", (True, False))
def test_left_as_it_was(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(KeyError), uncollected():
            with uncollected():
                assert not gc.isenabled()
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
