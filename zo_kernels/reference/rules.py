"""Reference of `zo_kernels.rules`: one weight and its state, in plain torch on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_kernels.reference.weights import compute_dtype


def round_stochastically(x: Tensor, words: Tensor) -> Tensor:
    """fp32 -> bf16, up with probability equal to the fraction dropped.

    The lower 16 bits of the fp32 pattern are what bf16 drops: add a uniform 16-bit number (the
    upper half of a word of purpose "rounding") and truncate. Infinities and NaN are cast as they
    are.
    """
    bits = x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    bits = (bits + (words >> 16)) & 0xFFFF0000
    signed = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32)
    return torch.where(torch.isfinite(x), signed.view(torch.float32), x).to(torch.bfloat16)


def moved(
    w: Tensor,
    total: Tensor,
    lr: Tensor,
    decay: Tensor,
    rule: str,
    state: Sequence[Tensor],
    settings: Sequence[Tensor],
) -> list[Tensor]:
    """The new weight and its new state; all tensors in the wide dtype, but for float64 settings."""
    wide = w.dtype
    if rule == "adam":
        (m, v), (beta1, beta2) = state, settings[:2]
        epsilon, correction1, correction2 = (t.to(wide) for t in settings[2:5])
        coupled = torch.where(settings[5] != 0, 0.0, decay)
        u = total + coupled * w
        m = beta1.to(wide) * m + (1 - beta1).to(wide) * u
        v = beta2.to(wide) * v + (1 - beta2).to(wide) * (u * u)
        step = (m / correction1) / ((v / correction2).sqrt() + epsilon)
        return [w - lr * (decay - coupled) * w - lr * step, m, v]
    u = total + decay * w
    if rule == "sign":
        return [w - lr * u.sign()]
    if rule == "momentum":
        (buffer,), momentum = state, settings[0].to(wide)
        buffer = momentum * buffer + u
        return [w - lr * torch.where(settings[1] != 0, u + momentum * buffer, buffer), buffer]
    return [w - lr * u]


@torch.no_grad()
def apply_rule_(
    w: Tensor,
    u_noise: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    skip: Tensor,
    rule: str = "sgd",
    state: Sequence[Tensor] = (),
    settings: Tensor | None = None,
    words: Tensor | None = None,
) -> None:
    """One weight and its state; nothing waits for the device."""
    wide = compute_dtype(w)
    old = [t.to(wide) for t in (w, *state)]
    numbers = () if settings is None else settings.unbind()
    rates = (lr.to(wide), weight_decay.to(wide))
    new = moved(old[0], u_noise.to(wide), *rates, rule, old[1:], numbers)
    if words is not None and w.dtype == torch.bfloat16:
        new[0] = round_stochastically(new[0], words)
    for t, value in zip((w, *state), new, strict=True):
        t.copy_(torch.where(skip != 0, t, value.to(t.dtype)))
