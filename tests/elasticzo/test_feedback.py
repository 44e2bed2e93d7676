"""Learnt feedback: gradients by the definition, matrices against Jacobians, state, any model."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticzo import ZOSGD, ElasticZO, TrajectoryLog, capture_step, pair_losses, replay
from elasticzo.feedback import Feedback
from elasticzo.memory import inference_memory, training_memory
from elasticzo.models import LeNet5, ResNet20
from elasticzo.optim import ZOAdam
from elasticzo.optim.head import HeadOptimizer
from tests.elasticzo.zoo import ZOO, build, smooth_loss

B, NOISE = 6, 0.1
# The second layer's forward direction ends in a state that the model does not read.
UNUSED = {
    "lstm_states": [f"lstm.{kind}_l1" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
}
TIME_FIRST = ("lstm_time_first", "encoder_time_first")


def wrapped(net: nn.Module, tail: Any = ("tail",), **settings: Any) -> ElasticZO:
    how = Feedback(**{"noise": NOISE, **settings})
    return ElasticZO(net, tail, directions=how, seed=5).train()


class Plain(nn.Module):
    """Three segments, the last of which ends at the cut."""

    def __init__(self, act: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 7, bias=False), nn.Linear(7, 3)
        self.tail, self.act = nn.Linear(3, 2), act

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.tail(self.c(self.act(self.b(self.act(self.a(x))))))
        return y


def step(
    model: ElasticZO, inputs: Any, zo: HeadOptimizer, loss: Any = smooth_loss, *targets: Any
) -> Tensor:
    losses = pair_losses(loss, model(*inputs), *targets)
    model.backward(losses)
    zo.step(losses)
    return losses


def signs(model: ElasticZO, name: str, shape: Any) -> Tensor:
    """xi of the nodes that a layer with this first weight was about to read."""
    head = model.head.parameters[name]
    return Feedback().xi(head, torch.Size(shape), model.session.key, 0, 0, "auto").double()


def test_gradients_are_those_of_the_definition() -> None:
    """Explicitly: d = M e at the inputs of b and c, the exact error at the output of c, each by
    the backward of the layer and what follows it, from inputs with noise."""
    torch.manual_seed(0)
    net = Plain().double()
    model, x = wrapped(net), torch.randn(B, 4, dtype=torch.float64)
    zo = ZOSGD(model, lr=1.0)
    step(model, (x,), ZOSGD(model, lr=0.0))  # which makes the matrices
    for m in model.session.learnt.values():
        if m.dim():
            m.normal_()
    m = {k: t.clone() for k, t in model.session.learnt.items()}
    before = {n: p.clone() for n, p in model.named_head_parameters()}

    def noisy(y: Tensor, name: str) -> Tensor:
        size = NOISE * y.square().mean().sqrt()
        return (y + size * signs(model, name, y.shape)).detach()

    leaves = {n: p.clone().requires_grad_() for n, p in before.items()}
    h = F.linear(x, before["a.weight"], before["a.bias"]).tanh()
    out = net.tail(
        F.linear(F.linear(h, before["b.weight"]).tanh(), before["c.weight"], before["c.bias"])
    )
    out.retain_grad()
    smooth_loss(out).backward()
    e, exact = out.grad, out.grad @ net.tail.weight
    y1 = F.linear(x, leaves["a.weight"], leaves["a.bias"]).tanh()
    y2 = F.linear(noisy(y1, "b.weight"), leaves["b.weight"]).tanh()
    y3 = F.linear(noisy(y2, "c.weight"), leaves["c.weight"], leaves["c.bias"])
    errors = [e @ m["b/0/0"].t(), e @ m["c/0/0"].t(), exact]
    torch.autograd.backward([y1, y2, y3], errors)
    net.tail.zero_grad()
    step(model, (x,), zo)
    for n, p in model.named_head_parameters():
        torch.testing.assert_close(before[n] - p, leaves[n].grad, rtol=1e-10, atol=1e-12)


def identity(x: Tensor) -> Tensor:
    return x


def moves_of_the_matrices(model: ElasticZO, x: Tensor, steps: int) -> dict[str, Tensor]:
    """What each step's noise said of the Jacobians, `[steps, nodes, outputs]`."""
    zo, found = ZOSGD(model, lr=0.0), {"b/0/0": [], "c/0/0": []}
    for t in range(steps):
        before = {k: v.clone() for k, v in model.session.learnt.items()}
        step(model, (x,), zo)
        beta = max(0.01, 1 / (t + 1))
        for k, moves in found.items():
            old = before.get(k, torch.zeros_like(model.session.learnt[k]))
            moves.append((model.session.learnt[k] - (1 - beta) * old) / beta)
    return {k: torch.stack(moves) for k, moves in found.items()}


def test_matrices_learn_the_jacobian() -> None:
    """Of a linear network it is one for all samples, and the noise's answer has no bias: n = 150
    steps, every element within 5 sigma, and the running mean near it."""
    torch.manual_seed(1)
    net = Plain(identity).double()
    model, x = wrapped(net), torch.randn(B, 4, dtype=torch.float64)
    moves = moves_of_the_matrices(model, x, 150)
    after_c = net.tail.weight.detach() @ net.c.weight.detach()
    wanted = {"c/0/0": after_c.t(), "b/0/0": (after_c @ net.b.weight.detach()).t()}
    for k, true in wanted.items():
        error = moves[k].mean(0) - true
        assert (error.abs() <= 5 * moves[k].std(0) / 150**0.5).all()
        far = (model.session.learnt[k] - true).norm() / true.norm()
        assert far < 0.5 < (moves[k][0] - true).norm() / true.norm()  # one step knows nothing


def gradients_by_step(model: ElasticZO, x: Tensor, v: Tensor, steps: int) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {n: [] for n in model.head.parameters}
    start = {n: p.clone() for n, p in model.named_head_parameters()}
    zo = ZOSGD(model, lr=1.0)
    for _ in range(steps):
        step(model, (x,), zo, lambda out: (out * v).sum() / B)
        with torch.no_grad():
            for n, p in model.named_head_parameters():
                found[n].append(start[n] - p)
                p.copy_(start[n])
    return {n: torch.stack(gs) for n, gs in found.items()}


def test_the_residual_is_what_no_matrix_foretold() -> None:
    """With matrices that are the Jacobians of a linear network nothing is left, and they stay;
    from zero both fits move them by their own weight times the same answer."""
    torch.manual_seed(1)
    net = Plain(identity).double()
    x = torch.randn(B, 4, dtype=torch.float64)
    other = wrapped(copy.deepcopy(net))
    model = wrapped(net, fit="residual")
    zo = ZOSGD(model, lr=0.0)
    step(model, (x,), zo)
    first = {k: m.clone() for k, m in model.session.learnt.items()}
    step(other, (x,), ZOSGD(other, lr=0.0))
    for k in ("b/0/0", "c/0/0"):
        share = B / 12  # of 5 + 7 nodes; the mean's first weight is 1
        torch.testing.assert_close(first[k], share * other.session.learnt[k])
    after_c = net.tail.weight.detach() @ net.c.weight.detach()
    true = {"c/0/0": after_c.t(), "b/0/0": (after_c @ net.b.weight.detach()).t()}
    for k, m in true.items():
        model.session.learnt[k].copy_(m)
    step(model, (x,), zo)
    for k, m in true.items():
        torch.testing.assert_close(model.session.learnt[k], m)


@pytest.mark.parametrize("unbiased", [True, False])
def test_the_corrected_form_has_no_bias(unbiased: bool) -> None:
    """A network linear in each weight, whose Jacobians differ by sample; n = 150 steps, projections
    of each weight's mean gradient within 5 sigma of autograd's; the plain form is not."""
    torch.manual_seed(2)
    gates = torch.randn(B, 7, dtype=torch.float64)
    net = Plain(lambda h: h * gates[:, : h.shape[1]]).double()
    x, v = torch.randn(B, 4, dtype=torch.float64), torch.randn(B, 2, dtype=torch.float64)
    true = torch.autograd.grad((net(x) * v).sum() / B, [*net.parameters()])
    wanted = dict(zip(dict(net.named_parameters()), true, strict=True))
    model = wrapped(net, unbiased=unbiased)
    far = {}
    for n, g in gradients_by_step(model, x, v, 150).items():
        onto = torch.randn_like(g[0])
        t = (g * onto).flatten(1).sum(1)
        far[n] = float((t.mean() - (wanted[n] * onto).sum()).abs() / (t.std() / 150**0.5))
    assert far.pop("c.weight") <= 5  # exact but for the noise of its inputs
    far.pop("c.bias")
    assert all(z <= 5 for z in far.values()) == unbiased


@pytest.mark.parametrize("name", [name for name in ZOO if name not in TIME_FIRST])
def test_any_model_learns(name: str) -> None:
    """All weights of the head move as soon as the matrices know something, the first step too
    where their gradient is exact; a forward is the model's own."""
    case = ZOO[name]
    net, inputs = build(case)
    model = ElasticZO(copy.deepcopy(net), case.tail, directions="feedback", seed=3).train()
    before = {n: p.clone() for n, p in model.named_head_parameters()}
    zo = ZOAdam(model, lr=1e-3)
    for _ in range(3):
        torch.manual_seed(1)
        step(model, inputs, zo)
    moved = {n for n, p in model.named_head_parameters() if not torch.equal(p, before[n])}
    assert moved == set(before) - set(UNUSED.get(name, ()))
    assert model(*inputs).shape[0] == 1
    assert {k.name for k in model.directions.values()} == {"feedback"}
    assert all(float(r) >= 0 for r in model.feedback_residual.values())


@pytest.mark.parametrize("name", TIME_FIRST)
def test_time_first_is_refused(name: str) -> None:
    case = ZOO[name]
    with pytest.raises(ValueError, match="batch_first"):
        ElasticZO(build(case)[0], case.tail, directions="feedback", pairing="sequential")


def test_the_weights_have_the_exact_gradient_where_one_segment_is_the_head() -> None:
    """Convolution, BatchNorm and what follows: no matrix, autograd's own numbers."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)
    )
    net, x = net.double(), torch.randn(B, 2, 4, 4, dtype=torch.float64)
    model = wrapped(copy.deepcopy(net), tail=["4"])
    smooth_loss(net(x)).backward()
    step(model, (x,), ZOSGD(model, lr=1.0))
    for (n, p), q in zip(model.named_head_parameters(), net.parameters(), strict=False):
        torch.testing.assert_close(q.detach() - p, q.grad, msg=n)
    torch.testing.assert_close(model.module[1].running_mean, net[1].running_mean)  # moved once


def test_micro_batches_are_one_batch() -> None:
    """Gradients are summed; matrices learn from all samples. The noise's size is that of a
    micro-batch: equal where nodes have one size."""
    torch.manual_seed(0)
    net = Plain(torch.sign).double()  # +-1: the same rms in every part
    x = torch.randn(B, 4, dtype=torch.float64)
    one, other = wrapped(copy.deepcopy(net)), wrapped(copy.deepcopy(net))
    for model, parts in ((one, [x]), (other, list(x.split((1, 3, 2))))):
        zo = ZOSGD(model, lr=0.1)
        for _ in range(3):
            losses = []
            for part in parts:
                losses.append(pair_losses(lambda o: o.square().sum() / B, model(part)))
                model.backward(losses[-1])
            zo.step(sum(losses))
    for p, q in zip(one.head_parameters(), other.head_parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    for k, m in one.session.learnt.items():
        torch.testing.assert_close(m, other.session.learnt[k], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["residual_cnn", "dropouts", "conv1d"])
def test_it_resumes_where_it_stood(name: str) -> None:
    case = ZOO[name]
    net, inputs = build(case)
    model = ElasticZO(net, case.tail, directions="feedback", seed=3).train()
    zo = ZOAdam(model, lr=1e-3)
    for _ in range(3):
        step(model, inputs, zo)
    state, weights = copy.deepcopy((zo.state_dict(), model.state_dict()))
    twin = copy.deepcopy(model)  # with its matrices
    again = ElasticZO(build(case)[0], case.tail, directions="feedback", seed=9).train()
    again.load_state_dict(weights)
    other, third = ZOAdam(again, lr=1e-3), ZOAdam(twin, lr=1e-3)
    other.load_state_dict(state)
    third.load_state_dict(state)
    for m, o in ((model, zo), (again, other), (twin, third)):
        step(m, inputs, o)
    for m in (again, twin):
        for p, q in zip(model.head_parameters(), m.head_parameters(), strict=True):
            assert torch.equal(p, q)
        for k, t in model.session.learnt.items():
            assert torch.equal(t, m.session.learnt[k])
    fresh = ElasticZO(build(case)[0], case.tail, directions=Feedback(noise=0.2)).train()
    with pytest.raises(ValueError, match="estimator"):
        ZOAdam(fresh, lr=1e-3).load_state_dict(state)


def test_a_skipped_step_changes_nothing() -> None:
    net, inputs = build(ZOO["residual_cnn"])
    model = ElasticZO(net, ["fc"], directions="feedback").train()
    zo = ZOAdam(model, lr=1e-3)
    for _ in range(2):
        step(model, inputs, zo)
    kept = [*model.head_parameters(), *model.buffers(), *model.session.learnt.values()]
    kept += [t for state in zo.state.values() for t in state.values()]
    before = [t.clone() for t in kept]
    losses = pair_losses(smooth_loss, model(*inputs))
    model.backward(losses * torch.nan)
    zo.step(losses * torch.nan)
    now = [*model.head_parameters(), *model.buffers(), *model.session.learnt.values()]
    now += [t for state in zo.state.values() for t in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))


def test_nothing_is_kept_between_segments() -> None:
    """While a later layer runs, what an earlier one saved for its backward is gone."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(m for _ in range(4) for m in (nn.Linear(8, 8), nn.Sigmoid())), nn.Linear(8, 2)
    )
    model, x, seen = wrapped(net, tail=["8"]), torch.randn(B, 8), list[list[bool]]()
    alive: list[weakref.ref[Tensor]] = []

    def note(m: nn.Module, args: Any, out: Tensor) -> None:
        gc.collect()
        seen.append([ref() is not None for ref in alive])
        alive.append(weakref.ref(out))

    zo = ZOSGD(model, lr=0.1)
    step(model, (x,), zo)  # the first noisy pass does not know the order yet
    losses = pair_losses(smooth_loss, model(x))
    model.backward(losses)
    for m in net:
        if isinstance(m, nn.Sigmoid):
            m.register_forward_hook(note)
    alive.clear()
    zo.step(losses)
    assert len(seen) == 4 and not any(any(old[:-1]) for old in seen[1:])


def test_many_outputs_are_told_as_fixed_sums() -> None:
    """Where outputs are more than `width`, matrices learn the Jacobian of so many random sums."""
    torch.manual_seed(3)
    net = Plain(identity)
    net.tail = nn.Linear(3, 20)
    model, x = wrapped(net.double(), width=8), torch.randn(B, 4, dtype=torch.float64)
    moves = moves_of_the_matrices(model, x, 150)["c/0/0"]
    sums = Feedback(width=8).sums(torch.zeros(1, 20).double(), model.session.key, "auto")
    assert sums is not None and moves.shape[1:] == (7, 8)
    true = (net.tail.weight.detach() @ net.c.weight.detach()).t() @ sums
    assert ((moves.mean(0) - true).abs() <= 5 * moves.std(0) / 150**0.5).all()


def test_scale_is_of_the_gradient() -> None:
    """As of directions: the estimate has `s^2` times the gradient; 0 leaves a weight alone."""
    torch.manual_seed(0)
    net, x = Plain().double(), torch.randn(B, 4, dtype=torch.float64)
    moved = []
    for scale in (None, {"c.*": 0.5, "a.weight": 0.0}):
        model = ElasticZO(copy.deepcopy(net), ["tail"], directions="feedback", scale=scale).train()
        before = {n: p.clone() for n, p in model.named_head_parameters()}
        step(model, (x,), ZOSGD(model, lr=1.0))
        moved.append({n: before[n] - p for n, p in model.named_head_parameters()})
    torch.testing.assert_close(moved[1]["c.weight"], 0.25 * moved[0]["c.weight"])
    assert moved[1]["a.weight"].eq(0).all()


def test_controls_settings_and_what_the_model_says() -> None:
    x, y = torch.randn(4, 1, 28, 28), torch.arange(4)
    for matrix in ("zero", "random"):
        model = wrapped(LeNet5(), ["fc3"], matrix=matrix)
        before = {n: p.clone() for n, p in model.named_head_parameters()}
        zo = ZOSGD(model, lr=0.1)
        for _ in range(2):
            step(model, (x,), zo, F.cross_entropy, y)
        moved = {n for n, p in model.named_head_parameters() if not torch.equal(p, before[n])}
        assert moved == ({"fc2.weight", "fc2.bias"} if matrix == "zero" else set(before))
        assert len(model.session.learnt) == (0 if matrix == "zero" else 3)
    assert "8 feedback" in model.extra_repr()
    settings: list[dict[str, Any]] = [
        {"matrix": "fixed"},
        {"noise": 0.0},
        {"beta": 2},
        {"width": 0},
        {"fit": "lms"},
    ]
    for wrong in (*settings, {"unbiased": True, "matrix": "random"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Feedback(**wrong)


def test_refusals(tmp_path: Path) -> None:
    x, net = torch.randn(3, 1, 28, 28), LeNet5()
    with pytest.raises(ValueError, match="whole head"):
        ElasticZO(net, 1, directions={"fc1": "feedback"})
    with pytest.raises(ValueError, match="clip"):
        ZOSGD(ElasticZO(LeNet5(), 1, directions={"*": "feedback"}), lr=0.1, clip=1.0)
    with pytest.raises(ValueError, match="group=2"):
        ElasticZO(net, 1, directions="feedback", group=2)
    with pytest.raises(ValueError, match="queries=2"):
        ElasticZO(net, 1, directions="feedback", queries=2)
    model = ElasticZO(net, 1, directions="feedback").train()
    zo = ZOSGD(model, lr=0.1)
    losses = pair_losses(smooth_loss, model(x))
    with pytest.raises(RuntimeError, match=r"model\.backward"):
        zo.step(losses)
    model.forget_forwards()
    log = TrajectoryLog(tmp_path / "run.log", zo)
    step(model, (x,), zo)
    log.drain()
    with pytest.raises(ValueError, match="checkpoint"):
        replay(log.path, ElasticZO(LeNet5(), 1, directions="feedback"))


def test_captured_as_any_step() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 1, 28, 28), torch.randint(0, 10, (8,))
    runs = []
    for captured in (False, True):
        torch.manual_seed(1)
        model = ElasticZO(LeNet5(), ["fc3"], directions="feedback").train()
        zo = ZOSGD(model, lr=torch.tensor(0.1))
        sgd = model.tail_optimizer(torch.optim.SGD, lr=torch.tensor(0.1), fused=True)
        once = capture_step(zo, F.cross_entropy, x, y, tail=sgd) if captured else None
        for _ in range(3):
            if once is not None:
                once(x, y)
                continue
            step(model, (x,), zo, F.cross_entropy, y)
            sgd.step()
            sgd.zero_grad()
        runs.append([p.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_memory_is_that_of_inference_in_parts() -> None:
    """ResNet-20, 64 images: the matrices, a tenth more than inference, and a third of Full BP."""
    net, x = ResNet20(channels=3), torch.zeros(64, 3, 32, 32)
    parts = ElasticZO(copy.deepcopy(net), ["fc"], directions=Feedback(parts=4)).train()
    full = ElasticZO(copy.deepcopy(net), "all").train()
    mine, bp = (training_memory(m, x, state_tensors=0).steady for m in (parts, full))
    assert mine.bytes <= 1.1 * inference_memory(net, x).bytes + mine.parts["optimizer"]
    assert mine.bytes < 0.35 * bp.bytes


@pytest.mark.parametrize("name", ["input_twice", "dropouts", "vit"])
def test_parts_of_the_batch_are_the_batch(name: str) -> None:
    """Gradients of given matrices are summed over the parts; masks of dropout are those of the
    sample. The size of the noise is each part's own: small here."""
    case = ZOO[name]
    net, inputs = build(case)
    runs = []
    for parts in (1, 3):
        how = Feedback(parts=parts, noise=1e-9)
        model = ElasticZO(copy.deepcopy(net), case.tail, directions=how, seed=3).train()
        step(model, inputs, ZOSGD(model, lr=0.0))
        torch.manual_seed(7)
        for m in model.session.learnt.values():
            m.copy_(torch.randn_like(m))
        step(model, inputs, ZOSGD(model, lr=1e-2))
        runs.append([p.clone() for p in model.head_parameters()])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_layers_must_keep_their_order() -> None:
    class Turns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.tail = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
            self.turned = False

        def forward(self, x: Tensor) -> Tensor:
            for m in (self.b, self.a) if self.turned else (self.a, self.b):
                x = torch.tanh(m(x))
            y: Tensor = self.tail(x)
            return y

    net = Turns()
    model = wrapped(net)
    zo = ZOSGD(model, lr=0.1)
    step(model, (torch.randn(B, 3),), zo)
    net.turned = True
    with pytest.raises(RuntimeError, match="same order"):
        step(model, (torch.randn(B, 3),), zo)


class Branches(nn.Module):
    """The head ends in a sum of two layers, and one of its activations is read beside the tail."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)
        self.tail = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.a(x))
        s = torch.tanh(self.b(h)) + self.c(h)
        return self.tail(s) + s, s


def test_the_head_may_end_in_branches() -> None:
    """All weights of the last segment have their exact gradient, whichever layer is called last,
    and from whatever reads the cut: the tail, a skip past it, the outputs."""
    torch.manual_seed(0)
    net, x = Branches().double(), torch.randn(B, 4, dtype=torch.float64)
    model = wrapped(copy.deepcopy(net), noise=1e-12)

    def loss(out: tuple[Tensor, Tensor]) -> Tensor:
        return smooth_loss(out[0]) + out[1].square().sum()

    loss(net(x)).backward()
    before = {n: p.clone() for n, p in model.named_head_parameters()}
    step(model, (x,), ZOSGD(model, lr=1.0), loss)
    for n, p in model.named_head_parameters():
        if n[0] != "a":
            torch.testing.assert_close(before[n] - p, net.get_parameter(n).grad, msg=n)
    torch.testing.assert_close(model.module.tail.weight.grad, net.tail.weight.grad)


def test_what_would_be_another_network_is_refused() -> None:
    x = torch.randn(B, 4)
    model = wrapped(Plain())
    zo = ZOSGD(model, lr=0.1)

    def until_step(after: Callable[[], Any]) -> Tensor:
        losses = pair_losses(smooth_loss, model(x))
        model.backward(losses)
        after()
        return losses

    losses = until_step(lambda: x.mul_(2.0))
    with pytest.raises(RuntimeError, match="memory of its own"):
        zo.step(losses)
    losses = until_step(model.eval)
    with pytest.raises(RuntimeError, match="switched"):
        zo.step(losses)
    model.train()
    step(model, (x,), zo)  # what was refused is forgotten
    twin = copy.deepcopy(model)
    step(twin, (x,), ZOSGD(twin, lr=0.1))
    losses = until_step(lambda: None)
    with pytest.raises(RuntimeError, match="without a training forward"):
        ZOSGD(copy.deepcopy(model), lr=0.1).step(losses)
    pickle.loads(pickle.dumps(model))
    dead = wrapped(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3), nn.Linear(3, 2)), ["3"]
    )
    nn.init.constant_(dead.module[0].bias, -1e3)
    step(dead, (x,), ZOSGD(dead, lr=0.1))
    assert all(m.isfinite().all() and m.abs().max() < 1e3 for m in dead.session.learnt.values())
    flat = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1), nn.Flatten(0))
    with pytest.raises(ValueError, match="dimension 0"):
        wrapped(nn.Sequential(flat, Sum()), ["0.1"])(x)


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum()
