"""Learnt feedback whose last layers have exact errors: backpropagation's gradients, little kept."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elasticzo import ZOSGD, ElasticZO, pair_losses
from elasticzo.feedback import Feedback
from elasticzo.forward.trees import strip
from tests.elasticzo._feedback import B, Plain, step, wrapped
from tests.elasticzo.zoo import ZOO, build, smooth_loss

NO_NOISE = 1e-12


def gradients(model: ElasticZO, inputs: Any) -> dict[str, Tensor]:
    before = {n: p.clone() for n, p in model.named_head_parameters()}
    torch.manual_seed(1)
    step(model, inputs, ZOSGD(model, lr=1.0))
    return {n: before[n] - p for n, p in model.named_head_parameters()}


@pytest.mark.parametrize("name", [n for n in ZOO if "time_first" not in n and n != "dropouts"])
def test_exact_everywhere_is_backpropagation(name: str) -> None:
    """No matrix is learnt, and every weight of the head has autograd's gradient."""
    case = ZOO[name]
    net, inputs = build(case)
    for m in net.modules():
        if isinstance(m, nn.Dropout | nn.MultiheadAttention | nn.LSTM):
            m.p = m.dropout = 0.0  # masks are those of the wrapper's own counter
    plain = copy.deepcopy(net)
    exact = Feedback(exact=("*",), noise=NO_NOISE)
    model = ElasticZO(net, case.tail, directions=exact, seed=3).train()
    found = gradients(model, inputs)
    smooth_loss(plain(*strip(inputs))).backward()
    assert set(model.session.learnt) <= {"steps"}
    for n, p in plain.named_parameters():
        if n in found:
            wanted = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(found[n], wanted, rtol=1e-8, atol=1e-10)


def test_what_comes_before_learns_by_matrices() -> None:
    """c is exact: b, whose error is that of c's input, has autograd's gradient, and a a matrix's.
    Where b is exact and c is not, the way back ends at c, and both have matrices."""
    torch.manual_seed(0)
    net, x = Plain().double(), torch.randn(B, 4, dtype=torch.float64)
    model = wrapped(copy.deepcopy(net), exact=("c",), noise=NO_NOISE)
    found = gradients(model, (x,))
    assert set(model.session.learnt) == {"b/0/0", "steps"}
    assert found["a.weight"].eq(0).all()  # its matrix knew nothing yet
    smooth_loss(net(x)).backward()
    for n in ("b.weight", "c.weight", "c.bias"):
        torch.testing.assert_close(found[n], dict(net.named_parameters())[n].grad)
    other = wrapped(copy.deepcopy(net), exact=("b",))
    gradients(other, (x,))
    assert set(other.session.learnt) == {"b/0/0", "c/0/0", "steps"}


@pytest.mark.parametrize("cuts", [{"parts": 3}, {"micro": 2}])
def test_a_step_is_the_same_however_it_is_cut(cuts: dict[str, int]) -> None:
    net, (x,) = build(ZOO["input_twice"])
    moved = []
    for parts, micro in ((1, 1), (cuts.get("parts", 1), cuts.get("micro", 1))):
        how = Feedback(exact=("*",), noise=NO_NOISE, parts=parts)
        model = ElasticZO(copy.deepcopy(net), ZOO["input_twice"].tail, directions=how).train()
        zo, losses = ZOSGD(model, lr=1.0), []
        before = [p.clone() for p in model.head_parameters()]
        for part in x.chunk(micro):
            losses.append(pair_losses(lambda out: out.square().mean(), model(part)))
            model.backward(losses[-1] / micro)
        zo.step(torch.stack(losses).mean(0))
        moved.append([p - b for p, b in zip(model.head_parameters(), before, strict=True)])
    for a, b in zip(*moved, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_of_a_linear_layer_and_its_relu_only_the_output_is_kept() -> None:
    """What exact layers read is gone before the backward, and their errors after the step."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(m for _ in range(4) for m in (nn.Linear(8, 8), nn.ReLU())), nn.Linear(8, 2)
    )
    model, read = wrapped(net, tail=["8"], exact=("4", "6")), list[weakref.ref[Tensor]]()
    for at in (2, 4):  # what the first exact layer reads, and what is saved by none
        net[at].register_forward_hook(lambda _, __, y: read.append(weakref.ref(y)))
    losses = pair_losses(smooth_loss, model(torch.randn(B, 8)))
    assert all(ref() is None for ref in read[-2:])
    model.backward(losses)
    errors = [weakref.ref(t) for one in model.session.kept for t in one.ends.values()]
    assert len(errors) == 2
    ZOSGD(model, lr=1e-2).step(losses)
    assert all(ref() is None for ref in errors)


def test_patterns_of_no_layer_are_refused() -> None:
    with pytest.raises(ValueError, match="exact 'fc' matches no layer of the head: a, b, c"):
        wrapped(Plain(), exact=("fc",))
    with pytest.raises(TypeError, match="exact must be a sequence of name patterns, got 'c'"):
        Feedback(exact="c")  # type: ignore[arg-type]
