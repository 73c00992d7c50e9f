"""`reap info`: what a file or folder is."""

from commandline import MODEL, invoke, refused, run_json

from reap.statistics.stats import Statistics


def test_info_says_what_a_path_is(work):
    pruned = work / "pruned"
    stats = run_json("info", work / "one.st")
    assert (stats["kind"], stats["tokens"], stats["domains"]) == ("statistics", 512, {"one": 512})
    assert stats["experts"] == [16] and stats["versions"]["torch"]
    assert stats["data"] == [str(work / "a.txt")]
    plan = run_json("info", work / "plan.json")
    assert (plan["kind"], plan["kept"], plan["tokens"]) == ("plan", [8], 512)
    for path in (pruned, pruned / "reap.json"):
        model = run_json("info", path)
        assert (model["kind"], model["experts"], model["criterion"]) == (
            "pruned model",
            [8],
            "reap",
        )
        assert model["base_model"] == MODEL.name
    assert run_json("info", MODEL)["kind"] == "model"
    for path in (work / "one.st", work / "plan.json", pruned, MODEL):
        assert f"kind         {run_json('info', path)['kind']}" in invoke("info", path)[1]
    for name in ("config.json", "model.safetensors"):
        assert refused("info", MODEL / name).endswith(f": give its folder, {MODEL}")
    assert "neither statistics nor a plan" in refused("info", work / "a.txt")
    assert "no config.json" in refused("info", work / "empty")


def test_text_that_statistics_describe_oddly(work, tmp_path):
    """Whoever wrote the file: what is not as `reap calibrate` writes it is left out."""
    stats = Statistics.load(work / "one.st")
    for place, sources in enumerate((7, [3, {"spec": "a"}], {})):
        stats.data = [{"sources": sources}]
        stats.save(tmp_path / str(place))
        assert run_json("info", tmp_path / str(place))["data"] == (["a"] if place == 1 else [])
