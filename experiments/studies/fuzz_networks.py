"""Random networks of the kinds of layers that a wrapper serves, and random settings for them.

A seed gives all of it. A network is a chain of blocks over flat samples `[B, C]`, sequences
`[B, T, C]` or images `[B, C, S, S]`; blocks may hold branches, layers that are used twice, buffers,
tables of positions and parameters without dimensions. All in float64.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CLASSES, TOKENS = 3, 7
SMOOTH = (nn.Tanh, nn.GELU, nn.SiLU, nn.Softplus, nn.Sigmoid)
Make = Callable[[], nn.Module]


@dataclass
class Case:
    """A network, one batch of inputs and targets, and how it is wrapped.

    Attributes:
        smooth: whether its loss has derivatives everywhere: neither ReLU nor a maximum.
        settings: of `ElasticZO`, but for pairing and backend.
        micro_batches: forwards a step.
    """

    seed: int
    net: nn.Module
    x: Tensor
    y: Tensor
    smooth: bool
    settings: dict[str, Any]
    micro_batches: int

    def __str__(self) -> str:
        blocks = ", ".join(type(m).__name__ for m in self.net.modules() if not list(m.children()))
        told = ", ".join(f"{k}={v!r}" for k, v in self.settings.items())
        return f"seed {self.seed}: {blocks}; {list(self.x.shape)}; {told}"


class Branches(nn.Module):
    """`x + a(b(x))`, or the mean of two ways."""

    def __init__(self, one: nn.Module, other: nn.Module, residual: bool) -> None:
        super().__init__()
        self.one, self.other, self.residual = one, other, residual

    def forward(self, x: Tensor) -> Any:
        return x + self.other(self.one(x)) if self.residual else (self.one(x) + self.other(x)) / 2


class Twice(nn.Module):
    """One layer, called two times."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.shared = shared

    def forward(self, x: Tensor) -> Any:
        return self.shared(torch.tanh(self.shared(x)))


class Tied(nn.Module):
    """Two layers over one weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Any:
        return self.two(torch.tanh(self.one(x)))


class Temperature(nn.Module):
    """A parameter without dimensions."""

    def __init__(self, exponent: bool) -> None:
        super().__init__()
        self.t, self.exponent = nn.Parameter(torch.tensor(0.3)), exponent

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.t.exp() if self.exponent else self.t)


class Added(nn.Module):
    """A table of positions, a parameter or a buffer, of one sample."""

    def __init__(self, *shape: int, learnt: bool) -> None:
        super().__init__()
        table = torch.randn(1, *shape) / 3
        if learnt:
            self.table = nn.Parameter(table)
        else:
            self.register_buffer("table", table)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return x + self.inner(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], width: int, layers: int, both: bool) -> None:
        super().__init__()
        settings: dict[str, Any] = {"batch_first": True, "bidirectional": both}
        self.inner = kind(width, width // (1 + both), layers, **settings)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)[0]


class Across(nn.Module):
    """A convolution over time, or over the places of an image, of `[B, T, C]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Conv1d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        return self.inner(x.mT).mT


class MeanOver(nn.Module):
    """The mean over all dimensions between the first and the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        dims = [d for d in range(1, x.dim()) if d != self.channels % x.dim()]
        return x.mean(dims) if dims else x


class Draw:
    """Draws from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.smooth = True

    def one(self, *options: Any) -> Any:
        return self.random.choice(options)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def activation(self) -> nn.Module:
        if self.chance(0.25):
            self.smooth = False
            return nn.ReLU()
        made: nn.Module = self.one(*SMOOTH)()
        return made

    def block(self, plain: Callable[[], nn.Module], own: list[Make], width: int) -> nn.Module:
        """A layer of `plain` or of the domain's `own`, maybe inside a branch or used twice."""
        makers: list[Make] = [
            lambda: nn.Sequential(plain(), self.activation()),
            lambda: nn.Sequential(plain(), self.activation()),
            lambda: Branches(plain(), self.activation(), residual=True),
            lambda: Branches(plain(), plain(), residual=False),
            lambda: Twice(plain()),
            lambda: Temperature(self.chance(0.5)),
            lambda: nn.Dropout(0.3),
        ]
        make: Make = self.one(*makers, *own, *own)
        return make()


def flat(draw: Draw, batch: int) -> tuple[Tensor, list[nn.Module], int]:
    width = draw.one(4, 6)
    own: list[Make] = [
        lambda: nn.LayerNorm(width),
        lambda: nn.BatchNorm1d(width, momentum=draw.one(0.1, None)),
        lambda: nn.GroupNorm(2, width),
        lambda: nn.RMSNorm(width),
        lambda: Tied(width),
        lambda: Added(width, learnt=draw.chance(0.5)),
    ]
    blocks = [
        draw.block(lambda: nn.Linear(width, width, bias=draw.chance(0.7)), own, width)
        for _ in range(draw.one(1, 2, 3))
    ]
    return torch.randn(batch, width), [*blocks, nn.Linear(width, width)], width


def sequence(draw: Draw, batch: int) -> tuple[Tensor, list[nn.Module], int]:
    width, length = 4, draw.one(2, 3, 2 * batch)
    own: list[Make] = [
        lambda: nn.LayerNorm(width),
        lambda: Attention(width, draw.one(1, 2)),
        lambda: nn.TransformerEncoderLayer(width, 2, 6, 0.0, nn.GELU(), batch_first=True),
        lambda: Recurrent(
            draw.one(nn.RNN, nn.LSTM, nn.GRU), width, draw.one(1, 2), draw.chance(0.3)
        ),
        lambda: Across(width),
        lambda: Added(length, width, learnt=draw.chance(0.5)),
    ]
    blocks = [
        draw.block(lambda: nn.Linear(width, width), own, width) for _ in range(draw.one(1, 2))
    ]
    if draw.chance(0.5):
        table = nn.Embedding(TOKENS, width, padding_idx=draw.one(None, 0))
        return torch.randint(TOKENS, (batch, length)), [table, *blocks, MeanOver(-1)], width
    return torch.randn(batch, length, width), [*blocks, MeanOver(-1)], width


def images(draw: Draw, batch: int) -> tuple[Tensor, list[nn.Module], int]:
    width, size = 4, draw.one(6, 7)

    def conv() -> nn.Module:
        kernel = draw.one(1, 3)
        fill = {"padding": kernel // 2, "groups": draw.one(1, 2), "bias": draw.chance(0.6)}
        return nn.Conv2d(width, width, kernel, **fill)

    def pool() -> nn.Module:
        draw.smooth = False
        return nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2, stride=1))

    own: list[Make] = [
        lambda: nn.BatchNorm2d(width, track_running_stats=draw.chance(0.8)),
        lambda: nn.GroupNorm(2, width),
        lambda: nn.Dropout2d(0.3),
        lambda: nn.ConvTranspose2d(width, width, 2),
        lambda: nn.Sequential(conv(), nn.AvgPool2d(2, stride=1)),
        pool,
    ]
    first = nn.Conv2d(2, width, 3, padding=1, stride=draw.one(1, 2))
    blocks = [draw.block(conv, own, width) for _ in range(draw.one(1, 2))]
    return torch.randn(batch, 2, size, size), [first, *blocks, MeanOver(1)], width


def settings_of(draw: Draw, head: list[str], seed: int) -> dict[str, Any]:
    """Of the wrapper: by whose noise, how often, how far."""
    found: dict[str, Any] = {"tail": draw.one(0, 1, 1), "seed": seed, "eps": 1e-5}
    if draw.chance(0.3):
        found |= {"directions": draw.one("rank1", "sample", "node", "auto")}
        found |= {"group": draw.one(1, 2)} if found["directions"] in ("sample", "auto") else {}
    else:
        found |= {"noise": draw.one("normal", "rademacher"), "queries": draw.one(1, 1, 2, 3)}
    if head and draw.chance(0.3):
        found["scale"] = {"*": draw.one(0.5, 1.0), draw.one(*head): draw.one(0.0, 2.0)}
    return found


def make_case(seed: int) -> Case:
    """The network and settings of a seed."""
    draw = Draw(seed)
    torch.manual_seed(seed)
    batch = draw.one(2, 3, 4)
    domain: Callable[[Draw, int], Any] = draw.one(flat, sequence, images)
    x, blocks, width = domain(draw, batch)
    net = nn.Sequential(*blocks, nn.Linear(width, CLASSES)).double()
    if x.is_floating_point():
        x = x.double()
    last = f"{len(net) - 1}."
    head = [name for name, _ in net.named_parameters() if not name.startswith(last)]
    settings = settings_of(draw, head, seed)
    target = torch.randn(batch, CLASSES, dtype=torch.float64)
    return Case(seed, net, x, target, draw.smooth, settings, draw.one(1, 1, 2))
