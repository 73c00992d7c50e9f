"""`reap combine`: sums to the last bit."""

import json

from commandline import invoke, run_json


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
