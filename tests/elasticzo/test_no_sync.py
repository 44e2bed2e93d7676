"""A training step reads nothing back: it runs whole on tensors that have no values.

On the meta device there is no data: `.item()`, `.tolist()`, `bool()` and `torch.equal` raise. The
kernels' launches are counted and not run (Triton's interpreter would read the memory). Copies from
the host, which wait as well, are caught by a dispatch mode.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import zo_kernels.ops
import zo_kernels.triton
from elasticzo import ZOSGD, ElasticZO, pair_losses
from elasticzo.buffers import all_buffers
from elasticzo.models import LeNet5, ResNet20

pytest.importorskip("triton")
META = torch.device("meta")
ON_META = pytest.mark.skipif(torch.cuda.is_available(), reason="stands for a device: use it")
MODULES = [
    importlib.import_module(f"{column.__name__}.{found.name}")
    for column in (zo_kernels.ops, zo_kernels.triton)
    for found in pkgutil.iter_modules(column.__path__)
]


class HostTraffic(TorchDispatchMode):
    """Complains of an op that mixes tensors of the host with those of the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = pytree.tree_leaves((args, kwargs, result))
        kinds = {(t.device.type, t.dim()) for t in leaves if isinstance(t, Tensor) and t.numel()}
        # A 0-d host tensor beside device ones is a number: it travels with the launch.
        kinds -= {("cpu", 0)}
        assert len({device for device, _ in kinds}) <= 1, f"{func} moves data between devices"
        return result


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kernels launched; on the meta device no table and no optimiser kernel exists."""
    launched: list[str] = []

    class Launch:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **kwargs: launched.append(self.name)

    for module in MODULES:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Launch(name))
    monkeypatch.setattr("elasticzo.losses._loss_backend", lambda device: "triton")
    monkeypatch.setattr("elasticzo.optim.tail.FUSED_DEVICES", ("meta",))
    for name in ("sgd", "adam"):
        module = importlib.import_module(f"torch.optim.{name}")
        monkeypatch.setattr(module, "_device_dtype_check_for_fused", lambda *a, **k: None)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *a: False)
    # The ops' own host code runs under the dispatch mode, too, not their fakes.
    monkeypatch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
    with torch.library._scoped_library("aten", "IMPL") as aten:
        for name in ("sgd", "adam"):
            aten.impl(f"_fused_{name}_.tensor_lr", lambda *a, **k: None, "Meta")
        yield launched


def on_meta(net: nn.Module, **kwargs: Any) -> ElasticZO:
    """Wrapped, and as after its first forward (which may look at values)."""
    model = ElasticZO(net.to(META), backend="triton", **kwargs).train()
    model.moved(META)  # its seed, too, which otherwise waits on the CPU for weights with values
    model.engine.settle(all_buffers(model.module))
    return model


def tail_of(model: ElasticZO, cls: Any, **settings: Any) -> Any:
    optimizer = model.tail_optimizer(cls, lr=0.1, **settings)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.1, device=META)
        if "capturable" in group:
            group["capturable"] = True
    return optimizer


class Norms(nn.Module):
    """BatchNorm with a cumulative average, LayerNorm, GroupNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=4),
            nn.BatchNorm2d(8, momentum=None),
            nn.ReLU(),
            nn.GroupNorm(2, 8),
            nn.LayerNorm([7, 7]),
            nn.Flatten(),
        )
        self.out = nn.Linear(8 * 7 * 7, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x))  # type: ignore[no-any-return]


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any]]] = {
    "staged": (LeNet5, {"path": "staged"}, {}),
    "deferred": (LeNet5, {"path": "staged"}, {"defer": True}),
    "queries": (LeNet5, {"path": "staged", "queries": 3}, {"clip": 5.0}),
    "fused": (LeNet5, {"path": "fused"}, {}),
    "norms": (Norms, {"path": "staged"}, {}),
    "sequential": (LeNet5, {"path": "staged", "pairing": "sequential"}, {}),
    "resnet": (ResNet20, {"path": "staged"}, {}),
    "dropout": (lambda: nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(784, 10)), {}, {}),
}


@ON_META
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("tail", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_for_nothing(
    case: str, tail: int, optimizer: Any, launches: list[str]
) -> None:
    make, settings, zo_settings = CASES[case]
    tail = 0 if case == "dropout" else tail
    model = on_meta(make(), tail=tail, **settings)
    zo = ZOSGD(model, lr=0.1, weight_decay=0.1, **zo_settings)
    schedule = torch.optim.lr_scheduler.ExponentialLR(zo, 0.9)
    tail_optimizer = tail_of(model, optimizer)
    channels = 3 if case == "resnet" else 1
    x, y = torch.empty(4, channels, 28, 28, device=META), torch.empty(4, device=META).long()

    def step() -> None:
        losses = pair_losses(F.cross_entropy, model(x), y)
        model.backward(losses)
        tail_optimizer.step()
        tail_optimizer.zero_grad()
        zo.step(losses)
        schedule.step()  # a new number every step

    step()  # tables and settings are written once
    first = len(launches)
    assert first >= 2
    with HostTraffic():
        for _ in range(2):
            step()
    assert len(launches) == 3 * first


@ON_META
def test_losses_by_sample_wait_for_nothing(launches: list[str]) -> None:
    """The kernel's, and by torch's formula with weights; what their sums are divided by, too."""
    x = torch.empty(2, 4, 10, device=META, requires_grad=True)
    y, weight = torch.empty(4, device=META).long(), torch.empty(10, device=META)
    given: tuple[dict[str, Any], ...] = ({}, {"weight": weight}, {"ignore_index": 3})
    with HostTraffic():
        for settings in given:
            losses = pair_losses(F.cross_entropy, x, y, reduction="none", **settings)
            assert losses.shape == (2, 4)
            losses.sum().backward()
    assert launches == 2 * ["_cross_entropy_kernel", "_cross_entropy_backward_kernel"]


@ON_META
def test_what_it_looks_for_is_found(launches: list[str]) -> None:
    t = torch.empty(3, device=META)
    with pytest.raises(AssertionError, match="moves data"), HostTraffic():
        t.copy_(torch.zeros(3))
    for read in (t.sum().item, t.tolist, lambda: bool(t.sum() > 0), lambda: torch.equal(t, t)):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tail", [0, 1])
def test_a_step_on_a_gpu_waits_for_nothing(tail: int) -> None:
    model = ElasticZO(ResNet20().cuda(), tail=tail).train()
    zo = ZOSGD(model, lr=1e-3)
    sgd = model.tail_optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
    x, y = torch.randn(8, 3, 32, 32, device="cuda"), torch.arange(8, device="cuda")

    def step() -> None:
        losses = pair_losses(F.cross_entropy, model(x), y)
        model.backward(losses)
        sgd.step()
        sgd.zero_grad()
        zo.step(losses)

    for _ in range(2):
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert model.step_index == 5 and zo.skipped == 0
