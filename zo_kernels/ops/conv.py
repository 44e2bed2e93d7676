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

ElasticZO (arXiv:2501.04287), abstract: two forward passes at `w +- eps z`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zo_kernels.geometry import Geometry, Pair, conv_size, empty_output, geometry
from zo_kernels.layout import check_groups
from zo_kernels.ops.linear import DTYPES, PRECISIONS, _parts
from zo_kernels.registry import (
    check_indices,
    check_key,
    check_noise,
    check_tensor,
    register,
    resolve_backend,
    twin,
)
from zo_kernels.triton.conv import launch


def _launch_paired_conv2d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    key: Tensor,
    eps: Tensor,
    tensors: tuple[int, int],
    start: int,
    stop: int,
    shared: bool,
    geo: Geometry,
    noise: str,
    scales: tuple[float, float],
    precision: str,
    dtype: torch.dtype | None,
    relu: bool,
    pool: bool,
) -> Tensor:
    if precision == "tf32x3" and torch.version.hip:
        raise ValueError("precision 'tf32x3' needs an NVIDIA GPU; an AMD one has 'ieee' and 'tf32'")
    y = empty_output(x, w, stop - start, shared, geo, pool, dtype)
    if y.numel() == 0:
        return y
    rows = y.shape[0] // (stop - start)
    for first, count in _parts(start, stop):
        here = slice((first - start) * rows, (first - start + count) * rows)
        x_here = x if shared else x[here]
        args = (x_here, w, bias, y[here], key, eps, tensors, first, count, shared, geo, noise)
        launch(*args, scales, precision, relu, pool)
    return y


def _implementation(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    key: Tensor,
    eps: Tensor,
    tensor: int,
    bias_tensor: int | None,
    start: int,
    stop: int,
    shared: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    noise: str,
    scale: float,
    bias_scale: float,
    precision: str,
    compute_dtype: torch.dtype | None,
    relu: bool,
    pool: bool,
    backend: str,
) -> Tensor:
    x, w, bias = x.detach(), w.detach(), None if bias is None else bias.detach()
    backend = resolve_backend(backend, w.device)
    if backend == "triton":
        tensors, scales = (tensor, bias_tensor or 0), (scale, bias_scale)
        span = (start, stop, shared, geometry(stride, padding, dilation), noise)
        rest = (precision, compute_dtype, relu, pool)
        return _launch_paired_conv2d(x, w, bias, key, eps, tensors, *span, scales, *rest)
    y: Tensor = twin("paired_conv2d", backend)(
        *(x, w, bias, key, eps),
        tensor=tensor,
        bias_tensor=bias_tensor,
        start=start,
        stop=stop,
        shared=shared,
        stride=stride,
        padding=padding,
        dilation=dilation,
        noise=noise,
        scale=scale,
        bias_scale=bias_scale,
        precision=precision,
        compute_dtype=compute_dtype,
        relu=relu,
        pool=pool,
    )
    return y


def _fake(x: Tensor, w: Tensor, *args: Any) -> Tensor:
    start, stop, shared, geo = args[5], args[6], args[7], geometry(*args[8:11])
    dtype, pool = args[15], args[17]
    return empty_output(x, w, stop - start, shared, geo, pool, dtype)


_OP = register(
    "paired_conv2d(Tensor x, Tensor w, Tensor? bias, Tensor key, Tensor eps, int tensor, "
    "int? bias_tensor, int start, int stop, bool shared, int[] stride, int[] padding, "
    "int[] dilation, str noise, float scale, float bias_scale, str precision, "
    "ScalarType? compute_dtype, bool relu, bool pool, str backend) -> Tensor",
    _implementation,
    _fake,
)


def _check(x: Tensor, w: Tensor, bias: Tensor | None, halves: int, shared: bool) -> None:
    check_tensor("w", w, dtype=DTYPES)
    check_tensor("x", x, dtype=DTYPES, device=w.device)
    for name, t in (("w", w), ("x", x)):
        if t.ndim != 4:
            raise ValueError(f"{name} must have four dimensions, got shape {list(t.shape)}")
    if 0 in w.shape or 0 in x.shape[1:]:
        raise ValueError(
            f"only the batch may be empty, got shapes {list(x.shape)} of x and {list(w.shape)} of w"
        )
    if w.shape[1] != x.shape[1]:
        raise ValueError(
            f"w must have the {x.shape[1]} input channels of x (groups are not supported), "
            f"got shape {list(w.shape)}"
        )
    if not shared and x.shape[0] % halves:
        raise ValueError(f"x must have equally many rows for {halves} halves, got {x.shape[0]}")
    if bias is not None:
        check_tensor("bias", bias, shape=[w.shape[0]], dtype=DTYPES, device=w.device)
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError(
            "x requires grad, and paired_conv2d has no backward: use torch.no_grad()"
        )


def _check_size(x: Tensor, w: Tensor, geo: Geometry, pool: bool) -> None:
    height, width = conv_size(x.shape[2:], w.shape[2:], geo)
    least = 2 if pool else 1
    if min(height, width) < least:
        raise ValueError(
            f"the convolution must give at least {least} x {least} outputs, got {height} x {width} "
            f"from shapes {list(x.shape)} of x and {list(w.shape)} of w"
        )


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
    if not 0 <= start < stop:
        raise ValueError(f"halves need 0 <= start < stop, got start={start}, stop={stop}")
    _check(x, w, bias, stop - start, shared)
    geo = geometry(stride, padding, dilation)
    _check_size(x, w, geo, pool)
    check_key(key, w.device)
    check_tensor("eps", eps, shape=[], dtype=[torch.float64], device=w.device)
    check_noise(noise)
    check_indices(tensor, (stop - 1) // 2)
    check_groups(w.shape, noise)
    if bias is not None and bias_tensor is None:
        raise ValueError("bias_tensor must be the index of the bias in the model, got None")
    check_indices(bias_tensor or 0)
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    if compute_dtype is not None and compute_dtype not in DTYPES:
        raise TypeError(f"compute_dtype must be one of {DTYPES}, got {compute_dtype}")
    args = (x, w, bias, key, eps, tensor, bias_tensor, start, stop, shared, *geo, noise, scale)
    y: Tensor = _OP(*args, bias_scale, precision, compute_dtype, relu, pool, backend)
    return y


__all__ = ["paired_conv2d"]
