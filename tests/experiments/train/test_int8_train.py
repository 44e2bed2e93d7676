"""The training command with precision int8: what it refuses, learns, leaves, and resumes."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from elasticzo.checkpoint import load_checkpoint
from elasticzo.data import load_digits
from elasticzo.int8 import replay_int8
from experiments.commands import Interrupted
from experiments.train.__main__ import main
from experiments.train.config import TrainConfig
from experiments.train.data import load_data
from experiments.train.fields import fields_of
from experiments.train.folder import CHECKPOINT, METRICS, TRAJECTORY
from experiments.train.inputs import Int8Images
from experiments.train.learner import Int8Learner
from experiments.train.network import build_int8_network
from experiments.train.recipes import METHODS
from experiments.train.resolve import resolve
from experiments.train.run import Run
from tests.experiments.conftest import OF_CLOUDS, Start

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model": "resnet20"}, "precision int8 takes model lenet5, pointnet, got 'resnet20'"),
    ({"eps": 1e-3}, "eps belongs to precision fp32 or bf16, got 0.001 with int8"),
    ({"head_weight_decay": 0.1}, "head_weight_decay belongs to precision fp32 or bf16"),
    ({"r_max": (15, 0)}, r"r_max must be in \[1, 127\], got 0"),
    ({"r_max": ()}, "r_max must have at least one value, got none"),
    ({"p_zero": (1.0,)}, r"p_zero must be in \[0, 1\), got 1.0"),
    ({"b_zo": (32,)}, r"b_zo must be in \[0, 31\], got 32"),
    ({"b_bp": (8,)}, r"b_bp must be in \[-8, 7\], got 8"),
    ({"fraction_bits": 17}, r"fraction_bits must be in \[0, 16\], got 17"),
    ({"logit_shift": -1}, r"logit_shift must be in \[0, 16\], got -1"),
    ({"tail_source": "clean"}, "tail_source must be plus, minus or mean with int8, got 'clean'"),
    ({"scale": {"fc3.*": 1.0}}, r"scale must match parameters of the head \(conv1.weight, conv2"),
    ({"precision": "fp32", "b_bp": (3,)}, r"b_bp belongs to precision int8, got \(3,\) with fp32"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[str(c) for c, _ in WRONG])
def test_refuses_before_it_writes(
    start: Start, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        start(**{"precision": "int8"} | changes)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("method", METHODS)
def test_every_default_is_decided(method: Any) -> None:
    config = resolve(TrainConfig(method=method, precision="int8", device="cpu"))
    open_fields = {f.name for f in fields(config) if getattr(config, f.name) is None}
    floats = {name for name in fields_of("float") if getattr(TrainConfig(), name) is None}
    given = {"data_dir", "train_images", "rotate", "start_from", *OF_CLOUDS}
    assert open_fields == given | floats
    assert resolve(config) == config
    model = build_int8_network(config)
    assert bool(list(model.head_parameters())) == (method in ("full-zo", "cls2", "cls1"))
    assert bool(list(model.tail_parameters())) == (method != "full-zo")


def test_inputs_are_converted_once() -> None:
    config = resolve(TrainConfig(precision="int8", device="cpu"))
    data = load_digits()
    images = Int8Images(config, data)
    assert images.train_q.dtype == torch.int8 and images.train_q.shape == data.train_x.shape
    exact = data.normalized(data.test_x[:50]).double()
    found = images.test_x(slice(50)).dequantize()
    assert (found - exact).abs().max() <= 2.0 ** int(images.table.exponent) / 2


def test_schedules_serve_equal_parts() -> None:
    config = TrainConfig(
        precision="int8", device="cpu", epochs=3, batch_size=479, r_max=(31, 15, 7), b_bp=(4, 2),
        threads=1,
    )  # fmt: skip
    config = resolve(config)
    learner = Int8Learner(config, load_data(config))
    assert learner.steps == 9
    seen = []
    for step in range(9):
        learner.step_index = step
        learner.follow_schedule()
        seen.append((learner.model.r_max, int(learner.rates()[1])))
    assert [r for r, _ in seen] == [31] * 3 + [15] * 3 + [7] * 3
    assert [b for _, b in seen] == [4] * 5 + [2] * 4


@pytest.mark.parametrize(
    ("method", "epochs", "floor"),
    [("full-bp", 4, 90.0), ("cls1", 6, 80.0), ("cls2", 6, 60.0), ("full-zo", 20, 30.0)],
)
def test_learns_the_digits(start: Start, method: Any, epochs: int, floor: float) -> None:
    result, folder = start(precision="int8", method=method, epochs=epochs, train_images=None)
    assert result["test_accuracy"] > floor
    assert result["config"]["precision"] == "int8"
    lines = [json.loads(line) for line in (folder.path / METRICS).read_text().splitlines()]
    assert all({"zero_signs", "loss", "lr_head"} <= set(x) for x in lines if x["kind"] == "train")
    state = load_checkpoint(folder.path / CHECKPOINT)
    assert all(v.dtype in (torch.int8, torch.int32) for v in state["model"].values())
    log = folder.path / TRAJECTORY
    assert log.exists() == (method != "full-bp")
    if log.exists():  # the head again, from its first weights and the signs
        model = build_int8_network(resolve(TrainConfig(
            precision="int8", method=method, epochs=epochs, batch_size=32, threads=1, device="cpu"
        )))  # fmt: skip
        replay_int8(log, model)
        for name, w in model.named_head_parameters():
            assert torch.equal(w, state["model"][name])


@pytest.mark.parametrize("loss", ["integer", "float"])
def test_an_interrupted_run_ends_in_the_same_bits(
    start: Start, small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: Any
) -> None:
    settings: dict[str, Any] = {"precision": "int8", "method": "cls1", "loss": loss}
    settings |= {"p_zero": (0.5, 0.9), "b_bp": (4, 3, 2)}
    result, folder = start(**settings)
    config = replace(small, **settings, out=tmp_path / "other")
    step = Int8Learner.step

    def stopped(self: Int8Learner) -> None:
        step(self)
        if self.step_index == 19:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Int8Learner, "step", stopped)
        with pytest.raises(Interrupted, match="at step 19 of 48"):
            Run(config).go()
    again = Run(config)
    found = again.go()
    assert found["test_accuracy"] == result["test_accuracy"]
    one, other = (load_checkpoint(f.path / CHECKPOINT) for f in (folder, again.folder))
    for part in ("model", "losses", "sum", "zeros"):
        values = one[part].values() if part == "model" else [one[part]]
        others = other[part].values() if part == "model" else [other[part]]
        assert all(torch.equal(a, b) for a, b in zip(values, others, strict=True))
    logs = [(f.path / TRAJECTORY).read_text().splitlines()[1:] for f in (folder, again.folder)]
    assert logs[0] == logs[1] and len(logs[0]) == 48


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--precision", "int8", "--method", "cls2", "--epochs", "1", "--threads", "1"]
    arguments += ["--r-max", "15", "7", "--b-bp", "3", "--out", str(tmp_path / "run"), "--no-plot"]
    assert main([*arguments, "--no-tensorboard", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "precision int8" in text and "test accuracy" in text and "r_max = [15, 7]" in text
