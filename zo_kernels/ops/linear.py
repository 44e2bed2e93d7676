"""`y_h = x_h (w +- eps scale z_w)^T + (b +- eps bias_scale z_b)`: both halves from one read of `w`.

Half `2q` is `+`, half `2q + 1` is `-`, of query `q`. A program owns a tile `[BM, BN]` of both
halves of one query. For each tile `[BN, BK]` of `w` that it reads it makes `z` once, in registers,
and the operands of two products. Noise is that of `perturbed_weights`; weights are perturbed in
fp32, then rounded.

A tile of `w` costs its bytes, `BN BK` elements of noise (bf16: 54-66 instructions of the loop
for a normal and 19-34 for a sign, loads and rounding included; static, sm_90) and
`4 BM BN BK` operations. Every block of BM rows reads `w` (from L2) and makes `z` anew: so normals
pay while the rows of a half fit one block or two. Floor for a query: `N K` weights read,
`2 M (K + N)` activations moved (`M (K + 2 N)` where the halves share `x`), `4 M N K` operations,
`ceil(M / BM) N K` elements of noise.

ElasticZO (arXiv:2501.04287), abstract: two forward passes at `w +- eps z`.
"""
# mypy: disable-error-code="return"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zo_kernels.geometry import empty_product
from zo_kernels.ops.checks import (
    check_arithmetic,
    check_no_grad,
    check_perturbation,
    check_product,
    check_rows,
    check_span,
)
from zo_kernels.registry import check_tensor, op


def _fake(
    x: Tensor,
    w: Tensor,
    start: int,
    stop: int,
    shared: bool,
    compute_dtype: torch.dtype | None,
    **_: Any,
) -> Tensor:
    return empty_product(x, w, stop - start, shared, compute_dtype)


@op(fake=_fake)
def paired_linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    key: Tensor,
    eps: Tensor,
    *,
    tensor: int,
    bias_tensor: int | None = None,
    start: int = 0,
    stop: int = 2,
    shared: bool = False,
    noise: str = "normal",
    scale: float = 1.0,
    bias_scale: float = 1.0,
    precision: str = "ieee",
    compute_dtype: torch.dtype | None = None,
    relu: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`y_h = x_h (w +- eps scale z_w)^T + (b +- eps bias_scale z_b)`, halves `start .. stop - 1`.

    Weights are perturbed in fp32 and rounded to the compute dtype; products are summed in fp32, the
    bias is perturbed and added in fp32, the result rounded once. Weights are only read.

    Args:
        x: `[H B, K]` float32 or bfloat16, half after half, H = stop - start; or `[B, K]`, `shared`.
        w: `[N, K]`, bias: `[N]` or None, float32 or bfloat16; any strides, as for x.
        key: `[2]` int64, (seed, step). eps: `[]` float64, the perturbation scale.
        tensor, bias_tensor: indices in the model, the second counter word of the noise.
        start, stop: halves wanted, `0 <= start < stop`; half `2q` is +, `2q + 1` is -.
        shared: every half reads the same x.
        noise: "normal" or "rademacher".
        scale, bias_scale: relative scales of the two perturbations.
        precision: of float32 products: "ieee", "tf32" or "tf32x3"; bfloat16 ones are exact in each.
            On the CPU products are exact, but the twins round operands as "tf32" does.
        compute_dtype: of operands and result, float32 or bfloat16; None is that of x.
        relu: apply it to the result (NaN stays).
        backend: "auto", "triton", "numba" or "reference".
    Returns: `[H B, N]`.
    Determinism: bit-equal in every run on one device; tiles depend on B, the order of sums on them.
    Source: arXiv:2501.04287, abstract; Spall 1992 (SPSA).
    """
    check_span(start, stop)
    check_product(x, w, bias, 2, "two")
    check_tensor("x", x, shape=[x.shape[0], w.shape[1]])
    if not shared:
        check_rows(x, stop - start)
    check_no_grad("paired_linear", x=x)
    of_noise = (stop, noise, scale, bias_scale)
    check_perturbation(w, bias, key, eps, tensor, bias_tensor, *of_noise)
    check_arithmetic(precision, compute_dtype)
