"""What the coefficients of the samples make of the noise: an estimate of each weight's gradient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from elasticzo.forward.layers.gradients import weight_gradients
from elasticzo.forward.layers.samples import node_noise, node_unit
from elasticzo.forward.passes import Kept
from elasticzo.head import Head
from elasticzo.samples import RankOne, Samples
from elasticzo.session import Session


@torch.no_grad()
def estimates(
    session: Session, head: Head, samples: Samples, a: Tensor, backend: str
) -> Iterator[tuple[str, Tensor]]:
    """(name, u) of every weight whose kind is not "weight", each once, as soon as it is whole.

    With coefficients `a` of the directions, `[Q, B]` by sample or `[Q]`:

        rank1   u = s sum_q mean_i(a_qi) r_q u_q^T
        sample  u = s / B sum_qi a_qi r_qi u_qi^T
        node    u = s / (B m) sum_qi a_qi n_qi xbar_i^T, by the layer's own backward
    """
    for kept in session.kept:
        kept.check()  # before anything moves
    mean = a if a.dim() == 1 else a.mean(1)
    weights = {one.name: w for one, w in head}
    for name, one in head.parameters.items():
        if name in weights and head.kinds[name].name == "rank1" and one.scale != 0.0:
            at = (one, weights[name], session.key)
            yield name, RankOne(samples.noise).sum(*at, mean, backend)
        elif head.kinds[name].name == "sample" and one.scale != 0.0:
            share = a / a.shape[1]
            yield name, samples.sum(one, weights[name], session.key, share, backend)
    yield from _of_nodes(session, samples, a, backend)


def _of_nodes(
    session: Session, samples: Samples, a: Tensor, backend: str
) -> Iterator[tuple[str, Tensor]]:
    """Weights that several layers, calls or micro-batches read have the sum of theirs."""
    kept: list[Kept] = list(session.kept)
    to_come = Counter(h.name for k in kept for h in k.own.values())
    found: dict[str, Tensor] = {}
    for one in kept:
        for name, u in _of_call(one, session, samples, a, backend):
            found[name] = found[name] + u if name in found else u
            to_come[name] -= 1
            if to_come[name] == 0:
                yield name, found.pop(name)


def _of_call(
    kept: Kept, session: Session, samples: Samples, a: Tensor, backend: str
) -> Iterator[tuple[str, Tensor]]:
    layer, stop = kept.layer, kept.first + kept.shape[0]
    m: Any = layer.module
    wide = torch.promote_types(m.weight.dtype, torch.float32)
    dy = torch.zeros(kept.shape, dtype=wide, device=a.device)
    for query in range(len(a)):
        n = node_noise(samples.noise, kept, session.key, query, backend).to(wide)
        share = (a[query, kept.first : stop] / (a.shape[1] * node_unit(m))).to(wide)
        dy += n * share.view(-1, *[1] * (n.dim() - 1))
    head = kept.head
    gradients = weight_gradients(m, kept.x, dy, kept.own)
    for local, one in kept.own.items():
        yield one.name, gradients[local].mul_(one.scale * one.scale / head.scale)
