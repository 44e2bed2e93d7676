"""Learnt feedback: noise on a layer's outputs learns a matrix that carries the errors back.

Of a layer with outputs y_i of sample i (its nodes), network outputs o_i, e_i = d loss / d o_i:

    d_i = M e_i                                  the error of the nodes, where M ~ (d o / d y)^T
    y'_i = y_i + s xi_i, s = noise * rms(y)      in a second pass, xi signs of the counter noise
    M <- (1 - beta) M + beta / (B s) sum_i xi_i (o'_i - o_i)^T,   beta = max(beta, 1 / step)
    or  M <- M + b / (B s) sum_i xi_i r_i^T,   r = o' - o - sum_l s_l xi_l M_l,   b = B / N at most

Two passes, and no activation is kept between them. d is biased (a mean Jacobian, not the sample's);
`d_i + (c_i - xi_i . d_i) xi_i` with `c_i = e_i . (o'_i - o_i) / s` is not.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from elasticzo.directions import draw
from elasticzo.head import HeadParameter
from elasticzo.settings import check_integer, check_number

MATRICES = ("learnt", "random", "zero")
PATTERNS = ("shared", "exact")  # settings that name layers


@dataclass(frozen=True)
class Feedback:
    """How errors come back to the layers of the head.

    Args:
        matrix: "learnt"; "random" is fixed signs (direct feedback alignment), "zero" none at all:
            of the head its last layer alone learns, by the exact gradient. Both are controls.
        noise: size of the noise on a layer's outputs, relative to their root mean square.
        fit: "mean", the running mean of each layer's own answer, or "residual": of what all
            matrices together (of N nodes) did not foretell, so that layers do not hear each
            other's noise.
        beta: what a step weighs in the mean at least; the residual's is 0.4 B / N.
        unbiased: whether the noise's own answer corrects d; the inputs of the layers are then
            kept until the end of the second pass.
        parts: of the batch that run the second pass one after the other, so that a segment's
            backward holds a part of its samples; gradients are summed meanwhile (as much memory as
            the weights). BatchNorm then normalises by the part.
        width: where a sample has more outputs, M learns so many fixed random sums of them.
        shared: name patterns of layers whose inputs `[B, channels, places...]` have one node a
            channel: one sign and one row of M for all places, which share the error equally. For
            places that are exchangeable (points of a cloud), and where M is to be small.
        exact: name patterns of the head's last layers, through which the errors come back by
            backpropagation: of their activations alone, in the clean pass, so that of a linear
            layer and its ReLU no more is kept than its output. All layers up to the cut must be;
            one that is not ends it, and those before it learn by their matrices.
    Source: Xiao et al., "Online pseudo-zeroth-order training" (arXiv:2407.12516); Lillicrap et al.
        2016 and Noekland 2016 (arXiv:1609.01596) for fixed random feedback.
    """

    matrix: str = "learnt"
    noise: float = 0.1
    beta: float = 0.01
    fit: str = "mean"
    unbiased: bool = False
    parts: int = 1
    width: int = 512
    shared: tuple[str, ...] = ()
    exact: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.matrix not in MATRICES:
            raise ValueError(f"matrix must be one of {MATRICES}, got {self.matrix!r}")
        if self.fit not in ("mean", "residual"):
            raise ValueError(f"fit must be 'mean' or 'residual', got {self.fit!r}")
        positive = "a finite number > 0"
        check_number("noise", self.noise, positive, lambda v: 0.0 < v < float("inf"))
        check_number("beta", self.beta, "in (0, 1]", lambda v: 0.0 < v <= 1.0)
        check_integer("width", self.width, 1, 1 << 20)
        check_integer("parts", self.parts, 1, 1 << 20)
        for name in PATTERNS:
            given = getattr(self, name)
            if isinstance(given, str) or not all(isinstance(p, str) for p in given):
                raise TypeError(f"{name} must be a sequence of name patterns, got {given!r}")
            object.__setattr__(self, name, tuple(given))
        if self.unbiased and self.matrix != "learnt":
            raise ValueError(f"unbiased corrects what is learnt, got matrix={self.matrix!r}")

    def describe(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k not in PATTERNS or v}

    def check_layers(self, names: Sequence[str]) -> None:
        """Raise ValueError for a pattern that no layer has."""
        for name in PATTERNS:
            for pattern in getattr(self, name):
                if not fnmatch.filter(names, pattern):
                    raise ValueError(
                        f"{name} {pattern!r} matches no layer of the head: {', '.join(names)}"
                    )

    def is_exact(self, layer: str) -> bool:
        """Whether errors come back through the layer of this name by backpropagation."""
        return any(fnmatch.fnmatchcase(layer, p) for p in self.exact)

    def nodes(self, layer: str, shape: torch.Size) -> torch.Size:
        """`[B, nodes]` of what a layer of this name is about to read, of this shape."""
        shares = len(shape) > 2 and any(fnmatch.fnmatchcase(layer, p) for p in self.shared)
        return torch.Size(shape[:2] if shares else (shape[0], shape[1:].numel()))

    def xi(
        self, head: HeadParameter, shape: torch.Size, key: Tensor, call: int, first: int, to: str
    ) -> Tensor:
        """The signs on the outputs `[B, nodes]` of one call of a layer; `to`: the backend."""
        at = (head, key, call, to, "node", first)
        return draw("rademacher", (shape[0], shape[1:].numel()), *at)

    def begin(self, head: HeadParameter, nodes: int, like: Tensor, key: Tensor, to: str) -> Tensor:
        """M before the first step, `[nodes, outputs]` for errors like these, `[B, outputs]`."""
        outputs = like.shape[1]
        if self.matrix == "random":
            of_run = key * torch.tensor([1, 0], device=key.device)
            signs = draw("rademacher", (nodes, outputs), head, of_run, 0, to, "left")
            return signs.to(like.dtype).mul_(outputs**-0.5)
        return like.new_zeros(nodes, outputs)

    def sums(self, like: Tensor, key: Tensor, to: str) -> Tensor | None:
        """`[outputs, width]`, what M is told instead of many outputs; None where they are few."""
        outputs = like.shape[1]
        if outputs <= self.width:
            return None
        of_run = key * torch.tensor([1, 0], device=key.device)
        nobody = HeadParameter("", 0, 1.0)
        signs = draw("rademacher", (outputs, self.width), nobody, of_run, 0, to, "right")
        return signs.to(like.dtype).mul_(self.width**-0.5)

    def moved(self, m: Tensor, move: Tensor, steps: Tensor, share: float) -> Tensor:
        """M after a step, the one after so many; `share`: samples a node, B / N."""
        one = 1.0 / (steps + 1.0)
        if self.fit == "mean":
            return m.lerp(move, torch.clamp(one, min=self.beta).to(m.dtype))
        share = min(share, 1.0)
        return m + move * torch.clamp(one, 0.4 * share, share).to(m.dtype)
