"""The benchmark of a whole step, INT8 against FP32: its rehearsal, what it refuses, its memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("numba")


import elasticzo.int8.optimizer
from experiments.benchmarks import int8_step_cpu, int8_step_memory, int8_steps
from experiments.benchmarks.int8_steps import PAIRINGS
from experiments.studies.networks import TAILS

METHODS = ["full-zo", "cls2", "cls1", "full-bp"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("step") / "out.json"
    before = torch.get_num_threads()
    int8_step_cpu.main(int8_step_cpu.Config(reduced=True, out=out))
    torch.set_num_threads(before)
    return json.loads(out.read_text())


def test_reduced_has_every_part(written: Any) -> None:
    assert written["command"].endswith(" --reduced") and written["commit"] and written["hardware"]
    assert [(row["batch"], row["method"]) for row in written["time"]] == [(8, m) for m in METHODS]
    assert written["paper"] == {"time": [1.38, 1.42], "memory": [1.46, 1.6]}
    stages = {(row["method"], row["precision"]) for row in written["stages"]}
    assert stages == {(m, p) for m in METHODS for p in ("fp32", "int8")}
    memory = {(row["method"], row["pairing"]) for row in written["memory"]}
    assert memory == {(m, p) for m in METHODS for p in PAIRINGS}


def test_ratios_are_of_the_faster_fp32_form(written: Any) -> None:
    for row in written["time"]:
        assert row["fp32"]["what"].startswith(f"fp32 {row['method']} ")
        assert row["fp32"]["rounds"] == row["int8"]["rounds"] == 3
        low, high = row["speedup"]["p20"], row["speedup"]["p80"]
        assert 0 < low <= row["speedup"]["median"] <= high
        assert 0 < row["passes"]["part_of_int8_step"] < 2
        assert ("speedup_over_torch" in row) == (row["method"] == "full-bp")


def test_memory(written: Any) -> None:
    """The aim is 3x, and the prediction within 5 % of the peak."""
    for row in written["memory"]:
        assert row["batch"] == 32
        assert row["ratio"] == row["fp32"]["measured"] / row["int8"]["measured"]
        assert row["ratio"] > (2.5 if row["method"] == "full-bp" else 3)
        assert (row["int8"]["static"] is None) == (row["method"] != "full-zo")
        for one in (row["fp32"], row["int8"]):
            assert one["predicted"] == pytest.approx(one["measured"], rel=0.05)


def test_static_figures_are_the_paper_s() -> None:
    """Three figures of the abstract: 1.60x, 1.46x and 0.072 % (our reading of its model)."""
    found = int8_step_memory.static_figures()
    assert round(found["ratio-32"], 3) == 1.598 and round(found["ratio-256"], 3) == 1.458
    assert round(found["cls2-256-percent"], 4) == 0.0721


def test_wrong_weights_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*args: Any, **kwargs: Any) -> Any:
        if kwargs["backend"] == "numba":
            kwargs["b_zo"] += 1
        return original(*args, **kwargs)

    original = elasticzo.int8.optimizer.int8_update_
    monkeypatch.setattr(elasticzo.int8.optimizer, "int8_update_", late)
    with pytest.raises(SystemExit, match=r"^cls2: INT8 weights differ from the reference's$"):
        int8_steps.verify("cls2", torch.contiguous_format, "stacked")


def test_wrong_losses_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_steps, "EPS", 2e-2)
    step = int8_steps.Fp32Step("full-zo", torch.contiguous_format, "stacked")
    monkeypatch.setattr(int8_steps, "EPS", 1e-2)
    x, y = int8_steps.images(4, 0)
    want, found = int8_steps.float64_losses(step, x, y), step(x, y).double()
    assert not torch.allclose(found, want, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("method", TAILS)
def test_float64_losses_are_those_of_the_step(method: str) -> None:
    """Step by step: the noise is that of the next one."""
    step = int8_steps.Fp32Step(method, torch.channels_last, "sequential")
    for seed in range(2):
        x, y = int8_steps.images(4, seed)
        want = int8_steps.float64_losses(step, x, y)
        torch.testing.assert_close(step(x, y).detach().double(), want, rtol=1e-5, atol=0.0)


def test_default_output_is_a_result_file() -> None:
    assert (
        Path(int8_step_cpu.__file__).parents[1] / "results" / ("int8_step_cpu.json")
        == int8_step_cpu.RESULT
    )
