"""`w += alpha * z` in place: the step of a MeZO-style walk (+eps, -2 eps, +eps), as a baseline.

Traffic: one read and one write of `w` a call. The library itself never perturbs in place: such a
walk does not return to where it began (in fp16 it drifts by 10 % of eps in 100 steps).
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels.layout import check_groups, layout_of
from zo_kernels.registry import (
    WEIGHT_DTYPES,
    check_in_place,
    check_indices,
    check_key,
    check_noise,
    check_tensor,
    register,
    resolve_backend,
    twin,
)
from zo_kernels.triton.weights import _launch


def _launch_perturb_(
    w: Tensor, key: Tensor, alpha: Tensor, tensor: int, query: int, noise: str
) -> None:
    """The kernel of `perturbed_weights` with its + half written over `w`."""
    target = w if layout_of(w) is not None else w.contiguous()
    if w.numel():
        _launch(
            target, target.unsqueeze(0), key, alpha, tensor, 2 * query, 2 * query + 1, noise, 1.0
        )
    if target is not w:
        w.copy_(target)


def _implementation(
    w: Tensor, key: Tensor, alpha: Tensor, tensor: int, query: int, noise: str, backend: str
) -> None:
    backend = resolve_backend(backend, w.device)
    w = w.detach()
    if backend == "triton":
        _launch_perturb_(w, key, alpha, tensor, query, noise)
    else:
        twin("perturb_", backend)(w, key, alpha, tensor=tensor, query=query, noise=noise)


def _fake(
    w: Tensor, key: Tensor, alpha: Tensor, tensor: int, query: int, noise: str, backend: str
) -> None:
    return None


_OP = register(
    "perturb_(Tensor(a!) w, Tensor key, Tensor alpha, int tensor, int query, str noise, "
    "str backend) -> ()",
    _implementation,
    _fake,
)


def perturb_(
    w: Tensor,
    key: Tensor,
    alpha: Tensor,
    *,
    tensor: int,
    query: int = 0,
    noise: str = "normal",
    backend: str = "auto",
) -> None:
    """Add `alpha * z` to `w` in place.

    Args:
        w: `[...]` float32, float64 or bfloat16; any strides.
        key: `[2]` int64, (seed, step).
        alpha: `[]` float64; +eps, -2 eps, +eps and -lr * g in a MeZO-style step.
        tensor, query: which noise.
        noise: "normal" or "rademacher".
        backend: "auto", "triton", "numba" or "reference".
    Raises: RuntimeError where `w` requires grad and grad mode is on.
    Source: Malladi et al. 2023, "Fine-tuning language models with just forward passes", alg. 1.
    """
    check_tensor("w", w, dtype=WEIGHT_DTYPES)
    check_in_place("w", w)
    check_key(key, w.device)
    check_tensor("alpha", alpha, shape=[], dtype=[torch.float64], device=w.device)
    check_noise(noise)
    check_indices(tensor, query)
    check_groups(w.shape, noise)
    _OP(w, key, alpha, tensor, query, noise, backend)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(w)


__all__ = ["perturb_"]
