"""The stages of a training step: exclusive, complete, and leaving everything as it was."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import elasticzo.forward.staging
import experiments.train.learner
from experiments.studies import breakdown, stages
from experiments.studies.stages import STAGES, Stopwatch, targets, watched
from experiments.studies.step_times import BreakdownConfig, learner_of, verify

SMALL = BreakdownConfig(device="cpu", threads=1, rounds=5, batches=(16,))


def test_stages_are_exclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "process_time", lambda: clock[0])
    watch = Stopwatch(torch.device("cpu"))

    def wait(seconds: float) -> None:
        clock[0] += seconds

    def step() -> None:
        wait(1)
        with watch.stage("forward"):
            wait(2)
            with watch.stage("noise"):
                wait(4)
            wait(8)
        with watch.stage("update"):
            wait(16)
        wait(32)

    for _ in range(2):  # a second step starts from nothing
        found = watch.time(step)
        assert found == {
            "noise": 4, "forward": 10, "loss": 0, "tail backward": 0, "update": 16, "other": 33,
        }  # fmt: skip
    assert watch.running is None


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("method", ["cls2", "full-bp"])
def test_a_step_by_stages(method: Any, precision: str) -> None:
    learner = learner_of(SMALL, method, precision, 16)
    learner.step()  # compiled and checked
    held = [(holder, name, getattr(holder, name)) for holder, name, *_ in targets(learner)]
    ops = (elasticzo.forward.staging.stage_, experiments.train.learner.pair_losses)
    watch = Stopwatch(learner.device)
    with watched(learner, watch):
        start = time.process_time()
        found = watch.time(learner.step)
        spent = time.process_time() - start
    assert set(found) == set(STAGES)
    # Nothing is counted twice, and little is lost: what other threads do between two stages.
    assert 0.5 * spent < sum(found.values()) <= spent
    for stage in ("forward", "loss", "tail backward", "update", "other"):
        assert found[stage] > 0, stage
    assert (found["noise"] > 0) == (method == "cls2")
    assert ops == (elasticzo.forward.staging.stage_, experiments.train.learner.pair_losses)
    assert all(getattr(holder, name) == before for holder, name, before in held)


def test_an_error_puts_everything_back() -> None:
    learner = learner_of(SMALL, "cls2", "fp32", 16)
    before = dict(learner.model.__dict__)
    with pytest.raises(RuntimeError, match="stopped"), watched(learner, Stopwatch(learner.device)):
        raise RuntimeError("stopped")
    assert learner.model.__dict__.keys() == before.keys()
    assert "step" not in learner.zo.__dict__ or learner.zo.__dict__["step"] == learner.zo.step


def test_what_changes_a_step_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(original: Any, stage: str, counts: Any, watch: Any) -> Any:
        return original if stage != "update" else lambda *args, **kwargs: None

    monkeypatch.setattr(stages, "_telling", other)
    config = replace(SMALL, methods=("cls2",), precisions=("fp32",))
    with pytest.raises(SystemExit, match="cls2, fp32: a watched step leaves other weights"):
        verify(config)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--methods", "cls2", "full-bp", "--batches", "32", "--rounds", "9", "--device", "cpu",
        "--results", str(tmp_path),
    ]  # fmt: skip
    assert breakdown.main(arguments) in (0, 1)  # 1: the machine was too busy for the margin
    written = json.loads((tmp_path / "breakdown_cpu.json").read_text())
    assert (tmp_path / "breakdown_cpu.png").exists()
    assert "a watched step" not in capsys.readouterr().err
    assert {(r["method"], r["precision"]) for r in written["rows"]} == {
        ("cls2", "fp32"), ("full-bp", "fp32"), ("cls2", "int8"), ("full-bp", "int8"),
    }  # fmt: skip
    for row in written["rows"]:
        assert sum(one["share"] for one in row["stages"].values()) == pytest.approx(1.0)
        assert row["sum_over_plain"]["median"] == pytest.approx(1.0, abs=0.3)
        assert (row["stages"]["noise"]["us"] > 0) == (row["method"] == "cls2")
        assert row["plain"]["rounds"] == 9
    backward = {r["method"]: r["stages"]["tail backward"]["share"] for r in written["rows"][:2]}
    assert backward["full-bp"] > 2 * backward["cls2"]


def test_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert breakdown.main(["--rounds", "0", "--results", str(tmp_path)]) == 2
    assert "rounds must be at least 1, got 0" in capsys.readouterr().err
    assert breakdown.main(["--threads", "0", "--results", str(tmp_path)]) == 2
    assert "threads must be in [1, 1024], got 0" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
