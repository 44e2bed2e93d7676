"""What `mean_q g_q s z_q` should be, from sizes and gradient norms alone.

Assumed: z has independent entries of mean 0 and variance 1; the loss is linear over the
perturbation (eps -> 0, no curvature) and computed without error. With `a = s * gradient`, tensor by
tensor, and `A = |a|^2` over the whole head:

    E <estimate, gradient>  =  sum s^2 |gradient|^2
    E |estimate|^2          =  (1 - 1/Q) sum s^2 |a|^2  +  (A sum s^2 d  +  c sum s^2 |a|^2) / Q

over the tensors looked at, d elements each; c = 2 for normal noise, 0 for signs. The cosine is
taken as the ratio of these means. With s = 1 and the whole head it is sqrt(Q / (Q + d + c - 1)),
the usual sqrt(Q / (Q + d)); a layer alone has the larger effective size
`d A / (s^2 |gradient|^2)`, since the noise of all other layers reaches it through g. With one
direction the cosine itself is spread like |N(0, 1)|: its mean lies a factor sqrt(2 / pi) = 0.8
below this root mean square.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

FOURTH = {"normal": 2.0, "rademacher": 0.0}  # c


@dataclass(frozen=True)
class Part:
    """One tensor of the head: its size, the norm of its gradient, its scale."""

    size: int
    norm: float
    scale: float


def variance_of_g(head: Sequence[Part]) -> float:
    """`E g^2 = A`, for either noise."""
    return sum((part.scale * part.norm) ** 2 for part in head)


def squared_norm(parts: Sequence[Part], head: Sequence[Part], queries: int, noise: str) -> float:
    """`E |estimate|^2` over some tensors of the head."""
    along = sum(part.scale**4 * part.norm**2 for part in parts)
    across = variance_of_g(head) * sum(part.scale**2 * part.size for part in parts)
    return along * (1 - 1 / queries) + (across + FOURTH[noise] * along) / queries


def cosine(parts: Sequence[Part], head: Sequence[Part], queries: int, noise: str) -> float:
    """Expected cosine over some tensors of the head; 0 where the gradient or the scale is 0."""
    dot = sum((part.scale * part.norm) ** 2 for part in parts)
    norm = math.sqrt(sum(part.norm**2 for part in parts))
    length = math.sqrt(squared_norm(parts, head, queries, noise))
    return dot / (length * norm) if dot else 0.0
