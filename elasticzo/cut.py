"""The cut: which modules are the head (zeroth-order) and which the tail (backpropagation)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

# What a count of "last layers" counts.
COUNTED = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
)

Tail = Sequence[str] | str | int


@dataclass(frozen=True)
class Cut:
    """The resolved cut.

    Attributes:
        tail_modules: names of all modules of the tail, children included.
        tail_parameters, head_parameters: names in `model.named_parameters()`, frozen ones left out.
        everything: whether the whole network is tail ("all", Full BP).
        tail: what it was resolved from: names, a count or "all".
    """

    tail_modules: frozenset[str]
    tail_parameters: tuple[str, ...]
    head_parameters: tuple[str, ...]
    everything: bool
    tail: tuple[str, ...] | str | int

    @property
    def named(self) -> str:
        """The outermost modules of the tail, for people: "fc2, fc3", "all" or "none"."""
        if self.everything:
            return "all"
        found: dict[str, None] = {}
        for parameter in self.tail_parameters:
            name = parameter.rpartition(".")[0]
            while name and name.rpartition(".")[0] in self.tail_modules:
                name = name.rpartition(".")[0]
            found[name or "the model itself"] = None
        return ", ".join(found) or "none"


def resolve_cut(model: nn.Module, tail: Tail) -> Cut:
    """Resolve `tail` (names, a count of last layers, or "all") on a model.

    Raises:
        ValueError: an unknown or empty name, names without parameters, a count out of range, a
            parameter on both sides.
        TypeError: a `tail` of another kind.
    """
    everything = isinstance(tail, str) and tail == "all"
    names = (
        {name for name, _ in model.named_modules()} if everything else _tail_modules(model, tail)
    )
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    owners: dict[int, tuple[list[str], list[str]]] = {key: ([], []) for key in trainable}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for local, p in module._parameters.items():
            if p is not None and id(p) in owners:
                full = f"{module_name}.{local}" if module_name else local
                owners[id(p)][0 if module_name in names else 1].append(full)
    for in_tail, in_head in owners.values():
        if in_tail and in_head:
            raise ValueError(
                f"tail and head must share no parameter: {in_tail[0]!r} (tail) is {in_head[0]!r} "
                "(head); put both on one side of the cut"
            )
    return Cut(
        frozenset(names),
        tuple(trainable[key] for key, (in_tail, _) in owners.items() if in_tail),
        tuple(trainable[key] for key, (_, in_head) in owners.items() if in_head),
        everything,
        tail if isinstance(tail, (int, str)) else tuple(tail),
    )


def warn_of_empty_head(head: Sequence[str], cut: Cut) -> None:
    """Warn where nothing is left to zeroth-order optimisation and not all was to be tail."""
    if not head and not cut.everything:
        warnings.warn(
            f"tail={cut.tail!r} leaves the head empty (all of it is frozen, or tail): nothing is "
            "perturbed, and every half is the same pass; tail='all' makes it once",
            stacklevel=3,
        )


def _tail_modules(model: nn.Module, tail: Tail) -> set[str]:
    if isinstance(tail, bool) or not isinstance(tail, (int, str, Sequence)):
        raise TypeError(
            "tail must be a list of module names, a number of last layers, 'all' or 'auto', "
            f"got {tail!r}"
        )
    if isinstance(tail, int):
        return _last_layers(model, tail)
    names = [tail] if isinstance(tail, str) else list(tail)
    if not names:
        raise ValueError("tail=[] names no module; for Full ZO (no tail) use tail=0")
    found = {inner for name in names for inner in _with_children(model, name)}
    modules = dict(model.named_modules(remove_duplicate=False))
    if not any(_owns(modules[name]) for name in found):
        raise ValueError(
            f"tail={names} names no module with parameters; for Full ZO (no tail) use tail=0; "
            f"layers of this model: {_layers(model)}"
        )
    return found


def _layers(model: nn.Module) -> str:
    """For people."""
    named = model.named_modules(remove_duplicate=False)
    found = ", ".join(name for name, module in named if name and _owns(module))
    return found or "none inside it (tail=0 or 1 where it is a layer itself)"


def _with_children(model: nn.Module, name: object) -> Iterator[str]:
    known = dict(model.named_modules(remove_duplicate=False))
    if not isinstance(name, str) or not name or name not in known:
        raise ValueError(
            f"tail names an unknown module {name!r}; layers of this model: {_layers(model)}"
        )
    for inner, _ in known[name].named_modules(remove_duplicate=False):
        yield f"{name}.{inner}" if inner else name


def _owns(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _last_layers(model: nn.Module, count: int) -> set[str]:
    """The last `count` weight layers, and all that is registered behind the first of them."""
    owning = [(name, m) for name, m in model.named_modules() if _owns(m)]
    counted = [i for i, (_, m) in enumerate(owning) if isinstance(m, COUNTED)]
    if not 0 <= count <= len(counted):
        raise ValueError(
            f"tail as a number of last layers must be in 0..{len(counted)} for this model, "
            f"got {count}"
        )
    if count == 0:
        return set()
    behind = [name for name, _ in owning[counted[-count] :]]
    if "" in behind:  # the model is a layer itself
        return {name for name, _ in model.named_modules(remove_duplicate=False)}
    return {inner for name in behind for inner in _with_children(model, name)}
