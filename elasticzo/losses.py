"""Losses of the halves, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from elasticzo.reductions import mean_divisor, reduced, sample_losses, share
from zo_kernels import paired_cross_entropy, paired_cross_entropy_backward

# The halves of a query: + at even places, - at odd ones.
SIDES = {"plus": slice(0, None, 2), "minus": slice(1, None, 2)}


def pair_losses(
    loss: Callable[..., Tensor],
    outputs: Any,
    *targets: Any,
    reduction: str | None = None,
    **settings: Any,
) -> Tensor:
    """The loss of every half: `[2Q]`, from outputs `[2Q, B, ...]` and the targets of one batch; or,
    with `reduction="none"`, that of every sample in every half: `[2Q, B]`.

    By sample the elements `e [B, ...]` of a half's loss are summed, `l_i = B / D sum_j e_ij`, where
    D is what the loss divides their sum by: the mean over samples is the loss of the half. D is the
    number of elements, for torch's losses of classes the weights of the targets that count
    (`weight`, `ignore_index`), for its weighted squared and absolute errors the sum of the weights.
    A loss of your own (masked, of tokens) counts elements, the masked ones too: with another
    normaliser, divide yourself, so that its mean over all elements is the loss.

    Args:
        loss: gives a scalar for `(output [B, ...], *targets)`, as `F.cross_entropy` does; that one
            (or `nn.CrossEntropyLoss`) runs as one kernel over all halves on CUDA, in fp32. By
            sample it gives `[B, ...]`: a module is told by its `reduction` (in a copy), a function
            that takes `reduction` (or any keyword) by that; what takes none is called as it is.
        outputs: what a training forward of `ElasticZO` returned; a tree is passed half by half. B
            is of its first tensor of two dimensions or more.
        targets: shared by all halves.
        reduction: None for the loss's own; "none" by sample; "mean" and others are the loss's.
        settings: passed on to `loss`.
    Returns: `[2Q]` or `[2Q, B]`, in the dtype of the loss. Ignored elements add 0; where nothing
        counts all is NaN, as in torch.
    Raises: ValueError where a loss is not a scalar, or by sample not `[B, ...]`.

    >>> logits = torch.zeros(2, 5, 10)
    >>> losses = pair_losses(torch.nn.functional.cross_entropy, logits, torch.arange(5))
    >>> [round(x, 3) for x in losses.tolist()]
    [2.303, 2.303]
    >>> pair_losses(F.mse_loss, logits, torch.ones(5, 10), reduction="none").shape
    torch.Size([2, 5])
    """
    leaves = [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]
    if not leaves or any(x.dim() == 0 or x.shape[0] != leaves[0].shape[0] for x in leaves):
        raise ValueError(
            f"outputs must be tensors of shape [halves, ...], got {[list(x.shape) for x in leaves]}"
        )
    halves = [
        pytree.tree_map(lambda x, h=half: x[h] if isinstance(x, Tensor) else x, outputs)
        for half in range(leaves[0].shape[0])
    ]
    if reduction == "none":
        samples = next((x.shape[1] for x in leaves if x.dim() > 1), 0)
        return _by_sample(loss, outputs, halves, samples, targets, settings)
    given = settings if reduction is None else settings | {"reduction": reduction}
    fused = _cross_entropy(loss, outputs, targets, given)
    if fused is not None:
        by_kernel: Tensor = PairCrossEntropy.apply(outputs, targets[0], *fused, "mean")  # type: ignore[no-untyped-call]
        return by_kernel
    loss = loss if reduction is None else reduced(loss, reduction)
    return torch.stack(
        [_scalar(loss(half, *targets, **settings), leaves[0].device) for half in halves]
    )


def _scalar(value: Any, device: torch.device) -> Tensor:
    """The loss of a half: `[]`."""
    found = value if isinstance(value, Tensor) else torch.as_tensor(value, device=device)
    if found.dim() != 0:
        raise ValueError(
            f"loss must be a scalar for each half, got shape {list(found.shape)}: "
            'pair_losses(..., reduction="none") gives losses by sample'
        )
    return found


def _by_sample(
    loss: Callable[..., Tensor],
    outputs: Any,
    halves: list[Any],
    samples: int,
    targets: tuple[Any, ...],
    settings: dict[str, Any],
) -> Tensor:
    """Losses `[2Q, B]`; D, which all halves share, is made once."""
    divisor = mean_divisor(loss, samples, targets, settings)
    fused = _cross_entropy(loss, outputs, targets, settings, also="none")
    if fused is not None and divisor is not None:
        rows: Tensor = PairCrossEntropy.apply(outputs, targets[0], *fused, "none")  # type: ignore[no-untyped-call]
        return rows * share(samples, divisor, rows.dtype)
    each = reduced(loss, "none")
    return torch.stack(
        [sample_losses(each, samples, divisor, half, *targets, **settings) for half in halves]
    )


class PairCrossEntropy(torch.autograd.Function):
    """Cross-entropies `[H]` (or `[H, B]`, of rows) of logits `[H, B, C]`: one read of the logits,
    one more and a write for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, smoothing: float, ignored: int, reduction: str
    ) -> Tensor:
        ctx.settings = {"label_smoothing": smoothing, "ignore_index": ignored}
        ctx.settings["reduction"] = reduction
        losses, lse = paired_cross_entropy(
            logits.detach(), target, **ctx.settings, backend="triton"
        )
        ctx.save_for_backward(logits, target, lse)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        logits, target, lse = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted: by torch's formula
            losses = [F.cross_entropy(part.float(), target, **ctx.settings) for part in logits]
            again = torch.autograd.grad(torch.stack(losses), logits, grad, create_graph=True)
            return again[0], None, None, None, None
        given = (logits.detach(), target, lse, grad.float().contiguous())
        dx = paired_cross_entropy_backward(*given, **ctx.settings, backend="triton")
        return dx, None, None, None, None


def _cross_entropy(
    loss: Any,
    outputs: Any,
    targets: tuple[Any, ...],
    settings: dict[str, Any],
    also: str = "mean",
) -> tuple[float, int] | None:
    """(label smoothing, ignored index) where the loss is a cross-entropy that the kernel computes:
    class indices as targets, no class weights, the mean over rows (or a reduction that is taken
    for it)."""
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
    reduction = given.pop("reduction", "mean")
    if given.pop("weight", None) is not None or reduction not in ("mean", also) or given:
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


def as_losses(losses: Any) -> Tensor:
    """What a step is given as a floating tensor without a graph.

    Raises: TypeError for nothing, a closure, or complex numbers.
    """
    if losses is None:
        raise TypeError("zo.step needs the losses of the halves: zo.step(losses)")
    if callable(losses):
        raise TypeError("zo.step takes losses, not a closure")
    if not isinstance(losses, Tensor):
        given = torch.as_tensor(losses, device="cpu")
        losses = (
            given
            if given.is_complex()
            else torch.as_tensor(losses, dtype=torch.float64, device="cpu")
        )
    if losses.is_complex():
        raise TypeError(f"losses must be real numbers, got {losses.dtype}")
    found: Tensor = losses.detach()
    return found if found.is_floating_point() else found.to(torch.float64)


def check_losses(losses: Any, halves: int, samples: int | None = None) -> None:
    """Raise unless `losses` is a floating tensor `[halves]`; of so many samples, `[halves, B]`."""
    wanted = [halves] if samples is None else [halves, samples]
    if not isinstance(losses, Tensor):
        raise TypeError(f"losses must be a Tensor of shape {wanted}, got {type(losses).__name__}")
    if list(losses.shape) != wanted:
        what = "one a half" if samples is None else "one a sample in each half"
        hint = "" if samples is None else ': use pair_losses(..., reduction="none")'
        raise ValueError(f"losses must have shape {wanted}, {what}, got {list(losses.shape)}{hint}")
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
