"""The two passes of learnt feedback: one that is clean and heard, one with noise that learns.

In the clean pass the output of the head's last layer becomes a leaf, so that the tail's backward
leaves the exact gradient there, and that of the loss at the network's outputs. In the noisy one
each layer of the head runs with its input in hand: its own backward turns the error of its outputs
into gradients of its weights, which are used at once; its outputs get their noise, and go on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from elasticzo.feedback import Feedback
from elasticzo.forward.passes import Layer, Pass
from elasticzo.head import HeadParameter
from elasticzo.session import Session

Call = tuple[str, int]  # layer, which of its calls in a forward
Take = Callable[[str, Tensor], None]


@dataclass
class Heard:
    """What a clean pass leaves for the noisy one: the inputs, which are the user's own, the
    outputs `[1, B, ...]` by their places, and the leaves of the cut, where gradients will be."""

    args: Any
    kwargs: Any
    micro_batch: int
    first: int
    generator: Tensor | None  # where the model draws from torch's: its state before the pass
    autocast: torch.dtype | None
    outputs: dict[int, Tensor]
    cut: list[Tensor]
    uses: Counter[str]

    def error(self) -> tuple[Tensor, Tensor]:
        """Outputs and the loss's gradient by them, `[B, outputs]` each."""
        given = [t for t in self.outputs.values() if t.grad is not None]
        if not given or all(t.grad is None for t in self.cut):
            raise RuntimeError(
                "learnt feedback needs the gradient of the loss by the outputs: call "
                "model.backward(losses) on a loss that can be differentiated before zo.step(losses)"
            )
        outputs = list(self.outputs.values())
        errors = [torch.zeros_like(t) if t.grad is None else t.grad for t in outputs]
        return rows([t.detach() for t in outputs]), rows(errors)


def rows(tensors: list[Tensor]) -> Tensor:
    """Outputs `[1, B, ...]` as one number each, `[B, outputs]`, in float32 at least."""
    wide = [t[0].flatten(1).to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    return wide[0] if len(wide) == 1 else torch.cat(wide, 1)


def parameters_of(layer: Layer) -> list[tuple[Any, str, HeadParameter]]:
    """(module, local name, what belongs to it) of all weights that a layer answers for."""
    return [(layer.module, local, head) for local, head in layer.head.items()] + layer.swaps


@dataclass
class Nodes:
    """The outputs of a layer as one number a node: `[B, nodes]` of all floating tensors that have
    the batch as dimension 0 (states of a recurrent layer: 1).

    Attributes:
        leaves: of the output. places: (which of them, dimension of the batch).
    """

    layer: Layer
    leaves: list[Any]
    spec: Any
    places: list[tuple[int, int]]

    @classmethod
    def of(cls, layer: Layer, output: Any, batch: int) -> Nodes:
        leaves, spec = pytree.tree_flatten(output)
        found, recurrent = [], isinstance(layer.module, torch.nn.RNNBase)
        for i, t in enumerate(leaves):
            dim = int(recurrent and i > 0)
            floating = isinstance(t, Tensor) and t.is_floating_point() and t.dim() > dim
            if floating and t.shape[dim] % batch == 0:
                found.append((i, dim))
        if not found:
            shapes = [list(t.shape) for t in leaves if isinstance(t, Tensor)]
            raise ValueError(
                f"learnt feedback needs the batch ({batch}) as dimension 0 of what {layer.name!r} "
                f"returns, got shapes {shapes}"
            )
        return cls(layer, leaves, spec, found)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.leaves[i] for i, _ in self.places]

    def flat(self, batch: int) -> Tensor:
        rows = [t.movedim(dim, 0).reshape(batch, -1) for t, (_, dim) in self._with_dims()]
        return rows[0] if len(rows) == 1 else torch.cat(rows, 1)

    def split(self, flat: Tensor) -> list[Tensor]:
        """The reverse of `flat`, a tensor for each place."""
        parts, at = [], 0
        for t, (_, dim) in self._with_dims():
            n = t.numel() // len(flat)
            shape = t.movedim(dim, 0).shape
            parts.append(flat[:, at : at + n].reshape(shape).movedim(0, dim))
            at += n
        return parts

    def _with_dims(self) -> list[tuple[Tensor, tuple[int, int]]]:
        return [(self.leaves[i], (i, dim)) for i, dim in self.places]

    def output(self, tensors: list[Tensor]) -> Any:
        """The output with other tensors at the places, and no graph."""
        leaves = [t.detach() if isinstance(t, Tensor) else t for t in self.leaves]
        for (i, _), t in zip(self.places, tensors, strict=True):
            leaves[i] = t
        return pytree.tree_unflatten(leaves, self.spec)


def floats(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor) and t.is_floating_point()]


class Listener:
    """What stands between a layer of the head and its module while a pass runs.

    Attributes:
        around: names of layers that have other layers of the head inside of them.
    """

    def __init__(self, around: set[str]) -> None:
        self.around = around

    def __call__(
        self, current: Pass, layer: Layer, run: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        raise NotImplementedError


class Clean(Listener):
    """Hears who ran, and makes the output of the last layer a leaf.

    Attributes:
        wanted: the call that was the last one in the first forward; None while that is not known.
    """

    def __init__(self, around: set[str], wanted: Call | None) -> None:
        super().__init__(around)
        self.wanted = wanted
        self.cut: list[Tensor] = []
        self.ran: list[Call] = []
        self.uses: Counter[str] = Counter()

    @property
    def last(self) -> Call | None:
        return self.ran[-1] if self.ran else None

    def __call__(
        self, current: Pass, layer: Layer, run: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        output = run(*args, **kwargs)
        self.uses.update(head.name for *_, head in parameters_of(layer))
        if layer.name in self.around:
            return output
        call = (layer.name, sum(name == layer.name for name, _ in self.ran))
        self.ran.append(call)
        if call != self.wanted:
            return output
        assert current.batch is not None
        nodes = Nodes.of(layer, output, current.batch)
        self.cut = [t.detach().requires_grad_() for t in nodes.tensors]
        return nodes.output(self.cut)


@dataclass
class Noised:
    """A call whose outputs had noise."""

    key: str
    head: HeadParameter
    call: int
    shape: torch.Size
    size: Tensor  # s


@dataclass
class Noisy(Listener):
    """Learns from the error of each layer, and adds noise to its outputs."""

    around: set[str]
    settings: Feedback
    session: Session
    backend: str
    heard: Heard
    last: Call
    error: Tensor  # [B, outputs], as M is told of it
    alone: bool  # whether this is the step's only micro-batch, so that weights move at once
    take: Take
    gradients: dict[str, Tensor]
    noised: list[Noised] = field(default_factory=list)
    outer: list[tuple[str, Tensor]] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.left = Counter(self.heard.uses)

    def __call__(
        self, current: Pass, layer: Layer, run: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        with self._open(current, layer) as leaves:
            if layer.name in self.around:
                self.outer += leaves
                with torch.enable_grad():
                    output = run(*args, **kwargs)
                del self.outer[len(self.outer) - len(leaves) :]
                output = pytree.tree_map_only(Tensor, Tensor.detach, output)
            else:
                output = self._inside(layer, leaves, run, args, kwargs)
        for name, _ in leaves:
            self._finish(name)
        return output

    def _inside(
        self,
        layer: Layer,
        leaves: list[tuple[str, Tensor]],
        run: Callable[..., Any],
        args: Any,
        kwargs: Any,
    ) -> Any:
        """One layer: its output with noise; `leaves`: its weights."""
        call = (layer.name, self.calls[layer.name])
        self.calls[layer.name] += 1
        given = [t for t in floats((args, kwargs)) if t.requires_grad]
        here = {id(t): t.detach().requires_grad_() for t in given}
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: here.get(id(t), t), (args, kwargs))
        with torch.enable_grad():
            output = run(*args, **kwargs)
        nodes = Nodes.of(layer, output, len(self.error))
        wanted = [(n, w) for n, w in leaves if w.requires_grad]
        self._learn(nodes, self._error_of(call, nodes), wanted, given, list(here.values()))
        return nodes.output(self._with_noise(call, nodes))

    def _learn(
        self,
        nodes: Nodes,
        errors: list[Tensor] | None,
        wanted: list[tuple[str, Tensor]],
        given: list[Tensor],
        here: list[Tensor],
    ) -> None:
        """Turn the errors of a layer's outputs into gradients of its weights, by its own backward;
        `here` are its inputs `given` as it read them."""
        leaves = [w for _, w in wanted] + here
        pairs = zip(nodes.tensors, errors or [], strict=False)
        with_graph = [(t, d.to(t.dtype)) for t, d in pairs if t.requires_grad]
        if not with_graph or not leaves:
            return
        ys, ds = zip(*with_graph, strict=True)
        found = torch.autograd.grad(ys, leaves, ds, allow_unused=True)
        for (name, _), g in zip(wanted, found, strict=False):
            self._add(name, g)
        for t, g in zip(given, found[len(wanted) :], strict=True):
            self._pass_out(t, g)

    def _pass_out(self, t: Tensor, g: Tensor | None) -> None:
        """On to the weights of modules around, through what stands between them and the layer."""
        leaves = [w for _, w in self.outer if w.requires_grad]
        if g is None or not leaves:
            return
        found = torch.autograd.grad(t, leaves, g, retain_graph=True, allow_unused=True)
        for (name, _), one in zip(
            [o for o in self.outer if o[1].requires_grad], found, strict=True
        ):
            self._add(name, one)

    def _add(self, name: str, g: Tensor | None) -> None:
        if g is not None:
            old = self.gradients.get(name)
            self.gradients[name] = g if old is None else old + g

    def _finish(self, name: str) -> None:
        """A layer that reads this weight is done with it."""
        self.left[name] -= 1
        if self.alone and self.left[name] == 0 and name in self.gradients:
            self.take(name, self.gradients.pop(name))

    @contextmanager
    def _open(self, current: Pass, layer: Layer) -> Iterator[list[tuple[str, Tensor]]]:
        """The weights of a layer as leaves of a graph of its own."""
        put_back, leaves = [], []
        for module, local, head in parameters_of(layer):
            p = module._parameters[local]
            leaf = p.detach().requires_grad_(head.scale != 0.0)
            module._parameters[local] = leaf
            current.swapped.add((id(module), local))
            put_back.append((module, local, p))
            leaves.append((head.name, leaf))
        try:
            yield leaves
        finally:
            for module, local, p in put_back:
                module._parameters[local] = p
                current.swapped.discard((id(module), local))
            for module in {m for m, *_ in put_back if isinstance(m, torch.nn.RNNBase)}:
                module._init_flat_weights()

    # ---- errors and noise

    def _error_of(self, call: Call, nodes: Nodes) -> list[Tensor] | None:
        """What the loss changes by with the outputs of a call: exact at the cut, else by M."""
        if call == self.last:
            return [torch.zeros_like(t) if t.grad is None else t.grad for t in self.heard.cut]
        if self.settings.matrix == "zero":
            return None
        return nodes.split(self.error @ self._matrix(call, nodes).t())

    def _matrix(self, call: Call, nodes: Nodes) -> Tensor:
        key, head = _name_of(call), parameters_of(nodes.layer)[0][2]
        if key not in self.session.learnt:
            count = sum(t.numel() for t in nodes.tensors) // len(self.error)
            at = (head, count, self.error, self.session.key, self.backend)
            self.session.learnt[key] = self.settings.begin(*at)
        return self.session.learnt[key]

    def _with_noise(self, call: Call, nodes: Nodes) -> list[Tensor]:
        still = [t.detach() for t in nodes.tensors]
        if call == self.last or self.settings.matrix != "learnt":
            return still
        head, y = parameters_of(nodes.layer)[0][2], nodes.flat(len(self.error)).detach()
        wide = y.to(torch.promote_types(y.dtype, torch.float32))
        size = self.settings.noise * wide.square().mean().sqrt()
        self.noised.append(Noised(_name_of(call), head, call[1], y.shape, size))
        xi = nodes.split(self._xi(self.noised[-1]) * size)
        return [t + noise.to(t.dtype) for t, noise in zip(still, xi, strict=True)]

    def _xi(self, one: Noised) -> Tensor:
        at = (one.head, one.shape, self.session.key, one.call, self.heard.first, self.backend)
        return self.settings.xi(*at).to(self.error.dtype)

    def answers(self, change: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """For each matrix: its name, `sum_i xi_i (o'_i - o_i)^T / s`, and how much of what the
        noise did it did not foretell, `[2]`: squares of `c - xi . M e` and of `c`."""
        for one in self.noised:
            xi = self._xi(one)
            answer = change / one.size.clamp(min=torch.finfo(torch.float32).tiny)
            c = (answer * self.error).sum(1)
            foretold = ((xi @ self.session.learnt[one.key]) * self.error).sum(1)
            yield (
                one.key,
                xi.t() @ answer,
                torch.stack([(c - foretold).square().sum(), c.square().sum()]),
            )


def _name_of(call: Call) -> str:
    return f"{call[0]}/{call[1]}"
