"""Signs of L+ - L- by the integer loss, held against those of float64's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zo_kernels import integer_cross_entropy


def float_losses(logits: Tensor, exponent: Tensor, target: Tensor) -> Tensor:
    """Cross-entropies `[N, 2]` in float64, summed over the batch."""
    values = logits.double() * torch.exp2(exponent.double())[..., None, None]
    label = target[:, None, :, None].expand(-1, 2, -1, 1)
    return -F.log_softmax(values, -1).gather(-1, label).sum((-1, -2))


def sign_errors(
    logits: Tensor, exponent: Tensor, target: Tensor, fraction_bits: Sequence[int]
) -> dict[str, dict[str, float]]:
    """For each F, shares of the N steps.

    Args:
        logits: `[N, 2, B, C]` int8, + half first; exponent: `[N, 2]` int32; target: `[N, B]` int64.
        fraction_bits: F to compare.
    Returns: by F, `wrong` (opposite signs), `zero` (no sign where float64 has one), `differ` (all
        steps whose sign is not float64's) and `loss_error`, the mean error of a sample in bits.
    """
    exact = float_losses(logits, exponent, target)
    sign = (exact[:, 0] - exact[:, 1]).sign()
    found = {}
    for f in fraction_bits:
        losses = torch.stack(
            [
                integer_cross_entropy(*step, fraction_bits=f)
                for step in zip(logits, exponent, target, strict=True)
            ]
        )
        mine = (losses[:, 0] - losses[:, 1]).sign()
        bits = losses.double() / 2**f
        error = (bits - exact / np.log(2.0)).abs() / logits.shape[2]
        found[str(f)] = {
            "wrong": float((mine * sign < 0).double().mean()),
            "zero": float(((mine == 0) & (sign != 0)).double().mean()),
            "differ": float((mine != sign).double().mean()),
            "loss_error": float(error.mean()),
        }
    return found


def table(rows: Sequence[dict[str, Any]], but: Sequence[str] = ()) -> str:
    """A line for each row, without the fields `but`: wrong and zero signs in % by F."""
    lines = []
    for row in rows:
        names = [f"{k}={v}" for k, v in row.items() if k not in ("fraction_bits", *but)]
        values = [
            f"F={f}: {100 * e['wrong']:.2f} / {100 * e['zero']:.2f}"
            for f, e in row["fraction_bits"].items()
        ]
        lines.append(f"{' '.join(names)}  {'  '.join(values)}")
    return "\n".join(lines)
