"""Estimators: at which points the loss is evaluated, and what its values make of the directions.

A zeroth-order step in its own order (arXiv:2501.04287, abstract), by the parts that the wrapper and
its optimisers exchange:

>>> from elasticzo.head import HeadParameter
>>> f = lambda w: (w - 1.0).square().sum()
>>> w, seed_and_step = torch.zeros(3), torch.tensor([7, 0])
>>> eps, lr = torch.tensor(1e-3, dtype=torch.float64), 0.1
>>> paper_s = spsa()
>>> at = (HeadParameter("w", index=0, scale=1.0), w, seed_and_step)
>>> W = paper_s.direction.weights(*at, eps, paper_s.points, None, "auto")  # w + eps z and w - eps z
>>> L = torch.stack([f(half) for half in W])  # the two passes, without gradients
>>> g = paper_s.project(L, eps)  # (L+ - L-) / (2 eps)
>>> a = paper_s.coefficients(g, clip=None)  # g / Q
>>> w -= lr * paper_s.direction.sum(*at, a, "auto")  # w <- w - lr g z, the same z made again
>>> bool(f(w) < f(torch.zeros(3)))
True

The wrapper's forward does the first two, `elasticzo.optim.step.Step.step` the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from elasticzo.directions import Dense, Direction, LowRank
from elasticzo.feedback import Feedback
from elasticzo.losses import SIDES
from elasticzo.points import CLEAN, Points, plus_sides, two_sided
from elasticzo.samples import Samples
from elasticzo.settings import check_queries

Project = Callable[[Tensor, Tensor], Tensor]  # losses [N], eps [] -> g [Q]


def central_difference(losses: Tensor, eps: Tensor) -> Tensor:
    """`(L+_q - L-_q) / (2 eps)`: `[2Q]` -> `[Q]`."""
    wide = losses.to(torch.float64)
    return (wide[0::2] - wide[1::2]) / (2.0 * eps)


def forward_difference(losses: Tensor, eps: Tensor) -> Tensor:
    """`(L+_q - L) / eps` with the loss at `w` first: `[1 + Q]` -> `[Q]`."""
    wide = losses.to(torch.float64)
    return (wide[1:] - wide[0]) / eps


def no_difference(losses: Tensor, eps: Tensor) -> Tensor:
    """Of one clean pass: `[1]`, zero."""
    return torch.zeros(1, dtype=torch.float64, device=losses.device)


@dataclass(frozen=True)
class Estimator:
    """Which points, along which direction, and what their losses make of it; see the methods below.

    Attributes:
        name: of the method.
        direction: what `z` is.
        queries: directions a step, Q.
        points: where the network is evaluated.
        difference: the projected gradients of the losses at these points.
        sources: halves of the losses that a tail may learn from, by name.
        average: whether the coefficients are averaged over the queries; signs add up.
        samples: the directions of weights that are learnt by sample.
        feedback: settings of learnt feedback, which has no directions.
    """

    name: str
    direction: Direction
    queries: int
    points: Points
    difference: Project
    sources: Mapping[str, slice]
    average: bool = True
    samples: Samples = field(default_factory=Samples)
    feedback: Feedback | None = None

    def __post_init__(self) -> None:
        check_queries(self.queries)

    @property
    def noise(self) -> str:
        return self.direction.noise

    def project(self, losses: Tensor, eps: Tensor) -> Tensor:
        """The projected gradients `g`, `[Q]` or `[Q, B]`, from the losses of the points (and
        samples)."""
        return self.difference(losses.detach(), eps)

    def coefficients(self, g: Tensor, clip: float | None) -> Tensor:
        """What each direction is weighed by: `clip(g_q, +-clip) / Q`."""
        a = g if clip is None else g.clamp(-clip, clip)
        return a / self.queries if self.average else a

    def describe(self) -> dict[str, Any]:
        """What makes it another estimator: it stands in logs and states."""
        of = self.direction.describe() if self.feedback is None else self.feedback.describe()
        return {"name": self.name, "queries": self.queries, **of}


def spsa(queries: int = 1, noise: str = "normal") -> Estimator:
    """Both sides of a dense direction: the paper's.

    Args:
        queries: directions a step, Q; 2Q passes. noise: "normal" or "rademacher".
    Source: Spall 1992; arXiv:2501.04287.
    """
    return Estimator("spsa", Dense(noise), queries, two_sided(queries), central_difference, SIDES)


def one_sided(queries: int = 1, noise: str = "normal") -> Estimator:
    """One side of a dense direction against the loss at `w`, which all queries share.

    1 + Q passes instead of 2Q, for a bias of order eps where the other has eps^2.

    Source: forward differences, as of DeepZero (Chen et al., arXiv:2310.02025).
    """
    sources = {"plus": slice(1, None), "clean": slice(0, 1)}
    return Estimator(
        "one_sided", Dense(noise), queries, plus_sides(queries), forward_difference, sources
    )


def low_rank(queries: int = 1, rank: int = 2, every: int = 50, noise: str = "normal") -> Estimator:
    """Both sides of a direction of low rank, one factor of which stays for some steps (`LowRank`).

    Source: LOZO, Chen et al., arXiv:2410.07698.
    """
    direction = LowRank(rank, every, noise)
    return Estimator("low_rank", direction, queries, two_sided(queries), central_difference, SIDES)


def by_feedback(settings: Feedback) -> Estimator:
    """One pass at `w`; what the step learns it learns from a second one, with noise on the layers'
    outputs: see `elasticzo.feedback`."""

    sources = {"clean": slice(0, 1)}
    direction = Dense("rademacher")
    return Estimator("feedback", direction, 1, CLEAN, no_difference, sources, feedback=settings)


def asked_estimator(
    estimator: Estimator | None,
    noise: str | None,
    queries: int,
    directions: str | Mapping[str, str] | Feedback,
    group: int,
) -> tuple[Estimator, str | Mapping[str, str]]:
    """What the settings of a wrapper come to: its estimator, and the kinds of its directions.

    Raises: TypeError for another estimator; ValueError for settings that exclude each other.
    """
    if not isinstance(estimator, Estimator | None):
        raise TypeError(
            f"estimator must be one of elasticzo.estimator, as one_sided(queries=4), got "
            f"{estimator!r}"
        )
    if estimator is not None and (noise, queries) != (None, 1):
        raise ValueError(
            f"estimator has its own noise and queries: got noise={noise!r} and "
            f"queries={queries!r} beside it"
        )
    if noise == "rank1":
        if directions != "weight":
            raise ValueError(
                'noise="rank1" is directions="rank1" with signs; got directions='
                f"{directions!r} beside it"
            )
        noise, directions = "rademacher", "rank1"
    by_name = isinstance(directions, Mapping) and "feedback" in directions.values()
    settings = Feedback() if directions == "feedback" or by_name else directions
    if isinstance(settings, Feedback):
        signs = noise in (None, "rademacher")
        if (estimator, queries, signs, group) != (None, 1, True, 1):
            raise ValueError(
                "learnt feedback is an estimator of its own, a clean and a noisy pass: got "
                f"estimator={estimator!r}, queries={queries!r}, noise={noise!r} and "
                f"group={group!r} beside it"
            )
        estimator = by_feedback(settings)
    if isinstance(directions, Feedback):
        directions = "feedback"
    if estimator is None:
        estimator = spsa(queries, noise or "normal")
    return replace(estimator, samples=Samples(noise or "rademacher", group)), directions


# What the contract tests run over: a new method is a line here.
ESTIMATORS: dict[str, Callable[..., Estimator]] = {
    "spsa": spsa,
    "one_sided": one_sided,
    "low_rank": low_rank,
}
