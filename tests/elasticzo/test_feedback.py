"""Learnt feedback: gradients by the definition, matrices against Jacobians."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticzo import ZOSGD, ElasticZO, pair_losses
from elasticzo.feedback import Feedback
from tests.elasticzo._feedback import NOISE, B, Plain, identity, step, wrapped
from tests.elasticzo.zoo import ZOO, build, smooth_loss


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
