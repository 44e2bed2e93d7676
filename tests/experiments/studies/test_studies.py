"""The studies and the demo, on the digits and for a few steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import demo
from experiments.studies import accuracy, sweep
from experiments.studies.accuracy import AccuracyConfig, check_floors, compare
from experiments.studies.elastic import ElasticConfig
from experiments.studies.memory_model import GridConfig
from experiments.studies.study import options
from experiments.train.config import TrainConfig
from experiments.train.memory import _peak, measure_step
from experiments.train.plots import standard_error
from experiments.train.resolve import resolve

TINY = ["--data", "digits", "--device", "cpu", "--threads", "1"]


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_accuracy_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        *TINY, "--epochs", "1", "--seeds", "2", "--batch-size", "256",
        "--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results"),
    ]  # fmt: skip
    assert accuracy.main(arguments) in (0, 1)
    assert names(tmp_path / "results") == {"accuracy_digits.json", "accuracy_digits.png"}
    text = (tmp_path / "results" / "accuracy_digits.json").read_text()
    assert str(tmp_path) not in text
    written = json.loads(text)
    stated = "--data digits --data-dir DIR --seeds 2 --epochs 1 --batch-size 256 --device cpu"
    assert written["command"] == f"python -m experiments.studies.accuracy {stated} --threads 1"
    assert set(written["methods"]) == set(accuracy.METHODS)
    for row in written["methods"].values():
        assert len(row["accuracies"]) == 2
        assert row["mean"] == pytest.approx(sum(row["accuracies"]) / 2)
    assert set(written["over_control"]) == {"cls2", "cls1"}
    assert written["seeds"] == [0, 1] and written["versions"]["torch"]

    runs = sorted((tmp_path / "runs" / "digits").iterdir())
    assert len(runs) == 12
    times = [(run / "result.json").stat().st_mtime_ns for run in runs]
    accuracy.main(arguments)
    assert times == [(run / "result.json").stat().st_mtime_ns for run in runs]
    shown = capsys.readouterr().out
    assert "over the control" in shown and "kept" not in shown  # nothing is promised of the digits


def test_options_say_what_differs_from_the_defaults() -> None:
    given = AccuracyConfig(data="digits", seeds=2, data_dir=Path("there"), results=Path("here"))
    assert options(given, "data") == " --seeds 2" and options(AccuracyConfig()) == ""
    grid = GridConfig(batches=(8, 16), threads=2, out=Path("there"))
    assert options(grid) == " --batches 8 16 --threads 2"
    assert options(ElasticConfig(reduced=True, train_images=64)) == " --train-images 64 --reduced"


def test_comparison_and_floors() -> None:
    values = {
        "full-zo": [76.0, 78.0],
        "frozen-cls2": [85.0, 87.0],
        "cls2": [90.0, 92.5],
        "frozen-cls1": [94.0, 95.0],
        "cls1": [95.0, 95.1],
        "full-bp": [98.0, 98.9],
    }
    gains = compare(values)
    assert gains["cls2"] == {"difference": 5.25, "standard_error": pytest.approx(0.25)}
    assert gains["cls1"]["standard_error"] == pytest.approx(0.45)
    kept = check_floors(AccuracyConfig(), values)
    assert kept == {
        "full-zo >= 75 %": True,
        "cls2 >= 90 %": True,
        "cls1 >= 94 %": True,
        "full-bp >= 98.5 %": False,
        "cls2 >= control + 3 points": True,
        "cls1 > control + 2 standard errors": False,
    }
    assert standard_error([1.0]) == 0.0


def test_sweep_marks_what_diverges(tmp_path: Path) -> None:
    arguments = [
        *TINY, "--methods", "cls2", "--lr-factors", "1", "1000", "--eps", "0.03",
        "--train-images", "640", "--hold-out", "200", "--epochs", "2",
        "--out", str(tmp_path / "runs"), "--results", str(tmp_path),
    ]  # fmt: skip
    assert sweep.main(arguments) == 0
    written: dict[str, Any] = json.loads((tmp_path / "sweep_digits.json").read_text())
    lr = written["defaults"]["cls2"]["head_lr"]
    diverged = {round(p["head_lr"] / lr): p["diverged"] for p in written["points"]}
    assert diverged == {1: False, 1000: True}
    assert (tmp_path / "sweep_digits.png").exists()


@pytest.mark.slow
def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--epochs", "1", "--device", "cpu", "--threads", "1", "--out", str(tmp_path)]
    assert demo.main(arguments) == 0
    runs = {"full-zo", "cls2", "cls1", "full-zo-feedback", "cls2-feedback", "full-bp"}
    assert {"demo.json", "demo.png", *runs} == names(tmp_path)
    rows = json.loads((tmp_path / "demo.json").read_text())["methods"]
    memory = {name: row["memory"]["sequential"]["bytes"] for name, row in rows.items()}
    assert memory["Full ZO"] <= memory["ZO-Feat-Cls2"] <= memory["Full BP"]
    out = capsys.readouterr().out
    assert "on cpu" in out and "ZO-Feat-Cls1" in out


def test_studies_refuse(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert accuracy.main(["--seeds", "0"]) == 2
    assert "seeds must be at least 1, got 0" in capsys.readouterr().err
    assert accuracy.main(["--out", str(tmp_path / "runs")]) == 2
    assert "data_dir must name their folder" in capsys.readouterr().err
    assert sweep.main([*TINY, "--hold-out", "0"]) == 2
    assert "hold_out must be at least 1" in capsys.readouterr().err
    assert demo.main(["--epochs", "0", "--out", str(tmp_path / "demo")]) == 2
    assert "epochs must be in [1" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_peak_counts_what_is_held_at_once() -> None:
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as recorded:
        a = torch.zeros(1_000_000)
        b = a + 1
        del a
        b *= 2
        b = b + 1  # a third tensor, but never more than two at once
    assert _peak(recorded) == pytest.approx(8e6, rel=1e-3)


def test_a_step_holds_at_least_weights_and_activations() -> None:
    config = resolve(TrainConfig(method="full-bp", device="cpu", threads=1))
    weights = 4 * 107_786
    # Weights, gradients and both moments of Adam; conv1's output, saved for its ReLU's backward.
    least = 4 * weights + 4 * config.batch_size * 6 * 28 * 28
    measured = measure_step(config)
    assert least < measured["bytes"] < 10 * least
    few = measure_step(replace(config, train_images=256))  # the data set and its order do not count
    assert few["bytes"] == measured["bytes"]


def test_int8_sweep(tmp_path: Path) -> None:
    arguments = ["--data", "digits", "--methods", "cls2", "--seeds", "1", "--epochs", "1"]
    arguments += ["--train-images", "256", "--hold-out", "200"]
    places = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path)]
    assert sweep.main(["--precision", "int8", *arguments, *places]) == 0
    written = json.loads((tmp_path / "int8_sweep_digits.json").read_text())
    points = written["methods"]["cls2"]["points"]
    assert next(iter(points)) == "recipe" and "r_max x 2" in points and "b_bp +1" in points
    assert all(len(point["accuracies"]) == 1 for point in points.values())
    assert (tmp_path / "int8_sweep_digits.png").stat().st_size > 10_000


def test_changes_stay_in_range() -> None:
    config = resolve(TrainConfig(precision="int8", method="cls2", r_max=(100,), b_bp=(7, 0)))
    found = sweep.changes(config)
    assert found["r_max x 2"] == {"r_max": (127,)} and found["b_bp +1"] == {"b_bp": (7, 1)}
    halved = found["share x 0.5"]["p_zero"]
    assert config.p_zero is not None
    assert halved == pytest.approx([(1 + p) / 2 for p in config.p_zero])
    for change in found.values():
        resolve(replace(config, **change))  # every one is a valid configuration
