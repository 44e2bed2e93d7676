"""CIFAR-10's pickled batches: what is read, and what is refused rather than run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elasticzo.data import load_cifar10, load_images
from elasticzo.data.cifar import CLASSES
from elasticzo.models import SmallCNN
from experiments.files import read_json
from experiments.train.__main__ import main
from experiments.train.config import TrainConfig
from experiments.train.resolve import resolve


def batch(folder: Path, name: str, labels: list[int], protocol: int = 4, **changes: Any) -> None:
    """A file in the published layout; a pixel's value is its label, and 100 + c in row 0."""
    x = np.repeat(np.array(labels, dtype=np.uint8), 3 * 32 * 32).reshape(len(labels), 3, 32, 32)
    for channel in range(3):
        x[:, channel, 0] = 100 + channel
    content = {b"data": x.reshape(len(labels), -1), b"labels": labels} | changes
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_bytes(pickle.dumps(content, protocol=protocol))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inner = tmp_path / "cifar-10-batches-py"
    batch(inner, "data_batch_1", [0, 1, 2])
    batch(inner, "data_batch_3", [9, 8], protocol=2)  # as python 2 wrote them
    batch(inner, "test_batch", [5])
    return tmp_path


def test_all_batches_that_are_there(folder: Path) -> None:
    data = load_images("cifar10", folder)
    assert data.train_x.shape == (5, 3, 32, 32) and data.train_x.dtype == torch.uint8
    assert data.train_y.tolist() == [0, 1, 2, 9, 8] and data.test_y.tolist() == [5]
    assert data.train_x[:, 0, 1:].flatten(1).eq(data.train_y[:, None]).all()
    assert data.train_x[0, :, 0, 0].tolist() == [100, 101, 102]
    assert data.classes == CLASSES and len(CLASSES) == 10
    same = load_cifar10(folder / "cifar-10-batches-py")
    assert torch.equal(same.train_x, data.train_x)


class Runs:
    def __reduce__(self) -> Any:
        return os.mkdir, ("made",)


def test_what_is_no_batch_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    inner = folder / "cifar-10-batches-py"
    (inner / "data_batch_1").write_bytes(pickle.dumps({b"data": Runs(), b"labels": [1]}))
    with pytest.raises(ValueError, match=r"data_batch_1 is no batch .*mkdir, which no array has"):
        load_cifar10(folder)
    assert not (tmp_path / "made").exists()
    for text, message in ((b"", "is no batch"), (pickle.dumps({}), "is no batch"),
                          (pickle.dumps([1]), "is no batch")):  # fmt: skip
        (inner / "data_batch_1").write_bytes(text)
        with pytest.raises(ValueError, match=message):
            load_cifar10(folder)
    for labels in (3, ["a", "b"], [1.5, 2.5]):
        (inner / "data_batch_1").write_bytes(pickle.dumps({b"data": 0, b"labels": labels}))
        with pytest.raises(ValueError, match=r"data_batch_1 is no batch .*: labels of shape"):
            load_cifar10(folder)
    content = {b"data": np.zeros((2, 10), np.uint8), b"labels": [1, 2]}
    (inner / "data_batch_1").write_bytes(pickle.dumps(content))
    batch(inner, "data_batch_10", [1])  # of another name: not read
    with pytest.raises(ValueError, match=r"images \[n, 3072\] and as many labels, got uint8"):
        load_cifar10(folder)
    with pytest.raises(FileNotFoundError, match="data_batch_1 is neither in"):
        load_cifar10(tmp_path / "nowhere")


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_small_network(batch_norm: bool) -> None:
    net = SmallCNN(batch_norm=batch_norm)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    weights = 3 * 32 * 9 + 32 * 64 * 9 + 64 * 64 * 9 + 1024 * 10 + 32 + 64 + 64 + 10
    assert sum(p.numel() for p in net.parameters()) == weights + 2 * 160 * batch_norm


def test_the_training_command_takes_both(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--data", "cifar10", "--data-dir", str(folder), "--epochs", "1", "--batch-size", "2"]
    given += ["--device", "cpu", "--threads", "1", "--no-tensorboard", "--no-plot"]
    out = folder / "run"
    how = ["--model", "cnn", "--directions", "feedback", "--batch-norm", "--out", str(out)]
    assert main([*given, *how]) == 0
    assert read_json(out / "result.json")["steps"] == 2
    how = ["--model", "resnet20", "--method", "full-bp", "--out", str(folder / "other")]
    assert main([*given, *how]) == 0
    for changes, message in (
        ({"model": "lenet5"}, "'lenet5' takes 28x28 images, got data 'cifar10'"),
        ({"model": "cnn", "data": "mnist"}, "'cnn' takes cifar10, got data 'mnist'"),
        ({"model": "cnn", "download": True}, "'cifar10' is not fetched"),
        ({"model": "resnet20", "batch_norm": True}, "batch_norm belongs to pointnet and cnn"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve(TrainConfig(**{"data": "cifar10", "data_dir": folder, **changes}))
