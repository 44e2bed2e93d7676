"""The range of int32 accumulators, and what it makes of them: `(q int8, exponent)`.

`bits = bit_length(max|x| - 1)` says how many bits magnitudes need: 0 for a maximum of 0 or 1; 2^k
needs k bits, 2^k + 1 needs k + 1. One read of the accumulators; each program reduces a block and
raises the result of its half by an atomic maximum: maxima of integers do not depend on their order.

`q = clip(acc / 2^s)`, `s = max(bits - 7, 0)`. The rounding rules are the contract of
`zo_kernels.reference.integer`. The shift of each half comes from the device; no host value takes
part. Traffic: 4 bytes read and one written an element; without `bits` the accumulators are read
once more, for their range. Noise of a stochastic rounding is that of one half: all halves use the
same words, as dropout uses one mask, so that the halves differ by the perturbation alone; stacked
equals sequential.

NITI: Wang et al., arXiv:2009.13108.
"""
# mypy: disable-error-code="return"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zo_kernels.int8 import check_exponent, check_halves, check_rounding, half_shape
from zo_kernels.registry import check_tensor, op


def _fake_range(acc: Tensor, halves: int | None, **_: Any) -> Tensor:
    return acc.new_empty(() if halves is None else (halves,))


@op(fake=_fake_range)
def int8_range(acc: Tensor, *, halves: int | None = None, backend: str = "auto") -> Tensor:
    """`bit_length(max|acc| - 1)`, 0 for a maximum of 0 or 1: of a tensor, or of each half of it.

    Args:
        acc: int32, any shape and strides; with halves `[H B, ...]` or `[H, ...]`, one half behind
            the other.
        halves: H, in how many equal parts dimension 0 falls; None is one tensor.
        backend: "auto", "triton", "numba" or "reference".
    Returns: `[H]` int32 in [0, 31], or `[]` where halves is None; 0 for an empty tensor.
    Determinism: equal on all backends, for any launch.
    Source: NITI (arXiv:2009.13108).
    """
    check_tensor("acc", acc, dtype=[torch.int32])
    check_halves("acc", acc, halves)


def _fake_requantize(acc: Tensor, halves: int | None, **_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(acc, dtype=torch.int8), _fake_range(acc, halves)


@op(fake=_fake_requantize)
def int8_requantize(
    acc: Tensor,
    bits: Tensor | None,
    exponent: Tensor,
    *,
    weight_exponent: Tensor | None = None,
    halves: int | None = None,
    rounding: str = "nearest",
    key: Tensor | None = None,
    tensor: int = 0,
    query: int = 0,
    relu: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`q = clip(acc / 2^s)` to int8, `s = max(bits - 7, 0)`, and its exponent.

    Rounding acts on magnitudes. Its bias, the mean of (|result| - |acc| / 2^s) over all dropped
    bits, in units of the result: "nearest" (half away from zero) +2^-(s+1); "stochastic" 0;
    "pseudo" +2^-(s+1) for odd s (1/4 for s = 1) and -(n-1)/(2 n^2), n = 2^(s/2), for even s (-1/8
    for s = 2). Only "nearest" is monotone, so only with it may a maximum be taken before.

    Args:
        acc: int32, any shape and strides; with halves `[H B, ...]`, one half behind the other.
        bits: of `int8_range`: int32, `[H]`, or 1 element for all; None measures them.
        exponent: of `acc`, int32, 1 element or `[H]`.
        weight_exponent: is added to it; None adds nothing.
        halves: H, in how many equal parts dimension 0 falls; None is one tensor.
        rounding: "nearest", "pseudo" or "stochastic" (noise of purpose "rounding").
        key: `[2]` int64, (seed, step); needed by "stochastic".
        tensor, query: place in the noise; a weight's own index with query 0 is `int8_update_`'s.
        relu: negative results become 0, after the shift.
        backend: "auto", "triton", "numba" or "reference".
    Returns: q int8 like `acc`; `exponent + weight_exponent + s` int32, `[H]` or `[]`.
    Determinism: equal on all backends, for any launch and memory format; halves share their noise.
    Source: NITI (arXiv:2009.13108).
    """
    check_tensor("acc", acc, dtype=[torch.int32])
    check_halves("acc", acc, halves)
    if bits is not None:
        check_exponent("bits", bits, halves, acc.device)
    check_exponent("exponent", exponent, halves, acc.device)
    if weight_exponent is not None:
        check_exponent("weight_exponent", weight_exponent, halves, acc.device)
    shape = half_shape(acc.shape, halves)
    check_rounding(rounding, key, shape, tensor, query, acc.device)
