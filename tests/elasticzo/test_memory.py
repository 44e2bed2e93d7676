"""The liveness model: what a step holds, without running it; tail="auto" by it."""

from __future__ import annotations

import copy
import pickle
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticzo import ZOSGD, ElasticZO, pair_losses, unbatched
from elasticzo.int8 import ElasticZOInt8, Int8Tensor
from elasticzo.int8.memory import int8_inference_memory, int8_training_memory
from elasticzo.memory import inference_memory, training_memory
from elasticzo.memory.budget import cuts, price
from elasticzo.memory.scratch import allocations
from elasticzo.memory.tracker import tracked
from elasticzo.models import LeNet5
from tests.elasticzo.zoo import ZOO, build, smooth_loss

CPU = torch.device("cpu")
IMAGES = torch.zeros(1).expand(64, 1, 28, 28)  # no memory, as none is needed


class Chain(nn.Module):
    """Square layers whose memory can be counted by hand."""

    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


# ---- the tracker


def test_tracker_counts_births_and_deaths() -> None:
    with tracked(CPU) as (tracker, _):
        a = torch.zeros(1000)
        b = a.view(10, 100).t()  # the same storage
        c = b.contiguous()
        assert tracker.held == 8000
        del a, b
        assert tracker.held == 4000
        tracker.note(c, "weights")
        d = c + 1
        del d
        assert tracker.held == 4000
        assert (tracker.peak.bytes, tracker.peak.parts) == (8000, {"activations": 8000})
        assert tracker.restart().bytes == 8000
        assert tracker.peak.parts == {"weights": 4000}


def test_tracker_keeps_what_autograd_saves() -> None:
    with tracked(CPU) as (tracker, _):
        w = torch.zeros(100, 100, requires_grad=True)
        x = torch.zeros(100, 100)
        y = torch.tanh(x @ w).sum()
        del x
        assert tracker.held == 4 * (3 * 10_000 + 1)  # w, x for w's gradient, tanh's output
        y.backward()
        assert w.grad is not None and tracker.held == 4 * (2 * 10_000 + 1)


def test_generator_is_left_as_it_was_and_real_tensors_are_real() -> None:
    state = torch.get_rng_state()
    with tracked(CPU) as _:
        F.dropout(torch.zeros(8))
        drawn = torch.get_rng_state()
        assert not torch.equal(drawn, state)  # seen by a model that asks
    assert torch.equal(torch.get_rng_state(), state)


# ---- a step


def test_a_step_by_hand() -> None:
    """Full ZO of three layers without biases, one half after the other: input, weights, W+ and W-
    of all (they are small); of the last tanh input and output, the input of its layer, and the
    output of the half before."""
    model = ElasticZO(Chain(), tail=0, pairing="sequential")
    found = training_memory(model, torch.zeros(128, 64), loss=lambda y: y.sum()).steady
    square, batch = 4 * 64 * 64, 4 * 128 * 64
    assert found.parts["weights"] == 3 * square
    assert found.parts["inputs"] == batch
    assert found.parts["halves"] == 2 * 3 * square
    assert 4 * batch <= found.parts["activations"] < 4 * batch + 1000
    assert "optimizer" not in found.parts and "gradients" not in found.parts


def test_full_bp_by_hand() -> None:
    model = ElasticZO(Chain(), tail="all")
    for states in (0, 1, 2):
        given = {"loss": lambda y: y.sum(), "state_tensors": states}
        found = training_memory(model, torch.zeros(128, 64), **given).steady
        square, batch = 4 * 64 * 64, 4 * 128 * 64
        assert found.parts["weights"] == 3 * square
        assert found.parts.get("optimizer", 0) == 3 * square * states
        # Three outputs of tanh, the model's output, two gradients of activations.
        assert 6 * batch <= found.parts["activations"] <= 6 * batch + 1000


def test_weights_are_those_of_the_model_and_no_memory_is_taken() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Flatten(), nn.Linear(784, 1 << 20), nn.ReLU(), nn.Linear(1 << 20, 9))
    numbers = sum(p.numel() for p in net.parameters())  # 3 GB
    x = torch.empty(1 << 14, 1, 28, 28, device="meta")
    model = ElasticZO(net, tail=1)
    taken = allocations(lambda: training_memory(model, x, device="cpu"))
    held = training_memory(model, x, device="cpu").peak
    assert held.parts["weights"] == 4 * numbers and held.bytes > 64e9
    assert sum(n for n in taken if n > 0) < 1e6
    with pytest.raises(ValueError, match="model is on the meta device: device must say"):
        training_memory(model, x, device="meta")


def test_the_model_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    model = ElasticZO(LeNet5(), tail=1, eps=1e-2).train()
    zo = ZOSGD(model, lr=1e-3)
    x, y = torch.randn(4, 1, 28, 28), torch.arange(4)
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    first = training_memory(model, x)
    losses = pair_losses(F.cross_entropy, model(x), y)
    assert training_memory(model, x) == first  # between a forward and its step, too
    zo.step(losses)
    again = copy.deepcopy(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.device.type == "cpu" and p.grad is None for p in again.parameters())
    for name, value in before.items():
        moved = not torch.equal(value, model.state_dict()[name])
        assert moved == (not name.startswith("fc3")), name


MEASURABLE = [name for name in ZOO if name != "transformer"]  # one of them is enough


@pytest.mark.parametrize("name", MEASURABLE)
def test_every_model_that_the_wrapper_takes_against_the_allocator(name: str) -> None:
    case, batch = ZOO[name], 128

    def wrapped(pairing: str) -> tuple[ElasticZO, Any]:
        net, inputs = build(case, batch, torch.float32)
        return ElasticZO(net, case.tail, pairing=pairing, eps=1e-2).train(), inputs

    def steps(pairing: str) -> None:
        model, inputs = wrapped(pairing)
        zo = ZOSGD(model, lr=1e-9)
        for _ in range(2):
            losses = pair_losses(smooth_loss, model(*inputs))
            model.backward(losses)
            for p in model.tail_parameters():
                p.grad = None
            zo.step(losses)

    states = 7 * torch.get_rng_state().numel()  # that the checks of a forward compare
    for pairing in case.pairings:
        model, inputs = wrapped(pairing)
        found = training_memory(model, inputs, loss=smooth_loss, state_tensors=0).peak
        held = max(accumulate(allocations(lambda pairing=pairing: steps(pairing))))
        assert abs(found.bytes - held) <= 0.02 * held + states, (pairing, found, held)


def test_generality_of_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, given: dict[str, Tensor], mask: Tensor) -> Tensor:
            return self.fc(given["x"] * mask)

    model = ElasticZO(Two(), tail=0)
    inputs = ({"x": torch.zeros(10, 4)}, unbatched(torch.ones(4)))
    labels = torch.zeros(10, dtype=torch.int64)
    found = training_memory(model, inputs, F.cross_entropy, labels)
    assert found.steady.parts["inputs"] == 4 * 44 + 8 * 10


def test_what_depends_on_values_is_refused() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if x.sum() > 0 else -self.fc(x)

    wanted = "memory of this model cannot be predicted: its forward depends on values"
    with pytest.raises(ValueError, match=wanted):
        training_memory(ElasticZO(Branches(), tail=0), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=wanted):
        inference_memory(Branches(), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=f"tail='auto' found no cut .* {wanted}"):
        ElasticZO(Branches(), "auto", memory_budget=10**6, example_input=torch.zeros(2, 4))


def test_refusals() -> None:
    with pytest.raises(TypeError, match="model must be an ElasticZO, got LeNet5"):
        training_memory(LeNet5(), IMAGES)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="state_tensors must be an integer >= 0, got -1"):
        training_memory(ElasticZO(LeNet5(), tail=1), IMAGES, state_tensors=-1)
    with pytest.raises(TypeError, match="model must be an ElasticZOInt8, got ElasticZO"):
        int8_training_memory(ElasticZO(LeNet5(), 1), IMAGES)  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device cuda: torch sees 0 CUDA devices"):
            inference_memory(LeNet5(), IMAGES, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tail", [0, 1, "all"])
def test_a_step_on_a_gpu(tail: Any) -> None:
    def step() -> None:
        x, y = torch.randn(512, 784, device="cuda"), torch.zeros(512, device="cuda").long()
        with torch.device("cuda"):
            net = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 10))
        model = ElasticZO(net, tail, eps=1e-2, path="staged").train()
        zo, adam = ZOSGD(model, lr=1e-9), model.tail_optimizer(torch.optim.Adam, lr=1e-9)
        for _ in range(2):
            losses = pair_losses(F.cross_entropy, model(x), y)
            model.backward(losses)
            adam.step()
            adam.zero_grad()
            zo.step(losses)

    step()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    measured = torch.cuda.max_memory_allocated() - held
    with torch.device("cuda"):
        net = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 10))
    model = ElasticZO(net, tail, eps=1e-2, path="staged")
    predicted = training_memory(model, torch.zeros(512, 784, device="cuda")).peak.bytes
    assert predicted == pytest.approx(measured, rel=0.05)


# ---- integers


def test_integers_hold_less() -> None:
    x = Int8Tensor(torch.zeros(64, 1, 28, 28, dtype=torch.int8), torch.tensor(-7).int())
    small = int8_training_memory(ElasticZOInt8(LeNet5(), 0), x)
    large = training_memory(ElasticZO(LeNet5(), 0), IMAGES)
    assert 1.46 * small.peak.bytes < large.peak.bytes
    assert small.peak.parts["weights"] >= 107_550
    assert int8_inference_memory(ElasticZOInt8(LeNet5(), 0), x).bytes < small.peak.bytes


# ---- tail="auto"


def test_cuts_go_from_full_bp_to_full_zo() -> None:
    assert cuts(LeNet5()) == [(0, "all"), (1, 4), (2, 3), (3, 2), (4, 1), (5, 0)]
    assert cuts(nn.ReLU()) == [(0, "all")]


@pytest.mark.parametrize("pairing", ["stacked", "sequential"])
def test_auto_picks_what_an_exhaustive_search_picks(pairing: str) -> None:
    def net() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2704, 64), nn.Linear(64, 10)
        )

    def peak(tail: Any) -> int:
        model = ElasticZO(net(), tail, pairing=pairing)
        return training_memory(model, IMAGES).peak.bytes

    tails: list[Any] = ["all", 2, 1, 0]  # by what backpropagation trains
    peaks = {tail: peak(tail) for tail in tails}
    given: dict[str, Any] = {"example_input": IMAGES, "pairing": pairing}
    for budget in sorted({p - d for p in peaks.values() for d in (0, 1)})[1:]:
        fitting = [tail for tail in tails if peaks[tail] <= budget]
        model = ElasticZO(net(), "auto", memory_budget=budget, **given)
        assert model.cut.tail == fitting[0]
        assert model.fitted is not None and model.fitted.memory is not None
        assert model.fitted.memory.peak.bytes == peaks[fitting[0]]
    least = min(peaks.values())
    with pytest.raises(ValueError, match=rf"memory_budget must be at least {least} bytes"):
        ElasticZO(net(), "auto", memory_budget=least - 1, **given)


def test_auto_trains_prints_and_travels() -> None:
    torch.manual_seed(0)
    one = price(ElasticZO, LeNet5(), 4, 1, IMAGES, 2, how={"pairing": "sequential"}).memory
    assert one is not None
    net = LeNet5()
    net.conv1.bias.requires_grad_(False)  # frozen by the user: neither perturbed nor updated
    given = {"memory_budget": one.peak.bytes, "example_input": IMAGES, "pairing": "sequential"}
    model = ElasticZO(net, "auto", 1e-2, **given)  # type: ignore[arg-type]
    assert model.cut.named == "fc3" and "tail=850 (BP: fc3)" in repr(model)
    assert all(type(p) is nn.Parameter and p.device.type == "cpu" for p in model.parameters())
    zo = ZOSGD(model.train(), lr=1e-3)
    tail = model.tail_optimizer(torch.optim.Adam, lr=1e-2)
    before = [p.clone() for p in model.parameters()]
    losses = pair_losses(F.cross_entropy, model(torch.randn(4, 1, 28, 28)), torch.arange(4))
    model.backward(losses)
    tail.step()
    zo.step(losses)
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert moved == [True, False] + 8 * [True]
    again = pickle.loads(pickle.dumps(model))
    assert again.cut == model.cut and again.fitted == model.fitted


def test_auto_keeps_of_scale_and_path_what_the_head_has() -> None:
    scale = {"conv1.*": 2.0, "fc*": 0.1}
    given: dict[str, Any] = {"example_input": IMAGES, "scale": scale, "pairing": "sequential"}
    given["path"] = {"conv*": "staged", "fc3": "staged"}
    model = ElasticZO(LeNet5(), "auto", memory_budget=10**9, **given)
    assert model.cut.everything
    less = price(ElasticZO, LeNet5(), 4, 1, IMAGES, 2, how={"pairing": "sequential"}).memory
    assert less is not None
    small = ElasticZO(LeNet5(), "auto", memory_budget=less.peak.bytes, **given)
    assert small.cut.tail == 1
    scales = {name: head.scale for name, head in small.head.parameters.items()}
    assert scales["conv1.weight"] == 2.0 and scales["fc1.weight"] == 0.1
    with pytest.raises(ValueError, match=r"scale pattern 'x\*' matches nothing of: conv1.weight"):
        ElasticZO(LeNet5(), "auto", memory_budget=1, example_input=IMAGES, scale={"x*": 1.0})
    with pytest.raises(ValueError, match=r"path pattern 'x\*' matches nothing of: conv1, "):
        ElasticZO(LeNet5(), "auto", memory_budget=1, example_input=IMAGES, path={"x*": "fused"})


def test_auto_passes_over_cuts_that_are_not_possible() -> None:
    class Late(nn.Module):
        """`c` is registered last and runs first: no tail of counted layers but all of them."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(32, 32) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(torch.tanh(self.c(x)))))

    x, how = torch.zeros(512, 32), {"pairing": "sequential"}
    found = [price(ElasticZO, Late(), cut, tail, x, 2, how=how) for cut, tail in cuts(Late())]
    assert [c.memory is None for c in found] == [False, True, True, False]
    assert "tail must come after the whole head" in found[1].reason
    whole, none = found[0].memory, found[-1].memory
    assert whole is not None and none is not None and none.peak.bytes < whole.peak.bytes
    given: dict[str, Any] = {"memory_budget": none.peak.bytes, "example_input": x, **how}
    model = ElasticZO(Late(), "auto", **given)
    assert model.cut.tail == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {},
            r"needs memory_budget \(bytes\) and example_input \(a batch\), got memory_budget=None",
        ),
        ({"memory_budget": 10}, r"example_input=NoneType"),
        ({"example_input": IMAGES}, r"got memory_budget=None and example_input=Tensor"),
        ({"memory_budget": 0, "example_input": IMAGES}, r"number of bytes > 0, got 0"),
        ({"memory_budget": 1.5, "example_input": IMAGES}, r"number of bytes > 0, got 1.5"),
        ({"memory_budget": 10, "example_input": IMAGES}, r"got 10; pairing='sequential' needs"),
        (
            {"memory_budget": 10, "example_input": IMAGES, "state_tensors": -1},
            r"state_tensors must be an integer >= 0, got -1",
        ),
    ],
    ids=["nothing", "no input", "no budget", "zero", "fraction", "too small", "states"],
)
def test_auto_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ElasticZO(LeNet5(), "auto", **settings)
