"""A weight layer in int8 and what follows it up to its requantisation: one block."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from elasticzo.int8.tensor import Int8Tensor

Two = tuple[int, int]


class Int8Layer(nn.Module):
    """The weight of a Linear, Conv1d or Conv2d as buffers: int8 `weight`, int32 `exponent` `[]`.

    Args:
        weight: `[N, K]`, `[Co, Ci, KW]` or `[Co, Ci, KH, KW]`.
        tensor: its place among the network's weights, the noise's second counter word.
        stride, padding, dilation: of a convolution, (height, width); a Conv1d has a height of 1.
    """

    weight: Tensor
    exponent: Tensor

    def __init__(
        self,
        weight: Int8Tensor,
        tensor: int,
        stride: Two = (1, 1),
        padding: Two = (0, 0),
        dilation: Two = (1, 1),
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight.q)
        self.register_buffer("exponent", weight.exponent)
        self.tensor = tensor
        self.stride, self.padding, self.dilation = stride, padding, dilation

    @property
    def convolution(self) -> bool:
        return self.weight.ndim > 2

    @property
    def weight2d(self) -> Tensor:
        """The weight of a convolution as that of a Conv2d."""
        return self.weight.unsqueeze(2) if self.weight.ndim == 3 else self.weight

    def extra_repr(self) -> str:
        return f"{list(self.weight.shape)}, tensor={self.tensor}"


@dataclass(frozen=True)
class Pool:
    """Maxima over windows of (height, width), or, where None, over all of the last dimension."""

    window: Two | None = None
    stride: Two = (1, 1)

    @property
    def fusible(self) -> bool:
        return self.window == (2, 2) == self.stride

    def windows(self, x: Tensor) -> Tensor:
        """A view `[..., elements of a window]`."""
        if self.window is None:
            return x
        view = x.unfold(-2, self.window[0], self.stride[0])
        return view.unfold(-2, self.window[1], self.stride[1]).flatten(-2)

    def __call__(self, x: Tensor) -> Tensor:
        return self.windows(x).amax(-1)

    def with_places(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The maxima, and for each the place in its window: the first one, where several are."""
        windows = self.windows(x)
        places = windows.argmax(-1, keepdim=True)
        return windows.gather(-1, places).squeeze(-1), places.squeeze(-1)

    def route(self, error: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
        """Errors of the maxima to their places; windows that overlap add up, in int32."""
        out = torch.zeros(shape, dtype=torch.int32, device=error.device)
        if self.window is None:
            return out.scatter_(-1, places.unsqueeze(-1), error.to(torch.int32).unsqueeze(-1))
        rows = torch.arange(error.shape[-2], device=error.device)[:, None] * self.stride[0]
        cols = torch.arange(error.shape[-1], device=error.device) * self.stride[1]
        row = rows + places // self.window[1]
        flat = row * shape[-1] + cols + places % self.window[1]
        into, values = out.flatten(-2), error.to(torch.int32).flatten(-2)
        return into.scatter_add_(-1, flat.flatten(-2), values).view(shape)


@dataclass
class Block:
    """`acc = W x`, then pooling and ReLU, then requantisation, then perhaps a Flatten.

    Maximum and ReLU commute, so only the pools have an order.
    """

    name: str
    layer: Int8Layer
    relu: bool = False
    pools: list[Pool] = field(default_factory=list)
    flatten: bool = False
