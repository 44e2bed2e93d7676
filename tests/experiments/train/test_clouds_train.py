"""The training command on point clouds: what it refuses, sees, learns and resumes."""

from __future__ import annotations

import os
import signal
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from elasticzo.checkpoint import load_checkpoint
from elasticzo.data import augment_clouds
from experiments.commands import Interrupted
from experiments.train.__main__ import main
from experiments.train.config import TrainConfig
from experiments.train.data import load_data
from experiments.train.fields import fields_of
from experiments.train.folder import CHECKPOINT, TRAJECTORY
from experiments.train.inputs import float_inputs, int8_inputs
from experiments.train.learner import FloatLearner, Int8Learner, learner_for
from experiments.train.network import build_network
from experiments.train.recipes import METHODS
from experiments.train.resolve import identity, resolve
from experiments.train.run import Run
from tests.clouds import write_modelnet10
from tests.experiments.conftest import Start


@pytest.fixture
def clouds(small: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Two epochs of four steps of ZO-Feat-Cls2 on 40 clouds of 8 points."""
    folder = write_modelnet10(tmp_path_factory.mktemp("clouds"))
    return replace(
        small, model="pointnet", data="modelnet10", data_dir=folder, points=8, batch_size=10,
        train_images=None,
    )  # fmt: skip


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model": "lenet5"}, "model 'lenet5' takes images, got data 'modelnet10'"),
    ({"data": "digits"}, r"model 'pointnet' takes clouds \(modelnet10, modelnet40\), got data 'di"),
    ({"points": 0}, r"points must be in \[1, inf\), got 0"),
    ({"points": 25}, r"points must be in \[1, 24\] \(of a cloud\), got 25"),
    ({"data_dir": None}, "data_dir must name their folder"),
    ({"data_dir": Path("/nowhere")}, "train_files.txt is neither in /nowhere"),
    ({"data": "modelnet40"}, "expected the 40 classes of modelnet40, got 10"),
    ({"rotate": 30.0}, "rotate belongs to images, got 30.0 with 'modelnet10'"),
    ({"download": True}, "data 'modelnet10' is not fetched: data_dir must hold its HDF5 files"),
    ({"batch_size": 41}, r"batch_size must be in \[1, 40\] \(training clouds\), got 41"),
    ({"precision": "int8", "batch_norm": True}, "batch_norm belongs to precision fp32 or bf16"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[str(c) for c, _ in WRONG])
def test_refuses_before_it_writes(
    clouds: TrainConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Run(replace(clouds, **changes)).go()
    assert clouds.out is not None and not clouds.out.exists()


@pytest.mark.parametrize("field", ["points", "augment"])
def test_images_have_no_settings_of_clouds(start: Start, field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} belongs to pointnet and clouds, got 1 with"):
        start(**{field: 1})
    assert field not in identity(resolve(TrainConfig()))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("method", METHODS)
def test_every_default_is_decided(clouds: TrainConfig, method: Any, precision: Any) -> None:
    config = resolve(replace(clouds, method=method, precision=precision, points=None))
    open_fields = {f.name for f in fields(config) if getattr(config, f.name) is None}
    floats = {name for name in fields_of("float") if getattr(TrainConfig(), name) is None}
    given = {"train_images", "rotate", "start_from"}
    assert open_fields == given | (floats if precision == "int8" else set())
    assert resolve(config) == config
    assert config.points == 1024 and config.augment is not None
    given = replace(clouds, method=method, precision=precision, points=1024)
    assert identity(resolve(given)) == identity(config)


def test_floats_are_the_first_points_augmented(clouds: TrainConfig) -> None:
    config = resolve(replace(clouds, augment=True, seed=4))
    data = load_data(config)
    inputs = float_inputs(config, data)
    assert inputs.steps_per_epoch == 4
    x, y = inputs.train(5)
    chosen = inputs.order(5)
    wanted = augment_clouds(data.train_x[chosen, :8], seed=4, step=5, up=2)
    assert torch.equal(x, wanted.transpose(1, 2)) and torch.equal(y, data.train_y[chosen])
    plain, _ = float_inputs(replace(config, augment=False), data).train(5)
    assert torch.equal(plain, data.train_x[chosen, :8].transpose(1, 2))
    parts = list(inputs.tests())
    assert torch.equal(torch.cat([x for x, _ in parts]), data.test_x[:, :8].transpose(1, 2))
    assert torch.equal(torch.cat([y for _, y in parts]), data.test_y)


@pytest.mark.parametrize("augment", [True, False])
def test_integers_are_the_same_clouds(clouds: TrainConfig, augment: bool) -> None:
    config = resolve(replace(clouds, augment=augment, precision="int8"))
    data = load_data(config)
    floats, integers = float_inputs(config, data), int8_inputs(config, data)
    x, y = integers.train(3)
    exact, labels = floats.train(3)
    assert int(x.exponent) == -7 and torch.equal(y, labels)
    half = 2.0**-8
    assert torch.allclose(x.dequantize(), exact.double().clamp(-127 / 128, 127 / 128), atol=half)
    (test, _), (wanted, _) = next(integers.tests()), next(floats.tests())
    assert torch.allclose(test.dequantize(), wanted.double(), atol=2 * half)
    assert test.q.is_contiguous() and x.q.is_contiguous()


def test_a_part_of_the_clouds_is_a_pick_of_all_classes(clouds: TrainConfig) -> None:
    data = load_data(resolve(replace(clouds, train_images=20, batch_size=4)))
    assert len(data.train_x) == 20 and data.train_y.bincount().count_nonzero() >= 7
    again = load_data(resolve(replace(clouds, train_images=10, batch_size=4, seed=9)))
    assert torch.equal(again.train_x, data.train_x[:10])


FP32: dict[str, Any] = {"method": "cls1", "batch_norm": True, "tail_optimizer": "adam"}
INT8: dict[str, Any] = {"method": "cls2", "precision": "int8", "p_zero": (0.5, 0.9)}


@pytest.mark.parametrize("settings", [FP32, INT8], ids=["fp32", "int8"])
def test_an_interrupted_run_ends_in_the_same_bits(
    clouds: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    config = replace(clouds, augment=True, **settings)
    whole = Run(config)
    result = whole.go()
    kind = Int8Learner if "precision" in settings else FloatLearner
    step = kind.step

    def stopped(self: Any) -> None:
        step(self)
        if self.step_index == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "step", stopped)
        with pytest.raises(Interrupted, match="at step 3 of 8"):
            Run(replace(config, out=tmp_path / "other")).go()
    again = Run(replace(config, out=tmp_path / "other"))
    found = again.go()
    assert found["test_accuracy"] == result["test_accuracy"] and found["steps"] == 8
    one, other = (load_checkpoint(r.folder.path / CHECKPOINT)["model"] for r in (whole, again))
    assert list(one) == list(other) and all(torch.equal(one[k], other[k]) for k in one)
    logs = [(r.folder.path / TRAJECTORY).read_text().splitlines()[1:] for r in (whole, again)]
    assert logs[0] == logs[1] and len(logs[0]) == 8


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_every_method(clouds: TrainConfig, method: Any, precision: Any) -> None:
    config = resolve(replace(clouds, method=method, precision=precision, batch_size=4))
    learner = learner_for(config, load_data(config))
    before = {k: v.clone() for k, v in learner.model.state_dict().items()}
    learner.probe()
    after = learner.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    for _ in range(2):
        learner.step()
    after = learner.model.state_dict()
    moved = {k.partition(".")[0] for k in before if not torch.equal(before[k], after[k])}
    moved = {name for name in moved if not name.startswith("bn")}
    tail = {"cls2": {"fc3"}, "cls1": {"fc2", "fc3"}}.get(method.removeprefix("frozen-"))
    whole = {f"conv{i}" for i in range(1, 6)} | {"fc1", "fc2", "fc3"}
    wanted = tail if method.startswith("frozen-") else whole
    assert moved <= (wanted or set()) and moved & (tail or whole)
    if not method.startswith("frozen-") and precision == "fp32":
        assert moved == whole


def test_learns_shapes(tmp_path: Path) -> None:
    folder = write_modelnet10(tmp_path, train=200, test=100, points=32)
    arguments = [
        "--model", "pointnet", "--data", "modelnet10", "--data-dir", str(folder), "--points", "16",
        "--no-augment", "--method", "full-bp", "--batch-size", "20", "--epochs", "4",
        "--threads", "1", "--device", "cpu", "--no-plot", "--no-tensorboard",
        "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    assert main(arguments) == 0
    result = Run(TrainConfig(
        model="pointnet", data="modelnet10", data_dir=folder, points=16, augment=False, threads=1,
        method="full-bp", batch_size=20, epochs=4, device="cpu", tensorboard=False, plot=False,
        out=tmp_path / "run",
    )).go()  # fmt: skip
    assert result["test_accuracy"] >= 50.0  # chance is 10


@pytest.mark.parametrize("directions", ["auto", "feedback"])
def test_learns_by_other_directions(clouds: TrainConfig, directions: Any) -> None:
    """And goes on where it stood, batch norm and augmentation included."""
    config = resolve(replace(clouds, directions=directions))
    data = load_data(config)
    whole, parts = FloatLearner(config, data), FloatLearner(config, data)
    parts.step()
    state = parts.state()
    parts = FloatLearner(config, data)
    parts.load(state)
    parts.step()
    for _ in range(2):
        whole.step()
    for name, w in whole.state()["model"].items():
        assert torch.equal(w, parts.state()["model"][name]), name
    assert whole.skipped == 0
    moved = {n for n, w in whole.state()["model"].items() if not torch.equal(w, first(config)[n])}
    assert {n for n, _ in whole.model.named_parameters()} <= {f"module.{n}" for n in moved}


def first(config: TrainConfig) -> dict[str, Any]:
    """The weights before the first step."""
    return dict(build_network(config).state_dict())
