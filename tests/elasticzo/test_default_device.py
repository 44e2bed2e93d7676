"""torch's default device and dtype are the user's: a model runs where its weights are."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import elasticzo
import zo_kernels
from elasticzo import ZOSGD, ElasticZO, ZOAdam, pair_losses
from elasticzo.data import load_digits
from elasticzo.data.augment import augment_clouds
from elasticzo.data.order import epoch_order
from elasticzo.feedback import Feedback
from elasticzo.int8 import ElasticZOInt8, Int8ZO, quantize
from tests.elasticzo.int8.nets import batch, small_net

BACKENDS = ["numba", "reference"]
MAKERS = (
    "tensor zeros empty full arange ones rand randn randint randperm linspace eye as_tensor "
    "empty_strided scalar_tensor logspace asarray"
)
PACKAGES = [Path(package.__file__ or "").parent for package in (elasticzo, zo_kernels)]


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """ "meta" stands for a GPU: what is made there by mistake has no values."""
    dtype = torch.get_default_dtype()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(dtype)


def net_and_batch() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Net(), torch.randn(5, 1, 8, 8), torch.arange(5) % 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.rnn, self.fc = nn.GRU(4, 6, batch_first=True), nn.Linear(6, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.norm(self.conv(x)), 2).flatten(2).mT
        x = self.attention(x, x, x)[0]
        out: Tensor = self.fc(self.drop(self.rnn(x)[0][:, -1]))
        return out


def steps(given: tuple[nn.Module, Tensor, Tensor], settings: dict[str, Any]) -> list[Tensor]:
    net, x, y = copy.deepcopy(given)
    model = ElasticZO(net, tail=1, **settings).train()
    zo = ZOAdam(model, lr=1e-2)
    bp = model.tail_optimizer(torch.optim.SGD, lr=0.1)
    for _ in range(2):
        losses = pair_losses(F.cross_entropy, model(x), y, reduction=model.reduction)
        model.backward(losses)
        bp.step()
        zo.step(losses)
    zo.load_state_dict(zo.state_dict())
    model.check(x)
    return [*model.parameters(), *model.buffers()]


SETTINGS: list[dict[str, Any]] = [
    *(
        {"backend": backend, "pairing": p}
        for backend in BACKENDS
        for p in ("stacked", "sequential")
    ),
    {"directions": "sample"},
    {"directions": "node"},
    {"directions": "rank1"},
    {"directions": Feedback()},
    {"noise": "rademacher", "queries": 2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_steps_are_the_same(settings: dict[str, Any], request: pytest.FixtureRequest) -> None:
    given = net_and_batch()
    here = steps(given, settings)
    request.getfixturevalue("elsewhere")
    assert all(map(torch.equal, here, steps(given, settings)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_integers(backend: str, request: pytest.FixtureRequest) -> None:
    given, (x, y) = small_net(), batch((6, 1, 8, 8), 4)

    def run() -> list[Tensor]:
        model = ElasticZOInt8(given, tail=1, backend=backend).train()
        zo, bp = Int8ZO(model, b_zo=1), model.tail_optimizer(b_bp=3)
        for _ in range(2):
            logits = model(x)
            model.backward(logits, y, "mean")
            bp.step()
            zo.step(model.losses(logits, y))
        return [*model.buffers(), quantize(x.dequantize()).q]

    here = run()
    request.getfixturevalue("elsewhere")
    assert all(map(torch.equal, here, run()))


def test_data_and_the_budget(request: pytest.FixtureRequest) -> None:
    net, x, _ = net_and_batch()
    clouds = torch.randn(2, 5, 3)

    def run() -> list[Tensor]:
        split = load_digits().hold_out(100, 0)
        budget: dict[str, Any] = {"memory_budget": 1 << 22, "example_input": x}
        model = ElasticZO(copy.deepcopy(net), tail="auto", **budget)
        assert model.fitted is not None
        return [split.train_x, epoch_order(9, 0, 0), augment_clouds(clouds, seed=0, step=0, up=1)]

    here = run()
    request.getfixturevalue("elsewhere")
    assert all(map(torch.equal, here, run()))


def test_losses_as_numbers(request: pytest.FixtureRequest) -> None:
    net, x, _ = net_and_batch()
    request.getfixturevalue("elsewhere")
    model = ElasticZO(net, tail=0).train()
    before = [p.clone() for p in model.parameters()]
    model(x)
    ZOSGD(model, lr=0.1).step([1.0, 0.5])  # type: ignore[arg-type]
    assert not any(map(torch.equal, before, model.parameters()))


def test_every_new_tensor_has_its_place() -> None:
    files = [path for package in PACKAGES for path in package.rglob("*.py")]
    assert len(files) > 100
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            made = ast.unparse(node.func.value) == "torch" and node.func.attr in MAKERS.split()
            placed = any(k.arg in ("device", None) for k in node.keywords)
            assert placed or not made, f"{path}:{node.lineno} makes a tensor without a device"
