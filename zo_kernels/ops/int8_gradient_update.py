"""`w = clip(w - R(G, bits(G) - b_bp))`: NITI's update of a weight from its int32 gradient.

The gradient's highest `b_bp` bits are subtracted; exponents play no part. On the CPU one call; on a
device the kernels of range and requantisation, then torch's subtraction.

NITI: Wang et al., arXiv:2009.13108.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels.int8 import LIMIT, check_rounding
from zo_kernels.registry import check_in_place, check_tensor, register, resolve_backend, twin
from zo_kernels.triton.int8_range import int8_range
from zo_kernels.triton.int8_requantize import int8_requantize

MIN_BITS, MAX_BITS = -24, 7


def _launch(
    w: Tensor, gradient: Tensor, b_bp: int, rounding: str, key: Tensor | None, tensor: int
) -> None:
    bits = int8_range(gradient, backend="triton")
    update, _ = int8_requantize(
        *(gradient, bits + (7 - b_bp), bits),  # requantising shifts by bits - 7
        rounding=rounding,
        key=key,
        tensor=tensor,
        backend="triton",
    )
    w.copy_((w.to(torch.int16) - update).clamp_(-LIMIT, LIMIT))


def _implementation(
    w: Tensor,
    gradient: Tensor,
    b_bp: int,
    rounding: str,
    key: Tensor | None,
    tensor: int,
    backend: str,
) -> None:
    backend = resolve_backend(backend, w.device)
    if w.numel() == 0:
        return
    if backend == "triton":
        _launch(w, gradient, b_bp, rounding, key, tensor)
        return
    given = {"b_bp": b_bp, "rounding": rounding, "key": key, "tensor": tensor}
    twin("int8_gradient_update_", backend)(w, gradient, **given)


def _fake(*args: object) -> None:
    return None


_OP = register(
    "int8_gradient_update_(Tensor(a!) w, Tensor gradient, int b_bp, str rounding, Tensor? key, "
    "int tensor, str backend) -> ()",
    _implementation,
    _fake,
)


def int8_gradient_update_(
    w: Tensor,
    gradient: Tensor,
    *,
    b_bp: int,
    rounding: str = "pseudo",
    key: Tensor | None = None,
    tensor: int = 0,
    backend: str = "auto",
) -> None:
    """Update a weight in place: `w = clip(w - clip(R(G, s)))`, `s = max(0, bits(G) - b_bp)`.

    Args:
        w: int8 in [-127, 127], any shape and strides.
        gradient: int32 like w.
        b_bp: bits of an update, in [-24, 7]: where it is not positive, only entries that round up
            from below one unit move a weight.
        rounding: R: "nearest", "pseudo" or "stochastic" (noise of purpose "rounding").
        key: `[2]` int64, (seed, step); needed by "stochastic".
        tensor: index of w in the model, the second counter word of the noise.
        backend: "auto", "triton", "numba" or "reference".
    Determinism: equal on all backends, for any launch and memory format.
    Source: NITI (arXiv:2009.13108).
    """
    check_tensor("w", w, dtype=[torch.int8])
    check_in_place("w", w)
    check_tensor("gradient", gradient, shape=w.shape, dtype=[torch.int32], device=w.device)
    if not MIN_BITS <= b_bp <= MAX_BITS:
        raise ValueError(f"b_bp must be in [{MIN_BITS}, {MAX_BITS}], got {b_bp}")
    check_rounding(rounding, key, w.shape, tensor, 0, w.device)
    _OP(w, gradient, b_bp, rounding, key, tensor, backend)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(w)


__all__ = ["int8_gradient_update_"]
