"""The estimator of one batch, direction by direction, beside the true gradient."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from elasticzo import ZOSGD, ElasticZO, pair_losses
from elasticzo.cut import Tail
from experiments.estimator.theory import Part
from zo_kernels import sample, update_

Loss = Callable[[Tensor, Tensor], Tensor]


def stats(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation (0 of a single value) and how many there are."""
    n = len(values)
    mean = sum(values) / n
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else 0.0
    return {"mean": mean, "sd": spread, "n": n}


def along(a: Tensor, b: Tensor) -> float:
    """Cosine between two flat tensors, in float64; 0 where one of them is 0."""
    a, b = a.double(), b.double()
    length = float(a.norm() * b.norm())
    return float(a @ b) / length if length else 0.0


class Probe:
    """A network, its head, and one batch.

    Args:
        net: copied, never changed.
        tail: the cut, as for `ElasticZO`.
        x, y: of the batch; `loss(output, y)` is a scalar.
    Attributes:
        places: where each tensor of the head lies in a flat estimate, by name.
        gradient: the true gradient of the head, flat, float64, by autograd in float64.
        value: the loss itself.
    """

    def __init__(self, net: nn.Module, tail: Tail, x: Tensor, y: Tensor, loss: Loss) -> None:
        self.net, self.tail, self.x, self.y, self.loss = net, tail, x, y, loss
        head = dict(ElasticZO(copy.deepcopy(net), tail).named_head_parameters())
        self.places: dict[str, slice] = {}
        start = 0
        for name, p in head.items():
            self.places[name] = slice(start, start + p.numel())
            start += p.numel()
        self.size = start
        self.value, gradients = gradient_of(net, list(head), x, y, loss)
        self.gradient = torch.cat([g.flatten() for g in gradients])

    @property
    def layers(self) -> dict[str, list[str]]:
        """Names of the tensors of each module of the head, which lie side by side."""
        found: dict[str, list[str]] = {}
        for name in self.places:
            found.setdefault(name.rpartition(".")[0], []).append(name)
        return found

    def over(self, names: Sequence[str]) -> slice:
        """Where some neighbouring tensors lie."""
        return slice(self.places[names[0]].start, self.places[names[-1]].stop)

    def wrapped(
        self,
        eps: float,
        noise: str,
        scale: Mapping[str, float],
        queries: int = 1,
        seed: int = 0,
        wide: bool = False,
        compute_dtype: torch.dtype | None = None,
    ) -> ElasticZO:
        """A copy of the network ready for training forwards; `wide` in float64."""
        net = copy.deepcopy(self.net)
        return ElasticZO(
            net.double() if wide else net,
            self.tail,
            eps=eps,
            noise=noise,
            scale=scale,
            queries=queries,
            seed=seed,
            compute_dtype=compute_dtype,
        ).train()

    def parts(self, model: ElasticZO) -> dict[str, Part]:
        """What the theory needs of each tensor of the head, by name."""
        scales: dict[str, float] = ZOSGD(model, lr=0.0).state_dict()["zo"]["scale"]
        return {
            name: Part(place.stop - place.start, float(self.gradient[place].norm()), scales[name])
            for name, place in self.places.items()
        }

    def directions(self, model: ElasticZO, count: int) -> Iterator[tuple[float, Tensor]]:
        """`g` and the estimate `g s z`, flat float32, of `count` directions of a wrapped copy.

        The estimate is made by the op of the update itself, from tensors of zeros; it is
        overwritten by the next one.
        """
        zo = ZOSGD(model, lr=0.0)  # goes on to the next z and leaves the weights as they are
        parts = self.parts(model)
        index = {name: i for i, (name, _) in enumerate(model.module.named_parameters())}
        device = self.x.device
        flat = torch.zeros(self.size, device=device)
        shapes = {name: p.shape for name, p in model.named_head_parameters()}
        views = [flat[place].view(shapes[name]) for name, place in self.places.items()]
        one = torch.ones(1, dtype=torch.float64, device=device)
        skip = torch.zeros((), device=device)
        for step in range(count):
            with torch.no_grad():
                losses = pair_losses(self.loss, model(self.x), self.y)
            zo.step(losses)
            flat.zero_()
            update_(
                views,
                torch.tensor([model.seed, step], device=device),
                -zo.projected_gradient,
                *(one, 0 * one, skip),
                tensors=[index[name] for name in self.places],
                groups=[0] * len(views),
                scales=[parts[name].scale for name in self.places],
                noise=model.noise,
                backend=model.backend,
            )
            yield float(zo.projected_gradient), flat

    def slopes(self, model: ElasticZO) -> Tensor:
        """The derivative of the loss along `s z` of each query of step 0: `[Q]` float64, exact."""
        parts = self.parts(model)
        names = [name for name, _ in model.module.named_parameters()]
        shapes = {name: p.shape for name, p in model.named_head_parameters()}
        key = torch.tensor([model.seed, 0], device=self.x.device)
        found = torch.zeros(model.queries, dtype=torch.float64, device=self.x.device)
        for name, place in self.places.items():
            given: dict[str, Any] = {
                "tensor": names.index(name),
                "noise": model.noise,
                "backend": model.backend,
            }
            for query in range(model.queries):
                z = sample(shapes[name], key, query=query, **given)
                found[query] += parts[name].scale * (self.gradient[place] @ z.flatten().double())
        return found

    def projected(self, model: ElasticZO) -> Tensor:
        """`g_q` of step 0: `[Q]` float64."""
        with torch.no_grad():
            x = self.x.to(next(model.parameters()).dtype)
            losses = pair_losses(self.loss, model(x), self.y).double()
        return (losses[0::2] - losses[1::2]) / (2 * model.eps)


def gradient_of(
    net: nn.Module, names: Sequence[str], x: Tensor, y: Tensor, loss: Loss
) -> tuple[float, list[Tensor]]:
    """The loss and its gradient by some parameters, computed in float64 on a copy."""
    wide = copy.deepcopy(net).double()
    own = dict(wide.named_parameters())
    leaves = [own[name].requires_grad_(True) for name in names]
    value = loss(wide(x.double()), y)
    return float(value.detach()), list(torch.autograd.grad(value, leaves))


def cosines(
    probe: Probe,
    model: ElasticZO,
    queries: Sequence[int],
    count: int,
    told: Callable[[int], object] = lambda passes: None,
) -> dict[tuple[str, int], list[float]]:
    """Cosines of estimates averaged over q directions to the true gradient, by (layer, q).

    Args:
        queries: ascending, each a multiple of the one before, the first 1.
        count: directions in all; `count / q` averages of q, none of which share a direction.
        told: gets the forward passes that were done.
    Returns: "head" is the whole of it.
    """
    if queries[0] != 1 or any(b % a for a, b in pairwise(queries)):
        raise ValueError(f"queries must begin with 1 and each divide the next, got {queries}")
    spans = {"head": slice(0, probe.size)}
    spans |= {layer: probe.over(names) for layer, names in probe.layers.items()}
    found: dict[tuple[str, int], list[float]] = {(s, q): [] for q in queries for s in spans}
    sums = [torch.zeros(probe.size, dtype=torch.float64, device=probe.x.device) for _ in queries]
    for done, (_, estimate) in enumerate(probe.directions(model, count), start=1):
        sums[0] += estimate
        for level, q in enumerate(queries):
            if done % q:
                break
            for name, span in spans.items():
                found[name, q].append(along(sums[level][span], probe.gradient[span]))
            if level + 1 < len(queries):
                sums[level + 1] += sums[level]
            sums[level].zero_()
        told(2)
    return found
