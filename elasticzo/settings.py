"""Settings of the wrapper: each refusal says what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zo_kernels import BACKENDS
from zo_kernels.registry import MAX_QUERIES, NOISES

WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel")
SHARDED = ("DTensor", "FlatParameter")


def check_integer(name: str, value: Any, low: int, high: int, span: str | None = None) -> None:
    """An int (True and 3.0 are none) in [low, high]; `span` is how to write that."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(
            f"{name} must be an integer in {span or f'[{low}, {high}]'}, got {value!r}"
        )


def check_number(name: str, value: Any, expected: str, accepts: Callable[[float], bool]) -> None:
    """An int or float (True is none) that `accepts` takes, which `expected` puts in words."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and accepts(value)):
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def check_queries(queries: Any) -> None:
    """A number of directions."""
    check_integer("queries", queries, 1, MAX_QUERIES - 1, "[1, 2^24)")


def check_noise(noise: Any) -> None:
    """A kind of noise that weights are perturbed by."""
    if noise not in NOISES:
        raise ValueError(f"noise must be one of {NOISES}, got {noise!r}")


def check_long(name: str, value: Any) -> None:
    """What a signed integer of 64 bits on the device can count."""
    check_integer(name, value, 0, (1 << 63) - 1, "[0, 2^63)")


def check_saved(
    of: str, state: Any, now: Iterable[str], fixed: Mapping[str, Any], more: bool = False
) -> None:
    """A saved state has the entries `now` (and no `more`), those of `fixed` with the same values.

    Raises: TypeError for what is no dictionary; ValueError that names the entries.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"a state of {of} must be a dictionary, got {type(state).__name__}")
    now = list(now)
    missing = [k for k in now if k not in state]
    unknown = [] if more else [k for k in state if k not in now]
    if missing or unknown:
        found = [f"without {', '.join(missing)}"] if missing else []
        found += [f"with {', '.join(map(repr, unknown))}"] if unknown else []
        raise ValueError(
            f"a state of {of} must have the entries {', '.join(now)}; got one {' and '.join(found)}"
        )
    different = [
        f"{k} was {state[k]!r}, is {v!r}" for k, v in fixed.items() if _differ(state[k], v)
    ]
    if different:
        raise ValueError("the saved run differs: " + "; ".join(different))


def _differ(a: Any, b: Any) -> bool:
    try:
        return bool(a != b)
    except (RuntimeError, ValueError):  # tensors and arrays of many elements
        return True


def check_settings(
    model: Any,
    eps: float,
    queries: int,
    seed: int,
    pairing: str,
    backend: str,
) -> None:
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model must be an nn.Module in Python, got {type(model).__name__}")
    refuse_wrapped(type(model).__name__, model)
    check_number("eps", eps, "a finite number > 0", lambda v: 0.0 < v < float("inf"))
    check_queries(queries)
    check_long("seed", seed)
    if pairing not in ("stacked", "sequential"):
        raise ValueError(f"pairing must be 'stacked' or 'sequential', got {pairing!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")


def check_budget(tail: Any, budget: Any, example_input: Any, state_tensors: Any) -> None:
    """What belongs to tail="auto" is there with it, and with it alone."""
    automatic = isinstance(tail, str) and tail == "auto"
    given = [budget is not None, example_input is not None]
    if not automatic and any(given):
        raise ValueError(
            f"memory_budget and example_input belong to tail='auto', got tail={tail!r}"
        )
    if automatic and not all(given):
        raise ValueError(
            "tail='auto' needs memory_budget (bytes) and example_input (a batch), got "
            f"memory_budget={budget!r} and example_input={type(example_input).__name__}"
        )
    if automatic and (isinstance(budget, bool) or not isinstance(budget, int) or budget <= 0):
        raise ValueError(f"memory_budget must be a number of bytes > 0, got {budget!r}")
    check_state_tensors(state_tensors)


def check_state_tensors(count: Any) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"state_tensors must be an integer >= 0, got {count!r}")


def refuse_wrapped(kind: str, model: nn.Module | None = None) -> None:
    """Raise for a model inside a distributed or compiled wrapper."""
    if model is None or kind in WRAPPERS:
        raise RuntimeError(
            f"ElasticZO does not support {kind} yet: run one process a model, or average the "
            "scalar losses over processes yourself before zo.step"
        )
    if kind == "OptimizedModule":
        raise ValueError("compile the wrapper, not the model: torch.compile(ElasticZO(model, ...))")


def refuse_scripted(model: nn.Module) -> None:
    """Raise for a compiled module with weights or statistics: they have no place in Python."""
    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            continue
        held = [n for n, _ in (*module.named_parameters(), *module.named_buffers())]
        if held:
            raise TypeError(
                f"module {name!r} is scripted or traced and holds {held[0]!r}, which a forward "
                "cannot perturb: wrap the module in Python that it was made of"
            )


class Unread(tuple[str, ...]):
    """An attribute that anyone may look at; who takes names from it is DistributedDataParallel."""

    def __iter__(self) -> Iterator[str]:
        refuse_wrapped("DistributedDataParallel")
        return iter(())


def refuse_transforms() -> None:
    """Raise where a training forward is not to run, but to be transformed or recorded."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "a training forward cannot run inside transforms of torch.func (grad, vmap, jvp, ...): "
            "use model.backward(losses) for the tail, or transform model.eval() or model.module"
        )
    recorded = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    if recorded or torch._C._get_tracing_state() is not None or torch.compiler.is_exporting():
        raise RuntimeError(
            "a training forward cannot be traced or exported: the record would repeat the "
            "directions of one step; trace model.eval() or model.module"
        )


def refuse_meta(module: nn.Module) -> None:
    """Raise for a model whose weights are not there yet."""
    for name, p in module.named_parameters():
        if p.is_meta:
            raise RuntimeError(
                f"parameter {name!r} is on 'meta' and has no values: before training call "
                "model.to_empty(device=...) and load a state, or load it with assign=True"
            )


def refuse_sharded(name: str, p: Tensor) -> None:
    """Raise for a parameter that was sharded (FSDP) after wrapping."""
    if type(p).__name__ in SHARDED:
        raise RuntimeError(
            f"ElasticZO does not support sharded parameters yet: {name!r} is a {type(p).__name__} "
            "(FSDP); wrap the unsharded model"
        )
