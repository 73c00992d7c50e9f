"""`reap doctor`: what this machine offers."""

from commandline import invoke, run_json

from reap.model import compat
from reap.versions import TESTED, releases


def test_doctor_gives_every_backend_a_reason_or_none():
    found = run_json("doctor")
    assert found["backends"]["reference"] is None
    assert found["versions"]["torch"]
    lines = invoke("doctor")[1].splitlines()
    for name in ("triton", "cuda", "cuda_sm90"):  # what ran on few GPUs says on which
        (line,) = [line for line in lines if line.startswith(f"backend {name} ")]
        assert found["caveats"][name] in line and "an H100" in line
    assert "backend reference  available" in lines


def test_doctor_says_what_a_release_changed(monkeypatch, request):
    request.addfinalizer(compat._fault.cache_clear)
    found = run_json("doctor")
    assert found["tested"] == {name: list(ends) for name, ends in TESTED.items()}
    assert set(found["seams"].values()) == {None}
    ranges = f"transformers {releases('transformers')}, torch {releases('torch')}"
    last = invoke("doctor")[1].splitlines()[-1]
    assert last == f"private names  all as needed; tested with {ranges}"

    monkeypatch.delattr("torch._C._current_graph_task_id")
    compat._fault.cache_clear()
    found = run_json("doctor")
    ((name, what),) = [item for item in found["seams"].items() if item[1] is not None]
    assert "_current_graph_task_id" in what and "stops observing a model: install torch" in what
    code, out, _ = invoke("doctor")
    assert code == 0 and f"changed        {name}: {what}" in out.splitlines()
    total = len(found["seams"])
    assert out.splitlines()[-1] == f"private names  1 of {total} changed; tested with {ranges}"
