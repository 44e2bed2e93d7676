"""Directions of a sample, of nodes and of rank one: outputs, updates, means, for every layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from elasticzo import ZOSGD, ElasticZO
from elasticzo.head import HeadParameter
from elasticzo.points import two_sided
from elasticzo.samples import RankOne, Samples

EPS, B, LR = 0.1, 5, 0.5

# Layers with an input of five samples; all in float64.
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(4, 3), lambda: torch.randn(B, 4)),
    "linear_tokens": (lambda: nn.Linear(4, 3, bias=False), lambda: torch.randn(B, 2, 6, 4)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2), lambda: torch.randn(B, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(2, 3, (3, 2), padding=(1, 0)), lambda: torch.randn(B, 2, 5, 4)),
    "conv2d_odd": (
        lambda: nn.Conv2d(4, 6, 3, stride=2, dilation=2, padding=2, groups=2),
        lambda: torch.randn(B, 4, 7, 6),
    ),
    "conv2d_circular": (
        lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
        lambda: torch.randn(B, 2, 5, 4),
    ),
    "depthwise_same": (
        lambda: nn.Conv2d(3, 3, (2, 3), groups=3, padding="same"),
        lambda: torch.randn(B, 3, 5, 4),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), lambda: torch.randn(B, 2, 3, 4, 3)),
    "layer_norm": (lambda: nn.LayerNorm(4), lambda: torch.randn(B, 3, 4)),
    "layer_norm_2d": (lambda: nn.LayerNorm((3, 4), bias=False), lambda: torch.randn(B, 3, 4)),
    "group_norm": (lambda: nn.GroupNorm(2, 4), lambda: torch.randn(B, 4, 3, 3)),
    "batch_norm": (lambda: nn.BatchNorm2d(4), lambda: torch.randn(B, 4, 3, 3)),
}
NODES = [name for name in LAYERS if "norm" not in name]
every = pytest.mark.parametrize("name", list(LAYERS))


class Alone(nn.Module):
    """A layer as a model, whose halves run as any other's."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def alone(name: str, **settings: Any) -> tuple[ElasticZO, Tensor]:
    make, inputs = LAYERS[name]
    torch.manual_seed(4)
    layer = make().double()
    for p in layer.parameters():  # normalisation begins with ones and zeros
        nn.init.normal_(p)
    model = ElasticZO(Alone(layer), tail=0, eps=EPS, seed=3, **settings).train()
    return model, inputs().double()


def noise_of(model: ElasticZO, w: Tensor, one: HeadParameter, sample: int) -> Tensor:
    """`z_i` of a weight, by the definition: r u^T, or an element each."""
    at = (one, w.shape, model.session.key, 0, sample, 1, "reference")
    r, u = model.estimator.samples.factors(*at)
    z = r[0] if u is None else torch.tensordot(r[0], u[0], 0)
    return z.double()


def by_sample(losses: Tensor) -> Tensor:
    """A loss of each sample and half, smooth and different for each."""
    return torch.sin(losses.flatten(2)).mul(torch.arange(1, losses.flatten(2).shape[2] + 1)).mean(2)


@pytest.mark.parametrize("pairing", ["stacked", "sequential"])
@pytest.mark.parametrize("noise", ["normal", "rademacher"])
@every
def test_a_sample_sees_its_own_weights(name: str, noise: str, pairing: str) -> None:
    """Each half and sample is the layer at `W +- eps r_i u_i^T`, and the update their weighted
    mean."""
    model, x = alone(name, directions="sample", noise=noise, pairing=pairing)
    before = {n: p.clone() for n, p in model.named_head_parameters()}
    out = model(x)
    batch = name == "batch_norm"  # its statistics are those of all samples
    for half, sign in enumerate((1.0, -1.0)):
        for i in range(B):
            z = {n: noise_of(model, w, model.head.parameters[n], i) for n, w in before.items()}
            weights = {n: w + sign * EPS * z[n] for n, w in before.items()}
            inputs = x if batch else x[i : i + 1]
            wanted = functional_call(model.module, weights, (inputs,))[i if batch else 0]
            torch.testing.assert_close(out[half, i], wanted, rtol=1e-6, atol=1e-6)
    losses = by_sample(out)
    c = (losses[0] - losses[1]) / (2 * EPS)
    wanted_updates = {
        n: sum(c[i] * noise_of(model, w, model.head.parameters[n], i) for i in range(B)) / B
        for n, w in before.items()
    }
    ZOSGD(model, lr=LR).step(losses)
    for n, p in model.named_head_parameters():
        torch.testing.assert_close(p, before[n] - LR * wanted_updates[n], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pairing", ["stacked", "sequential"])
@pytest.mark.parametrize("name", NODES)
def test_nodes_are_the_outputs_and_learn_by_the_layers_backward(name: str, pairing: str) -> None:
    """`y +- eps m n`, m = sqrt(K), one sign an output; the update is autograd's, of c n / m."""
    model, x = alone(name, directions="node", pairing=pairing)
    before = {n: p.clone() for n, p in model.named_head_parameters()}
    out = model(x)
    weights = {n: w.clone().requires_grad_() for n, w in before.items()}
    clean = functional_call(model.module, weights, (x,))
    m = model.get_submodule("module.layer").weight[0].numel() ** 0.5
    n0 = (out[0] - clean) / (EPS * m)
    torch.testing.assert_close(n0.abs(), torch.ones_like(n0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out[0] + out[1], 2 * clean, rtol=1e-6, atol=1e-6)
    losses = by_sample(out).detach()
    c = (losses[0] - losses[1]) / (2 * EPS)
    dy = n0.detach() * (c / (B * m)).view(-1, *[1] * (n0.dim() - 1))
    wanted = torch.autograd.grad(clean, list(weights.values()), dy)
    ZOSGD(model, lr=LR).step(losses)
    for (n, p), g in zip(model.named_head_parameters(), wanted, strict=True):
        torch.testing.assert_close(p, before[n] - LR * g, rtol=1e-5, atol=1e-6)


KINDS = [("sample", "normal"), *((k, "rademacher") for k in ("sample", "node", "rank1"))]


@pytest.mark.parametrize(("kind", "noise"), KINDS)
@pytest.mark.parametrize("name", ["linear_tokens", "conv2d_odd", "layer_norm"])
def test_the_mean_of_the_estimates_is_the_gradient(name: str, kind: str, noise: str) -> None:
    """The loss is linear in the outputs, so that g has no bias; n = 100 steps of five samples, a
    projection of each weight's mean onto random numbers within 5 sigma of autograd's."""
    model, x = alone(name, directions=kind, noise=noise)
    weights = {n: p.clone().requires_grad_() for n, p in model.named_head_parameters()}
    out = functional_call(copy.deepcopy(model.module), weights, (x,))
    v = torch.randn(out.shape, dtype=torch.float64)
    true = dict(
        zip(weights, torch.autograd.grad((out * v).sum() / B, weights.values()), strict=True)
    )
    onto = {n: torch.randn_like(g) for n, g in true.items()}
    found: dict[str, list[float]] = {n: [] for n in true}
    zo = ZOSGD(model, lr=1.0)
    for _ in range(100):
        losses = (model(x) * v).flatten(2).sum(2)
        zo.step(losses if model.head.by_sample else losses.mean(1))
        with torch.no_grad():
            for n, p in model.named_head_parameters():
                found[n].append(float(((weights[n] - p) * onto[n]).sum()))
                p.copy_(weights[n])
    for n, values in found.items():
        t = torch.tensor(values, dtype=torch.float64)
        error = t.mean() - (true[n] * onto[n]).sum()
        assert abs(error) <= 5 * t.std() / len(t) ** 0.5


def test_an_embedding_learns_the_rows_of_its_tokens() -> None:
    """A token's row is its output: n +-1, m = 1; a padding token has no noise and its row stays."""
    torch.manual_seed(0)
    net = Alone(nn.Embedding(7, 3, padding_idx=2)).double()
    tokens = torch.tensor([[0, 2, 5], [5, 5, 1]])
    model = ElasticZO(net, tail=0, eps=EPS, directions="sample").train()
    assert str(model.directions["layer.weight"]) == "node (a token's row is its output)"
    before = net.layer.weight.detach().clone()
    out = model(tokens)
    n = (out[0] - before[tokens]) / EPS
    assert (n[tokens == 2] == 0).all() and torch.allclose(
        n[tokens != 2].abs(), torch.ones(()).double()
    )
    losses = by_sample(out)
    c = (losses[0] - losses[1]) / (2 * EPS)
    wanted = torch.zeros_like(before)
    for i in range(2):
        for t in range(3):
            wanted[tokens[i, t]] += c[i] * n[i, t] / 2
    ZOSGD(model, lr=LR).step(losses)
    torch.testing.assert_close(net.layer.weight.detach(), before - LR * wanted)


@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_neighbours_share_a_direction(group: int) -> None:
    """`group` samples have one `r u^T`; the sum over samples is that over groups."""
    samples, one = Samples("rademacher", group), HeadParameter("w", 2, 0.5)
    w, key = torch.zeros(3, 4), torch.tensor([1, 6])
    r, u = samples.of_samples(one, w.shape, key, 0, 0, 7, "auto")
    assert u is not None
    for i in range(7):
        first = i // group * group
        assert torch.equal(r[i], r[first]) and torch.equal(u[i], u[first])
    assert len({tuple(r[i].tolist() + u[i].tolist()) for i in range(7)}) == -(-7 // group)
    later = samples.of_samples(one, w.shape, key, 0, 3, 4, "auto")  # the micro-batch from 3 on
    assert torch.equal(later[0], r[3:]) and torch.equal(later[1], u[3:])  # type: ignore[arg-type]
    a = torch.randn(1, 7, dtype=torch.float64)
    wanted = 0.5 * torch.einsum("i,in,ik->nk", a[0], r.double(), u.double())
    found = samples.sum(one, w, key, a, "auto").double()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["linear_tokens", "conv2d_odd", "layer_norm"])
def test_rank_one_is_one_direction_for_the_batch(name: str) -> None:
    """A layer's thin product gives what its weights at the points give, which others stage."""
    model, x = alone(name, noise="rank1", queries=2)
    assert {str(k) for k in model.directions.values()} == {"rank1"}
    out = model(x)
    direction, points = RankOne(), two_sided(2)
    parts = {
        n: direction.weights(
            model.head.parameters[n], w, model.session.key, model.session.eps, points, None, "auto"
        )
        for n, w in model.named_head_parameters()
    }
    for half in range(4):
        wanted = functional_call(model.module, {n: w[half] for n, w in parts.items()}, (x,))
        torch.testing.assert_close(out[half], wanted, rtol=1e-6, atol=1e-6)
    assert not model.head.by_sample  # one number a batch is enough
    ZOSGD(model, lr=1e-3).step(by_sample(out).mean(1))


def test_the_thin_product_has_the_variance_of_theory() -> None:
    """E (s.g)^2 |s|^2 over |g|^2 of a sample's estimate is N K for r u^T of signs, and N P for
    nodes; n = 4,000 directions, 5 sigma."""
    n, k = 4, 6
    for kind, factor in (("sample", n * k), ("node", n)):
        torch.manual_seed(0)
        count = 4000
        model = ElasticZO(Alone(nn.Linear(k, n, bias=False)).double(), 0, eps=EPS, directions=kind)
        x = torch.randn(1, k, dtype=torch.float64).expand(count, k)
        v = torch.randn(n, dtype=torch.float64)
        out = model.train()(x) @ v
        c = (out[0] - out[1]) / (2 * EPS)
        # |u|^2 of each sample's own estimate: signs have a fixed length
        size = factor if kind == "sample" else n * (x[0].square().sum() / k)
        squares = c.square() * size
        wanted = v.square().sum() * x[0].square().sum() * factor
        error = squares.mean() - wanted
        assert abs(error) <= 5 * squares.std() / count**0.5
