"""Those who read a wrapper by names, attributes or records: torch.func, checkpoints of
torch.distributed, inspect, tracing, a model without values yet."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as distributed
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from elasticzo import ZOSGD, ElasticZO, pair_losses
from elasticzo.feedback import Feedback


class Root(nn.Module):
    """Tensors at the root, and weights that are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4))
        self.register_buffer("b", torch.ones(4))
        self.fc, self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.two.weight = self.one.weight
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x * self.w + self.b)
        out: Tensor = self.last(self.one(h) + self.two(h))
        return out


MODELS: dict[str, Callable[[], nn.Module]] = {
    "root": Root,
    "layer": lambda: nn.Linear(4, 3),
    "chain": lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)),
}
X, Y = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.arange(5) % 3


def wrapped(make: Callable[[], nn.Module], **settings: Any) -> ElasticZO:
    torch.manual_seed(0)
    return ElasticZO(make(), tail=1, pairing="sequential", **settings)


def changed(model: ElasticZO) -> nn.Module:
    other = copy.deepcopy(model.module)
    with torch.no_grad():
        for t in (*other.parameters(), *other.buffers()):
            t.mul_(2)
    return other


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_functional_call(make: Callable[[], nn.Module], prefix: str) -> None:
    model = wrapped(make).eval()
    other, before = changed(model), copy.deepcopy(model.state_dict())
    places = [id(t) for t in (*model.parameters(), *model.buffers())]
    named = (*other.named_parameters(), *other.named_buffers()) if prefix else ()
    given = {f"{prefix}{name}": t for name, t in named} or other.state_dict()
    assert torch.equal(functional_call(model, given, (X,)), other.eval()(X))
    assert [id(t) for t in (*model.parameters(), *model.buffers())] == places
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_distributed_checkpoints(make: Callable[[], nn.Module]) -> None:
    model, other = wrapped(make), wrapped(make)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    state = distributed.get_model_state_dict(model)
    assert list(state) == list(model.state_dict())
    distributed.set_model_state_dict(other, state)
    assert torch.equal(other.eval()(X), model.eval()(X))


def test_children_by_their_names_are_no_new_ones() -> None:
    model = wrapped(MODELS["chain"])
    assert getattr(model, "0") is model.module.get_submodule("0")
    assert model.module is model.get_submodule("module")
    assert [n for n, _ in model.named_children()] == ["module"]
    with pytest.raises(AttributeError, match="'ElasticZO' object has no attribute '7'"):
        getattr(model, "7")


SETTINGS: list[dict[str, Any]] = [{}, {"directions": "auto"}, {"directions": Feedback()}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_attributes_are_read(settings: dict[str, Any]) -> None:
    model = wrapped(MODELS["chain"], **settings)
    found = dict(inspect.getmembers(model))
    assert found["eps"] == model.eps
    assert all(hasattr(model, name) for name in dir(model))


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_evaluation_is_traced_and_exported(make: Callable[[], nn.Module]) -> None:
    model = wrapped(make).eval()
    for record in (
        torch.jit.trace(model, X),  # type: ignore[no-untyped-call]
        torch.export.export(model, (X,)).module(),
    ):
        assert torch.equal(record(X), model(X))


RECORDED: dict[str, Callable[[ElasticZO], Any]] = {
    "trace": lambda m: torch.jit.trace(m, X),  # type: ignore[no-untyped-call]
    "export": lambda m: torch.export.export(m, (X,)),
    "make_fx": lambda m: make_fx(m)(X),
}


def tail_loss(model: ElasticZO, tail: dict[str, Tensor]) -> Tensor:
    return pair_losses(F.cross_entropy, functional_call(model, tail, (X,)), Y).mean()


def tail_of(model: ElasticZO) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_tail_parameters()}


TRANSFORMED: dict[str, Callable[[ElasticZO], Any]] = {
    "grad": lambda m: grad(lambda t: tail_loss(m, t))(tail_of(m)),
    "jvp": lambda m: jvp(lambda x: m(x).sum(), (X,), (X,)),
    "vmap": lambda m: vmap(m)(X[None]),
    "clean": lambda m: grad(lambda x: m.clean_forward(x).sum())(X),
    "settle": lambda m: vmap(lambda x: m.settle(x) and x)(X[None]),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("way", [*RECORDED, *TRANSFORMED])
def test_a_training_forward_is_not_transformed(way: str, settled: bool) -> None:
    model = wrapped(MODELS["chain"]).train()
    if settled:
        model(X)
        model.forget_forwards()
    before = copy.deepcopy(model.state_dict())
    what = "cannot run inside transforms" if way in TRANSFORMED else "cannot be traced or exported"
    with pytest.raises(RuntimeError, match=f"a training forward {what}"):
        (RECORDED | TRANSFORMED)[way](model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.session.forwards == 0 and torch.isfinite(model(X)).all()


def test_gradients_of_the_evaluated_model() -> None:
    model = wrapped(MODELS["chain"]).eval()
    tail = tail_of(model)
    found = grad(lambda t: F.cross_entropy(functional_call(model, t, (X,)), Y))(tail)
    F.cross_entropy(model(X), Y).backward()
    for name, p in model.named_tail_parameters():
        torch.testing.assert_close(found[name], p.grad)


def on_meta(make: Callable[[], nn.Module], **settings: Any) -> ElasticZO:
    torch.utils._device._device_constructors.cache_clear()  # filled while another test patched
    with torch.device("meta"):
        return wrapped(make, **settings)


def step(model: ElasticZO) -> list[Tensor]:
    zo, bp = ZOSGD(model, lr=0.1), model.tail_optimizer(torch.optim.SGD, lr=0.1)
    losses = pair_losses(F.cross_entropy, model.train()(X), Y)
    model.backward(losses)
    bp.step()
    zo.step(losses)
    return [*model.state_dict().values()]


@pytest.mark.parametrize("way", ["empty", "assign", "inside", "there and back"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_wrapped_before_there_are_values(make: Callable[[], nn.Module], way: str) -> None:
    plain = wrapped(make, seed=3)
    state = {name: t.clone() for name, t in plain.state_dict().items()}
    model = plain if way == "there and back" else on_meta(make, seed=3)
    if way == "there and back":
        plain = copy.deepcopy(model)
        model.to("meta")
    with pytest.raises(RuntimeError, match="is on 'meta' and has no values: before training call"):
        model.train()(X.to("meta"))
    if way == "assign":
        model.load_state_dict(state, assign=True)
    elif way == "inside":
        outer = nn.ModuleDict({"a": model})
        outer.load_state_dict({f"a.{name}": t for name, t in state.items()}, assign=True)
    else:
        model.to_empty(device="cpu")
        model.load_state_dict(state)
    assert [n for n, _ in model.named_head_parameters()] == [
        n for n, _ in plain.named_head_parameters()
    ]
    for _ in range(2):
        assert all(map(torch.equal, step(model), step(plain)))
    if isinstance(model.module, Root):
        assert model.module.one.weight is model.module.two.weight
