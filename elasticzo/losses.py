"""Losses of the halves, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from zo_kernels import paired_cross_entropy, paired_cross_entropy_backward

# The halves of a query: + at even places, - at odd ones.
SIDES = {"plus": slice(0, None, 2), "minus": slice(1, None, 2)}


def pair_losses(
    loss: Callable[..., Tensor], outputs: Any, *targets: Any, **settings: Any
) -> Tensor:
    """The loss of every half: `[2Q]`, from outputs `[2Q, B, ...]` and the targets of one batch.

    Args:
        loss: gives a scalar for `(output [B, ...], *targets)`, as `F.cross_entropy` does; that one
            (or `nn.CrossEntropyLoss`) runs as one kernel over all halves on CUDA, in fp32.
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
    fused = _cross_entropy(loss, outputs, targets, settings)
    if fused is not None:
        by_kernel: Tensor = PairCrossEntropy.apply(outputs, targets[0], *fused)  # type: ignore[no-untyped-call]
        return by_kernel
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


class PairCrossEntropy(torch.autograd.Function):
    """Cross-entropies `[H]` of logits `[H, B, C]`: one read of the logits, one more and a write for
    the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, smoothing: float, ignored: int) -> Tensor:
        ctx.settings = {"label_smoothing": smoothing, "ignore_index": ignored, "backend": "triton"}
        losses, lse = paired_cross_entropy(logits.detach(), target, **ctx.settings)
        ctx.save_for_backward(logits, target, lse)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        logits, target, lse = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted: by torch's formula
            settings = {k: v for k, v in ctx.settings.items() if k != "backend"}
            losses = [F.cross_entropy(part.float(), target, **settings) for part in logits]
            again = torch.autograd.grad(torch.stack(losses), logits, grad, create_graph=True)
            return again[0], None, None, None
        given = (logits.detach(), target, lse, grad.float().contiguous())
        return paired_cross_entropy_backward(*given, **ctx.settings), None, None, None


def _cross_entropy(
    loss: Any, outputs: Any, targets: tuple[Any, ...], settings: dict[str, Any]
) -> tuple[float, int] | None:
    """(label smoothing, ignored index) where the loss is a cross-entropy that the kernel computes:
    class indices as targets, no class weights, the mean over rows."""
    if type(loss) is nn.CrossEntropyLoss:
        if "forward" in loss.__dict__ or loss._forward_hooks or loss._forward_pre_hooks:
            return None
        names = ("weight", "reduction", "label_smoothing", "ignore_index")
        given: dict[str, Any] = {name: getattr(loss, name) for name in names}
        given |= settings  # of which its forward knows none
    elif loss is F.cross_entropy:
        given = dict(settings)
    else:
        return None
    smoothing, ignored = given.pop("label_smoothing", 0.0), given.pop("ignore_index", -100)
    if given.pop("weight", None) is not None or given.pop("reduction", "mean") != "mean" or given:
        return None
    if not isinstance(outputs, Tensor) or outputs.dim() != 3 or len(targets) != 1:
        return None
    target = targets[0]
    if outputs.dtype not in (torch.float32, torch.bfloat16) or not isinstance(target, Tensor):
        return None
    if target.dtype != torch.int64 or target.dim() != 1 or target.device != outputs.device:
        return None
    if _loss_backend(outputs.device) != "triton" or target.shape[0] != outputs.shape[1]:
        return None
    return float(smoothing), int(ignored)


def _loss_backend(device: torch.device) -> str:
    """Where a kernel runs of itself: on the CPU torch's own cross-entropy is the fast one."""
    return "triton" if device.type == "cuda" else "reference"


def check_losses(losses: Any, halves: int) -> None:
    """Raise unless `losses` is a floating tensor `[halves]`."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"losses must be a Tensor of shape [{halves}], got {type(losses).__name__}")
    if tuple(losses.shape) != (halves,):
        raise ValueError(f"losses must have shape [{halves}], one a half, got {list(losses.shape)}")
    if not losses.is_floating_point():
        raise TypeError(f"losses must be floating, got {losses.dtype}")


def select_source(
    losses: Tensor, source: str | Tensor, sources: Mapping[str, slice] = SIDES
) -> Tensor:
    """The scalar that the tail learns from: "mean", some of these losses by name, or one given."""
    if isinstance(source, Tensor):
        if source.dim() != 0:
            raise ValueError(f"the loss of a clean pass must be a scalar, got {list(source.shape)}")
        return source
    if source != "mean" and source not in sources:
        known = ("mean", *sources)
        raise ValueError(f"source must be one of {known} or a loss, got {source!r}")
    if source == "mean" or losses.shape[0] == 1:
        return losses.mean()
    return losses[sources[source]].mean()


def all_finite(losses: Tensor, source: str | Tensor = "mean") -> Tensor:
    """Whether the losses are finite, and that of the clean pass, where there is one: `[]` bool."""
    finite = torch.isfinite(losses.detach()).all()
    return finite & torch.isfinite(source.detach()).all() if isinstance(source, Tensor) else finite
