"""A deferred update is the plain one, bit for bit, whoever looks at the weights and when."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticzo import ZOSGD, ElasticZO, TrajectoryLog, pair_losses
from elasticzo.models import LeNet5, ResNet20


def tiny() -> nn.Module:
    """Small enough for the interpreter."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, stride=5), nn.ReLU(), nn.Flatten(), nn.Linear(100, 20), nn.Linear(20, 10)
    )


NETS: dict[str, Callable[[], nn.Module]] = {
    "lenet": LeNet5,
    "tiny": tiny,
    "resnet": lambda: ResNet20(channels=1),
    "bf16": lambda: LeNet5().bfloat16(),
    "fp64": lambda: LeNet5().double(),
}


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8, padding_idx=0)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.words(x).mean(1))  # type: ignore[no-any-return]


def setup(net: str, defer: bool, tail: Any = 1, **kwargs: Any) -> tuple[ElasticZO, ZOSGD, Any]:
    torch.manual_seed(0)
    noise = {"eps": 0.1} if net == "bf16" else {}
    on_gpu = kwargs.get("backend") == "triton" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    model = ElasticZO(NETS[net]().to(device), tail=tail, **noise, **kwargs).train()
    zo = ZOSGD(model, lr=1e-2, weight_decay=0.01, defer=defer)
    sgd = model.tail_optimizer(torch.optim.SGD, lr=0.05, momentum=0.9)
    return model, zo, sgd


def batch(net: str, i: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(i)
    dtype = {"bf16": torch.bfloat16, "fp64": torch.float64}.get(net, torch.float32)
    size = 16 if net == "resnet" else 28
    x = torch.randn(4, 1, size, size, generator=generator).to(dtype)
    return x, torch.randint(0, 10, (4,), generator=generator)


def step(parts: tuple[ElasticZO, ZOSGD, Any], net: str, i: int) -> Tensor:
    model, zo, sgd = parts
    x, y = (t.to(model.session.key.device) for t in batch(net, i))
    losses = pair_losses(F.cross_entropy, model(x), y)
    model.backward(losses)
    sgd.step()
    sgd.zero_grad()
    zo.step(losses if i != 2 else losses * float("nan"))  # step 2 is skipped
    return losses.detach()


def same_state(a: nn.Module, b: nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return all(torch.equal(mine[k], other[k]) for k in mine) and mine.keys() == other.keys()


@pytest.mark.parametrize("pairing", ["stacked", "sequential"])
@pytest.mark.parametrize(
    ("net", "backend"),
    [*((net, "numba") for net in NETS), ("tiny", "reference"), ("tiny", "triton")],
)
def test_equals_the_plain_update(net: str, backend: str, pairing: str) -> None:
    pytest.importorskip(backend) if backend != "reference" else None
    runs = [
        setup(net, defer, backend=backend, pairing=pairing, path="staged")
        for defer in (False, True)
    ]
    for i in range(4):
        plain, deferred = (step(run, net, i) for run in runs)
        assert torch.equal(plain, deferred)
    assert runs[1][0].session.pending is not None and runs[1][0].session.pending.left
    assert same_state(runs[0][0], runs[1][0])
    assert not runs[1][0].session.pending.left


def test_fused_layers_take_it_before_they_are_read() -> None:
    pytest.importorskip("triton")
    given = {"backend": "triton", "path": {"3": "fused", "0": "staged"}}
    runs = [setup("tiny", defer, **given) for defer in (False, True)]
    for i in range(3):
        assert torch.equal(step(runs[0], "tiny", i), step(runs[1], "tiny", i))
    assert same_state(runs[0][0], runs[1][0])


LOOKS: dict[str, Callable[[ElasticZO, ZOSGD], Any]] = {
    "eval": lambda model, zo: model.eval(),
    "state-dict": lambda model, zo: model.state_dict(),
    "head-parameters": lambda model, zo: list(model.head_parameters()),
    "named-head-parameters": lambda model, zo: list(model.named_head_parameters()),
    "flush": lambda model, zo: model.flush(),
    "zo-state": lambda model, zo: zo.state_dict(),
    "clean-forward": lambda model, zo: model.clean_forward(batch("lenet", 9)[0]),
    "deepcopy": lambda model, zo: copy.deepcopy(model),
    "pickle": lambda model, zo: torch.save(model, io.BytesIO()),
    "to": lambda model, zo: model.to(torch.float32),
    "check": lambda model, zo: model.check(batch("lenet", 9)[0]),
    "repr": lambda model, zo: repr(model),
}


@pytest.mark.parametrize("look", LOOKS)
def test_whoever_looks_sees_it_applied(look: str) -> None:
    runs = [setup("lenet", defer) for defer in (False, True)]
    for i in range(2):
        for run in runs:
            step(run, "lenet", i)
    model, zo, _ = runs[1]
    before = model.module.fc1.weight.clone()
    LOOKS[look](model, zo)
    assert not torch.equal(before, model.module.fc1.weight)
    assert torch.equal(model.module.fc1.weight, runs[0][0].module.fc1.weight)
    for model, _, _ in runs:
        model.train()
    assert torch.equal(step(runs[0], "lenet", 2), step(runs[1], "lenet", 2))
    assert same_state(runs[0][0], runs[1][0])


def test_evaluation_between_steps_and_resuming() -> None:
    runs = [setup("lenet", defer) for defer in (False, True)]
    x = batch("lenet", 7)[0]
    for run in runs:
        step(run, "lenet", 0)
    outputs = [model.eval()(x) for model, _, _ in runs]
    assert torch.equal(*outputs)
    saved = runs[1][0].state_dict(), runs[1][1].state_dict()
    resumed = setup("lenet", True)
    resumed[0].load_state_dict(copy.deepcopy(saved[0]))
    resumed[1].load_state_dict(copy.deepcopy(saved[1]))
    for run in (runs[0], resumed):
        run[0].train()
    resumed[2].load_state_dict(copy.deepcopy(runs[0][2].state_dict()))
    assert torch.equal(step(runs[0], "lenet", 1), step(resumed, "lenet", 1))
    assert same_state(runs[0][0], resumed[0])


def test_a_forward_that_fails_half_way_loses_nothing() -> None:
    runs = [setup("lenet", defer) for defer in (False, True)]
    for run in runs:
        step(run, "lenet", 0)
    handle = runs[1][0].module.fc1.register_forward_pre_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runs[1][0](batch("lenet", 1)[0])
    handle.remove()
    assert same_state(runs[0][0], runs[1][0])


def test_micro_batches_and_a_padding_row() -> None:
    runs = []
    for defer in (False, True):
        torch.manual_seed(0)
        model = ElasticZO(Words(), tail=0).train()
        zo = ZOSGD(model, lr=0.5, defer=defer)
        for i in range(3):
            generator = torch.Generator().manual_seed(i)
            losses = []
            for _ in range(2):
                x = torch.randint(0, 20, (6, 5), generator=generator)
                losses.append(pair_losses(F.cross_entropy, model(x), x[:, 0] % 3))
            zo.step(torch.stack(losses).mean(0))
        runs.append(model)
    assert same_state(*runs)


def test_a_log_of_a_deferred_run_replays(tmp_path: Any) -> None:
    from elasticzo import replay

    run = setup("lenet", True)
    start = copy.deepcopy(run[0].state_dict())
    log = TrajectoryLog(tmp_path / "log.jsonl", run[1])
    for i in range(3):
        step(run, "lenet", i)
    log.drain()
    torch.manual_seed(0)
    net = LeNet5()
    net.load_state_dict(start)
    replay(tmp_path / "log.jsonl", ElasticZO(net, tail=1))
    end = run[0].state_dict()
    for name, p in net.named_parameters():
        if not name.startswith("fc3"):
            assert torch.equal(p, end[name]), name
