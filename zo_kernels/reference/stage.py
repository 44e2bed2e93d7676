"""Reference of `zo_kernels.stage_`: halves of many weights, after the update that is pending."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from zo_kernels.reference.noise import sample
from zo_kernels.reference.update import Sample, update_one_
from zo_kernels.reference.weights import compute_dtype, write_halves


def stage_one(
    out: Tensor,
    w: Tensor,
    key: Tensor,
    eps: Tensor,
    tensor: int,
    scale: float,
    start: int,
    noise: str,
    draw: Sample,
) -> None:
    """Write the halves of one weight, with noise from `draw`."""
    amplitude = eps.to(compute_dtype(w)) * torch.tensor(
        scale, dtype=compute_dtype(w), device=w.device
    )
    for query in range(start // 2, (start + out.shape[0] + 1) // 2):
        z = draw(w.shape, key, tensor=tensor, query=query, noise=noise)
        write_halves(out, w, amplitude, start, query, z)


@torch.no_grad()
def stage_(
    outs: Sequence[Tensor],
    params: Sequence[Tensor],
    key: Tensor,
    eps: Tensor,
    *,
    tensors: Sequence[int],
    scales: Sequence[float],
    start: int = 0,
    stop: int = 2,
    first_row: int = 0,
    noise: str = "normal",
    before: Tensor | None = None,
    coeff: Tensor | None = None,
    lr: Tensor | None = None,
    weight_decay: Tensor | None = None,
    skip: Tensor | None = None,
    groups: Sequence[int] = (),
    rule: str = "sgd",
    state: Sequence[Tensor] = (),
    settings: Tensor | None = None,
) -> None:
    draw = partial(sample, first_row=first_row)
    for i, (out, w) in enumerate(zip(outs, params, strict=True)):
        assert out.shape[0] == stop - start
        if before is not None:
            assert coeff is not None and lr is not None
            assert weight_decay is not None and skip is not None
            g = groups[i]
            own = (rule, state[i :: len(params)], None if settings is None else settings[i])
            named = (tensors[i], scales[i], noise)
            update_one_(w, before, coeff, lr[g], weight_decay[g], skip, *named, *own, draw)
        stage_one(out, w, key, eps, tensors[i], scales[i], start, noise, draw)
