"""The repository stays small: what is tracked has a budget."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODEL, ALL = 8 << 20, 40 << 20  # bytes of one model's folder, and of everything
OTHER = 256 << 10  # of one file elsewhere: sources and raw results


@pytest.fixture(scope="module")
def sizes() -> dict[str, int]:
    """Tracked file -> bytes."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    return {name: (ROOT / name).stat().st_size for name in names if (ROOT / name).is_file()}


def test_all_of_it(sizes):
    assert sum(sizes.values()) <= ALL


def test_each_model(sizes):
    models: dict[str, int] = {}
    for name, size in sizes.items():
        if name.startswith("models/"):
            folder = name.split("/")[1]
            models[folder] = models.get(folder, 0) + size
    assert models and all(size <= MODEL for size in models.values()), models


def test_each_other_file(sizes):
    large = {
        name: size
        for name, size in sizes.items()
        if not name.startswith("models/") and size > OTHER
    }
    assert not large
