"""Reference of `zo_kernels.int8_gradient_update_`: range, shift, subtraction, in int64."""

from __future__ import annotations

from torch import Tensor

from zo_kernels.reference.int8_range import int8_range
from zo_kernels.reference.integer import clip, round_shift, rounding_words


def int8_gradient_update_(
    w: Tensor,
    gradient: Tensor,
    *,
    b_bp: int,
    rounding: str = "pseudo",
    key: Tensor | None = None,
    tensor: int = 0,
) -> None:
    s = (int8_range(gradient).long() - b_bp).clamp(0, 31)
    words = rounding_words(gradient.shape, key, rounding, tensor)
    update = clip(round_shift(gradient.long(), s, rounding, words))
    w.copy_(clip(w.long() - update))


__all__ = ["int8_gradient_update_"]
