"""The gate: what is not finite reaches no weight of the head or tail, whatever it comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticzo import ZOSGD, ElasticZO, ZOAdam, ZOSign, capture_step, pair_losses
from elasticzo.int8 import ElasticZOInt8, Int8ZO
from elasticzo.int8.tensor import Int8Tensor

X, Y = torch.linspace(-1, 1, 20).view(5, 4), torch.tensor([0, 1, 2, 0, 1])
RULES: dict[str, Callable[..., Any]] = {
    "sgd": ZOSGD,
    "momentum": lambda m, **k: ZOSGD(m, momentum=0.9, **k),
    "adam": ZOAdam,
    "sign": ZOSign,
}


def wrapped(tail: Any = 1, **settings: Any) -> ElasticZO:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    return ElasticZO(net, tail, **{"eps": 1e-2, **settings}).train()


def values(model: ElasticZO, *optimizers: Any) -> list[Tensor]:
    kept = (t for o in optimizers for s in o.state.values() for t in s.values())
    return [t.detach().clone() for t in (*model.parameters(), *model.buffers(), *kept)]


@pytest.mark.parametrize("kind", ["weight", "rank1"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(
    ("losses", "lr", "decay"),
    [
        ([1e308, -1e308], 0.1, 0.0),  # g is infinite
        ([1e38, -1e38], 0.1, 0.0),  # g is finite in float64 alone
        ([1e30, -1e30], 1e20, 0.0),  # the step is
        ([2.0, 1.0], torch.tensor(float("nan")), 0.0),
        ([2.0, 1.0], torch.tensor(float("inf")), 0.0),
        ([2.0, 1.0], 0.1, torch.tensor(float("nan"))),
        ([1e30, -1e30], torch.tensor(1e20), 0.0),
    ],
)
def test_finite_losses_of_a_step_that_is_not(
    losses: list[float], lr: Any, decay: Any, rule: Any, kind: str
) -> None:
    model = wrapped(directions=kind)
    zo = rule(model, lr=0.1)
    for _ in range(2):  # the rule's state is there, and is not zero
        zo.step(pair_losses(F.cross_entropy, model(X), Y))
    zo.param_groups[0] |= {"lr": lr, "weight_decay": decay}
    moved = [v for k, s in zo.state.items() for v in s.values()]
    before = values(model, zo)
    model(X)
    zo.step(torch.tensor(losses, dtype=torch.float64))
    assert all(map(torch.equal, before, values(model, zo))) and len(moved) == sum(
        len(s) for s in zo.state.values()
    )
    with pytest.warns(UserWarning, match="a loss, or the step that it leads to, was NaN"):
        assert zo.skipped == 1


def test_float64_weights_reach_further() -> None:
    model = wrapped(tail=0).double()
    zo = ZOSGD(model, lr=1e-40)
    model(X.double())
    before = values(model)
    zo.step(torch.tensor([1e40, -1e40], dtype=torch.float64))
    assert zo.skipped == 0 and not torch.equal(before[0], next(model.parameters()))
    assert all(bool(t.isfinite().all()) for t in model.parameters())


def test_a_bound_makes_a_step_of_what_overflows() -> None:
    model = wrapped()
    zo = ZOSGD(model, lr=0.1, clip=1.0)
    model(X)
    zo.step(torch.tensor([1e308, -1e308], dtype=torch.float64))
    assert zo.skipped == 0
    assert all(bool(t.isfinite().all()) for t in model.parameters())


@pytest.mark.parametrize("lr", [float("nan"), float("inf"), -0.1])
def test_a_schedule_s_number_is_refused(lr: float) -> None:
    model = wrapped()
    zo = ZOSGD(model, lr=0.1)
    losses = pair_losses(F.cross_entropy, model(X), Y)
    zo.param_groups[0]["lr"] = lr
    before = values(model)
    with pytest.raises(ValueError, match=f"lr of a parameter group must be .* got {lr}"):
        zo.step(losses)
    zo.param_groups[0]["lr"] = 0.1
    assert all(map(torch.equal, before, values(model)))
    zo.step(losses)  # the same step, with a rate
    with pytest.raises(ValueError, match=f"lr and weight_decay must be finite .* got {lr}"):
        ZOSGD(model, lr=lr)


@pytest.mark.parametrize("losses", [torch.tensor([1 + 5j, 2 - 3j]), [1 + 5j, 2 - 3j]])
def test_complex_losses_are_refused(losses: Any) -> None:
    model = wrapped()
    zo = ZOSGD(model, lr=0.1)
    model(X)
    with pytest.raises(TypeError, match=r"losses must be real numbers, got torch.complex"):
        zo.step(losses)


def test_complex_losses_of_integers_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
    model = ElasticZOInt8(net, tail=0).train()
    zo = Int8ZO(model, b_zo=1)
    model(Int8Tensor(torch.ones(5, 4, dtype=torch.int8), torch.tensor(0, dtype=torch.int32)))
    with pytest.raises(TypeError, match=r"losses must be integers or floating, got torch.complex"):
        zo.step(torch.tensor([1 + 5j, 2 - 3j]))


# ---- the tail

CLASSES = {"fused": torch.optim.SGD, "host": torch.optim.RMSprop, "adam": torch.optim.Adam}


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_a_closure_makes_what_the_gate_looks_at(cls: Any) -> None:
    model, plain = wrapped(), wrapped()
    zo, opt = ZOSGD(model, lr=0.01), model.tail_optimizer(cls, lr=0.1)
    zo2, opt2 = ZOSGD(plain, lr=0.01), plain.tail_optimizer(cls, lr=0.1)
    ran = []
    for factor in (1.0, float("nan"), 1.0):

        def closure(factor: float = factor) -> Tensor:
            opt.zero_grad()
            losses = pair_losses(F.cross_entropy, model(X), Y) * factor
            model.backward(losses)
            ran.append(losses.detach())
            return losses.mean()

        before = values(model)
        with torch.no_grad():  # as torch's own optimisers, it turns gradients on
            loss = opt.step(closure)
        assert torch.equal(loss, ran[-1].mean()) or factor != factor
        if factor != factor:
            held = [p.detach() for p in model.parameters()]
            assert all(map(torch.equal, before, held))
        zo.step(ran[-1])
        losses = pair_losses(F.cross_entropy, plain(X), Y) * factor
        opt2.zero_grad()
        plain.backward(losses)
        opt2.step()
        zo2.step(losses)
    assert len(ran) == 3 and all(map(torch.equal, values(model), values(plain)))


def test_a_class_that_evaluates_its_closure_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="LBFGS evaluates a closure as often as it likes"):
        wrapped().tail_optimizer(torch.optim.LBFGS)


class Steep(torch.autograd.Function):
    """Finite, and its gradient is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * float("inf")


@pytest.mark.parametrize("first", ["tail", "head"])
@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_gradients_that_are_not_finite_reach_no_weight_of_the_tail(cls: Any, first: str) -> None:
    model = wrapped()
    zo, opt = ZOSGD(model, lr=0.01), model.tail_optimizer(cls, lr=0.1)
    losses = pair_losses(F.cross_entropy, Steep.apply(model(X)), Y)  # type: ignore[no-untyped-call]
    model.backward(losses)
    before = [p.detach().clone() for p in model.tail_parameters()]
    steps = [opt.step, lambda: zo.step(losses)]
    for step in steps if first == "tail" else steps[::-1]:
        step()  # type: ignore[operator]
    assert all(map(torch.equal, before, model.tail_parameters()))
    assert zo.skipped == 0  # the head's step is as good as its losses


def test_sparse_and_empty_gradients_are_looked_at() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    model = ElasticZO(net, tail=1).train()
    model.module[1].weight.grad = torch.sparse_coo_tensor([[0]], torch.full((1, 4), 1.0), (3, 4))
    model.module[1].bias.grad = torch.zeros(3)
    assert float(model.gate()) == 0.0
    model.module[1].weight.grad *= float("nan")
    assert float(model.gate()) == 1.0


# ---- torch's fused SGD


SETTINGS: list[dict[str, Any]] = [{}, {"momentum": 0.9}, {"weight_decay": 0.1}]


def narrow(cls: Any = torch.optim.SGD, **settings: Any) -> tuple[Tensor, Tensor]:
    """A bfloat16 weight after some steps of torch's own on the CPU, fused and not."""
    torch.manual_seed(0)
    w, gradients = torch.randn(64).bfloat16(), torch.randn(5, 64).bfloat16()
    ends = []
    for fused in (True, False):
        p = nn.Parameter(w.clone())
        optimizer = cls([p], lr=0.05, fused=fused, **settings)
        for g in gradients:
            p.grad = g.clone()
            optimizer.step()
        ends.append(p.detach().float())
    return ends[0], ends[1]


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="of the torch at hand")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_torch_s_fused_sgd_is_wrong_in_bfloat16(settings: Any) -> None:
    """When this fails, torch has mended it: `_wrong_when_fused` can go from there on."""
    fused, plain = narrow(**settings)
    assert (fused - plain).abs().max() > 0.1


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad])
def test_torch_s_other_fused_forms_are_right(cls: Any) -> None:
    fused, plain = narrow(cls)
    torch.testing.assert_close(fused, plain, rtol=0, atol=2**-6)  # a rounding of weights up to 3


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_bfloat16_tail_is_plain_sgd_s(settings: Any) -> None:
    ends = []
    for plain in (False, True):
        model = wrapped().bfloat16()
        zo, make = ZOSGD(model, lr=0.0), torch.optim.SGD
        of: Any = {"lr": 0.05, **settings}
        tail = list(model.tail_parameters())
        opt = make(tail, fused=False, **of) if plain else model.tail_optimizer(make, **of)
        for _ in range(5):
            losses = pair_losses(F.cross_entropy, model(X.bfloat16()).float(), Y)
            model.backward(losses)
            opt.step()
            opt.zero_grad()
            zo.step(losses)
        ends.append([p.detach().clone() for p in tail])
    assert all(map(torch.equal, *ends))


def test_a_fused_form_that_is_wrong_is_refused() -> None:
    given: Any = {"lr": 0.05, "momentum": 0.9}
    message = "fused SGD is wrong for torch.bfloat16 .* fused=False, after the cast"
    with pytest.raises(ValueError, match=message):
        wrapped().bfloat16().tail_optimizer(torch.optim.SGD, fused=True, **given)
    model = wrapped()
    opt = model.tail_optimizer(torch.optim.SGD, **given)
    model.bfloat16()
    model.backward(pair_losses(F.cross_entropy, model(X.bfloat16()).float(), Y))
    before = values(model)
    with pytest.raises(ValueError, match=message):
        opt.step()
    assert all(map(torch.equal, before, values(model)))


def test_a_step_on_the_cpu_needs_no_fused_class() -> None:
    model = wrapped().bfloat16()
    rates = torch.tensor(0.01), torch.tensor(0.1)
    zo = ZOSGD(model, lr=rates[0])
    opt = model.tail_optimizer(torch.optim.SGD, lr=rates[1], momentum=0.9)
    if model.session.device.type == "cpu":
        step = capture_step(
            zo, lambda o, y: F.cross_entropy(o.float(), y), X.bfloat16(), Y, tail=opt
        )
        before = [p.detach().clone() for p in model.tail_parameters()]
        step(X.bfloat16(), Y)
        assert not any(map(torch.equal, before, model.tail_parameters()))
