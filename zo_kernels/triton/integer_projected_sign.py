"""`sign(L+ - L-)` of each query: the projected gradient of integer training, on the device."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator"

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels.registry import check_tensor, register, resolve_backend, twin
from zo_kernels.triton.shim import jit, tl, triton

BLOCK = 128


@jit(do_not_specialize=["queries"])
def _sign_kernel(losses_ptr, out_ptr, queries, BLOCK: tl.constexpr):
    o_q = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_q = o_q < queries
    b_plus = tl.load(losses_ptr + 2 * o_q, mask=m_q, other=0)
    b_minus = tl.load(losses_ptr + 2 * o_q + 1, mask=m_q, other=0)
    b_sign = (b_plus > b_minus).to(tl.int32) - (b_plus < b_minus).to(tl.int32)
    tl.store(out_ptr + o_q, b_sign, mask=m_q)


def _launch_integer_projected_sign(losses: Tensor) -> Tensor:
    signs = _empty(losses)
    if signs.numel():
        grid = (triton.cdiv(signs.numel(), BLOCK),)
        settings = {"BLOCK": BLOCK, "num_warps": 1, "enable_fp_fusion": True}
        _sign_kernel[grid](losses, signs, signs.numel(), **settings)
    return signs


def _implementation(losses: Tensor, backend: str) -> Tensor:
    backend = resolve_backend(backend, losses.device)
    if backend == "triton":
        return _launch_integer_projected_sign(losses)
    signs: Tensor = twin("integer_projected_sign", backend)(losses)
    return signs


def _empty(losses: Tensor) -> Tensor:
    return torch.empty(losses.shape[0] // 2, dtype=torch.int32, device=losses.device)


def _fake(losses: Tensor, backend: str) -> Tensor:
    return _empty(losses)


_OP = register(
    "integer_projected_sign(Tensor losses, str backend) -> Tensor", _implementation, _fake
)


def integer_projected_sign(losses: Tensor, *, backend: str = "auto") -> Tensor:
    """`g_q = sign(L+ - L-)`, by comparison: no difference that could overflow.

    Args:
        losses: `[2 Q]` int64, of `integer_cross_entropy`; the + of a query before its -.
        backend: "auto", "triton", "numba" or "reference".
    Returns: `[Q]` int32 in {-1, 0, 1}.
    Determinism: equal on all backends.
    Source: arXiv:2501.04287, abstract (ElasticZO-INT8).
    """
    check_tensor("losses", losses, dtype=[torch.int64], vector=True)
    if losses.numel() % 2:
        raise ValueError(f"losses must come in pairs, got {losses.numel()}")
    signs: Tensor = _OP(losses, backend)
    return signs


__all__ = ["integer_projected_sign"]
