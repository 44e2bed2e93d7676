"""The first forward of a model: what moves in it, and whether every head parameter is perturbed.

A forward that shows something to settle (a parameter read around its module, a module whose halves
cannot be joined, a generator drawn from) changes the plan and starts again, from the same buffers
and generator state.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from elasticzo.engine import NotByHalf, UsesGenerator
from elasticzo.passes import Pass
from elasticzo.plan import compute_dtype, owner_of, promote
from elasticzo.state import BufferSnapshot, all_buffers, generator_state, set_generator_state

if TYPE_CHECKING:
    from elasticzo.wrapper import ElasticZO

DRAWS = (
    "the model draws from torch's generator outside nn.Dropout; its halves run one after the other "
    "from the same generator state"
)


def circumstances(model: ElasticZO) -> tuple[Any, ...]:
    """What a verified plan rests on; it is verified anew when this changes.

    Raises: RuntimeError where modules were replaced since wrapping.
    """
    modules = list(model.module.modules())
    known = model._wrapped_modules
    if len(modules) != len(known) or any(a is not b for a, b in zip(modules, known, strict=True)):
        raise RuntimeError(
            "modules of the model were added or replaced since it was wrapped: wrap it again"
        )
    computed_in = compute_dtype(model._key.device, model.compute_dtype)
    return tuple(m.training for m in modules), computed_in, torch.is_grad_enabled()


def first_pair(model: ElasticZO, args: Any, kwargs: Any) -> Any:
    """A training forward under observation; its output, once the plan has settled."""
    device = model._key.device
    snapshot = BufferSnapshot(all_buffers(model.module))
    generator = generator_state(device)
    model._moving = all_buffers(model.module)
    for _ in range(len(model._plan.parameters) * len(model._wrapped_modules) + 2):
        current = model._new_pass(True, model.halves)
        current.raw = {id(p): name for name, p in model._head()}
        try:
            with ExitStack() as stack:
                _watch_tail(stack, model.module, model.cut.tail_parameters, current)
                output = model._run(current, args, kwargs)
            if _settled(model, current):
                model._moving = snapshot.moved()
                if model._before is None:
                    model._before = snapshot
                return output
        except NotByHalf as problem:
            _promote(model, problem.layer.name, [h.name for *_, h in problem.layer.swaps])
        except UsesGenerator:
            model._mixes_generator = True
            warnings.warn(DRAWS, stacklevel=5)
        except Exception:
            snapshot.restore()
            raise
        snapshot.restore()
        set_generator_state(device, generator)
    raise AssertionError("the plan of the model did not settle")


def _settled(model: ElasticZO, current: Pass) -> bool:
    """Whether each head parameter was read perturbed, and none as it is; else the plan changes."""
    wrong = (set(model._plan.parameters) - current.consumed) | current.read_raw
    if not wrong or not current.perturb:
        return True
    name = min(wrong)
    _promote(model, owner_of(model._plan, model.module, name), [name])
    return False


def _promote(model: ElasticZO, layer: str, parameters: list[str]) -> None:
    if layer:
        promote(model._plan, model.module, layer, parameters)
        return
    if not parameters:
        raise ValueError("the halves of this model cannot run stacked: use pairing='sequential'")
    raise ValueError(
        f"head parameter {parameters[0]!r} was not perturbed in the forward (it is not used, or "
        "not through its module): freeze it with requires_grad_(False) before wrapping"
    )


def _watch_tail(stack: ExitStack, model: nn.Module, tail: Sequence[str], current: Pass) -> None:
    """Note which tail module ran last, so that a head behind it can be named."""
    owners = {name.rpartition(".")[0] for name in tail}
    for name, module in model.named_modules():
        if name in owners:

            def note(m: nn.Module, args: Any, *, name: str = name) -> None:
                current.tail_ran = name

            stack.callback(module.register_forward_pre_hook(note).remove)


__all__ = ["DRAWS", "circumstances", "first_pair"]
