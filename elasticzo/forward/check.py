"""`model.check`: stacked against sequential, module by module."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from elasticzo.forward.engine import Engine
from elasticzo.points import Points

# Large, so that rows of different halves that meet do not agree by accident: with a small eps the
# halves are nearly equal, and attention over duplicated keys gives what it would give without.
CHECK_EPS = 0.1
Record = tuple[str, int | None, int]  # module, half (None: all), which call


class _Recorder:
    """Outputs of every module call of a pass, in order of completion."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.outputs: dict[Record, list[Tensor]] = {}
        self.current: Any = None

    def attach(self, stack: ExitStack) -> None:
        for name, module in self.engine.module.named_modules():

            def note(m: nn.Module, args: Any, output: Any, *, name: str = name) -> None:
                current = self.engine.current
                if current is not self.current:  # a forward that starts again leaves nothing behind
                    self.current = current
                    self.outputs.clear()
                half = current.half if current is not None else None
                call = 0
                while (name, half, call) in self.outputs:
                    call += 1
                tensors = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]
                self.outputs[name, half, call] = [x.detach().clone() for x in tensors]

            stack.callback(module.register_forward_hook(note).remove)


def check_stacked(engine: Engine, points: Points, args: Any, kwargs: Any) -> None:
    """Raise ValueError naming the first module whose stacked outputs differ from sequential."""
    if engine.effective_pairing == "sequential":
        return
    stacked = _record(engine, points, "stacked", args, kwargs)
    if engine.effective_pairing == "sequential":  # the first forward found a reason to
        return
    sequential = _record(engine, points, "sequential", args, kwargs)
    for (name, half, call), outputs in stacked.items():
        halves = range(len(points)) if half is None else [half]
        wanted = [sequential.get((name, h, call)) for h in halves]
        if any(w is None or len(w) != len(outputs) for w in wanted):
            _refuse(engine, name, "is called differently")
        for i, got in enumerate(outputs):
            _compare(engine, name, got, [w[i] for w in wanted if w is not None])


def _compare(engine: Engine, name: str, got: Tensor, wanted: list[Tensor]) -> None:
    if len(wanted) > 1 and got.dim() == 0:
        _refuse(engine, name, "returns a scalar for all halves together")
    for dim in (0, 1):  # states of recurrent modules have the batch as dimension 1
        if got.dim() <= dim and len(wanted) > 1:
            continue
        reference = torch.cat(wanted, dim) if len(wanted) > 1 else wanted[0]
        if reference.shape == got.shape and _close(got, reference):
            return
    _refuse(engine, name, "gives other outputs")


def _close(got: Tensor, wanted: Tensor) -> bool:
    if got.is_complex() and wanted.is_complex():
        return _close(torch.view_as_real(got), torch.view_as_real(wanted))
    if not got.is_floating_point():
        return bool(torch.equal(got, wanted))
    same = (got == wanted) | (got.isnan() & wanted.isnan())  # infinities and NaN at one place, too
    if bool(same.all()):
        return True
    finest = torch.finfo(got.dtype).eps
    error = (got - wanted)[~same].abs().max()
    finite = wanted[wanted.isfinite()]
    size = finite.abs().max() if finite.numel() else wanted.new_zeros(())
    # sqrt(eps): sums in another order stay far below, mixed rows at this eps far above.
    return bool(error <= finest**0.5 * torch.clamp(size, min=1e-3))


def _refuse(engine: Engine, name: str, what: str) -> None:
    kind = type(dict(engine.module.named_modules())[name]).__name__
    raise ValueError(
        f"module {name or 'the model itself'!r} ({kind}) {what} when the halves are stacked along "
        "dimension 0 than one by one: it mixes rows, or its dimension 0 is not the batch; use "
        "pairing='sequential'"
    )


@torch.no_grad()
def _record(
    engine: Engine, points: Points, pairing: str, args: Any, kwargs: Any
) -> dict[Record, list[Tensor]]:
    """Outputs of one pass; everything it moves is put back."""
    session, wanted = engine.session, engine.pairing
    start = engine.start()
    recorder = _Recorder(engine)
    with ExitStack() as stack:
        stack.callback(start.restore)
        if not engine.settled():
            with session.untouched():
                engine.run(points, args, kwargs)
            start.restore()
        stack.enter_context(session.untouched(CHECK_EPS))
        stack.callback(setattr, engine, "pairing", wanted)
        engine.pairing = pairing
        recorder.attach(stack)
        engine.run(points, args, kwargs)
    return recorder.outputs
