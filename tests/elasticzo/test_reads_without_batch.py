"""Tensors without the batch, or with it elsewhere, are read whole by each half."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from elasticzo import ZOSGD, ElasticZO, pair_losses
from tests.elasticzo._halves import PAIRINGS, B, D, SelfAttention, check

# ---- tensors without the batch


class Positions(nn.Module):
    """As GPT-2: rows of a table, by place, through a layer or not."""

    def __init__(self, between: Callable[[], nn.Module] = nn.Identity, ids: bool = False) -> None:
        super().__init__()
        self.wte, self.wpe, self.between = nn.Embedding(9, D), nn.Embedding(16, D), between()
        self.register_buffer("ids", torch.arange(16)[None] if ids else None)

    def forward(self, tokens: Tensor) -> Tensor:
        t = tokens.shape[1]
        at = torch.arange(t) if self.ids is None else self.ids[:, :t]
        return torch.tanh(self.wte(tokens) + self.between(self.wpe(at)))


class Body(nn.Module):
    """Its table goes to a module of its own, which has no other input."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.at, self.mix = nn.Embedding(9, D), At(), nn.Linear(D, D)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.mix(self.wte(tokens) + self.at(torch.arange(tokens.shape[1]))))


class At(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.gain = nn.Embedding(16, D), nn.Parameter(torch.ones(D))

    def forward(self, places: Tensor) -> Tensor:
        return self.table(places) * self.gain


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, : 2 * D]


class Latents(nn.Module):
    """A buffer without a batch through a layer, beside the input."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.inner, self.layer = nn.Linear(D, D), layer
        self.register_buffer("latents", torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(self.latents)
        y = y[0] if isinstance(y, tuple) else y
        return self.inner(x) * y.mean() + y.flatten()[:D]


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "linear": lambda n: Latents(nn.Linear(D, D), (n, D)),
    "norm": lambda n: Latents(nn.LayerNorm(D), (n, D)),
    "groups": lambda n: Latents(nn.GroupNorm(2, D), (n, D)),
    "batch norm": lambda n: Latents(nn.BatchNorm1d(D), (n, D)),
    "conv": lambda n: Latents(nn.Conv1d(2, 3, 3), (n, 2, 5)),
    "attention": lambda n: Latents(SelfAttention(D, 2, batch_first=True), (n, 3, D)),
    "recurrent": lambda n: Latents(nn.GRU(D, D, batch_first=True), (n, 3, D)),
    "parametrized": lambda n: Latents(parametrizations.weight_norm(nn.Linear(D, D)), (n, D)),
}


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("length", [3, B, 6, 2 * B])
def test_positions_are_those_of_each_half(length: int, pairing: str) -> None:
    tokens = torch.randint(0, 9, (B, length))
    for body in (
        Positions(),
        Positions(lambda: nn.Linear(D, D)),
        Positions(lambda: nn.LayerNorm(D)),
        Positions(ids=True),
        Body(),
    ):
        model = check(nn.Sequential(body, Pool(), nn.Linear(2 * D, 3)), tokens, pairing=pairing)
        assert model.effective_pairing == pairing  # the module around runs by half, not all of it


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("length", [2, B, 2 * B])
@pytest.mark.parametrize("layer", list(LAYERS))
def test_latents_are_not_cut(layer: str, length: int, pairing: str) -> None:
    net = nn.Sequential(LAYERS[layer](length), nn.Linear(D, 3))
    check(net, torch.randn(B, D).double(), pairing=pairing)


class TimeFirst(nn.Module):
    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.a, self.b, self.flat = nn.Linear(D, D), nn.Linear(D, 3), flat

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x)).transpose(0, 1)
        y = self.b(y.flatten(0, 1)).unflatten(0, y.shape[:2]) if self.flat else self.b(y)
        return y.transpose(0, 1)


@pytest.mark.parametrize("flat", [False, True], ids=["dimension 1", "rows"])
@pytest.mark.parametrize("length", [2, B, 2 * B])
def test_a_batch_that_changes_its_place_inside(length: int, flat: bool) -> None:
    check(TimeFirst(flat), torch.randn(B, length, D).double())


def test_an_output_without_the_batch() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(D, 3)
            self.register_buffer("table", torch.randn(2 * B, 3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.fc(x), self.table

    net = Aside()
    y, table = ElasticZO(net, tail=0).train()(torch.randn(B, D))
    assert y.shape == (2, B, 3) and torch.equal(table, torch.stack([net.table] * 2))


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("kind", ["sample", "node", "auto", "rank1"])
def test_a_table_as_long_as_the_batch_has_no_samples(kind: str, pairing: str) -> None:
    torch.manual_seed(0)
    body = Positions(lambda: nn.Linear(D, D))
    scale = {"*": 0.0, "0.wpe*": 1.0, "0.between*": 1.0}
    given: dict[str, Any] = {"directions": kind, "scale": scale, "pairing": pairing, "eps": 0.1}
    model = ElasticZO(nn.Sequential(body, Pool(), nn.Linear(2 * D, 3)), tail=0, **given).train()
    tokens = torch.randint(0, 9, (1, B)).expand(B, -1)
    for _ in range(2):
        y = model(tokens)
        assert not torch.equal(y[0], y[1])
        torch.testing.assert_close(y, y[:, :1].expand_as(y))  # equal samples, equal positions
    if kind != "rank1":
        kinds = {name: str(kind) for name, kind in model.directions.items()}
        assert kinds["0.between.weight"].startswith("weight (") and "weight" not in kinds["2.bias"]


def test_learnt_feedback_takes_no_table_for_samples() -> None:
    torch.manual_seed(0)
    body = Positions(lambda: nn.Linear(D, D))
    net = nn.Sequential(body, Pool(), nn.Linear(2 * D, 3))
    model = ElasticZO(net, tail=1, directions="feedback").train()
    zo, tokens = ZOSGD(model, lr=0.1), torch.randint(0, 9, (B, B))
    before = body.wpe.weight.clone()
    losses = pair_losses(F.cross_entropy, model(tokens), torch.arange(B) % 3)
    model.backward(losses)
    zo.step(losses)
    assert not torch.equal(before, body.wpe.weight)
    assert not any(name.startswith("0.between") for name in model.session.learnt)


def test_a_model_of_one_size_of_batch_may_still_learn_by_sample() -> None:
    torch.manual_seed(0)
    gates = torch.rand(B, D)

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.p, self.b = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 3)
            self.register_buffer("table", torch.randn(B, D))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)) * gates + self.p(self.table).mean())

    model = ElasticZO(Gated(), tail=0, directions="sample", pairing="sequential").train()
    model(torch.randn(B, D))
    names = {name: kind.name for name, kind in model.directions.items()}
    assert (names["a.weight"], names["p.weight"], names["b.weight"]) == (
        "sample",
        "weight",
        "sample",
    )


# ---- models as people write them


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.fc, self.out = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (
            p.view(b, t, 2, D // 2).transpose(1, 2) for p in self.qkv(self.ln1(x)).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, D))
        return x + self.out(F.gelu(self.fc(self.ln2(x))))


class GPT2(nn.Module):
    """A tied head, positions at the root."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe, self.block = nn.Embedding(9, D), nn.Embedding(16, D), Block()
        self.ln, self.lm = nn.LayerNorm(D), nn.Linear(D, 9, bias=False)
        self.lm.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        at = torch.arange(tokens.shape[1])[None]
        return self.lm(self.ln(self.block(self.wte(tokens) + self.wpe(at))))


class Bert(nn.Module):
    """Position and type ids in buffers, a mask of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.types = (nn.Embedding(n, D) for n in (9, 16, 2))
        self.norm, self.block, self.pooler = nn.LayerNorm(D), Block(), nn.Linear(D, 3)
        self.register_buffer("ids", torch.arange(16)[None])
        self.register_buffer("kinds", torch.zeros(1, 16, dtype=torch.long))

    def forward(self, tokens: Tensor) -> Tensor:
        t = tokens.shape[1]
        kinds = self.kinds[:, :t].expand(len(tokens), t)
        x = self.words(tokens) + self.types(kinds) + self.places(self.ids[:, :t])
        keep = (tokens != 0).to(x.dtype)[:, None, None]
        return self.pooler(self.block(self.norm(x), (1 - keep) * -1e4)[:, 0])


class Masked(nn.Module):
    """A causal mask of numbers, which has no batch, to layers of torch and of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.fc = nn.Embedding(9, D), Block(), nn.Linear(D, 3)
        self.layer = nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0, batch_first=True)
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        t = tokens.shape[1]
        x = self.embed(tokens)
        mask = nn.Transformer.generate_square_subsequent_mask(t, dtype=x.dtype)
        x = self.layer(self.block(x, mask), src_mask=mask)
        return self.fc(self.attention(x, x, x, attn_mask=mask)[0]).mean(1)


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("length", [3, B, 2 * B])
@pytest.mark.parametrize("make", [GPT2, Bert, Masked])
def test_language_models_as_they_are(make: Any, length: int, pairing: str) -> None:
    check(make(), torch.randint(0, 9, (B, length)), pairing=pairing)
