"""The plan of a wrapped model: how each of its modules takes part in a forward of the pair."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from elasticzo.cut import Cut
from elasticzo.dropout import DROPOUTS
from elasticzo.layers import PAIRED
from elasticzo.norms import BATCH_NORMS, NORMS
from elasticzo.passes import HeadParameter
from zo_kernels.paths import PATHS
from zo_kernels.registry import WEIGHT_DTYPES

Kind = Literal["paired", "fallback", "dropout", "sequence"]
FUSED = (nn.Linear, nn.Conv1d, nn.Conv2d)  # what has a fused kernel
# Modules that read parameters of their children directly: the whole subtree is swapped.
CLOSED = (nn.MultiheadAttention, nn.RNNBase)
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass
class Layer:
    """A module whose forward is taken over while the pair runs.

    Attributes:
        kind: "paired" (one call serves all halves), "fallback" (runs once a half with its perturbed
            parameters swapped in), "dropout", or "sequence" (an nn.Sequential in which a layer's
            kernel may do what follows it).
        head: the perturbed parameters of its own, by local name.
        swaps: for a fallback, (module, local name, parameter) of all that it swaps.
        index: for dropout, the stream of its masks.
        path: for a paired layer, "auto", "fused" or "staged", as the user wants.
        fusable: whether it has a fused kernel.
    """

    name: str
    module: nn.Module
    kind: Kind
    head: dict[str, HeadParameter] = field(default_factory=dict)
    swaps: list[tuple[nn.Module, str, HeadParameter]] = field(default_factory=list)
    index: int = 0
    path: str = "auto"
    fusable: bool = False


@dataclass
class Plan:
    """All layers by module name, and the head's parameters by name.

    Attributes:
        slots: where each head parameter lives, (name, module, local name), in order of the model.
        sequence_first: modules that read dimension 0 as time.
    """

    layers: dict[str, Layer]
    parameters: dict[str, HeadParameter]
    slots: list[tuple[str, nn.Module, str]]
    sequence_first: list[str]


def build_plan(
    model: nn.Module,
    cut: Cut,
    scale: Mapping[str, float] | None,
    path: str | Mapping[str, str] = "auto",
) -> Plan:
    """Decide for every module how it serves the pair.

    Raises:
        ValueError: a scale or path pattern that matches nothing, a fused path for a layer that has
            none, an Embedding that renormalises in place.
        TypeError: a head parameter of an unsupported dtype.
    """
    parameters = _head_parameters(model, cut, scale or {})
    by_id = {id(p): parameters[name] for name, p in model.named_parameters() if name in parameters}
    plan = Plan({}, parameters, _slots(model, parameters), [])
    closed: list[str] = []
    dropouts = 0
    for name, module in model.named_modules():
        if getattr(module, "batch_first", True) is False:
            plan.sequence_first.append(f"{name or 'the model'} ({type(module).__name__})")
        if any(name.startswith(f"{outer}.") if outer else bool(name) for outer in closed):
            continue
        own = _own(module, by_id)
        swaps = [
            (inner, local, head)
            for inner in module.modules()
            for local, head in _own(inner, by_id).items()
        ]
        if isinstance(module, DROPOUTS):
            plan.layers[name] = Layer(name, module, "dropout", index=dropouts)
            dropouts += 1
        elif (type(module) in PAIRED or type(module) in NORMS) and _as_built(module):
            if own or isinstance(module, BATCH_NORMS):
                _check_supported(name, module)
                plan.layers[name] = Layer(name, module, "paired", head=own)
        elif isinstance(module, CLOSED) or parametrize.is_parametrized(module):
            closed.append(name)
            if swaps or any(isinstance(inner, _BatchNorm) for inner in module.modules()):
                plan.layers[name] = Layer(name, module, "fallback", swaps=swaps)
        elif isinstance(module, _BatchNorm):  # a subclass: each half by its own statistics
            closed.append(name)
            plan.layers[name] = Layer(name, module, "fallback", swaps=swaps)
        elif own:
            swaps = [(module, local, head) for local, head in own.items()]
            plan.layers[name] = Layer(name, module, "fallback", swaps=swaps)
        elif _is_sequential(module):
            plan.layers[name] = Layer(name, module, "sequence")
    _choose_paths(plan, path)
    return plan


def _is_sequential(module: nn.Module) -> bool:
    """Whether its forward is known to run its modules one after the other."""
    kind = type(module)
    known = kind.forward is nn.Sequential.forward and "forward" not in module.__dict__
    return known and getattr(kind, "__iter__", None) is nn.Sequential.__iter__


def why_not_fused(layer: Layer) -> str | None:
    """What keeps a layer from the fused path whatever its input, or None."""
    m = layer.module
    if type(m) not in FUSED:
        return f"a {type(m).__name__} has no fused kernel"
    if "weight" not in layer.head:
        return "its weight is not perturbed"
    if isinstance(m, (nn.Conv1d, nn.Conv2d)):
        if m.groups != 1:
            return f"it has {m.groups} groups"
        if m.padding_mode != "zeros" or isinstance(m.padding, str):
            return f"its padding is {m.padding!r} ({m.padding_mode})"
    return None


def _choose_paths(plan: Plan, path: str | Mapping[str, str]) -> None:
    """Give every paired layer the path that the user wants for it."""
    layers = {n: layer for n, layer in plan.layers.items() if layer.kind == "paired"}
    for layer in layers.values():
        layer.fusable = why_not_fused(layer) is None
        layer.path = path if isinstance(path, str) else "auto"
    if isinstance(path, str):
        if path not in PATHS:
            raise ValueError(f"path must be one of {PATHS} or {{name pattern: path}}, got {path!r}")
        return
    for pattern, wanted in path.items():
        named = {n: layer for n, layer in layers.items() if fnmatch.fnmatchcase(n, pattern)}
        if not named or wanted not in PATHS:
            raise ValueError(
                f"path needs {{name pattern: one of {PATHS}}} over paired layers "
                f"({', '.join(layers) or 'there are none'}), got {pattern!r}: {wanted!r}"
            )
        for name, layer in named.items():
            reason = why_not_fused(layer)
            if wanted == "fused" and reason is not None:
                raise ValueError(f"path 'fused' is not possible for {name!r}: {reason}")
            layer.path = wanted


def _head_parameters(
    model: nn.Module, cut: Cut, scale: Mapping[str, float]
) -> dict[str, HeadParameter]:
    if not isinstance(scale, Mapping):
        raise TypeError(f"scale must be {{name pattern: number}}, got {scale!r}")
    head = set(cut.head_parameters)
    for pattern, value in scale.items():
        if not any(fnmatch.fnmatchcase(name, pattern) for name in head):
            raise ValueError(
                f"scale pattern {pattern!r} matches no head parameter; they are: "
                + ", ".join(cut.head_parameters)
            )
        if not 0.0 <= value < float("inf"):
            raise ValueError(f"scale of {pattern!r} must be finite and >= 0, got {value}")
    found = {}
    padding = {id(m.weight): m.padding_idx for m in model.modules() if isinstance(m, nn.Embedding)}
    for index, (name, p) in enumerate(model.named_parameters()):
        if name not in head:
            continue
        if p.dtype not in WEIGHT_DTYPES:
            raise TypeError(
                f"head parameter {name!r} must be float32, float64 or bfloat16, got {p.dtype} "
                "(for float16 activations use autocast over float32 parameters)"
            )
        factor = 1.0
        for pattern, value in scale.items():  # the last pattern that matches wins
            if fnmatch.fnmatchcase(name, pattern):
                factor = float(value)
        found[name] = HeadParameter(name, index, factor, padding.get(id(p)))
    return found


def _slots(
    model: nn.Module, parameters: Mapping[str, HeadParameter]
) -> list[tuple[str, nn.Module, str]]:
    modules = dict(model.named_modules())
    slots = []
    for name in parameters:
        owner, _, local = name.rpartition(".")
        slots.append((name, modules[owner], local))
    return slots


def _own(module: nn.Module, by_id: Mapping[int, HeadParameter]) -> dict[str, HeadParameter]:
    return {
        local: by_id[id(p)]
        for local, p in module._parameters.items()
        if p is not None and id(p) in by_id
    }


def _as_built(module: nn.Module) -> bool:
    """Whether a known layer holds just the parameters its constructor gave it."""
    return set(module._parameters) <= {"weight", "bias"} and "weight" in module._parameters


def _check_supported(name: str, module: nn.Module) -> None:
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise ValueError(
            f"{name!r} (Embedding) has max_norm: it rewrites its weight in the forward, which the "
            "perturbed passes must only read; set max_norm=None"
        )


def promote(plan: Plan, model: nn.Module, name: str, parameters: list[str]) -> None:
    """Let the nearest module around `name` that runs swap these parameters instead."""
    modules = dict(model.named_modules())
    outer = name
    while outer:
        outer = outer.rpartition(".")[0]
        if not isinstance(modules[outer], CONTAINERS):
            break
    heads = {p: plan.parameters[p] for p in parameters}
    by_id = {id(p): heads[n] for n, p in model.named_parameters() if n in heads}
    swaps = [
        (inner, local, head)
        for inner in modules[outer].modules()
        for local, head in _own(inner, by_id).items()
    ]
    layer = plan.layers.get(outer)
    if layer is None or layer.kind != "fallback":
        layer = plan.layers[outer] = Layer(outer, modules[outer], "fallback")
    taken = {(id(module), local) for module, local, _ in layer.swaps}
    layer.swaps += [s for s in swaps if (id(s[0]), s[1]) not in taken]


def owner_of(plan: Plan, model: nn.Module, parameter: str) -> str:
    """The outermost layer that is responsible for a parameter now, else its module."""
    for name, layer in plan.layers.items():
        if any(head.name == parameter for _, _, head in layer.swaps):
            return name
    return parameter.rpartition(".")[0]


def compute_dtype(device: torch.device, wanted: torch.dtype | None) -> torch.dtype | None:
    """The dtype a matrix product computes in, or None for that of its weight."""
    if wanted is not None:
        return wanted
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


__all__ = ["Kind", "Layer", "Plan", "build_plan", "compute_dtype", "owner_of", "promote"]
