"""PointNet: its size, its cuts, the pair through it, and its integer counterpart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from elasticzo import ElasticZO
from elasticzo.int8 import ElasticZOInt8, Int8Network, Int8ZO
from elasticzo.models import PointNet
from tests.elasticzo.int8.nets import batch, digest, fixed_weights, one_step


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_size_and_shape() -> None:
    model, bare = PointNet(), PointNet(batch_norm=False)
    assert parameters(model) == 819_624 and parameters(bare) == 815_400
    assert parameters(PointNet(classes=10)) == 819_624 - 30 * 257
    for net in (model, bare):
        assert net(torch.randn(2, 3, 9)).shape == (2, 40)
        weights = [m for m in net if isinstance(m, (nn.Conv1d, nn.Linear))]
        assert len(weights) == 8
        for m in weights:  # Kaiming: deviation sqrt(2 / fan in), 5 standard errors
            fan = m.weight.flatten(1).shape[1]
            error = 5 / (2 * m.weight.numel()) ** 0.5
            assert abs(float(m.weight.detach().std()) / (2 / fan) ** 0.5 - 1) < error
            assert m.bias is not None and not m.bias.any()
    assert not any("bn" in name for name, _ in bare.named_modules())


def test_does_not_depend_on_the_order_of_points() -> None:
    model = PointNet().eval()
    x = torch.randn(3, 3, 12)
    torch.testing.assert_close(model(x), model(x[:, :, torch.randperm(12)]))


@pytest.mark.parametrize(
    ("tail", "names"),
    [
        (1, {"fc3"}),
        (2, {"fc2", "bn7", "fc3"}),
        (["fc2", "bn7", "fc3"], {"fc2", "bn7", "fc3"}),
    ],
)
def test_cuts(tail: Any, names: set[str]) -> None:
    model = ElasticZO(PointNet(), tail)
    assert {name.partition(".")[0] for name, _ in model.named_tail_parameters()} == names


def test_each_half_is_normalised_by_itself() -> None:
    torch.manual_seed(0)
    net = PointNet(classes=4)
    x = torch.randn(5, 3, 7)
    model = ElasticZO(net, 2, eps=1e-2, seed=3, noise="rademacher")
    stacked = model(x).detach()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    apart = ElasticZO(model.unwrap(), 2, eps=1e-2, seed=3, noise="rademacher", pairing="sequential")
    torch.testing.assert_close(apart(x).detach(), stacked, rtol=1e-4, atol=1e-4)
    moved = [k for k in before if "num_batches" in k]
    assert len(moved) == 7
    assert all(int(net.state_dict()[k]) == int(before[k]) + 1 for k in moved)  # once for both
    assert not torch.equal(net.state_dict()["bn6.running_mean"], before["bn6.running_mean"])


def tiny(batch_norm: bool) -> nn.Module:
    """PointNet's modules at a size for the interpreter."""
    net = PointNet(classes=4, batch_norm=batch_norm)
    sizes = {"conv1": (3, 4), "conv2": (4, 4), "conv3": (4, 4), "conv4": (4, 6), "conv5": (6, 8)}
    for name, (inner, outer) in sizes.items():
        setattr(net, name, nn.Conv1d(inner, outer, 1))
    for name, (inner, outer) in {"fc1": (8, 6), "fc2": (6, 5), "fc3": (5, 4)}.items():
        setattr(net, name, nn.Linear(inner, outer))
    for i, width in enumerate((4, 4, 4, 6, 8, 6, 5), start=1):
        if batch_norm:
            setattr(net, f"bn{i}", nn.BatchNorm1d(width))
    return fixed_weights(net)


@pytest.mark.parametrize("tail", [0, 1, 2, "all"])
def test_integers_are_the_same_bits_on_every_backend(tail: Any) -> None:
    found = []
    for backend in ("reference", "numba", "triton"):
        model = ElasticZOInt8(tiny(False), tail, r_max=7, p_zero=0.3, seed=1, backend=backend)
        zo, bp = Int8ZO(model, b_zo=2), model.tail_optimizer(b_bp=3)
        for step in range(3):
            x, y = batch((3, 3, 5), 4, step)
            one_step(model, zo, bp, x, y)
        found.append(digest(model))
    assert len(set(found)) == 1


def test_fresh_batch_norm_folds_away() -> None:
    torch.manual_seed(0)
    normed = PointNet(classes=4)
    bare = PointNet(classes=4, batch_norm=False)
    bare.load_state_dict({k: v for k, v in normed.state_dict().items() if "bn" not in k})
    one, other = Int8Network(normed), Int8Network(bare)
    assert list(one.layers) == ["conv1", "conv2", "conv3", "conv4", "conv5", "fc1", "fc2", "fc3"]
    for a, b in zip(one.blocks, other.blocks, strict=True):
        assert torch.equal(a.layer.weight, b.layer.weight)
        assert (a.relu, a.pools) == (b.relu, b.pools)
