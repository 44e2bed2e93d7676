"""Learnt feedback whose nodes are channels: one sign and one row for all places."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from elasticzo import ZOSGD
from elasticzo.feedback import Feedback
from tests.elasticzo._feedback import B, step, wrapped
from tests.elasticzo.zoo import smooth_loss

P = 8  # places


class Points(nn.Module):
    """Linear, and every place alike."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.tail = nn.Conv1d(3, 4, 1), nn.Conv1d(4, 5, 1), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.tail(self.b(self.a(x)).mean(2))
        return y

    def jacobian(self) -> Tensor:
        """Of the outputs by a channel at all its places together, `[4, 2]`."""
        return (self.tail.weight @ self.b.weight[:, :, 0]).t().detach()


def test_a_row_is_the_jacobian_of_all_places() -> None:
    """n = 150 steps, every element within 5 sigma."""
    torch.manual_seed(0)
    net, x = Points().double(), torch.randn(B, 3, P, dtype=torch.float64)
    model = wrapped(net, shared=["b"], beta=1.0)
    zo, moves = ZOSGD(model, lr=0.0), []
    for _ in range(150):
        step(model, (x,), zo)
        moves.append(model.session.learnt["b/0/0"].clone())
    found = torch.stack(moves)
    assert found.shape == (150, 4, 2)
    error = found.mean(0) - net.jacobian()
    assert (error.abs() <= 5 * found.std(0) / 150**0.5).all()


@pytest.mark.parametrize("matrix", ["learnt", "random"])
def test_places_share_the_error(matrix: str) -> None:
    """With the true matrix the first layer's gradient is autograd's, and the residual fit has
    nothing left to learn."""
    torch.manual_seed(1)
    net, x = Points().double(), torch.randn(B, 3, P, dtype=torch.float64)
    plain = copy.deepcopy(net)
    fit = {"fit": "residual"} if matrix == "learnt" else {}
    model = wrapped(net, shared=("b",), matrix=matrix, **fit)
    zo = ZOSGD(model, lr=1.0)
    model.session.learnt["b/0/0"] = true = net.jacobian()
    before = {n: p.clone() for n, p in model.named_head_parameters()}
    step(model, (x,), zo)
    smooth_loss(plain(x)).backward()
    for name in ("a.weight", "a.bias"):
        moved = before[name] - dict(model.named_head_parameters())[name]
        torch.testing.assert_close(moved, plain.get_parameter(name).grad)
    torch.testing.assert_close(model.session.learnt["b/0/0"], true)


def test_what_is_said_of_it() -> None:
    assert "shared" not in Feedback().describe()  # states of before it
    assert Feedback(shared=["b*"]).describe()["shared"] == ("b*",)
    of = Feedback(shared=["b*"]).nodes
    assert of("b1", torch.Size([2, 3, 4, 5])) == (2, 3)
    assert of("a", torch.Size([2, 3, 4, 5])) == (2, 60)
    assert of("b1", torch.Size([2, 3])) == (2, 3)
    with pytest.raises(ValueError, match=r"shared 'c\*' matches no layer of the head: .*b"):
        wrapped(Points(), shared=["b", "c*"])
    with pytest.raises(TypeError, match="name patterns, got 'conv"):
        Feedback(shared="conv*")
