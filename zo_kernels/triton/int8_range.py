"""`bits = bit_length(max|x| - 1)` of int32 accumulators: how many bits their magnitudes need.

0 for a maximum of 0 or 1; 2^k needs k bits, 2^k + 1 needs k + 1. Traffic: one read of the
accumulators. Each program reduces a block and raises the result of its half by an atomic maximum:
maxima of integers do not depend on their order.

NITI: Wang et al., arXiv:2009.13108 (range of an int32 tensor).
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator"

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels.int8 import check_halves, dense
from zo_kernels.registry import check_tensor, register, resolve_backend, twin
from zo_kernels.triton.integer import bit_length, magnitude_less_one
from zo_kernels.triton.shim import jit, tl, triton

BLOCK = 4096  # 16 elements a thread, four loads of 16 bytes
WARPS = 8
INT32_MAX = 2**31 - 1


@jit(do_not_specialize=["blocks"])
def _range_kernel(acc_ptr, bits_ptr, blocks, elements, INT64: tl.constexpr, BLOCK: tl.constexpr):
    half = tl.program_id(0) // blocks
    pid = tl.program_id(0) % blocks
    if INT64:
        half, pid = half.to(tl.int64), pid.to(tl.int64)
    o_e = pid * BLOCK + tl.arange(0, BLOCK)
    b_acc = tl.load(acc_ptr + half * elements + o_e, mask=o_e < elements, other=0)
    bits = bit_length(tl.max(magnitude_less_one(b_acc)))
    tl.atomic_max(bits_ptr + half, bits)


def _launch_int8_range(acc: Tensor, halves: int | None) -> Tensor:
    count = halves or 1
    bits = torch.zeros(() if halves is None else (halves,), dtype=torch.int32, device=acc.device)
    if acc.numel():
        elements = acc.numel() // count
        blocks = triton.cdiv(elements, BLOCK)
        _range_kernel[(count * blocks,)](
            acc if dense(acc) else acc.contiguous(),
            bits,
            blocks,
            elements,
            INT64=acc.numel() + BLOCK > INT32_MAX,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return bits


def _implementation(acc: Tensor, halves: int | None, backend: str) -> Tensor:
    backend = resolve_backend(backend, acc.device)
    if backend == "triton":
        return _launch_int8_range(acc, halves)
    bits: Tensor = twin("int8_range", backend)(acc, halves=halves)
    return bits


def _fake(acc: Tensor, halves: int | None, backend: str) -> Tensor:
    return acc.new_empty(() if halves is None else (halves,), dtype=torch.int32)


_OP = register("int8_range(Tensor acc, int? halves, str backend) -> Tensor", _implementation, _fake)


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
    bits: Tensor = _OP(acc, halves, backend)
    return bits


__all__ = ["int8_range"]
