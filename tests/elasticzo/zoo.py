"""Models that the wrapper was not written for, with inputs, a cut and a pairing that fits each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from elasticzo import unbatched


class ResidualCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(4)
        self.down = nn.Sequential(nn.Conv2d(4, 6, 1, stride=2), nn.BatchNorm2d(6))
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.stem(x)))
        x = F.relu(x + self.bn2(self.conv(x)))
        return self.fc(self.down(x).mean((2, 3)))


class OddConvs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, groups=2, stride=2, padding="valid")
        self.dilated = nn.Conv2d(8, 6, 3, dilation=2, padding=2, padding_mode="circular")
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6, padding="same")
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.dilated(F.max_pool2d(torch.tanh(self.grouped(x)), 2)))
        return self.fc(self.depthwise(x).amax((2, 3)))


class Conv1dNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(3, 8, 3, padding=1),
            nn.GroupNorm(2, 8),
            nn.ReLU(),
            nn.Conv1d(8, 4, 3, stride=2),
            nn.BatchNorm1d(4),
        )
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(x).mean(-1))


class Encoder(nn.Module):
    """Token embedding, two encoder layers with dropout, a classifier."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.encoder(self.embed(tokens)))
        return self.fc(x.mean(1 if self.batch_first else 0))


class ViT(nn.Module):
    """Parameters at the root: a class token and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 8, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 8) * 0.3)
        self.position = nn.Parameter(torch.randn(1, 5, 8) * 0.3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.fc(self.norm(x + self.attention(x, x, x, need_weights=False)[0])[:, 0])


class LSTMNet(nn.Module):
    def __init__(self, batch_first: bool = True, states: bool = False) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, num_layers=2, batch_first=batch_first, bidirectional=states)
        self.fc = nn.Linear(5, 3)
        self.batch_first, self.states = batch_first, states

    def forward(self, x: Tensor) -> Tensor:
        out, (h, _) = self.lstm(x)
        if self.states:
            return self.fc(h[-1] + h[0])
        return self.fc(out[:, -1] if self.batch_first else out[-1])


class TiedLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.mix = nn.Linear(6, 6)
        self.out = nn.Linear(6, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mix(self.embed(tokens)))).mean(1)


class InputTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(9, 5), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.b(torch.cat([x, torch.tanh(self.a(x))], 1)))
        return self.c(torch.cat([x, h], 1))


class TwoInputs(nn.Module):
    """Attention of one input over another, with a mask that has no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, kdim=4, vdim=4, batch_first=True)
        self.fc = nn.Linear(6, 3)

    def forward(self, pair: dict[str, Tensor], mask: Tensor) -> Tensor:
        y, _ = self.attention(pair["q"], pair["kv"], pair["kv"], attn_mask=mask)
        return self.fc(y.mean(1))


class Padded(nn.Module):
    """An embedding with a padding token, whose row no gradient reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5, padding_idx=2)
        self.fc = nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.embed(tokens)).sum(1))


class Functional(nn.Module):
    """Reads the weight of a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(F.linear(x, self.shared.weight.t(), self.shared.bias)))


class Scales(nn.Module):
    """A ParameterList, and a parametrized layer, inside a plain model."""

    def __init__(self) -> None:
        super().__init__()
        self.gains = nn.ParameterList([torch.randn(4), torch.randn(4)])
        self.inner = parametrizations.weight_norm(nn.Linear(4, 4))
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.inner(x * self.gains[0] + self.gains[1])))


class Dropouts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.Dropout2d(0.3), nn.Tanh(), nn.Dropout(0.2), nn.Conv2d(6, 4, 3)
        )
        self.alpha = nn.AlphaDropout(0.2)
        self.fc1, self.drop, self.fc = nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.alpha(F.selu(self.layers(x).mean((2, 3))))
        return self.fc(self.drop(self.drop(torch.tanh(self.fc1(x)))))


@dataclass(frozen=True)
class Case:
    """A model, its inputs `(batch) -> args`, its tail and the pairings that it allows."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]]
    tail: Any = ("fc",)
    pairings: tuple[str, ...] = ("stacked", "sequential")


def _floats(*shape: int) -> Callable[[int], tuple[Any, ...]]:
    return lambda batch: (torch.randn(batch, *shape),)


def _tokens(batch: int) -> tuple[Any, ...]:
    return (torch.randint(0, 7, (batch, 5)),)


def _pair(batch: int) -> tuple[Any, ...]:
    mask = torch.triu(torch.full((3, 5), float("-inf"), dtype=torch.float64), 3)
    return {"q": torch.randn(batch, 3, 6), "kv": torch.randn(batch, 5, 4)}, unbatched(mask)


def _time_first(*shape: int) -> Callable[[int], tuple[Any, ...]]:
    return lambda batch: (torch.randn(4, batch, *shape),)


ZOO: dict[str, Case] = {
    "residual_cnn": Case(ResidualCNN, _floats(2, 8, 8)),
    "residual_cnn_tail_bn": Case(ResidualCNN, _floats(2, 8, 8), tail=("down", "fc")),
    "odd_convs": Case(OddConvs, _floats(4, 9, 9)),
    "conv1d": Case(Conv1dNet, _floats(3, 9)),
    "transformer": Case(Encoder, _tokens),
    "transformer_tail_layer": Case(Encoder, _tokens, tail=("encoder.layers.1", "norm", "fc")),
    "vit": Case(ViT, _floats(1, 8, 8)),
    "lstm": Case(LSTMNet, _floats(4, 3)),
    "lstm_states": Case(lambda: LSTMNet(states=True), _floats(4, 3)),
    "lstm_time_first": Case(
        lambda: LSTMNet(batch_first=False), _time_first(3), pairings=("sequential",)
    ),
    "encoder_time_first": Case(
        lambda: Encoder(batch_first=False),
        lambda batch: (torch.randint(0, 7, (5, batch)),),
        pairings=("sequential",),
    ),
    "tied": Case(TiedLM, _tokens, tail=0),
    "input_twice": Case(InputTwice, _floats(4), tail=("c",)),
    "two_inputs": Case(TwoInputs, _pair),
    "padding": Case(Padded, _tokens),
    "functional": Case(Functional, _floats(4)),
    "scales": Case(Scales, _floats(4)),
    "dropouts": Case(Dropouts, _floats(1, 8, 8)),
}


def build(case: Case, batch: int = 6, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Any]:
    """The model and inputs of a case, from fixed seeds."""
    torch.manual_seed(5)
    model = case.make().to(dtype)
    inputs = case.inputs(batch)
    return model, cast(inputs, dtype)


def cast(tree: Any, dtype: torch.dtype) -> Any:
    """Floating tensors of nested inputs in another dtype."""
    if isinstance(tree, Tensor):
        return tree.to(dtype) if tree.is_floating_point() else tree
    if isinstance(tree, dict):
        return {k: cast(v, dtype) for k, v in tree.items()}
    if isinstance(tree, tuple):
        return tuple(cast(v, dtype) for v in tree)
    return unbatched(cast(tree.tensor, dtype))


def smooth_loss(output: Tensor) -> Tensor:
    """A loss with no kinks, different for every row and column."""
    weight = torch.arange(1, output.numel() + 1, dtype=output.dtype, device=output.device)
    return (torch.sin(output.flatten()) * weight).mean() + output.square().mean()
