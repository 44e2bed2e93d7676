"""The noisy pass of learnt feedback: segments of the head, each learns and gets its noise.

A segment begins with a layer that multiplies, and has all that follows it (normalisation,
activation, pooling, a residual sum) up to the next such layer. What that one is about to read are
the segment's nodes: their error goes through the segment's own backward to its weights; then,
without a graph and with noise, they take the place of the tensor wherever it is used from now on,
so that a residual branch reads what the block reads. Fewer nodes than a layer's own outputs, and no
kink between them and what comes after.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from elasticzo.feedback import Feedback
from elasticzo.forward.layers.norms import NORMS
from elasticzo.forward.listening import (
    Heard,
    Instead,
    Leaves,
    Listener,
    Order,
    each_once,
    floats,
    is_float,
    opened,
    own_work,
    parameters_of,
)
from elasticzo.forward.passes import Layer, Pass
from elasticzo.head import HeadParameter
from elasticzo.session import Session

Take = Callable[[str, Tensor], None]
SEEN = 32  # samples of a part of the batch that say how well a matrix foretells


@dataclass
class Nodes:
    """What one call of a layer was about to read, `[B, nodes]`.

    Attributes:
        key: of their matrix. head, stream: whose noise they have. size: s.
    """

    key: str
    head: HeadParameter
    stream: int
    shape: torch.Size
    size: Tensor

    @property
    def inverse(self) -> Tensor:
        """1 / s; 0 where there was nothing to add noise to (a layer that is dead)."""
        return torch.where(self.size > 0, 1.0 / self.size, torch.zeros_like(self.size))


@dataclass
class Noisy(Listener):
    """Learns from the error of each segment, and adds noise to its nodes.

    Attributes:
        here: which samples of the forward run. error: theirs, `[B, outputs]`, as the matrices are
            told of it.
        alone: whether this is all of the step, so that weights move at once.
        gradients: those that wait, by name.
    """

    around: set[str]
    settings: Feedback
    session: Session
    backend: str
    heard: Heard
    here: slice
    order: Order
    error: Tensor
    alone: bool
    take: Take
    gradients: dict[str, Tensor]
    noised: list[Nodes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.calls, self._streams = Counter(), Counter[str]()
        self._leaves: Leaves = []  # of segments that have not ended
        self._waiting: list[tuple[Nodes, Tensor, Leaves]] = []  # for the noise's own answer
        self._ends = 0
        self._fresh: list[weakref.ref[Tensor]] = []  # what the last layer returned
        self.replaced: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}

    def run(self, again: Callable[[], Any]) -> list[Tensor]:
        """The pass, and its outputs."""
        with torch.enable_grad(), Instead(self):
            found = floats(again())
            for place, heard in self.heard.outputs.items():  # the head may end there
                t = self.instead(found[place])
                self._cut(t, None if heard.grad is None else heard.grad[:, self.here])
                found[place] = t.detach()
        return [found[place] for place in self.heard.outputs]

    def finish(self, change: Tensor) -> None:
        """The pass is over, and changed the outputs by this: what waited for it is done, and
        gradients that no end took are taken."""
        for nodes, t, leaves in self._waiting:
            matrix = self._matrix(nodes.key, nodes.head, nodes.shape[1])
            m, xi = self.error @ matrix.t(), self._xi(nodes)
            c = (change * self.error).sum(1) * nodes.inverse
            d = m + (c - (xi * m).sum(1)).unsqueeze(1) * xi
            self._add(leaves, _gradients([t], leaves, [_to_places(d, t.shape)], retain=True))
        self._waiting.clear()
        self.order.known = not self.settings.unbiased
        if self.alone:
            for name in list(self.gradients):
                self.take(name, self.gradients.pop(name))

    def layer(
        self, current: Pass, layer: Layer, run: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        call, around = self.next_call(layer.name), layer.name in self.around
        with own_work():
            if not around and layer.in_front and not self._goes_on(layer, args):
                args, kwargs = self._end_inputs(layer, call, args, kwargs)
        # One of torch's own reads its arguments, and nothing else; a user's may read anything.
        known = type(layer.module).__module__.startswith("torch.nn.modules.")
        alone = known and not around and not layer.module._modules
        with opened(current, layer) as leaves, own_work() if alone else nullcontext():
            self._leaves += leaves
            output = run(*args, **kwargs)
        if not around:
            self._fresh = [weakref.ref(t) for t in floats(output)]
        return output

    def tail(self, name: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The head ends in front of it: the errors of what it reads are exact."""
        call = self.next_call(name)
        with own_work():
            flat, spec = pytree.tree_flatten((args, kwargs))
            for place, t in enumerate(flat):
                if is_float(t):
                    t, heard = self.instead(t), self.heard.cut.get((name, call, place))
                    d = None if heard is None or heard.grad is None else heard.grad[self.here]
                    self._cut(t, d)
                    flat[place] = self.instead(t).detach()
            args, kwargs = pytree.tree_unflatten(flat, spec)
        with torch.no_grad():
            return run(*args, **kwargs)

    def _goes_on(self, layer: Layer, args: Any) -> bool:
        """Normalisation of just what a layer returned belongs to its segment."""
        fresh = [ref() for ref in self._fresh]
        return isinstance(layer.module, NORMS) and bool(args) and any(args[0] is t for t in fresh)

    # ---- ends of segments

    def instead(self, t: Any) -> Any:
        while isinstance(t, Tensor) and id(t) in self.replaced:
            ref, other = self.replaced[id(t)]
            if ref() is not t:
                break
            t = other
        return t

    def _end_inputs(self, layer: Layer, call: int, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The inputs of a layer, each the end of a segment where it is one."""
        args, kwargs = pytree.tree_map(self.instead, (args, kwargs))
        if isinstance(layer.module, torch.nn.RNNBase):  # states have no batch in front
            read: list[Tensor] = floats(args[:1])
        else:
            read = floats((args, kwargs))
        batch, done = len(self.error), dict[int, Tensor]()
        places = {id(t): place for place, t in enumerate(each_once(floats((args, kwargs))))}
        for place, t in enumerate(each_once(t for t in read if t.requires_grad)):
            if t.dim() and t.shape[0] == batch:  # else its graph goes on through the layer
                exact = self.heard.ends.get((layer.name, call, places[id(t)]))
                if exact is None:
                    done[id(t)] = self._end(layer, call, place, t)
                else:
                    self._learn_exactly(t, exact[self.here])
                    done[id(t)] = t.detach()
                self._replace(t, done[id(t)])
        args, kwargs = pytree.tree_map(lambda t: done.get(id(t), t), (args, kwargs))
        return args, kwargs

    def _cut(self, t: Tensor, d: Tensor | None) -> None:
        """The head ends at `t`; weights around the cut have learnt of it in the clean pass."""
        if not t.requires_grad:
            return
        if d is not None:
            self._learn_exactly(t, d)
        self._replace(t, t.detach())

    def _learn_exactly(self, t: Tensor, d: Tensor) -> None:
        outer = {name for name, _ in self.heard.outer}
        self._learn(t, d, [(name, w) for name, w in self._leaves if name not in outer])

    def _replace(self, t: Tensor, other: Tensor) -> None:
        """From now on `other` is read where `t` is, as long as someone holds that."""
        at = id(t)
        self.replaced[at] = (weakref.ref(t, lambda _: self.replaced.pop(at, None)), other)

    def _end(self, layer: Layer, call: int, place: int, t: Tensor) -> Tensor:
        head = parameters_of(layer)[0][2]
        key, still = f"{layer.name}/{call}/{place}", t.detach()
        if self.settings.matrix == "zero":
            return still
        shape = self.settings.nodes(layer.name, t.shape)
        m = self._matrix(key, head, shape[1])
        if not self.settings.unbiased:
            self._learn(t, _to_places(self.error @ m.t(), t.shape), self._leaves)
        if self.settings.matrix != "learnt":
            return still
        size = self.settings.noise * still.to(self.error.dtype).square().mean().sqrt()
        nodes = Nodes(key, head, self._streams[head.name], shape, size)
        self._streams[head.name] += 1  # layers that share the weight count together
        self.noised.append(nodes)
        if self.settings.unbiased:
            self._waiting.append((nodes, t, list(self._leaves)))
        return still + _at_places(self._xi(nodes) * size, t.shape).to(t.dtype)

    def _learn(self, t: Tensor, d: Tensor, leaves: Leaves) -> None:
        """The error of the end of a segment to gradients of weights, by its own backward."""
        end, self._ends = self._ends, self._ends + 1
        last = self.order.last
        left = not self.order.known or any(last.get(n, -1) > end for n, _ in self._leaves)
        names = self._add(leaves, _gradients([t], leaves, [d], retain=left))
        self.order.note(names, end)
        if self.order.known:
            self._close(end)

    def _add(self, leaves: Leaves, found: Sequence[Tensor | None]) -> list[str]:
        """To what is known of the weights; their names."""
        names = []
        for (name, _), g in zip(leaves, found, strict=True):
            if g is not None:
                old = self.gradients.get(name)
                self.gradients[name] = g if old is None else old + g
                names.append(name)
        return names

    def _close(self, end: int) -> None:
        """Let go of weights that nothing more will be learnt of, and move them."""
        done = {n for n, _ in self._leaves if self.order.last.get(n, -1) <= end}
        self._leaves = [(n, w) for n, w in self._leaves if n not in done]
        if self.alone:
            for name in done & self.gradients.keys():
                self.take(name, self.gradients.pop(name))

    # ---- matrices and noise

    def _matrix(self, key: str, head: HeadParameter, nodes: int) -> Tensor:
        if key not in self.session.learnt:
            at = (head, nodes, self.error, self.session.key, self.backend)
            self.session.learnt[key] = self.settings.begin(*at)
        found = self.session.learnt[key]
        if found.dtype != self.error.dtype:  # the model was cast since
            found = self.session.learnt[key] = found.to(self.error.dtype)
        if found.shape != (nodes, self.error.shape[1]):
            raise ValueError(
                f"the matrix of {key!r} is {list(found.shape)}, but {nodes} nodes came for "
                f"{self.error.shape[1]} outputs: learnt feedback needs inputs of one size"
            )
        return found

    def _xi(self, one: Nodes) -> Tensor:
        first = self.heard.first + (self.here.start or 0)
        at = (one.head, one.shape, self.session.key, one.stream, first, self.backend)
        return self.settings.xi(*at).to(self.error.dtype)

    def answers(self, change: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """For each matrix: its name, `sum_i xi_i r_i^T / s` of what is fitted (see `Feedback`), and
        how much of what the noise did it did not foretell, `[2]`: squares of `c - xi . M e`, and of
        `c`, of the first samples."""
        if self.settings.fit == "residual":
            foretold = [self._xi(k) @ self.session.learnt[k.key] * k.size for k in self.noised]
            rest = change - torch.stack(foretold).sum(0) if foretold else change
        for one in self.noised:
            xi, m = self._xi(one), self.session.learnt[one.key]
            few = slice(SEEN)
            c = (change[few] * self.error[few]).sum(1) * one.inverse
            own = ((xi[few] @ m) * self.error[few]).sum(1)
            squares = torch.stack([(c - own).square().sum(), c.square().sum()])
            told = rest if self.settings.fit == "residual" else change
            # This way round: a product of few rows, which libraries are quicker at.
            yield one.key, ((told * one.inverse).t() @ xi).t(), squares


def _at_places(nodes: Tensor, shape: torch.Size) -> Tensor:
    """A number a node, `[B, nodes]`, at all the places that have it."""
    if nodes.shape[1] == shape[1:].numel():
        return nodes.view(shape)
    return nodes.view(*nodes.shape, *[1] * (len(shape) - 2)).expand(shape)


def _to_places(d: Tensor, shape: torch.Size) -> Tensor:
    """The error of each node, which its places share equally."""
    return _at_places(d * (d[0].numel() / shape[1:].numel()), shape)


def _gradients(
    tensors: list[Tensor], leaves: Leaves, errors: list[Any], retain: bool
) -> Sequence[Tensor | None]:
    errors = [d.to(t.dtype) for t, d in zip(tensors, errors, strict=True)]
    at = [w for _, w in leaves]
    if not at:
        return []
    return torch.autograd.grad(tensors, at, errors, retain_graph=retain, allow_unused=True)
