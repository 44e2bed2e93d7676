"""The gradients of a layer's own weights from one of its outputs: one product, no graph.

`dW = dy x^T` over samples and places, `db = sum dy`; of an embedding the rows of its tokens.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from elasticzo.forward.layers.samples import pad_input


def weight_gradients(m: Any, x: Tensor, dy: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
    """Of the parameters `wanted` ("weight", "bias"), for an input `x` and a gradient `dy` of the
    outputs; in float32 at least."""
    wide = torch.promote_types(m.weight.dtype, torch.float32)
    dy = dy.to(wide)
    if isinstance(m, nn.Embedding):
        padding = -1 if m.padding_idx is None else m.padding_idx
        return {"weight": _rows(dy, x, m.num_embeddings, padding, m.scale_grad_by_freq)}
    x = x.to(wide)
    found = {}
    if isinstance(m, nn.Linear):
        rows = dy.flatten(0, -2)
        if "weight" in wanted:
            found["weight"] = rows.t() @ x.flatten(0, -2)
        if "bias" in wanted:
            found["bias"] = rows.sum(0)
        return found
    x, padding = pad_input(m, x)
    dims = len(m.kernel_size)
    mask = [False, "weight" in wanted, "bias" in wanted]
    sizes = [m.out_channels] if m.bias is not None else None
    where = (list(m.stride), padding, list(m.dilation), False, [0] * dims, m.groups)
    w = m.weight.to(wide)
    _, weight, bias = torch.ops.aten.convolution_backward(dy, x, w, sizes, *where, mask)
    return {k: t for k, t in (("weight", weight), ("bias", bias)) if k in wanted}


def _rows(dy: Tensor, tokens: Tensor, rows: int, padding: int, by_frequency: bool) -> Tensor:
    found: Tensor = torch.ops.aten.embedding_dense_backward(dy, tokens, rows, padding, by_frequency)
    return found
