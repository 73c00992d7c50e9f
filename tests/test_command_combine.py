"""`reap combine`: sums to the last bit."""

import json
import os
import re
import resource

import pytest
from commandline import MODEL, invoke, refused, run_json
from slots import MODEL as MODEL_INFO
from slots import NAME, slots

from reap.statistics.stats import Statistics


def test_combine_adds_exactly(work):
    printed = run_json("combine", work / "one.st", work / "two.st", "--out", work / "both.st")
    assert printed["tokens"] == 1024
    assert sorted(printed["domains"]) == ["one", "two"]
    one = run_json("score", work / "one.st", "--criterion", "weighted_ean")["layers"]
    both = run_json("score", work / "both.st", "--criterion", "weighted_ean")["layers"]
    for layer, values in both.items():
        assert values["scores"] == [2 * score for score in one[layer]["scores"]]
    alone = run_json("score", work / "both.st", "--criterion", "weighted_ean", "--domain", "one")
    assert alone["layers"] == one and alone["tokens"] == 512
    out = work / "two.json"
    invoke("plan", work / "both.st", "--domain", "two", "--keep", 4, "--out", out)
    assert json.loads(out.read_text())["calibration"]["domains"] == {"two": 512}


def test_sums_of_tokens_that_count_otherwise_say_so(work):
    from reap.statistics.stats import Statistics

    some = Statistics.load(work / "two.st")
    some.data = [entry | {"count": {"after": "x"}} for entry in some.data]
    some.save(work / "some.st")
    said = run_json("combine", work / "one.st", work / "some.st", "--out", work / "mixed.st")
    assert said["notes"] == ["not all count the same tokens: all; those after 'x'"]


def shards(work, tmp_path, of, *more, name="s"):
    """Files of the shards, and one of the run in one process."""
    options = ("--data", work / "a.txt", "--seq-len", 64, "--max-tokens", 512, *more)
    for number in range(of):
        out = ("--shard", f"{number}/{of}", "--out", tmp_path / f"{name}{number}.st")
        run_json("calibrate", MODEL, *options, *out)
    run_json("calibrate", MODEL, *options, "--out", tmp_path / f"{name}.whole")


def test_shards_are_the_run_in_one_process(work, tmp_path):
    shards(work, tmp_path, 3)
    for given in (f"{tmp_path}/s?.st", f"@{tmp_path}/list"):
        names = [f"{tmp_path}/s{number}.st" for number in (2, 0, 1)]
        (tmp_path / "list").write_text("\n".join(names) + "\n\n")
        assert run_json("combine", given, "--out", tmp_path / "all", "--overwrite")["tokens"] == 512
        assert (tmp_path / "all").read_bytes() == (tmp_path / "s.whole").read_bytes()
    _, out, _ = invoke("info", tmp_path / "s1.st")
    assert "shard 1/3" in out

    # In two steps, of which the first has not all.
    some = ("combine", tmp_path / "s0.st", tmp_path / "s2.st", "--out", tmp_path / "some")
    assert "shard 1/3 is missing" in refused(*some)
    run_json(*some, "--incomplete")
    run_json("combine", tmp_path / "some", tmp_path / "s1.st", "--out", tmp_path / "both")
    assert (tmp_path / "both").read_bytes() == (tmp_path / "s.whole").read_bytes()
    for other in ("some", "s.whole"):
        twice = ("combine", tmp_path / "s0.st", tmp_path / other, "--out", tmp_path / "x")
        line = refused(*twice, "--incomplete")
        assert "both have shard 0/3" in line or "would be added to the run that has it" in line


def test_shards_that_are_not_of_one_run(work, tmp_path):
    shards(work, tmp_path, 2)
    out = ("--out", tmp_path / "x")
    first, second = tmp_path / "s0.st", tmp_path / "s1.st"
    assert "is given twice" in refused("combine", first, first, second, *out)
    copy = tmp_path / "copy.st"
    copy.write_bytes(first.read_bytes())
    assert "both have shard 0/2" in refused("combine", first, second, copy, *out)
    options = ("--data", work / "a.txt", "--seq-len", 64)
    other = ("calibrate", MODEL, "--shard", "1/2", "--out", tmp_path / "o.st", "--overwrite")
    for changed, reason in [
        (("--max-tokens", 448), "max_tokens is 512, and 448"),
        (("--max-tokens", 512, "--batch-size", 2), "--batch-size is 1, and 2"),
        (("--max-tokens", 512, "--dtype", "float32"), "run is .*float32"),
        (("--max-tokens", 512, "--shard", "1/3"), "the number of shards is 2, and 3"),
    ]:
        run_json(*other, *options, *changed)
        assert re.search(reason, refused("combine", first, tmp_path / "o.st", *out))
    stats = Statistics.load(second)
    stats.data[0]["shard"]["versions"]["torch"] = "1.0"
    stats.save(copy, overwrite=True)
    assert "torch is 2" in refused("combine", first, copy, *out)
    stats.data = [stats.data[0] | {"partial": {"batches": 3}}]
    stats.save(copy, overwrite=True)
    assert "copy.st is what shard 1/2 measured so far" in refused("combine", first, copy, *out)
    stats.data[0]["shard"] = 5
    stats.save(copy, overwrite=True)
    assert "copy.st: shard 5" in refused("combine", first, copy, *out)
    run_json("calibrate", MODEL, *options, "--shard", "0/2", "--gates", "renormalized",
             "--max-tokens", 512, "--out", copy, "--overwrite")  # fmt: skip
    assert "gates" in refused("combine", second, copy, *out)
    assert not (tmp_path / "x").exists()


def test_files_that_are_not_there(tmp_path):
    out = ("--out", tmp_path / "x")
    assert "names no file of statistics" in refused("combine", f"{tmp_path}/*.st", *out)
    assert "cannot read the list" in refused("combine", f"@{tmp_path}/list", *out)
    (tmp_path / "list").write_text("\n")
    assert "names no file of statistics" in refused("combine", f"@{tmp_path}/list", *out)
    assert "x.st" in refused("combine", tmp_path / "x.st", *out)
    (tmp_path / "p.json").write_text('{"format": "reap-plan"}')
    assert "p.json is a plan, it holds no statistics" in refused(
        "combine", tmp_path / "p.json", *out
    )


@pytest.mark.parametrize("count", [64, pytest.param(10_000, marks=pytest.mark.slow)])
def test_as_many_files_as_a_fleet_has(tmp_path, count):
    """More than may be open at once, one at a time, exactly."""
    whole = Statistics(MODEL_INFO)
    entry = {"tokens": count, "sources": [{"spec": "a"}]}
    for number in range(count):
        part, data = Statistics(MODEL_INFO), slots(3, seed=number)
        for stats in (part, whole):
            stats.update(NAME, *data)
        shard = {"numbers": [number], "of": count, "versions": part.versions}
        part.data = [entry | {"shard": shard}]
        part.save(tmp_path / f"{number}.st")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 30, hard))
    try:
        run_json("combine", f"{tmp_path}/*.st", "--out", tmp_path / "all")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    total = Statistics.load(tmp_path / "all")
    assert total == whole and total.data == [entry]
