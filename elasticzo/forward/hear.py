"""The step of learnt feedback: noisy passes over what the clean ones were given."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from elasticzo.forward.engine import Engine
from elasticzo.forward.listening import Heard, rows
from elasticzo.forward.noisy import Noisy
from elasticzo.forward.plan import around

COUNT = "steps"  # of `session.learnt`: how many have moved the matrices


@torch.no_grad()
def learn_by_feedback(
    engine: Engine, backend: str, found: Tensor, take: Callable[[str, Tensor], None]
) -> None:
    """Gradients of the head's weights, and one step of the matrices.

    Weights move at once, one layer after the other, where the step has one micro-batch; gradients
    of several are summed first. Of a skipped step (`found`) the matrices stay.
    """
    session, settings = engine.session, engine.feedback
    assert settings is not None
    heard: list[Heard] = list(session.kept)
    try:
        for one in heard:
            one.check(list(engine.module.modules()))
    except RuntimeError:
        session.forget()  # the next step begins with its own forward
        raise
    scales = {name: one.scale**2 for name, one in engine.head.parameters.items()}

    def scaled(name: str, u: Tensor) -> None:
        take(name, u if scales[name] == 1.0 else u * scales[name])

    gradients: dict[str, Tensor] = {}
    moves: dict[str, Tensor] = {}
    left: dict[str, Tensor] = {}
    whole = torch.ones((), dtype=torch.bool, device=found.device)
    for one in heard:
        o, e = one.error()
        told = settings.sums(o, session.key, backend)
        if told is not None:
            o, e = o @ told, e @ told
        parts = list(one.parts(settings.parts))
        alone = len(heard) * len(parts) == 1
        for name, leaf in one.outer:  # of what comes after the cut
            if leaf.grad is not None:
                gradients[name] = gradients.get(name, 0) + leaf.grad
        for here, args, kwargs in parts:
            of = (settings, session, backend, one, here, engine.order, e[here], alone)
            noisy = Noisy(around(engine.plan, engine.cut), *of, scaled, gradients)
            after = rows(noisy.run(partial(engine.again, one, here, args, kwargs, noisy)))
            change = (after if told is None else after @ told) - o[here]
            whole = whole & torch.isfinite(change).all()
            noisy.finish(change)
            for name, move, squares in noisy.answers(change):
                moves[name] = moves[name] + move if name in moves else move
                left[name] = left[name] + squares if name in left else squares
        one.ends.clear()  # which the graph of losses that a user keeps would hold
    for name, u in gradients.items():
        scaled(name, u)
    samples = sum(one.samples for one in heard)
    _move(engine, moves, samples, (found == 0) & whole)
    engine.residual = {name: part / whole for name, (part, whole) in left.items()}


def _move(engine: Engine, moves: dict[str, Tensor], samples: int, goes: Tensor) -> None:
    """One step of all matrices, where it is not skipped."""
    session, settings = engine.session, engine.feedback
    assert settings is not None
    if not moves:
        return
    if COUNT not in session.learnt:
        session.learnt[COUNT] = torch.zeros((), dtype=torch.float64, device=session.device)
    steps = session.learnt[COUNT]
    share = samples / sum(len(move) for move in moves.values())
    for name, move in moves.items():
        m = session.learnt[name]
        new = settings.moved(m, move.to(m.dtype) / samples, steps, share)
        m.copy_(torch.where(goes & torch.isfinite(new).all(), new, m))
    steps.add_(goes.to(steps.dtype))
