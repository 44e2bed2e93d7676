"""`zo_kernels.sample` in Triton; `philox` has the noise that kernels make in registers."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator"

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_kernels.layout import (
    PER_CALL,
    PURPOSES,
    SAMPLE_DTYPES,
    groups_per_row,
    rows_cols,
    to_shape,
)
from zo_kernels.triton.philox import KIND, NORMAL, RADEMACHER, SPARSE, interleave4
from zo_kernels.triton.philox import normal as normal_noise
from zo_kernels.triton.philox import rademacher as rademacher_noise
from zo_kernels.triton.philox import sparse_int8 as sparse_noise
from zo_kernels.triton.philox import words as noise_words
from zo_kernels.triton.shim import jit, tl, triton

BLOCK = 1024


@jit(do_not_specialize=["tensor", "third", "p0", "r_max", "first_group"])
def _sample_kernel(
    out_ptr,
    key_ptr,
    tensor,
    third,  # query + 2^24 * purpose
    p0,
    r_max,
    first_group,
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
    o_group = first_group + pid * (BLOCK // PER) + tl.arange(0, BLOCK // PER)
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
    first_row: int = 0,
) -> Tensor:
    rows, cols = rows_cols(shape)
    per, per_row = PER_CALL[noise], groups_per_row(cols, noise)
    padded = torch.empty(rows, per_row * per, dtype=SAMPLE_DTYPES[noise], device=key.device)
    if padded.numel():
        _sample_kernel[(triton.cdiv(padded.numel(), BLOCK),)](
            padded,
            key,
            tensor,
            query + (PURPOSES[purpose] << 24),
            round(65536 * p_zero),
            r_max,
            first_row * per_row,
            padded.numel(),
            NOISE=KIND[noise],
            PER=per,
            INT64=padded.numel() + BLOCK > 2**31 - 1 or (first_row + rows) * per_row > 2**31 - 1,
            BLOCK=BLOCK,
            enable_fp_fusion=True,
        )
    return to_shape(padded[:, :cols], shape).contiguous()
