"""Weights are read perturbed, wherever a forward reads them, or the model is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticzo import ZOSGD, ElasticZO, pair_losses, unwrap
from tests.elasticzo._halves import PAIRINGS, B, D, SelfAttention, check, explicit

# ---- weights beside their layer


class Clip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale, self.o = (
            nn.Linear(D, D),
            nn.Parameter(torch.tensor(1.0)),
            nn.Linear(D, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.scale.exp() * self.fc(x))


class Mix(Clip):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.scale[0] * x + self.scale[1] * self.fc(x))


class Normed(nn.Module):
    def __init__(self, read: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.fc, self.o, self.read = nn.Linear(D, D), nn.Linear(D, 3), read

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.fc(x) / self.read(self.fc.weight))


def written(w: Tensor) -> Tensor:
    room = torch.zeros(D, D, dtype=w.dtype)
    room[:] = w
    return room.norm()


READS: dict[str, Callable[[Tensor], Any]] = {
    "norm": lambda w: w.norm(),
    "item": lambda w: w.square().sum().item(),
    "item of it": lambda w: w.view(-1)[0].item(),
    "list": lambda w: w.tolist()[0][0],
    "number": lambda w: float(w.sum()),
    "truth": lambda w: 2.0 if (w > 0).sum() > 17 else 3.0,
    "numpy": lambda w: float(w.detach().numpy().sum()),
    "data": lambda w: w.data.norm(),
    "written": written,
}


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_reads_without_dimensions(pairing: str) -> None:
    x = torch.randn(B, D).double()
    for make in (Clip, Mix, *(lambda read=read: Normed(read) for read in READS.values())):
        check(make(), x, pairing=pairing)
    model = check(
        Normed(lambda w: w.shape[0] + w.dim() + w.is_floating_point()), x, pairing=pairing
    )
    assert not any(layer.by_half for layer in model.engine.plan.layers.values())


# ---- patched forwards


def ten(self: Any, x: Tensor) -> Tensor:
    y = type(self).forward(self, x)
    return 10 * (y[0] if isinstance(y, tuple) else y)


PATCHED: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(D, D),
    "norm": lambda: nn.LayerNorm(D),
    "batch norm": lambda: nn.BatchNorm1d(D),
    "dropout": lambda: nn.Dropout(0.0),
    "sequence": lambda: nn.Sequential(nn.Linear(D, D)),
    "attention": lambda: SelfAttention(D, 2, batch_first=True),
}


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("kind", list(PATCHED))
def test_a_patched_forward_runs(kind: str, pairing: str) -> None:
    net = nn.Sequential(nn.Linear(D, D), PATCHED[kind](), nn.Linear(D, 3))
    net[1].forward = MethodType(ten, net[1])
    check(net, torch.randn(B, D).double(), pairing=pairing)


@pytest.mark.parametrize("kind", [kind for kind in PATCHED if kind != "attention"])
def test_a_forward_patched_after_wrapping_is_refused(kind: str) -> None:
    x = torch.randn(B, D)
    for early in (True, False):
        net = nn.Sequential(nn.Linear(D, D), PATCHED[kind](), nn.Linear(D, 3))
        model = pickle.loads(pickle.dumps(ElasticZO(net, tail=0))).train()
        if not early:
            model(x)
        else:
            model = ElasticZO(unwrap(net), tail=0).train()
        model.module[1].forward = MethodType(ten, model.module[1])
        with pytest.raises(RuntimeError, match="forward of '1' is another one than when the model"):
            model(x)
        del model.module[1].forward
        assert model(x).shape == (2, B, 3)


def test_a_class_that_is_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = nn.Linear.forward
    x, net = torch.randn(B, D).double(), nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 3))
    model = ElasticZO(copy.deepcopy(net), tail=0).train()

    @wraps(plain)
    def doubled(self: Any, x: Tensor) -> Tensor:
        return 2 * plain(self, x)

    monkeypatch.setattr(nn.Linear, "forward", doubled)
    with pytest.raises(RuntimeError, match="forward of '0' is another one than when the model"):
        model(x.float())
    check(net, x)


class Loud(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_subclass_with_a_forward_of_its_own() -> None:
    check(nn.Sequential(nn.Linear(D, D), Loud(0.0), nn.Linear(D, 3)), torch.randn(B, D).double())


@pytest.mark.filterwarnings("ignore")
def test_scripted_children_are_refused_by_name() -> None:
    for make in (torch.jit.script, lambda m: torch.jit.trace(m, torch.randn(2, D))):
        for kind, held in ((nn.Linear, "weight"), (nn.BatchNorm1d, "weight")):
            child = make(kind(D, D) if kind is nn.Linear else kind(D))
            for tail in (0, 1):
                net = nn.Sequential(nn.Linear(D, D), child, nn.Linear(D, 3))
                message = rf"module '1' is scripted or traced and holds '{held}'"
                with pytest.raises(TypeError, match=message):
                    ElasticZO(net, tail=tail)
    net = nn.Sequential(nn.Linear(D, D), torch.jit.script(nn.Tanh()), nn.Linear(D, 3))
    assert ElasticZO(net, tail=1).train()(torch.randn(B, D)).shape == (2, B, 3)


# ---- another path later


class Paths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 3)
        self.norm = nn.BatchNorm1d(D, affine=False)

    def forward(self, x: Tensor, how: str = "all") -> Tensor:
        if how == "raw":
            h = F.linear(x, self.a.weight, self.a.bias)
        elif how == "both":
            h = self.a(x) * self.a.weight.norm()
        elif how == "norm":
            h = self.norm(self.a(x))
        else:
            h = self.a(x.to(self.a.weight.dtype))
        return self.o(h if how == "skip" else self.b(h))


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("how", ["raw", "both", "norm"])
def test_another_path_in_a_later_forward(how: str, pairing: str) -> None:
    torch.manual_seed(0)
    start, x = Paths().double(), torch.randn(B, D).double()
    net = copy.deepcopy(start)
    model = ElasticZO(net, tail=0, eps=0.05, seed=3, pairing=pairing).train()
    wanted = {h: explicit(model, start, x, h) for h in ("all", how)}
    for path in ("all", how, "all", how, how):
        torch.testing.assert_close(model(x, path), wanted[path])
    moved = 3 if how == "norm" else 0  # once a forward
    assert int(net.norm.num_batches_tracked) == moved


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_a_layer_that_is_left_out_later_is_refused(pairing: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(B, D), torch.arange(B) % 3
    model = ElasticZO(Paths(), tail=["o"], pairing=pairing).train()
    zo = ZOSGD(model, lr=1.0)
    zo.step(pair_losses(F.cross_entropy, model(x), y))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"'b.bias' was not perturbed in this forward, which takes"
    ):
        model(x, "skip")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    zo.step(pair_losses(F.cross_entropy, model(x), y))
    assert model.effective_pairing == pairing


def test_a_copy_locks_its_own_weights() -> None:
    x = torch.randn(B, D)
    model = ElasticZO(Paths(), tail=0).train()
    model(x)
    model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other.module.a.weight += 1
        assert not torch.equal(other(x), model(x))
        assert all(type(p) is nn.Parameter for p in other.module.parameters())
