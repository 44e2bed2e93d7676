"""`y_h = x_h * (w +- eps scale z_w) + (b +- eps bias_scale z_b)`: a convolution of both halves.

Half `2q` is `+`, half `2q + 1` is `-`, of query `q`. An implicit product: its rows are the outputs
of a half, `M = B OH OW`, its columns the output channels, its depth `K = KH KW Ci` in the order of
the noise, channels innermost. A program owns a tile `[BM, BN]` of both halves; it gathers x by its
strides, and for each tile `[BN, BK]` of `w` it makes `z` once, in registers. With pooling the four
outputs of a window are neighbours in a tile; only their maximum is written. Noise is that of
`perturbed_weights`; weights are perturbed in fp32, then rounded.

Floor for a query: `2 B Ci IH IW` activations read (half of it where the halves share x),
`2 B Co OH OW` written (a quarter with pooling), `K Co` weights read, `4 M K Co` operations, and
`ceil(M / BM) K Co` elements of noise: normals cost less than the products in full fp32; with
tensor cores, staging is faster once there are many rows. In lines of 32 channels (channels_last) x
moves 16 bytes at a time, else an element at a time.

One dimension is images of height 1: a column of the noise is `k Ci + ci` either way.

ElasticZO (arXiv:2501.04287), abstract: two forward passes at `w +- eps z`.
"""
# mypy: disable-error-code="return"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zo_kernels.geometry import Pair, empty_output, geometry
from zo_kernels.ops.checks import (
    check_arithmetic,
    check_images,
    check_no_grad,
    check_perturbation,
    check_product,
    check_rows,
    check_series,
    check_size,
    check_span,
)
from zo_kernels.registry import op


def _fake(
    x: Tensor,
    w: Tensor,
    start: int,
    stop: int,
    shared: bool,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    compute_dtype: torch.dtype | None,
    pool: bool,
    **_: Any,
) -> Tensor:
    geo = geometry(stride, padding, dilation)
    return empty_output(x, w, stop - start, shared, geo, pool, compute_dtype)


@op(fake=_fake)
def paired_conv2d(
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
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    noise: str = "normal",
    scale: float = 1.0,
    bias_scale: float = 1.0,
    precision: str = "ieee",
    compute_dtype: torch.dtype | None = None,
    relu: bool = False,
    pool: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`y_h = x_h * (w +- eps scale z_w) + (b +- eps bias_scale z_b)`, halves `start .. stop - 1`.

    Weights are perturbed in fp32 and rounded to the compute dtype; products are summed in fp32, the
    bias is perturbed and added in fp32, the result rounded once. Weights are only read.

    Args:
        x: `[H B, Ci, IH, IW]` float32 or bfloat16, half after half, H = stop - start; or
            `[B, Ci, IH, IW]`, `shared`.
        w: `[Co, Ci, KH, KW]`, bias: `[Co]` or None, float32 or bfloat16; any strides, as for x.
            No groups.
        key: `[2]` int64, (seed, step). eps: `[]` float64, the perturbation scale.
        tensor, bias_tensor: indices in the model, the second counter word of the noise.
        start, stop: halves wanted, `0 <= start < stop`; half `2q` is +, `2q + 1` is -.
        shared: every half reads the same x.
        stride, padding, dilation: an integer, or two (height, width); zeros are padded.
        noise: "normal" or "rademacher".
        scale, bias_scale: relative scales of the two perturbations.
        precision: of float32 products: "ieee", "tf32" or "tf32x3"; bfloat16 ones are exact in each.
            On the CPU products are exact, but the twins round operands as "tf32" does.
        compute_dtype: of operands and result, float32 or bfloat16; None is that of x.
        relu: apply it to the result (NaN stays).
        pool: then take maxima of windows 2 x 2, stride 2 (a NaN stays; an odd row or column falls).
        backend: "auto", "triton", "numba" or "reference".
    Returns: `[H B, Co, OH, OW]`, channels_last where x is, else contiguous.
    Determinism: bit-equal in every run on one device; tiles depend on B, the order of sums on them.
    Source: arXiv:2501.04287, abstract; Spall 1992 (SPSA).
    """
    check_span(start, stop)
    check_product(x, w, bias, 4, "four")
    check_images(x, w)
    if not shared:
        check_rows(x, stop - start)
    check_no_grad("paired_conv2d", x=x)
    check_size(x, w, geometry(stride, padding, dilation), pool)
    of_noise = (stop, noise, scale, bias_scale)
    check_perturbation(w, bias, key, eps, tensor, bias_tensor, *of_noise)
    check_arithmetic(precision, compute_dtype)


def paired_conv1d(
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
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    noise: str = "normal",
    scale: float = 1.0,
    bias_scale: float = 1.0,
    precision: str = "ieee",
    compute_dtype: torch.dtype | None = None,
    relu: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`y_h = x_h * (w +- eps scale z_w) + (b +- eps bias_scale z_b)`, halves `start .. stop - 1`.

    The arithmetic is that of `paired_conv2d`, which also reports what is wrong with sizes.

    Args:
        x: `[H B, Ci, L]` float32 or bfloat16, half after half, H = stop - start; or `[B, Ci, L]`,
            `shared`.
        w: `[Co, Ci, K]`, bias: `[Co]` or None, float32 or bfloat16; any strides, as for x.
        key: `[2]` int64, (seed, step). eps: `[]` float64, the perturbation scale.
        tensor, bias_tensor, start, stop, shared, noise, scale, bias_scale, precision,
            compute_dtype, relu, backend: as in `paired_conv2d`.
        stride, padding, dilation: integers.
    Returns: `[H B, Co, OL]`, channels innermost where x has them so, else contiguous.
    Determinism: as `paired_conv2d`.
    Source: arXiv:2501.04287, abstract; Spall 1992 (SPSA).
    """
    check_series(x, w)
    y = paired_conv2d(
        *(x.unsqueeze(2), w.unsqueeze(2), bias, key, eps),
        tensor=tensor,
        bias_tensor=bias_tensor,
        start=start,
        stop=stop,
        shared=shared,
        stride=(1, stride),
        padding=(0, padding),
        dilation=(1, dilation),
        noise=noise,
        scale=scale,
        bias_scale=bias_scale,
        precision=precision,
        compute_dtype=compute_dtype,
        relu=relu,
        backend=backend,
    )
    return y.squeeze(2)
