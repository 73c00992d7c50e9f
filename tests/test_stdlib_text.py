"""The standard library as text: what is kept of a source, and which side of the split it is on."""

from itertools import islice

import pytest

from reap.errors import ReapError
from reap.text import stdlib_text

SOURCE = '''# The first comment of this file explains it,
# and goes on.
"""A module docstring of more than five words."""

import os  # a trailing remark of several plain words

def f(x):
    """What f does, in
    two lines of text."""  # noqa
    text = "# not a comment, and " "not a docstring"
    return f"{x}" + """kept
    as it is"""
'''


def test_split_source():
    code, prose = stdlib_text.split_source(SOURCE)
    assert code == (
        'import os\ndef f(x):\n    text = "# not a comment, and " "not a docstring"\n'
        '    return f"{x}" + """kept\n    as it is"""\n'
    )
    assert prose == (
        "The first comment of this file explains it,\nand goes on.\n\n"
        "A module docstring of more than five words.\n\n"
        "a trailing remark of several plain words\n\n"
        "What f does, in\ntwo lines of text."
    )


@pytest.mark.parametrize("domain", stdlib_text.DOMAINS)
def test_parts_do_not_overlap(domain):
    def some(held_out, seed=0):  # a few will do: all of them would take half a minute
        documents = stdlib_text.documents(domain, held_out=held_out, seed=seed)
        names, texts = zip(*islice(documents, 9), strict=True)
        assert all(texts) and len(set(names)) == 9
        assert not any("site-packages" in name for name in names)
        assert all(stdlib_text.is_held_out(name) == held_out for name in names)
        return names

    assert some(True) == some(True) != some(True, seed=1)
    assert some(False) == some(False) != some(False, seed=1)


def test_held_out_share():
    names = [f"package/module{i}.py" for i in range(4096)]
    assert abs(sum(map(stdlib_text.is_held_out, names)) - 256) < 64
    assert stdlib_text.is_held_out("ast.py") and not stdlib_text.is_held_out("argparse.py")


def test_a_python_without_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(stdlib_text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ReapError, match="no standard library sources"):
        stdlib_text.names("code", held_out=False)
