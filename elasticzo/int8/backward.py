"""NITI's integer backward over the tail's blocks, one half at a time, and the sum over halves.

Error of a block's input: `W^T err`, requantised to nearest as the forward's results are. Weight
gradient: `err^T x` in int32, summed over the batch, at exponent `e_err + e_x`.

NITI: Wang et al., arXiv:2009.13108.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from elasticzo.int8.layers import Block, Int8Layer
from elasticzo.int8.passes import Kept
from elasticzo.int8.tensor import Int8Tensor
from zo_kernels import (
    int8_conv2d_gradient,
    int8_matmul,
    int8_paired_conv2d,
    int8_requantize,
    int8_unpool,
)

Part = tuple[Tensor, Tensor]  # int32 sums and their exponent, []
MAX_ROWS = 1 << 17  # 127^2 2^17 < 2^31: rows of a product whose sums fit in int32
ALIGNED_BITS = 16  # the unit of a sum is at the least 2^-16 of the largest among its parts
NEVER = 1 << 40  # no exponent
SUM_BITS = 30  # of a sum that is handed on in int32


def part_of(t: Tensor, half: int, count: int) -> Tensor:
    size = t.shape[0] // count
    return t[half * size : (half + 1) * size]


def half_gradients(
    blocks: Sequence[Block],
    kept: dict[str, Kept],
    trained: frozenset[str],
    error: Int8Tensor,
    half: int,
    count: int,
    backend: str,
) -> dict[str, list[Part]]:
    """The gradients of the trained layers among the kept blocks, from one half.

    Args:
        blocks: all that were kept, in their order; the last one made the logits.
        error: of the logits, `[B, C]` int8, exponent `[]`.
    Returns: by name, products whose sum, exponents aligned, is the gradient.
    """
    found: dict[str, list[Part]] = {}
    q, exponent = error.q, error.exponent
    for block in reversed(blocks):
        own = kept[block.name]
        layer = block.layer
        q = _to_accumulators(block, own, q, half, count, backend)
        if q.dtype != torch.int8:  # windows that overlap add up
            q, exponent = int8_requantize(q, None, exponent, backend=backend)
        x = part_of(own.x.q, half, count)
        if block.name in trained:
            e = exponent + own.x.exponent[half]
            found[block.name] = [(g, e) for g in weight_gradient(layer, q, x, backend)]
        if block is not blocks[0]:
            acc, bits = input_error(layer, q, x, backend)
            q, exponent = int8_requantize(
                acc, bits, exponent, weight_exponent=layer.exponent, backend=backend
            )
    return found


def _to_accumulators(
    block: Block, own: Kept, q: Tensor, half: int, count: int, backend: str
) -> Tensor:
    """From the error of a block's output to that of its accumulators."""
    if block.relu:
        q = q * part_of(own.out, half, count).clamp_max(1)  # no output is negative
    if block.flatten:
        q = q.reshape(-1, *own.shapes[-1][1:])
    for i in reversed(range(len(block.pools))):
        pool, places = block.pools[i], part_of(own.places[i], half, count)
        if places.dtype == torch.uint8:
            q = int8_unpool(q, places, own.shapes[i][2:], backend=backend)
            continue
        shape = torch.Size((len(q), *own.shapes[i][1:]))
        routed = pool.route(q, places, shape)
        apart = pool.window is None or (
            pool.stride[0] >= pool.window[0] and pool.stride[1] >= pool.window[1]
        )
        q = routed.to(torch.int8) if apart and q.dtype == torch.int8 else routed
    return q


def _in_parts(error: Tensor, x: Tensor, rows: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Both in parts of so many rows at the most."""
    if len(x) <= rows:
        return [(error, x)]
    return zip(torch.split(error, rows), torch.split(x, rows), strict=True)


def weight_gradient(layer: Int8Layer, error: Tensor, x: Tensor, backend: str) -> list[Tensor]:
    """`err^T x`: int32 like the weight; more than one where int32 could not hold the sum."""
    if not layer.convolution:
        parts = _in_parts(error, x, MAX_ROWS)
        return [int8_matmul(e.t(), part, backend=backend)[0] for e, part in parts]
    if layer.weight.ndim == 3:
        error, x = error.unsqueeze(2), x.unsqueeze(2)
    images = max(1, MAX_ROWS // error[0, 0].numel())
    return [
        int8_conv2d_gradient(
            *(e, part, layer.weight2d.shape[2:]),
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            backend=backend,
        ).reshape(layer.weight.shape)
        for e, part in _in_parts(error, x, images)
    ]


def input_error(
    layer: Int8Layer, error: Tensor, x: Tensor, backend: str
) -> tuple[Tensor, Tensor | None]:
    """`W^T err`: int32 like x, and the bits of it where they are known."""
    if not layer.convolution:
        return int8_matmul(error, layer.weight, backend=backend)
    flat = layer.weight.ndim == 3
    w = layer.weight2d
    if flat:
        error = error.unsqueeze(2)
    height, width = (1, x.shape[2]) if flat else (x.shape[2], x.shape[3])
    flipped = w.flip(2, 3).transpose(0, 1).contiguous()
    (kh, kw), (ph, pw), (dh, dw) = w.shape[2:], layer.padding, layer.dilation
    padding = (dh * (kh - 1) - ph, dw * (kw - 1) - pw)
    if layer.stride != (1, 1) or min(padding) < 0:
        error, padding = _spread(layer, error, height, width), (0, 0)
    acc, bits = int8_paired_conv2d(
        *(error, flipped, None),
        stop=1,
        padding=padding,
        dilation=layer.dilation,
        backend=backend,
    )
    return (acc.squeeze(2) if flat else acc), bits.reshape(())


def _spread(layer: Int8Layer, error: Tensor, height: int, width: int) -> Tensor:
    """Zeros between, around and behind the errors: what a plain convolution with the flipped weight
    turns into the errors of the input."""
    (kh, kw), (ph, pw) = layer.weight2d.shape[2:], layer.padding
    (sh, sw), (dh, dw) = layer.stride, layer.dilation
    batch, channels, oh, ow = error.shape
    top, left = dh * (kh - 1) - ph, dw * (kw - 1) - pw
    out = error.new_zeros(batch, channels, height + dh * (kh - 1), width + dw * (kw - 1))
    to_h, from_h = _inside(top, sh, oh, out.shape[2])
    to_w, from_w = _inside(left, sw, ow, out.shape[3])
    out[:, :, to_h, to_w] = error[:, :, from_h, from_w]
    return out


def _inside(offset: int, stride: int, count: int, size: int) -> tuple[slice, slice]:
    """Places `offset + stride i`, i < count, in `0 .. size - 1`, and their i: errors of the padding
    alone belong to no input."""
    first = max(0, -(offset // stride))
    n = max(0, min(count, -((offset - size) // stride)) - first)
    begin = offset + stride * first
    return slice(begin, begin + stride * n, stride), slice(first, first + n)


def aligned_sum(parts: Sequence[Part]) -> Tensor:
    """The sum of int32 tensors of different exponents: int32, up to a power of 2.

    The unit is the smallest among the parts that are not zero, but at the least 2^-16 of the
    largest; what is smaller is cut off toward zero, and so is what lies below the 30 highest bits
    of the result. A smaller unit would fill the low bits with zeros, by which pseudo-stochastic
    rounding decides.
    """
    if len(parts) == 1:
        return parts[0][0]
    exponents = torch.stack([e for _, e in parts]).to(torch.int64)
    live = torch.stack([g.any() for g, _ in parts])
    least, most = exponents.where(live, NEVER).amin(), exponents.where(live, -NEVER).amax()
    unit = torch.maximum(least, most - ALIGNED_BITS)
    shifts = exponents - unit
    total = torch.zeros_like(parts[0][0], dtype=torch.int64)
    for i, (g, _) in enumerate(parts):
        total += shifted(g.to(torch.int64), shifts[i])
    excess = (_bit_length(total.abs().amax()) - SUM_BITS).clamp_min(0)
    return shifted(total, -excess).to(torch.int32)


def shifted(x: Tensor, s: Tensor) -> Tensor:
    """`x 2^s`, toward zero."""
    left, right = s.clamp(0, 31), (-s).clamp(0, 63)
    return x.sign() * ((x.abs() << left) >> right)


def _bit_length(v: Tensor) -> Tensor:
    n = torch.zeros_like(v)
    for k in (32, 16, 8, 4, 2, 1):
        step = ((v >> k) > 0).to(torch.int64) * k
        n, v = n + step, v >> step
    return n + v
