"""Fine-tuning: runs on rotated images that start from another run's weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from elasticzo.checkpoint import load_checkpoint
from elasticzo.data import load_digits, rotate_images
from elasticzo.int8 import Int8Network
from experiments.train.config import TrainConfig
from experiments.train.data import load_data
from experiments.train.folder import CHECKPOINT, METRICS, RESULT
from experiments.train.learner import FloatLearner
from experiments.train.network import build_model
from experiments.train.resolve import resolve
from experiments.train.run import Run
from tests.experiments.conftest import Start


def logged_tests(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [line for line in lines if line["kind"] == "test"]


def first_state(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The weights that a run has when its first step begins."""
    run = Run(config)
    found: dict[str, Any] = {}

    def stop_here() -> dict[str, Any]:
        found.update({k: v.clone() for k, v in run.learner.model.state_dict().items()})
        return {}

    monkeypatch.setattr(run, "_train", stop_here)
    run.go()
    return found


def test_images_are_rotated_before_they_are_split(small: TrainConfig) -> None:
    config = resolve(replace(small, rotate=30.0, hold_out=100))
    data, plain = load_data(config), load_data(replace(config, rotate=None))
    assert torch.equal(data.train_x, rotate_images(plain.train_x, 30.0))
    assert torch.equal(data.test_x, rotate_images(plain.test_x, 30.0))
    assert torch.equal(data.train_y, plain.train_y)
    assert torch.equal(load_digits().train_x[0], load_data(resolve(small)).train_x[0])


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("method", ["cls2", "frozen-cls2", "full-bp"])
def test_the_first_weights_are_the_others_last(
    start: Start,
    small: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: Any,
    method: Any,
) -> None:
    _, source = start(precision=precision, method="full-bp", epochs=1)
    last = load_checkpoint(source.path / CHECKPOINT)["model"]
    tuned = replace(
        small, precision=precision, method=method, start_from=source.path, out=tmp_path / "tuned"
    )
    first = first_state(tuned, monkeypatch)
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) for name in last)


def test_a_run_tests_what_it_starts_from(start: Start, tmp_path: Path) -> None:
    before, source = start(epochs=1, method="full-bp")
    after, tuned = start(start_from=source.path, out=tmp_path / "tuned", epochs=1)
    assert before["start_accuracy"] is None
    assert after["start_accuracy"] == before["test_accuracy"]
    assert [line["epoch"] for line in logged_tests(tuned.path)] == [0, 1]
    turned, _ = start(start_from=source.path, out=tmp_path / "turned", epochs=1, rotate=90.0)
    assert turned["start_accuracy"] < before["test_accuracy"] - 10.0


def test_int8_starts_from_fp32(
    start: Start, small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, source = start(method="full-bp", epochs=1)
    net = build_model(TrainConfig())
    net.load_state_dict(load_checkpoint(source.path / CHECKPOINT)["model"])
    expected = Int8Network(net, drop_biases=True).tree.state_dict()
    tuned = replace(small, precision="int8", start_from=source.path, out=tmp_path / "tuned")
    first = first_state(tuned, monkeypatch)
    assert all(torch.equal(first[name], expected[name]) for name in expected)
    shifted = first_state(replace(tuned, logit_shift=3, out=tmp_path / "3"), monkeypatch)
    assert int(shifted["fc3.exponent"]) == int(first["fc3.exponent"]) - 3


def test_what_it_cannot_start_from(start: Start, tmp_path: Path) -> None:
    _, source = start(epochs=1)
    again = {"start_from": source.path, "out": tmp_path / "tuned"}
    with pytest.raises(ValueError, match=r"must be a run of model resnet20, got .* of lenet5"):
        start(**again, model="resnet20")
    with pytest.raises(ValueError, match=r"must be a run of precision bf16, got .* of fp32"):
        start(**again, precision="bf16")
    with pytest.raises(FileNotFoundError, match=r"nowhere/config.json is missing"):
        start(**again | {"start_from": tmp_path / "nowhere"})
    (source.path / CHECKPOINT).rename(source.path / "other")
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        start(**again)
    (source.path / RESULT).unlink()
    with pytest.raises(ValueError, match=r"must be a finished run, got .* no result.json"):
        start(**again)
    assert not (tmp_path / "tuned").exists()


def test_another_angle_or_start_is_another_run(start: Start, tmp_path: Path) -> None:
    _, source = start(epochs=1, rotate=30.0)
    with pytest.raises(ValueError, match=r"rotate was 30.0, is 45.0"):
        start(epochs=1, rotate=45.0)
    with pytest.raises(ValueError, match=r"rotate was 30.0, is 'missing'; start_from was"):
        start(epochs=1, start_from=source.path)
    with pytest.raises(ValueError, match=r"rotate must be in \[-360, 360\], got 361"):
        start(rotate=361.0)


def test_a_start_is_read_once(
    start: Start, small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on needs its own checkpoint alone."""
    _, source = start(epochs=1, method="full-bp")
    config = replace(small, start_from=source.path, out=tmp_path / "tuned", checkpoint_steps=10)
    step = FloatLearner.step

    def breaks(learner: FloatLearner) -> None:
        if learner.step_index == 20:
            raise RuntimeError("power cut")
        step(learner)

    monkeypatch.setattr(FloatLearner, "step", breaks)
    with pytest.raises(RuntimeError, match="power cut"):
        Run(config).go()
    monkeypatch.undo()
    (source.path / CHECKPOINT).unlink()
    gone_on = Run(config).go()
    assert gone_on["start_accuracy"] == logged_tests(source.path)[-1]["test_accuracy"]
    assert len(logged_tests(tmp_path / "tuned")) == 3
