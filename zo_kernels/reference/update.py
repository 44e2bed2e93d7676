"""Reference of `zo_kernels.update_`: the in-place update of all head parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zo_kernels.reference.noise import sample
from zo_kernels.reference.rules import apply_rule_
from zo_kernels.reference.weights import compute_dtype

Sample = Callable[..., Tensor]


def update_one_(
    w: Tensor,
    key: Tensor,
    coeff: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    skip: Tensor,
    tensor: int,
    scale: float,
    noise: str,
    rule: str = "sgd",
    state: Sequence[Tensor] = (),
    settings: Tensor | None = None,
    draw: Sample = sample,
) -> None:
    """One weight and its state, with noise from `draw`; `lr` to `skip` are numbers."""
    wide = compute_dtype(w)
    total = torch.zeros(w.shape, dtype=wide, device=w.device)
    for query in range(coeff.numel()):
        z = draw(w.shape, key, tensor=tensor, query=query, noise=noise)
        total += coeff[query].to(wide) * z.to(wide)
    total = total * torch.tensor(scale, dtype=wide, device=w.device)
    words = None
    if w.dtype == torch.bfloat16:
        words = draw(w.shape, key, tensor=tensor, noise="bits", purpose="rounding")
    apply_rule_(w, total, lr, weight_decay, skip, rule, state, settings, words)


@torch.no_grad()
def update_(
    params: Sequence[Tensor],
    key: Tensor,
    coeff: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    skip: Tensor,
    *,
    tensors: Sequence[int],
    groups: Sequence[int],
    scales: Sequence[float],
    noise: str = "normal",
    rule: str = "sgd",
    state: Sequence[Tensor] = (),
    settings: Tensor | None = None,
) -> None:
    for i, (w, group) in enumerate(zip(params, groups, strict=True)):
        rates = (lr[group], weight_decay[group], skip)
        own = (rule, state[i :: len(params)], None if settings is None else settings[i])
        update_one_(w, key, coeff, *rates, tensors[i], scales[i], noise, *own)
