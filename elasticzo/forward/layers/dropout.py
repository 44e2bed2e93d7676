"""Dropout from the counter noise: the same mask in every half, no generator state.

With independent masks in the two halves, `g` measures the masks: std(g) is 30 times larger.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from elasticzo.forward.layers.registry import serves
from elasticzo.forward.layers.staged import halves_of
from elasticzo.forward.passes import Layer, Pass
from zo_kernels import sample

BY_CHANNEL: dict[type[nn.Module], int | None] = {
    nn.Dropout1d: 1,
    nn.Dropout2d: 2,
    nn.Dropout3d: 3,
    nn.FeatureAlphaDropout: None,
}
ALPHA_PRIME = -1.7580993408473766  # -scale * alpha of SELU: what a dropped unit becomes
CALL_BITS = 12


def _mask_shape(m: nn.Module, shape: torch.Size) -> torch.Size:
    """The shape of one half's mask: elements, or whole channels."""
    if type(m) not in BY_CHANNEL:
        return shape
    spatial = BY_CHANNEL[type(m)]
    if spatial is not None and len(shape) not in (spatial + 1, spatial + 2):
        raise ValueError(
            f"{type(m).__name__} expects {spatial + 1} or {spatial + 2} dimensions, "
            f"got {len(shape)}"
        )
    kept = len(shape) - spatial if spatial is not None else 2
    return torch.Size([*shape[:kept], *([1] * (len(shape) - kept))])


@serves(
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    always=True,
    subclasses=True,
)
def dropout(current: Pass, layer: Layer, x: Tensor) -> Tensor:
    """Apply a dropout module (the stream-th of its model) to a stacked or single batch."""
    m: Any = layer.module
    if not m.training or m.p == 0.0:
        return x
    n = current.count
    half_shape = torch.Size([x.shape[0] // n, *x.shape[1:]])
    call = current.next_call(m)
    bits = sample(
        _mask_shape(m, half_shape),
        current.key,
        tensor=layer.stream,
        query=((current.micro_batch << CALL_BITS) + call) % (1 << 24),
        noise="bits",
        first_row=current.offset,
        purpose="dropout",
        backend=current.backend,
    )
    keep = bits >= round(m.p * 2**32)
    halves = halves_of(x, n)
    if isinstance(m, (nn.AlphaDropout, nn.FeatureAlphaDropout)):
        if m.p == 1.0:
            return torch.zeros_like(x)
        a = ((1.0 - m.p) * (1.0 + m.p * ALPHA_PRIME**2)) ** -0.5
        dropped = torch.where(keep, halves, ALPHA_PRIME)
        alpha: Tensor = a * dropped - a * m.p * ALPHA_PRIME
        return alpha.flatten(0, 1)
    scale = 0.0 if m.p == 1.0 else 1.0 / (1.0 - m.p)
    kept: Tensor = halves * (keep.to(x.dtype) * scale)
    return kept.flatten(0, 1)
