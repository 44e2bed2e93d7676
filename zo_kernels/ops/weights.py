"""`W+- = w +- eps * scale * z_q`: the staged halves of a weight, from one read of it.

Halves are numbered `0 .. 2Q-1`: half `2q` is `+`, half `2q + 1` is `-`, of query `q`. A call writes
the halves `start .. stop - 1`. Traffic: one read of `w`, one write a half; `z` is made once a
query, in registers.

`perturb_` is the step of a MeZO-style walk (+eps, -2 eps, +eps), as a baseline: one read and one
write of `w` a call. The library itself never perturbs in place: such a walk does not return to
where it began (in fp16 it drifts by 10 % of eps in 100 steps).

ElasticZO (arXiv:2501.04287), abstract: two forward passes at `w +- eps z`.
"""
# mypy: disable-error-code="return"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zo_kernels.layout import check_groups, empty_halves
from zo_kernels.ops.checks import check_scale, check_span
from zo_kernels.registry import (
    OUT_DTYPES,
    WEIGHT_DTYPES,
    check_in_place,
    check_indices,
    check_key,
    check_noise,
    check_tensor,
    op,
)


def _fake(w: Tensor, start: int, stop: int, dtype: torch.dtype | None, **_: Any) -> Tensor:
    return empty_halves(w, stop - start, dtype)


@op(fake=_fake)
def perturbed_weights(
    w: Tensor,
    key: Tensor,
    eps: Tensor,
    *,
    tensor: int,
    start: int = 0,
    stop: int = 2,
    noise: str = "normal",
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Halves `start .. stop - 1` of `w +- eps * scale * z_q`; half `2q` is +, `2q + 1` is -.

    The sum is made in fp32 (float64 for a float64 weight) and rounded to `dtype`.

    Args:
        w: `[...]` float32, float64 or bfloat16; any strides. Only read.
        key: `[2]` int64, (seed, step), on the device of `w`.
        eps: `[]` float64, the perturbation scale.
        tensor: index of the tensor in the model, the noise's second counter word.
        start, stop: halves wanted, `0 <= start < stop`.
        noise: "normal" or "rademacher".
        scale: relative scale of this tensor's perturbation.
        dtype: of the result; None is that of `w`.
        backend: "auto", "triton", "numba" or "reference".
    Returns: `[stop - start, *w.shape]`, each half in the memory format of `w`.
    Determinism: bit-equal for any launch on one backend; signs ("rademacher") on all of them.
    Source: arXiv:2501.04287, abstract; Spall 1992 (SPSA).
    """
    check_tensor("w", w, dtype=WEIGHT_DTYPES)
    check_key(key, w.device)
    check_tensor("eps", eps, shape=[], dtype=[torch.float64], device=w.device)
    check_noise(noise)
    check_span(start, stop)
    check_scale("scale", scale)
    check_indices(tensor, (stop - 1) // 2)
    if dtype is not None and dtype not in OUT_DTYPES:
        raise TypeError(f"dtype must be one of {OUT_DTYPES}, got {dtype}")
    check_groups(w.shape, noise)


@op(mutates=("w",))
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
