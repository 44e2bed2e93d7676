"""`model.check`: stacked against sequential, module by module."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from elasticzo.passes import Pass
from elasticzo.state import BufferSnapshot, all_buffers, generator_state, set_generator_state
from elasticzo.verify import circumstances

if TYPE_CHECKING:
    from elasticzo.wrapper import ElasticZO

# Large, so that rows of different halves that meet do not agree by accident: with a small eps the
# halves are nearly equal, and attention over duplicated keys gives what it would give without.
CHECK_EPS = 0.1
Record = tuple[str, int | None, int]  # module, half (None: all), which call


class _Recorder:
    """Outputs of every module call of a pass, in order of completion."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.outputs: dict[Record, list[Tensor]] = {}
        self.current: Pass | None = None

    def attach(self, stack: ExitStack) -> None:
        for name, module in self.model.named_modules():

            def note(m: nn.Module, args: Any, output: Any, *, name: str = name) -> None:
                half = self.current.half if self.current is not None else None
                call = 0
                while (name, half, call) in self.outputs:
                    call += 1
                tensors = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]
                self.outputs[name, half, call] = [x.detach().clone() for x in tensors]

            stack.callback(module.register_forward_hook(note).remove)


def check_stacked(model: ElasticZO, args: Any, kwargs: Any) -> None:
    """Raise ValueError naming the first module whose stacked outputs differ from sequential."""
    if not model.training:
        raise RuntimeError("check compares training forwards: call model.train() first")
    if model.cut.everything or model.effective_pairing == "sequential":
        return
    stacked = _record(model, "stacked", args, kwargs)
    if model.effective_pairing == "sequential":  # the first forward found a reason to
        return
    sequential = _record(model, "sequential", args, kwargs)
    for (name, half, call), outputs in stacked.items():
        halves = range(model.halves) if half is None else [half]
        wanted = [sequential.get((name, h, call)) for h in halves]
        if any(w is None or len(w) != len(outputs) for w in wanted):
            _refuse(model, name, "is called differently")
        for i, got in enumerate(outputs):
            _compare(model, name, got, [w[i] for w in wanted if w is not None])


def _compare(model: ElasticZO, name: str, got: Tensor, wanted: list[Tensor]) -> None:
    if len(wanted) > 1 and got.dim() == 0:
        _refuse(model, name, "returns a scalar for all halves together")
    for dim in (0, 1):  # states of recurrent modules have the batch as dimension 1
        if got.dim() <= dim and len(wanted) > 1:
            continue
        reference = torch.cat(wanted, dim) if len(wanted) > 1 else wanted[0]
        if reference.shape == got.shape and _close(got, reference):
            return
    _refuse(model, name, "gives other outputs")


def _close(got: Tensor, wanted: Tensor) -> bool:
    if not got.is_floating_point():
        return bool(torch.equal(got, wanted))
    finest = torch.finfo(got.dtype).eps
    error = (got - wanted).abs().max() if got.numel() else got.new_zeros(())
    size = wanted.abs().max() if wanted.numel() else wanted.new_zeros(())
    # sqrt(eps): sums in another order stay far below, mixed rows at this eps far above.
    return bool(error <= finest**0.5 * torch.clamp(size, min=1e-3))


def _refuse(model: ElasticZO, name: str, what: str) -> None:
    kind = type(dict(model.module.named_modules())[name]).__name__
    raise ValueError(
        f"module {name or 'the model itself'!r} ({kind}) {what} when the halves are stacked along "
        "dimension 0 than one by one: it mixes rows, or its dimension 0 is not the batch; use "
        "pairing='sequential'"
    )


@torch.no_grad()
def _record(model: ElasticZO, pairing: str, args: Any, kwargs: Any) -> dict[Record, list[Tensor]]:
    """Outputs of one pass; everything it moves is put back."""
    device = model._key.device
    snapshot = BufferSnapshot(all_buffers(model.module))
    generator = generator_state(device)
    saved = {
        k: getattr(model, k) for k in ("pairing", "_eps", "_micro_batches", "_before", "_seen")
    }
    recorder = _Recorder(model.module)
    new_pass = model._new_pass

    def noting_pass(*args: Any, **settings: Any) -> Pass:
        recorder.outputs.clear()  # a forward that starts again leaves nothing behind
        recorder.current = new_pass(*args, **settings)
        return recorder.current

    with ExitStack() as stack:
        try:
            if model._verified != circumstances(model):
                model(*args, **kwargs)
                model._micro_batches = saved["_micro_batches"]  # the same dropout masks again
            model.pairing = pairing
            model._eps = torch.full_like(model._eps, CHECK_EPS)
            model.__dict__["_new_pass"] = noting_pass
            recorder.attach(stack)
            model(*args, **kwargs)
        finally:
            model.__dict__.pop("_new_pass", None)
            for name, value in saved.items():
                setattr(model, name, value)
            snapshot.restore()
            set_generator_state(device, generator)
    return recorder.outputs


__all__ = ["check_stacked"]
