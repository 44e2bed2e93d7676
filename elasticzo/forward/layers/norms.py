"""Normalisation of the pair: each half by its own statistics, all halves in one call of a kernel.

Where gradients flow (the tail), or no kernel runs, torch normalises half by half.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from elasticzo.forward.layers import samples
from elasticzo.forward.layers.registry import Serve, serves
from elasticzo.forward.layers.staged import Staged, by_half, pick, stage_all
from elasticzo.forward.passes import Layer, Pass
from elasticzo.head import Kind
from zo_kernels import paired_batch_norm, paired_layer_norm

LAST = (nn.LayerNorm,)  # whose weights are of the last dimensions
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)
NODE_IS_SAMPLE = Kind("sample", "a normalisation's weights are as many as its nodes")
KINDS = {"node": NODE_IS_SAMPLE, "auto": NODE_IS_SAMPLE}
KERNEL_DTYPES = (torch.float32, torch.bfloat16)


def _has_kernel(current: Pass, x: Tensor, staged: Staged) -> bool:
    tensors = [x, *(t for t in staged.values() if t is not None)]
    if current.backend != "triton" or not {t.dtype for t in tensors} <= set(KERNEL_DTYPES):
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def _relu(current: Pass, layer: Layer) -> bool:
    """Whether a ReLU follows in an `nn.Sequential`, which the kernel then applies."""
    if layer.kind.name == "sample":
        return False  # weights come first
    m = layer.module
    follow = current.follow
    if follow is None or follow.module is not m:
        return False
    follow.done = True
    return True


def _by_sample(run: Serve) -> Serve:
    """Where its weights are learnt by sample, the layer normalises alone, and they come after."""

    @wraps(run)
    def wrapped(current: Pass, layer: Layer, x: Tensor) -> Tensor:
        if layer.kind.name != "sample":
            return run(current, layer, x)
        with current.unwatched():
            m: Any = layer.module
            dim = x.dim() - len(m.normalized_shape) if type(m) in LAST else 1
            before = run(current, layer, x)
            y = samples.affine(current, layer, before, dim)
        current.note_noise(layer, before, y)
        return y

    return wrapped


def _stage(current: Pass, layer: Layer) -> Staged:
    """The weights that the layer normalises with: none where they come after."""
    if layer.kind.name == "sample":
        return {"weight": None, "bias": None}
    return stage_all(current, layer)


@serves(nn.LayerNorm, kinds=KINDS)
@_by_sample
def layer_norm(current: Pass, layer: Layer, x: Tensor) -> Tensor:
    m: Any = layer.module
    staged = _stage(current, layer)
    w, b, n = staged["weight"], staged["bias"], current.count
    dims = len(m.normalized_shape)
    fits = x.dim() > dims and tuple(x.shape[-dims:]) == tuple(m.normalized_shape)
    if fits and _has_kernel(current, x, staged):
        flat = [None if t is None else t.flatten(1) for t in (w, b)]
        y = paired_layer_norm(
            x.flatten(-dims),
            *flat,
            halves=n,
            epsilon=m.eps,
            relu=_relu(current, layer),
            backend=current.backend,
        )
        return y.reshape(x.shape)
    shape = list(m.normalized_shape)
    return by_half(x, n, lambda part, h: F.layer_norm(part, shape, pick(w, h), pick(b, h), m.eps))


@serves(nn.GroupNorm, kinds=KINDS)
@_by_sample
def group_norm(current: Pass, layer: Layer, x: Tensor) -> Tensor:
    m: Any = layer.module
    staged = _stage(current, layer)
    w, b = staged["weight"], staged["bias"]
    return by_half(
        x,
        current.count,
        lambda part, h: F.group_norm(part, m.num_groups, pick(w, h), pick(b, h), m.eps),
    )


@serves(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, always=True, kinds=KINDS)
@_by_sample
def batch_norm(current: Pass, layer: Layer, x: Tensor) -> Tensor:
    """Each half by its own batch statistics; the running ones move once, by the average."""
    m: Any = layer.module
    staged = _stage(current, layer)
    m._check_input_dim(x)
    n = current.count
    own_statistics = m.training or m.running_mean is None
    moves = m.training and m.track_running_stats and m.running_mean is not None
    if own_statistics:
        F._verify_batch_size([x.shape[0] // n, *x.shape[1:]])  # type: ignore[attr-defined]
    if moves and m.num_batches_tracked is not None:
        m.num_batches_tracked.add_(1)
    if _has_kernel(current, x, staged):
        return _kernel_batch_norm(current, layer, x, staged, own_statistics, moves)
    w, b = staged["weight"], staged["bias"]
    if not moves:
        mean, var = (None, None) if own_statistics else (m.running_mean, m.running_var)
        return by_half(
            x,
            n,
            lambda part, h: F.batch_norm(
                part, mean, var, pick(w, h), pick(b, h), own_statistics, 0.0, m.eps
            ),
        )
    # Momentum 1 leaves the statistics of the half in its own buffers.
    means = [torch.zeros_like(m.running_mean) for _ in range(n)]
    variances = [torch.ones_like(m.running_var) for _ in range(n)]
    y = by_half(
        x,
        n,
        lambda part, h: F.batch_norm(
            part, means[h], variances[h], pick(w, h), pick(b, h), True, 1.0, m.eps
        ),
    )
    _move(m, torch.stack(means).mean(0), torch.stack(variances).mean(0))
    return y


def _kernel_batch_norm(
    current: Pass, layer: Layer, x: Tensor, staged: Staged, own_statistics: bool, moves: bool
) -> Tensor:
    m: Any = layer.module
    n = current.count
    y, means, variances = paired_batch_norm(
        x,
        staged["weight"],
        staged["bias"],
        halves=n,
        epsilon=m.eps,
        mean=None if own_statistics else m.running_mean,
        var=None if own_statistics else m.running_var,
        relu=_relu(current, layer),
        backend=current.backend,
    )
    if moves:
        values = x.numel() // (n * x.shape[1])  # a channel and half
        _move(m, means.mean(0), variances.mean(0) * (values / (values - 1)))
    return y


def _move(m: Any, mean: Tensor, var: Tensor) -> None:
    """Running statistics towards the average over the halves, without reading the count."""
    momentum: Any = m.momentum
    if momentum is None and m.num_batches_tracked is None:
        return  # as torch has it: nothing to average by
    if momentum is None:  # the cumulative average
        momentum = m.num_batches_tracked.to(m.running_mean.dtype).reciprocal()
    m.running_mean.lerp_(mean.to(m.running_mean.dtype), momentum)
    m.running_var.lerp_(var.to(m.running_var.dtype), momentum)
