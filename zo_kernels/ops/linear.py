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

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zo_kernels.layout import check_groups
from zo_kernels.registry import (
    check_indices,
    check_key,
    check_noise,
    check_tensor,
    register,
    resolve_backend,
    twin,
)
from zo_kernels.triton.linear import launch

DTYPES = (torch.float32, torch.bfloat16)
PRECISIONS = ("ieee", "tf32", "tf32x3")


def _parts(start: int, stop: int) -> list[tuple[int, int]]:
    """Halves as (first, count): a single -, whole queries, a single +."""
    whole, end = start + start % 2, stop - stop % 2
    parts = [(start, whole - start), (whole, end - whole), (end, stop - end)]
    return [part for part in parts if part[1] > 0]


def _empty(
    x: Tensor, w: Tensor, start: int, stop: int, shared: bool, dtype: torch.dtype | None
) -> Tensor:
    rows = x.shape[0] * (stop - start) if shared else x.shape[0]
    return torch.empty((rows, w.shape[0]), dtype=dtype or x.dtype, device=x.device)


def _launch_paired_linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    key: Tensor,
    eps: Tensor,
    tensors: tuple[int, int],
    start: int,
    stop: int,
    shared: bool,
    noise: str,
    scales: tuple[float, float],
    precision: str,
    dtype: torch.dtype | None,
    relu: bool,
) -> Tensor:
    if precision == "tf32x3" and torch.version.hip:
        raise ValueError("precision 'tf32x3' needs an NVIDIA GPU; an AMD one has 'ieee' and 'tf32'")
    y = _empty(x, w, start, stop, shared, dtype)
    if y.numel() == 0:
        return y
    rows = y.shape[0] // (stop - start)
    for first, count in _parts(start, stop):
        here = slice((first - start) * rows, (first - start + count) * rows)
        x_here = x if shared else x[here]
        args = (x_here, w, bias, y[here], key, eps, tensors, first, count, shared, noise, scales)
        launch(*args, precision, relu)
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
    noise: str,
    scale: float,
    bias_scale: float,
    precision: str,
    compute_dtype: torch.dtype | None,
    relu: bool,
    backend: str,
) -> Tensor:
    x, w, bias = x.detach(), w.detach(), None if bias is None else bias.detach()
    backend = resolve_backend(backend, w.device)
    if backend == "triton":
        tensors, scales = (tensor, bias_tensor or 0), (scale, bias_scale)
        span = (start, stop, shared, noise)
        rest = (precision, compute_dtype, relu)
        return _launch_paired_linear(x, w, bias, key, eps, tensors, *span, scales, *rest)
    y: Tensor = twin("paired_linear", backend)(
        *(x, w, bias, key, eps),
        tensor=tensor,
        bias_tensor=bias_tensor,
        start=start,
        stop=stop,
        shared=shared,
        noise=noise,
        scale=scale,
        bias_scale=bias_scale,
        precision=precision,
        compute_dtype=compute_dtype,
        relu=relu,
    )
    return y


def _fake(x: Tensor, w: Tensor, *args: Any) -> Tensor:
    start, stop, shared, dtype = args[5], args[6], args[7], args[12]
    return _empty(x, w, start, stop, shared, dtype)


_OP = register(
    "paired_linear(Tensor x, Tensor w, Tensor? bias, Tensor key, Tensor eps, int tensor, "
    "int? bias_tensor, int start, int stop, bool shared, str noise, float scale, "
    "float bias_scale, str precision, ScalarType? compute_dtype, bool relu, str backend) -> Tensor",
    _implementation,
    _fake,
)


def _check(x: Tensor, w: Tensor, bias: Tensor | None, halves: int, shared: bool) -> None:
    check_tensor("w", w, dtype=DTYPES)
    check_tensor("x", x, dtype=DTYPES, device=w.device)
    for name, t in (("w", w), ("x", x)):
        if t.ndim != 2:
            raise ValueError(f"{name} must have two dimensions, got shape {list(t.shape)}")
    check_tensor("x", x, shape=[x.shape[0], w.shape[1]])
    if not shared and x.shape[0] % halves:
        raise ValueError(f"x must have equally many rows for {halves} halves, got {x.shape[0]}")
    if bias is not None:
        check_tensor("bias", bias, shape=[w.shape[0]], dtype=DTYPES, device=w.device)
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError(
            "x requires grad, and paired_linear has no backward: use torch.no_grad()"
        )


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
    if not 0 <= start < stop:
        raise ValueError(f"halves need 0 <= start < stop, got start={start}, stop={stop}")
    _check(x, w, bias, stop - start, shared)
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
    args = (x, w, bias, key, eps, tensor, bias_tensor, start, stop, shared, noise, scale)
    y: Tensor = _OP(*args, bias_scale, precision, compute_dtype, relu, backend)
    return y


__all__ = ["paired_linear"]
