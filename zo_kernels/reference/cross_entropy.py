"""Reference of `zo_kernels.paired_cross_entropy` and its backward: rows in fp32, means in fp64."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def _valid(target: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Which targets are classes; all targets, 0 in place of the others."""
    valid = (target >= 0) & (target < classes)
    return valid, target.where(valid, torch.zeros_like(target))


def paired_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    x = logits.float()
    top = x.amax(-1, keepdim=True)
    below = x - top
    log = below.exp().sum(-1, keepdim=True).log()
    minus_log_p = log - below
    valid, index = _valid(target, x.shape[-1])
    index = rearrange(index, "b -> 1 b 1").expand(len(x), -1, 1)
    loss = minus_log_p.gather(-1, index).squeeze(-1)
    if label_smoothing > 0:
        loss = (1 - label_smoothing) * loss + label_smoothing * minus_log_p.mean(-1)
    taken = target != ignore_index
    loss = loss.masked_fill(~valid, torch.nan).masked_fill(~taken, 0.0)
    if reduction == "mean":
        loss = (loss.double().sum(-1) / taken.sum()).float()
    return loss, (top + log).squeeze(-1)


def paired_cross_entropy_backward(
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    grad: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    classes = logits.shape[-1]
    p = (logits.float() - rearrange(lse, "h b -> h b 1")).exp()
    valid, index = _valid(target, classes)
    wanted = torch.nn.functional.one_hot(index, classes) * (1 - label_smoothing)
    taken = target != ignore_index
    if reduction == "mean":
        scale = rearrange(grad / taken.sum(), "h -> h 1 1")
    else:
        scale = rearrange(grad, "h b -> h b 1")
    out = scale * (p - wanted - label_smoothing / classes)
    out = out.masked_fill(rearrange(~valid, "b -> b 1"), torch.nan)
    return out.masked_fill(rearrange(~taken, "b -> b 1"), 0.0).to(logits.dtype)
