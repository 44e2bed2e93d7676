"""The plan of a wrapped model: how each of its modules takes part in a training forward."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils import parametrize

from elasticzo.cut import Cut
from elasticzo.forward.layers import Handler, handler_of
from elasticzo.forward.layers.norms import NORMS
from elasticzo.forward.layers.sequence import is_sequential, run_sequence
from elasticzo.forward.layers.weights import why_not_fused
from elasticzo.forward.layers.whole import CLOSED, run_whole
from elasticzo.forward.passes import Layer, learn_by
from elasticzo.head import (
    BY_SAMPLE,
    Head,
    HeadParameter,
    Kind,
    resolve_directions,
    resolve_scale,
    slots_of,
)
from elasticzo.overlap import refuse_overlap
from elasticzo.settings import refuse_scripted
from zo_kernels.paths import PATHS
from zo_kernels.registry import WEIGHT_DTYPES

TIME_FIRST = "dimension 0 is time in this model (batch_first=False)"
RUNS_WHOLE = "it runs as a whole, and cannot tell samples apart"
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass
class Plan:
    """All layers that take part, by module name.

    Attributes:
        sequence_first: modules that read dimension 0 as time.
    """

    layers: dict[str, Layer]
    sequence_first: list[str]

    def saved(self, head: Head) -> Callable[[], None]:
        """What puts it back, with the kinds of the head, as it is now."""
        layers, kinds = dict(self.layers), dict(head.kinds)
        of = [(layer, layer.swaps, layer.kind, layer.in_front) for layer in layers.values()]

        def restore() -> None:
            self.layers = layers
            head.kinds.update(kinds)
            for layer, swaps, kind, in_front in of:
                layer.swaps, layer.kind, layer.in_front = swaps, kind, in_front

        return restore


def head_of(model: nn.Module, cut: Cut, scale: Mapping[str, float] | None) -> Head:
    """The head of a float model.

    Raises: TypeError for a parameter of an unsupported dtype, or of a scripted module; ValueError
        for one whose elements share memory; what `resolve_scale` raises.
    """
    refuse_scripted(model)
    names = set(cut.head_parameters)
    scales = resolve_scale(cut.head_parameters, scale)
    padding = {id(m.weight): m.padding_idx for m in model.modules() if isinstance(m, nn.Embedding)}
    norms = (m for m in model.modules() if isinstance(m, NORMS))
    flats = {id(p) for m in norms for p in m.parameters(recurse=False)}
    found = []
    for index, (name, p) in enumerate(model.named_parameters()):
        if name not in names:
            continue
        if p.dtype not in WEIGHT_DTYPES:
            raise TypeError(
                f"head parameter {name!r} must be float32, float64 or bfloat16, got {p.dtype} "
                "(for float16 activations use autocast over float32 parameters)"
            )
        refuse_overlap(name, p)
        still, flat = padding.get(id(p)), id(p) in flats
        found.append(HeadParameter(name, index, scales[name], still, flat))
    return Head(found, slots_of(model))


def build_plan(
    model: nn.Module,
    head: Head,
    path: str | Mapping[str, str] = "auto",
    directions: str | Mapping[str, str] = "weight",
) -> Plan:
    """Decide for every module how it takes part, and for every weight by whose noise it learns.

    Raises: what `resolve_directions` raises; ValueError for a path pattern that matches nothing, a
        fused path for a layer that has none, kinds that differ within a layer, an Embedding that
        renormalises in place.
    """
    by_id = {id(p): head.parameters[name] for name, p in head.named()}
    plan = Plan({}, [])
    closed: list[str] = []
    streams = 0
    for name, module in model.named_modules():
        if getattr(module, "batch_first", True) is False:
            plan.sequence_first.append(f"{name or 'the model'} ({type(module).__name__})")
        if any(name.startswith(f"{outer}.") if outer else bool(name) for outer in closed):
            continue
        layer, closes = _layer(name, module, by_id)
        if closes:
            closed.append(name)
        if layer is not None:
            layer.stream = streams
            streams += isinstance(module, _DropoutNd)
            plan.layers[name] = layer
    _choose_paths(plan, path)
    _choose_kinds(plan, head, directions)
    return plan


def _layer(
    name: str, module: nn.Module, by_id: Mapping[int, HeadParameter]
) -> tuple[Layer | None, bool]:
    """How a module takes part, if it does; and whether it answers for all that is inside of it."""
    own, handler = _own(module, by_id), handler_of(module)
    if handler is not None and _as_built(module):
        if own:
            _check_supported(name, module)
        served = bool(own) or handler.always
        return (Layer(name, module, handler, head=own) if served else None), False
    whole = partial(Layer, name, module, run_whole, by_half=True)
    if isinstance(module, CLOSED) or parametrize.is_parametrized(module):
        swaps = _inside(module, by_id)
        norms = any(isinstance(inner, _BatchNorm) for inner in module.modules())
        return (whole(swaps=swaps) if swaps or norms else None), True
    if isinstance(module, _BatchNorm):  # a subclass: each half by its own statistics
        return whole(swaps=_inside(module, by_id)), True
    if own:
        return whole(swaps=[(module, local, head) for local, head in own.items()]), False
    if is_sequential(module):
        return Layer(name, module, run_sequence), False
    return None, False


def _inside(module: nn.Module, by_id: Mapping[int, HeadParameter]) -> list[Any]:
    """(module, local name, parameter) of all of the head inside of a module."""
    return [
        (inner, local, head)
        for inner in module.modules()
        for local, head in _own(inner, by_id).items()
    ]


def _choose_paths(plan: Plan, path: str | Mapping[str, str]) -> None:
    """Give every paired layer the path that the user wants for it."""
    layers = {n: layer for n, layer in plan.layers.items() if layer.head}
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


def _choose_kinds(plan: Plan, head: Head, directions: str | Mapping[str, str]) -> None:
    """Give every weight the kind that is asked for, as far as its layer can serve it."""
    wanted = resolve_directions(list(head.parameters), directions)
    if "feedback" in wanted.values():
        _all_by_feedback(plan, head, wanted)
        return
    served = {h.name for layer in plan.layers.values() for h in layer.head.values()}
    if plan.sequence_first:
        served = set()
    for name, kind in wanted.items():
        no = kind in BY_SAMPLE and name not in served
        why = TIME_FIRST if plan.sequence_first else RUNS_WHOLE
        head.kinds[name] = Kind("weight", why) if no else Kind(kind)
    for layer in plan.layers.values():
        if not layer.head or not served >= {h.name for h in layer.head.values()}:
            continue
        asked = {wanted[h.name] for h in layer.head.values()}
        if len(asked) > 1:
            raise ValueError(
                f"the weights of a layer are learnt by noise of one kind; of {layer.name!r} "
                f"{' and '.join(sorted(asked))} are asked for"
            )
        assert isinstance(layer.call, Handler)
        layer.kind = layer.call.kind_of(asked.pop())
    _share_weights(plan)
    for layer in plan.layers.values():
        if layer.head and served >= {h.name for h in layer.head.values()}:
            learn_by(head.kinds, layer, layer.kind)


def _share_weights(plan: Plan) -> None:
    """Layers that read the same weight learn it by noise of one kind: a product's and a table's
    of their outputs."""
    layers = [layer for layer in plan.layers.values() if layer.head]
    for layer in layers:
        mine = {h.name for h in layer.head.values()}
        others = [o for o in layers if mine & {h.name for h in o.head.values()} and o is not layer]
        layer.partners += others
        kinds = {o.kind.name for o in (layer, *others)}
        if len(kinds) > 1:
            kind = "weight" if "weight" in kinds else "node"
            for one in (layer, *others):
                one.kind = Kind(kind, "several layers read it")


def _all_by_feedback(plan: Plan, head: Head, wanted: Mapping[str, str]) -> None:
    others = [name for name, kind in wanted.items() if kind != "feedback"]
    if others:
        raise ValueError(
            f"learnt feedback is of the whole head; {wanted[others[0]]!r} is asked for of "
            f"{others[0]!r}"
        )
    if plan.sequence_first:
        raise ValueError(
            "learnt feedback needs the batch as dimension 0, but these modules have "
            f"batch_first=False: {', '.join(plan.sequence_first)}"
        )
    head.kinds |= dict.fromkeys(head.kinds, Kind("feedback"))
    for layer in plan.layers.values():
        layer.kind = Kind("feedback")


def around(plan: Plan, cut: Cut) -> set[str]:
    """Names of layers with weights of the head that have others, or the tail, inside of them."""
    names = [name for name, layer in plan.layers.items() if layer.head or layer.swaps]
    inside = [*names, *cut.tail_parameters]
    return {
        name
        for name in names
        for other in inside
        if other != name and (not name or other.startswith(f"{name}."))
    }


def _own(module: nn.Module, by_id: Mapping[int, HeadParameter]) -> dict[str, HeadParameter]:
    return {
        local: by_id[id(p)]
        for local, p in module._parameters.items()
        if p is not None and id(p) in by_id
    }


def _as_built(module: nn.Module) -> bool:
    """Whether a known layer holds just the parameters its constructor gave it."""
    names = set(module._parameters)
    return names <= {"weight", "bias"} and (not names or "weight" in names)


def _check_supported(name: str, module: nn.Module) -> None:
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise ValueError(
            f"{name!r} (Embedding) has max_norm: it rewrites its weight in the forward, which the "
            "perturbed passes must only read; set max_norm=None"
        )


def swap_around(plan: Plan, head: Head, model: nn.Module, parameter: str, later: bool) -> None:
    """A weight was not read perturbed, or read as it is: the module around is to swap it.

    Args:
        later: whether other forwards have read all weights.
    Raises: ValueError where nothing is around.
    """
    owner = owner_of(plan, parameter)
    if not owner and later:
        raise ValueError(
            f"head parameter {parameter!r} was not perturbed in this forward, which takes another "
            "path than those before; a step would move it at random: let every training forward "
            "use the whole head"
        )
    if not owner:
        raise ValueError(
            f"head parameter {parameter!r} was not perturbed in the forward (it is not used, or "
            "not through its module): freeze it with requires_grad_(False) before wrapping"
        )
    _promote(plan, head, model, owner, [parameter], again=True)


def run_around(plan: Plan, head: Head, model: nn.Module, layer: Layer) -> None:
    """The halves of a layer cannot be told apart, or joined: the module around is to run by half.

    Raises: ValueError where nothing is around.
    """
    if not layer.name:
        raise ValueError("the halves of this model cannot run stacked: use pairing='sequential'")
    _promote(plan, head, model, layer.name, [one.name for *_, one in layer.swaps], again=False)


def _promote(
    plan: Plan, head: Head, model: nn.Module, name: str, parameters: Sequence[str], again: bool
) -> None:
    """Let the nearest module around `name` that runs swap these parameters instead; `again`: one
    that runs by half already, too."""
    modules = dict(model.named_modules())
    outer = name
    while outer:
        outer = outer.rpartition(".")[0]
        there = plan.layers.get(outer)
        by_half = there is not None and there.by_half
        if not isinstance(modules[outer], CONTAINERS) and (again or not by_half):
            break
    by_id = {id(p): head.parameters[n] for n, p in head.named() if n in parameters}
    for n in parameters:
        if head.kinds[n].name in BY_SAMPLE:
            head.kinds[n] = Kind("weight", RUNS_WHOLE)
    layer = plan.layers.get(outer)
    if layer is None or not layer.by_half:
        layer = plan.layers[outer] = Layer(outer, modules[outer], run_whole, by_half=True)
    taken = {(id(module), local) for module, local, _ in layer.swaps}
    swaps = _inside(modules[outer], by_id)
    layer.swaps = layer.swaps + [s for s in swaps if (id(s[0]), s[1]) not in taken]


def owner_of(plan: Plan, parameter: str) -> str:
    """The outermost layer that is responsible for a parameter now, else its module."""
    for name, layer in plan.layers.items():
        if any(head.name == parameter for _, _, head in layer.swaps):
            return name
    return parameter.rpartition(".")[0]
