"""Losses of the halves, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

SOURCES = ("mean", "plus", "minus")


def pair_losses(
    loss: Callable[..., Tensor], outputs: Any, *targets: Any, **settings: Any
) -> Tensor:
    """The loss of every half: `[2Q]`, from outputs `[2Q, B, ...]` and the targets of one batch.

    Args:
        loss: gives a scalar for `(output [B, ...], *targets)`, as `F.cross_entropy` does.
        outputs: what a training forward of `ElasticZO` returned; a tree is passed half by half.
        targets: shared by all halves.
        settings: passed on to `loss`.
    Raises: ValueError where a loss is not a scalar.

    >>> logits = torch.zeros(2, 5, 10)
    >>> losses = pair_losses(torch.nn.functional.cross_entropy, logits, torch.arange(5))
    >>> [round(x, 3) for x in losses.tolist()]
    [2.303, 2.303]
    """
    leaves = [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]
    if not leaves or any(x.dim() == 0 or x.shape[0] != leaves[0].shape[0] for x in leaves):
        raise ValueError(
            f"outputs must be tensors of shape [halves, ...], got {[list(x.shape) for x in leaves]}"
        )
    losses = []
    for half in range(leaves[0].shape[0]):
        part = pytree.tree_map(lambda x, h=half: x[h] if isinstance(x, Tensor) else x, outputs)
        value = loss(part, *targets, **settings)
        if not isinstance(value, Tensor):
            value = torch.as_tensor(value, device=leaves[0].device)
        if value.dim() != 0:
            raise ValueError(f"loss must be a scalar for each half, got shape {list(value.shape)}")
        losses.append(value)
    return torch.stack(losses)


def check_losses(losses: Any, halves: int) -> None:
    """Raise unless `losses` is a floating tensor `[halves]`."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"losses must be a Tensor of shape [{halves}], got {type(losses).__name__}")
    if tuple(losses.shape) != (halves,):
        raise ValueError(f"losses must have shape [{halves}], one a half, got {list(losses.shape)}")
    if not losses.is_floating_point():
        raise TypeError(f"losses must be floating, got {losses.dtype}")


def select_source(losses: Tensor, source: str) -> Tensor:
    """The scalar that the tail learns from."""
    if source not in SOURCES:
        raise ValueError(f"source must be one of {SOURCES}, got {source!r}")
    if source == "mean" or losses.shape[0] == 1:
        return losses.mean()
    return losses[0::2].mean() if source == "plus" else losses[1::2].mean()


def projected_gradients(losses: Tensor, eps: Tensor) -> Tensor:
    """`g_q = (L+_q - L-_q) / (2 eps)` in float64: `[2Q]` -> `[Q]`."""
    wide = losses.detach().to(torch.float64)
    return (wide[0::2] - wide[1::2]) / (2.0 * eps)


__all__ = ["check_losses", "pair_losses", "projected_gradients", "select_source"]
