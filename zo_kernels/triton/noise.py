"""The noise itself, as a tensor: for tests, dropout masks, data order and whoever wants to see `z`.

Nothing in a step stores `z`; the kernels that use it make it in registers.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator"

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_kernels.layout import PER_CALL, check_groups, groups_per_row, rows_cols, to_shape
from zo_kernels.registry import (
    check_indices,
    check_key,
    check_noise,
    register,
    resolve_backend,
    twin,
)
from zo_kernels.triton.philox import KIND, NORMAL, RADEMACHER, SPARSE, interleave4
from zo_kernels.triton.philox import normal as normal_noise
from zo_kernels.triton.philox import rademacher as rademacher_noise
from zo_kernels.triton.philox import sparse_int8 as sparse_noise
from zo_kernels.triton.philox import words as noise_words
from zo_kernels.triton.shim import jit, tl, triton

BLOCK = 1024
PURPOSES = {"noise": 0, "rounding": 1, "dropout": 2, "data": 3}
DTYPES = {
    "normal": torch.float32,
    "rademacher": torch.float32,
    "sparse_int8": torch.int8,
    "bits": torch.int64,
}


@jit(do_not_specialize=["tensor", "third", "p0", "r_max"])
def _sample_kernel(
    out_ptr,
    key_ptr,
    tensor,
    third,  # query + 2^24 * purpose
    p0,
    r_max,
    elements,
    NOISE: tl.constexpr,
    PER: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    if INT64:
        pid = pid.to(tl.int64)
    o_e = pid * BLOCK + tl.arange(0, BLOCK)
    o_group = pid * (BLOCK // PER) + tl.arange(0, BLOCK // PER)
    if NOISE == NORMAL:
        b_z = normal_noise(key_ptr, o_group, tensor, third)
    elif NOISE == RADEMACHER:
        b_z = rademacher_noise(key_ptr, o_group, tensor, third)
    elif NOISE == SPARSE:
        b_z = sparse_noise(key_ptr, o_group, tensor, third, p0, r_max)
    else:
        w0, w1, w2, w3 = noise_words(key_ptr, o_group, tensor, third)
        b_z = interleave4(w0, w1, w2, w3)
    tl.store(out_ptr + o_e, b_z.to(out_ptr.dtype.element_ty), mask=o_e < elements)


def _launch_sample(
    shape: Sequence[int],
    key: Tensor,
    tensor: int,
    query: int,
    noise: str,
    purpose: str,
    p_zero: float,
    r_max: int,
) -> Tensor:
    rows, cols = rows_cols(shape)
    per, per_row = PER_CALL[noise], groups_per_row(cols, noise)
    padded = torch.empty(rows, per_row * per, dtype=DTYPES[noise], device=key.device)
    if padded.numel():
        _sample_kernel[(triton.cdiv(padded.numel(), BLOCK),)](
            padded,
            key,
            tensor,
            query + (PURPOSES[purpose] << 24),
            round(65536 * p_zero),
            r_max,
            padded.numel(),
            NOISE=KIND[noise],
            PER=per,
            INT64=padded.numel() + BLOCK > 2**31 - 1,
            BLOCK=BLOCK,
            enable_fp_fusion=True,
        )
    return to_shape(padded[:, :cols], shape)


def _implementation(
    shape: Sequence[int],
    key: Tensor,
    tensor: int,
    query: int,
    noise: str,
    purpose: str,
    p_zero: float,
    r_max: int,
    backend: str,
) -> Tensor:
    backend = resolve_backend(backend, key.device)
    if backend == "triton":
        return _launch_sample(shape, key, tensor, query, noise, purpose, p_zero, r_max).contiguous()
    z: Tensor = twin("sample", backend)(
        shape,
        key,
        tensor=tensor,
        query=query,
        noise=noise,
        purpose=purpose,
        p_zero=p_zero,
        r_max=r_max,
    )
    return z.contiguous()


def _fake(
    shape: Sequence[int],
    key: Tensor,
    tensor: int,
    query: int,
    noise: str,
    purpose: str,
    p_zero: float,
    r_max: int,
    backend: str,
) -> Tensor:
    return key.new_empty(shape, dtype=DTYPES[noise])


_OP = register(
    "sample(SymInt[] shape, Tensor key, int tensor, int query, str noise, str purpose, "
    "float p_zero, int r_max, str backend) -> Tensor",
    _implementation,
    _fake,
)


def sample(
    shape: Sequence[int],
    key: Tensor,
    *,
    tensor: int,
    query: int = 0,
    noise: str = "normal",
    purpose: str = "noise",
    p_zero: float = 0.0,
    r_max: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Noise for a tensor of `shape`: a pure function of (seed, step, query, tensor, row, column).

    Args:
        shape: of the result; columns run with dimension 1 innermost.
        key: `[2]` int64, (seed, step); its device is the result's.
        tensor: index of the tensor in the model.
        query: direction of this step, in [0, 2^24).
        noise: "normal" (fp32), "rademacher" (fp32 +-1), "sparse_int8" (int8 in [-r_max, r_max]) or
            "bits" (the words, int64 in [0, 2^32)).
        purpose: "noise", "rounding", "dropout" or "data": separate streams.
        p_zero, r_max: of "sparse_int8": probability of a forced zero in [0, 1), largest value.
        backend: "auto", "triton", "numba" or "reference".
    Returns: `[*shape]`, contiguous.
    Determinism: integers and signs are bit-equal on all backends; normals within 1.5e-6 of float64.
    Source: Salmon et al. 2011 (Philox4x32-10); Box and Muller 1958.
    """
    check_key(key)
    check_noise(noise, tuple(DTYPES))
    check_indices(tensor, query)
    check_groups(shape, noise)
    if purpose not in PURPOSES:
        raise ValueError(f"purpose must be one of {tuple(PURPOSES)}, got {purpose!r}")
    if not 0.0 <= p_zero < 1.0:
        raise ValueError(f"p_zero must be in [0, 1), got {p_zero}")
    if not 1 <= r_max <= 127:
        raise ValueError(f"r_max must be in [1, 127], got {r_max}")
    z: Tensor = _OP(shape, key, tensor, query, noise, purpose, p_zero, r_max, backend)
    return z


__all__ = ["PURPOSES", "sample"]
