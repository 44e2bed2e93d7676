"""The captured step: as eager steps bit for bit, over a schedule; what it refuses, and why.

Without a GPU the same object runs eagerly: its rehearsal, its checks and its bookkeeping are the
same. The tests of the graph itself need a device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticzo import ZOSGD, ElasticZO, TrajectoryLog, capture_step, pair_losses, read_trajectory
from elasticzo.models import LeNet5, ResNet20

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NETS: dict[str, Callable[[], nn.Module]] = {
    "lenet": LeNet5,
    "resnet": lambda: ResNet20(channels=1),
    "dropout": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(784, 20), nn.Dropout(), nn.ReLU(), nn.Linear(20, 10)
    ),
}
TAILS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "adam": (torch.optim.Adam, {}),
}


def rate(value: float) -> Tensor:
    return torch.tensor(value, device=DEVICE)


class Run:
    """A model, its optimisers and schedules; all learning rates on the device."""

    def __init__(self, net: str = "lenet", tail: str | None = "momentum", **settings: Any) -> None:
        torch.manual_seed(0)
        zo_settings = {k: settings.pop(k) for k in ("defer", "clip") if k in settings}
        self.model = ElasticZO(NETS[net]().to(DEVICE), tail=1 if tail else 0, **settings).train()
        self.zo = ZOSGD(self.model, lr=rate(1e-2), weight_decay=0.01, **zo_settings)
        self.tail = None
        if tail:
            cls, kwargs = TAILS[tail]
            self.tail = self.model.tail_optimizer(cls, lr=rate(0.01), **kwargs)
        self.schedules = [
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            for optimizer in (self.zo, self.tail)
            if optimizer is not None
        ]

    def eager(self, x: Tensor, y: Tensor) -> Tensor:
        if self.tail is not None:
            self.tail.zero_grad()
        losses = pair_losses(F.cross_entropy, self.model(x), y)
        self.model.backward(losses)
        if self.tail is not None:
            self.tail.step()
        self.zo.step(losses)
        return losses.detach()

    def capture(self) -> Any:
        return capture_step(self.zo, F.cross_entropy, *batch(99), tail=self.tail)

    def schedule(self) -> None:
        for schedule in self.schedules:
            schedule.step()

    def state(self) -> dict[str, Any]:
        state = {"model": self.model.state_dict(), "zo": self.zo.state_dict()}
        return copy.deepcopy(state | ({"tail": self.tail.state_dict()} if self.tail else {}))


def batch(i: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(4, 1, 28, 28, generator=generator)
    if i == 2:
        x[0, 0, 0, 0] = float("nan")  # this step is skipped
    return x.to(DEVICE), torch.randint(0, 10, (4,), generator=generator).to(DEVICE)


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            if key not in ("capturable",):
                assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize("defer", [False, True], ids=["at-once", "deferred"])
@pytest.mark.parametrize("tail", [None, *TAILS])
@pytest.mark.parametrize("net", NETS)
def test_equals_eager_steps_over_a_schedule(net: str, tail: str | None, defer: bool) -> None:
    eager, captured = Run(net, tail, defer=defer), Run(net, tail, defer=defer)
    before = captured.state()
    step = captured.capture()
    assert step.captured is (DEVICE.type == "cuda")
    if tail != "adam":  # whose state begins with its first step
        assert_same(captured.state(), before)
    for i in range(5):
        wanted = eager.eager(*batch(i))
        losses = step(*batch(i))
        assert torch.equal(losses, wanted) or i == 2
        if i == 3:  # a look in between changes nothing
            assert_same(captured.state(), eager.state())
        for run in (eager, captured):
            run.schedule()
    assert_same(captured.state(), eager.state())
    assert captured.zo.skipped == 1


def test_a_captured_step_is_logged(tmp_path: Any) -> None:
    records = []
    for name in ("eager", "captured"):
        run = Run("lenet", "sgd")
        log = TrajectoryLog(tmp_path / name, run.zo)
        step = run.capture() if name == "captured" else run.eager
        for i in range(4):
            step(*batch(i))
            run.schedule()
        log.drain()
        records.append(read_trajectory(tmp_path / name)[1])
    kept = [[{k: v for k, v in r.items() if k != "losses"} for r in run] for run in records]
    assert kept[0] == kept[1] and len(kept[0]) == 4
    assert [r["losses"] for r in records[0] if not r["skipped"]] == [
        r["losses"] for r in records[1] if not r["skipped"]
    ]


class Draws(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


DRAWN = r"1 \(Draws\) draws from torch's generator"
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "number": (
        lambda: _with_rate("zo", 0.1).capture(),
        ValueError,
        rf"lr of group 0 of zo must be a 0-d tensor on {DEVICE}.*it is the number 0.1",
    ),
    "number-tail": (
        lambda: _with_rate("tail", 0.1).capture(),
        ValueError,
        "lr of group 0 of tail must be a 0-d tensor .*it is the number 0.1",
    ),
    "vector": (lambda: _with_rate("zo", torch.ones(1)).capture(), ValueError, "0-d tensor"),
    "no-tail": (
        lambda: capture_step(Run().zo, F.cross_entropy, *batch(0)),
        ValueError,
        "the model has a tail: give its optimiser",
    ),
    "ungated": (lambda: _ungated().capture(), ValueError, "skip the steps .* of none"),
    "another-model": (lambda: _of_another().capture(), ValueError, "of another model"),
    "eval": (lambda: _evaluating().capture(), RuntimeError, r"call model.train\(\) first"),
    "draws": (lambda: _drawing("sequential").capture(), RuntimeError, DRAWN),
    "draws-stacked": (lambda: _drawing("stacked").capture(), RuntimeError, DRAWN),
    "shape": (
        lambda: Run().capture()(torch.randn(5, 1, 28, 28, device=DEVICE), batch(0)[1]),
        ValueError,
        r"captured for inputs \[\(\(4, 1, 28, 28\), torch.float32\)\], got \[\(\(5, 1",
    ),
    "dtype": (
        lambda: Run().capture()(batch(0)[0], batch(0)[1].int()),
        ValueError,
        "captured for targets",
    ),
    "momentum-changed": (lambda: _changed_momentum(), RuntimeError, "capture it again"),
    "moved": (lambda: _moved(), RuntimeError, "capture it again"),
}


def _with_rate(who: str, lr: Any) -> Run:
    run = Run()
    getattr(run, who).param_groups[0]["lr"] = lr
    return run


def _ungated() -> Run:
    run = Run()
    run.tail = torch.optim.SGD(run.model.tail_parameters(), lr=rate(0.1))
    return run


def _of_another() -> Run:
    run = Run()
    run.tail = Run().tail
    return run


def _evaluating() -> Run:
    run = Run()
    run.model.eval()
    return run


def _drawing(pairing: str) -> Run:
    run = Run(tail=None)
    net = nn.Sequential(nn.Flatten(), Draws(), nn.Linear(784, 10)).to(DEVICE)
    run.model = ElasticZO(net, tail=0, pairing=pairing).train()
    run.zo = ZOSGD(run.model, lr=rate(0.1))
    return run


def _changed_momentum() -> None:
    run = Run()
    step = run.capture()
    assert run.tail is not None
    run.tail.param_groups[0]["momentum"] = 0.5
    step(*batch(0))


def _moved() -> None:
    run = Run()
    step = run.capture()
    weight = run.model.module.conv1.weight
    weight.data = weight.data.clone()
    step(*batch(0))


@pytest.mark.filterwarnings("ignore:the model draws from torch's generator")
@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()


def test_a_refused_capture_leaves_the_run_as_it_was() -> None:
    run, other = Run(), Run()
    before = run.state()

    def broken(*args: Any) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        capture_step(run.zo, broken, *batch(0), tail=run.tail)
    assert_same(run.state(), before)
    assert torch.equal(run.eager(*batch(0)), other.eager(*batch(0)))
    assert_same(run.state(), other.state())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_replay_is_one_graph_launch() -> None:
    run = Run("resnet")
    step = run.capture()
    given = batch(0)
    step(*given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step.captured and run.model.step_index == 4 and run.zo.skipped == 0
