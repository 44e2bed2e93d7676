"""Directions and coefficients of integer training: sparse steps, and the sign of a difference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from elasticzo.directions import Direction
from elasticzo.estimator import Estimator
from elasticzo.head import Head, HeadParameter
from elasticzo.losses import SIDES
from elasticzo.points import Points, two_sided
from zo_kernels import int8_perturbed_weights, integer_projected_sign, sample


@dataclass(frozen=True)
class Sparse(Direction):
    """`z` in `[-r_max, r_max]`, zero with a probability of p_zero; of a scaled weight with more."""

    r_max: int
    p_zero: float
    noise = "sparse_int8"

    def describe(self) -> dict[str, Any]:
        return {"direction": "sparse", "r_max": self.r_max, "p_zero": self.p_zero}

    def zeros(self, head: HeadParameter) -> float:
        """The share of zeros of a weight: its scale multiplies the share of the others."""
        return max(0.0, 1.0 - (1.0 - self.p_zero) * head.scale)

    def sum(self, head: HeadParameter, w: Tensor, key: Tensor, a: Tensor, backend: str) -> Tensor:
        """`sum_q a_q z_q` of signs a, int32: what an update shifts."""
        settings: dict[str, Any] = {"p_zero": self.zeros(head), "r_max": self.r_max}
        total = torch.zeros(w.shape, dtype=torch.int32, device=w.device)
        for query in range(a.numel()):
            how: dict[str, Any] = {"tensor": head.index, "query": query, "noise": self.noise}
            z = sample(w.shape, key, backend=backend, **how, **settings)
            total += a[query] * z.to(torch.int32)
        return total

    def weights(
        self,
        head: HeadParameter,
        w: Tensor,
        key: Tensor,
        eps: Tensor | None,
        points: Points,
        dtype: torch.dtype | None,
        backend: str,
    ) -> Tensor:
        """`clip(w +- z_q)`, int8; there is no eps."""
        assert points.span is not None
        start, stop = points.span
        settings: dict[str, Any] = {"p_zero": self.zeros(head), "r_max": self.r_max}
        at: dict[str, Any] = {"tensor": head.index, "start": start, "stop": stop}
        return int8_perturbed_weights(w, key, backend=backend, **at, **settings)

    def alike(self, head: Head) -> Iterator[tuple[float, list[tuple[HeadParameter, Tensor]]]]:
        """The weights that are perturbed, those with one share of zeros together."""
        groups: dict[float, list[tuple[HeadParameter, Tensor]]] = {}
        for one, w in head:
            if one.scale:
                groups.setdefault(self.zeros(one), []).append((one, w))
        return iter(groups.items())


def sign_difference(losses: Tensor, eps: Tensor, backend: str) -> Tensor:
    """`sign(L+_q - L-_q)`: `[2Q]` integers or floats -> `[Q]` int32; of NaN no direction."""
    if not losses.is_floating_point():
        return integer_projected_sign(losses.to(torch.int64), backend=backend)
    plus, minus = losses[0::2], losses[1::2]
    return (plus > minus).to(torch.int32) - (plus < minus).to(torch.int32)


def signs(r_max: int, p_zero: float, queries: int, backend: str) -> Estimator:
    """Both sides of a sparse direction, whose difference gives a sign.

    Source: arXiv:2501.04287, abstract (ElasticZO-INT8).
    """
    sign = partial(sign_difference, backend=backend)
    points = two_sided(queries)
    return Estimator("signs", Sparse(r_max, p_zero), queries, points, sign, SIDES, average=False)
