"""An update by one of the rules with an estimate that is given: for directions no kernel makes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_kernels.registry import (
    WEIGHT_DTYPES,
    check_in_place,
    check_tensor,
    implementation,
    looked_on,
    resolve_backend,
)
from zo_kernels.rules import check_rule


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
    *,
    backend: str = "auto",
) -> None:
    """What `zo_kernels.update_` does to one weight, in place, given the sum of its directions.

    On a device nothing waits for it.

    Args:
        w: float32, float64 or bfloat16, any strides.
        u_noise: `scale * sum_q coeff_q z_q`, of the shape of w.
        lr, weight_decay: `[]` float64.
        skip: `[]` float32; not 0 leaves weight and state bit-identical.
        rule, state, settings: as in `update_`, of this weight: settings is a row.
        words: of purpose "rounding", for a bfloat16 weight; None rounds to nearest.
        backend: "numba" takes one pass over weights that are float32 and contiguous with all that
            belongs to them; all else is plain torch.
    """
    check_tensor("w", w, dtype=WEIGHT_DTYPES)
    check_in_place("w", w)
    check_tensor("u_noise", u_noise, shape=w.shape, device=w.device)
    check_rule(rule, state, None if settings is None else settings[None], [w], w.device)
    args = (w, u_noise, lr, weight_decay, skip, rule, state, settings)
    tensors = (w, u_noise, *state)
    fits = all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
    watched = torch.compiler.is_compiling() or looked_on()
    compiled = resolve_backend(backend, w.device) == "numba" and fits and not watched
    run = implementation("rules", "apply_rule_", "numba" if compiled else "reference")
    if compiled:
        run(*args)
        for t in (w, *state):
            torch.autograd.graph.increment_version(t)
    else:
        run(*args, words)
