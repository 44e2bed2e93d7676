"""Recurrent layers and attention with a forward of their own, BatchNorm without a counter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticzo import ZOSGD, ElasticZO, pair_losses

B, T, C, H, LAYERS = 4, 8, 4, 6, 2
X = torch.randn(B, T, C, generator=torch.Generator().manual_seed(0))
Y = torch.arange(B) % 3


class Renamed(nn.LSTM):
    pass


class OutputAlone(nn.GRU):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x)[0]


class Scaled(nn.LSTM):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale, self.norm = nn.Parameter(torch.ones(1)), nn.LayerNorm(H)

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return self.norm(super().forward(x)[0]) * self.scale


class StatesToo(nn.RNN):
    """Its second dimension 0 is that of layers, as many as there are halves."""

    def forward(self, x: Tensor, h: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, h)[0]


class StatesFirst(nn.GRU):
    def forward(self, h: Tensor, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, h)[0]


class BatchFirstStates(nn.GRU):
    def forward(self, x: Tensor, h: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, h.transpose(0, 1).contiguous())[0]


class Itself(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


class Masked(nn.MultiheadAttention):
    """The mask is as long as the stacked batch."""

    def forward(self, x: Tensor, mask: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, x, x, attn_mask=mask, need_weights=False)[0]


class Net(nn.Module):
    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.embed, self.layer, self.call = nn.Linear(C, C), layer, call
        self.fc = nn.LazyLinear(3)
        self(X)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        h = x.mean(1).expand(LAYERS, -1, C).repeat(1, 1, 2)[..., :H]
        out = self.call(self.layer, x, h)
        result: Tensor = self.fc((out[0] if isinstance(out, tuple) else out)[:, -1])
        return result


def mask() -> Tensor:
    return torch.ones(T, T).triu(1) * -1e9


def recurrent(kind: type[nn.RNNBase]) -> nn.Module:
    return kind(C, H, LAYERS, batch_first=True)  # type: ignore[call-arg, arg-type]


CASES: dict[str, Callable[[], nn.Module]] = {
    "renamed": lambda: Net(recurrent(Renamed), lambda m, x, h: m(x)),
    "renamed, states": lambda: Net(recurrent(Renamed), lambda m, x, h: m(x, (h, h))),
    "output alone": lambda: Net(recurrent(OutputAlone), lambda m, x, h: m(x)),
    "scaled": lambda: Net(recurrent(Scaled), lambda m, x, h: m(x)),
    "states": lambda: Net(recurrent(StatesToo), lambda m, x, h: m(x, h)),
    "states by name": lambda: Net(recurrent(StatesToo), lambda m, x, h: m(x=x, h=h)),
    "states first": lambda: Net(recurrent(StatesFirst), lambda m, x, h: m(h, x)),
    "batch first": lambda: Net(
        recurrent(BatchFirstStates), lambda m, x, h: m(x, h.transpose(0, 1))
    ),
    "attention": lambda: Net(Itself(C, 2, batch_first=True), lambda m, x, h: m(x)),
    "mask": lambda: Net(Masked(C, 2, batch_first=True), lambda m, x, h: m(x, mask())),
}


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_a_forward_of_its_own(make: Callable[[], nn.Module]) -> None:
    """Stacked halves are those that run one by one, and those are the model's own."""
    torch.manual_seed(0)
    net = make()
    outputs = {}
    for pairing in ("stacked", "sequential"):
        model = ElasticZO(copy.deepcopy(net), tail=1, eps=0.1, pairing=pairing).train()
        zo = ZOSGD(model, lr=0.1)
        outputs[pairing] = model(X)
        zo.step(pair_losses(F.cross_entropy, outputs[pairing], Y))
        outputs[pairing + " later"] = model(X)
    torch.testing.assert_close(outputs["stacked"], outputs["sequential"])
    torch.testing.assert_close(outputs["stacked later"], outputs["sequential later"])
    assert not torch.allclose(outputs["stacked"][0], outputs["stacked"][1])
    still = ElasticZO(net, tail=1, eps=1e-6).train()(X)
    torch.testing.assert_close(still, net(X).expand(2, -1, -1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pairing", ["stacked", "sequential"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_without_a_counter(momentum: float | None, pairing: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(C, H), nn.BatchNorm1d(H, momentum=momentum), nn.Linear(H, 3))
    norm: Any = net[1]
    norm.num_batches_tracked = None
    plain = copy.deepcopy(net).train()
    model = ElasticZO(net, tail=1, eps=1e-7, pairing=pairing).train()
    for _ in range(2):
        expected = plain(X[:, 0])
        torch.testing.assert_close(model(X[:, 0]).mean(0), expected)
    for name, t in plain.named_buffers():
        torch.testing.assert_close(model.module.get_buffer(name), t)
