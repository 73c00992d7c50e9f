"""The roofline model: its sums, its targets, and that the command runs."""

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from bench import gpu_roofline
from bench.gpu_roofline import GPUS, REAL, Gpu, Roof, Work, large_config, uniform_counts

ENDLESS = Gpu("endless cache", "sm_90", 1e15, 1e12, 1e15, 132)


def work(name: str, gpu: Gpu, T: int = 1 << 14) -> Work:
    shape = REAL[name]
    return Work(shape, T, uniform_counts(shape, T), large_config(gpu, shape))


def test_an_endless_cache_fetches_everything_once():
    made = work("qwen3-30b-a3b", ENDLESS)
    moved = made.memory_bytes(ENDLESS)
    E, H, I, S, T = 128, 2048, 768, 8 << 14, 1 << 14  # noqa: E741
    assert moved["gate_up_proj"] == 2 * 2 * E * H * I
    assert moved["down_proj"] == 2 * E * H * I
    assert moved["x"] == 2 * T * H
    assert moved["inner"] == 2 * 2 * S * I


def test_no_cache_fetches_a_panel_in_every_wave():
    made = replace(work("qwen3-30b-a3b", ENDLESS), counts=(256, 0))
    alone = replace(ENDLESS, cache=0, processors=1)
    programs = 2 * 6  # row tiles times column tiles of 128
    rows, weights = made._panels(made.config.gate_up, 768, 2 * 2048, 2048, alone)
    assert rows == programs * 128 * 2048 * 2
    assert weights == programs * 128 * 2 * 2048 * 2


def test_modelled_bytes_are_near_the_minimum():
    """At most 1.15 times, but for Mixtral on caches of 40 and 50 MB: the inner rows of a wave of
    its down projection, 14336 deep, do not fit them. It is bound by compute by a factor of 3."""
    for name in ("qwen3-30b-a3b", "deepseek-v3", "mixtral-8x7b"):
        for gpu in GPUS:
            roof = Roof(gpu, work(name, gpu))
            ratio = roof.bytes / roof.work.minimum()
            if name == "mixtral-8x7b" and gpu.cache < 100e6:
                assert roof.compute_ms > 3 * roof.memory_ms
            else:
                assert 1 <= ratio < 1.16, (name, gpu.name)


def test_compute_floor_of_qwen3_on_h100():
    roof = Roof(GPUS[1], work("qwen3-30b-a3b", GPUS[1]))
    assert roof.compute_ms == pytest.approx(1.25, rel=0.01)
    assert roof.floor_ms == max(roof.compute_ms, roof.memory_ms)


def test_command_prints_a_labelled_table_and_draws_a_plot(tmp_path):
    app = gpu_roofline.typer.Typer()
    app.command()(gpu_roofline.main)
    result = CliRunner().invoke(
        app, ["--tokens", "256", "--shapes", "olmoe", "--out", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    assert result.output.count("model, not measurement") == 1
    assert all(gpu.name in result.output for gpu in GPUS)
    assert (tmp_path / "gpu-roofline.png").stat().st_size > 10_000
    assert CliRunner().invoke(app, ["--shapes", "gpt-2"]).exit_code == 2
