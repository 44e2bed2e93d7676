"""The control in which every layer has a loss of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from elasticzo.models import LeNet5, PointNet
from experiments.train.config import TrainConfig
from experiments.train.local import PRODUCTS, LocalNet
from experiments.train.resolve import resolve
from experiments.train.run import train


@pytest.mark.parametrize("build", [LeNet5, lambda: PointNet(10)], ids=["lenet5", "pointnet"])
def test_no_error_passes_from_a_layer_to_the_one_before(build: Callable[[], nn.Module]) -> None:
    """Each loss has a gradient by one layer alone, the last by the outputs'; and without training
    it is the network."""
    torch.manual_seed(0)
    net = build()
    x = torch.randn(4, 1, 28, 28) if isinstance(net, LeNet5) else torch.randn(4, 3, 16)
    plain, y = copy.deepcopy(net), torch.tensor([1, 0, 3, 2])
    local = LocalNet(net, x, 10)
    assert all(torch.equal(t, plain.state_dict()[k]) for k, t in net.state_dict().items())
    torch.testing.assert_close(local.eval()(x), plain.eval()(x))
    local.train()
    outputs, ends = local(x), list(local._ends)
    assert len(ends) == len(local.classifiers) > 3
    pairs = zip(local.classifiers, ends, strict=True)
    losses = [cross_entropy(c(t.flatten(1)), y) for c, t in pairs] + [cross_entropy(outputs, y)]
    torch.testing.assert_close(local.local_losses(y), torch.stack(losses[:-1]).sum())
    layers = [m for m in net.modules() if isinstance(m, PRODUCTS)]
    for k, loss in enumerate(losses):
        weights = [m.weight for m in layers]
        found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        assert [g is not None for g in found] == [i == k for i in range(len(layers))]


def test_it_trains_by_the_command_and_has_no_integers(tmp_path: Path) -> None:
    given = {"method": "local", "device": "cpu", "tensorboard": False, "plot": False}
    found = train(resolve(TrainConfig(**given, epochs=12, eval_epochs=12, out=tmp_path / "run")))
    assert found["test_accuracy"] > 70.0
    for changes, message in (
        ({"precision": "int8"}, "'local' is of fp32 and bf16"),
        ({"model": "resnet20"}, "'local' needs layers one after the other, got model 'resnet20'"),
        ({"start_from": tmp_path / "run"}, "'local' has classifiers that no trained run has"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve(TrainConfig(method="local", **changes))


def test_it_runs_in_bf16(tmp_path: Path) -> None:
    config = TrainConfig(
        method="local", precision="bf16", epochs=1, train_images=64, device="cpu",
        tensorboard=False, plot=False, out=tmp_path / "run",
    )  # fmt: skip
    assert train(resolve(config))["steps"] == 1
