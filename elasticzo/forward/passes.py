"""One training forward: which points run, and what is known while it lasts; and a layer's part."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from elasticzo.buffers import BufferSlot
from elasticzo.forward.draws import Draws
from elasticzo.forward.parts import Parts
from elasticzo.forward.staging import Staging
from elasticzo.forward.state import Attributes
from elasticzo.forward.watch import Watch
from elasticzo.head import WEIGHT, HeadParameter, Kind
from elasticzo.samples import Samples


@dataclass
class Layer:
    """A module whose forward is taken over while the points run.

    Attributes:
        call: what runs instead, `(current, layer, forward, args, kwargs)`.
        by_half: whether it runs once a half, with its perturbed parameters swapped in.
        head: the perturbed parameters of its own, by local name.
        swaps: of one that runs by half, (module, local name, parameter) of all that it swaps.
        stream: of dropout, the stream of its masks.
        path: of products, "auto", "fused" or "staged", as the user wants.
        fusable: whether it has a fused kernel.
        kind: by whose noise its weights are learnt.
        partners: layers that read one of its weights, too: they have its kind.
        in_front: whether dimension 0 of what it reads is the batch.
        stands: its module's own forward, the instance's and the class's.
    """

    name: str
    module: nn.Module
    call: Callable[..., Any]
    by_half: bool = False
    head: dict[str, HeadParameter] = field(default_factory=dict)
    swaps: list[tuple[nn.Module, str, HeadParameter]] = field(default_factory=list)
    stream: int = 0
    path: str = "auto"
    fusable: bool = False
    kind: Kind = WEIGHT
    partners: list[Layer] = field(default_factory=list)
    in_front: bool = True
    stands: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.stands = (self.module.__dict__.get("forward"), type(self.module).forward)

    def changed(self, own: Any) -> bool:
        """Whether the module has another forward than it had; `own`: the instance's, if any."""
        kind = type(self.module).forward
        if self.stands is None:  # a copy
            self.stands = (own, kind)
        return self.stands[0] is not own or self.stands[1] is not kind

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "stands": None}  # not all that is callable can be pickled


@dataclass
class Follow:
    """What follows a layer in its `nn.Sequential`, and may be done by the layer's own kernel."""

    module: nn.Module
    relu: bool
    pool: bool
    modules: int  # how many they are
    done: bool = False


@dataclass
class Kept:
    """What a layer keeps of a forward for the step: the mean of its inputs over the points.

    Attributes:
        call: which call in this forward of those that have this noise. first: the number of its
            first sample.
        head: whose noise the outputs have. own: its weights that learn by it, by local name.
        shape: of its outputs, of all samples `[B, ...]`.
    """

    layer: Layer
    call: int
    first: int
    head: HeadParameter
    own: dict[str, HeadParameter]
    shape: torch.Size
    x: Tensor
    version: int = 0

    def check(self) -> None:
        """Raise RuntimeError where the input was written to since."""
        if not self.x.is_inference() and self.x._version != self.version:
            raise RuntimeError(
                f"an input of {self.layer.name!r} was written to between the forward and zo.step, "
                "which learns from it: give each step's batch memory of its own"
            )


@dataclass
class Pass:
    """State of one training forward.

    Its points have places `0 .. halves - 1`. `half` is the place that runs now, or None while all
    of them travel together, stacked along the batch.
    """

    staging: Staging
    micro_batch: int
    moving: Sequence[BufferSlot]  # buffers that a forward moves
    attributes: Callable[[], Attributes] | None = None  # those that it changes, as they are now
    wanted: torch.dtype | None = None  # compute dtype the user named
    precision: str | None = None  # of float32 products, where the user named one
    watch: Watch | None = None  # of the first forward
    half: int | None = None
    swapped: set[tuple[int, str]] = field(default_factory=set)  # parameters perturbed in place
    # Stacked inputs by id, as (stacked, its version, one half): they carry the batch, and while
    # nobody wrote to them their halves agree.
    batched: dict[int, tuple[Tensor, int, Tensor]] = field(default_factory=dict)
    shares: bool = True  # whether layers may read that one half in place of all
    unbatched: set[int] = field(default_factory=set)
    calls: dict[tuple[int, int | None], int] = field(default_factory=dict)
    generator_state: Tensor | None = None
    started: Tensor | None = None  # the generator's state before anything ran
    draws: Draws | None = None  # where others may draw, too: what this thread draws
    follow: Follow | None = None
    # Of learning by sample: a sample's direction, whose noise a weight has, how many samples this
    # forward has, the number of the first, and what layers keep for the step.
    samples: Samples = field(default_factory=Samples)
    kinds: dict[str, Kind] = field(default_factory=dict)
    batch: int | None = None
    first: int = 0
    offset: int = 0  # of the first sample in its forward, where a part of it runs again
    kept: dict[tuple[str, int], Kept] = field(default_factory=dict)
    listener: Any = None  # of learnt feedback: stands before each layer
    # Names of layers that ran; of those that ever did, where nothing watches; the weights that each
    # of them may read then; and what they read, where it is noted.
    ran: set[str] = field(default_factory=set)
    known: Collection[str] | None = None
    locks: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    parts: Parts | None = None

    def note_read(self, name: str, tree: Any) -> None:
        """A layer is about to read these tensors."""
        if self.parts is not None and self.half in (None, 0):
            with self.unwatched():
                self.parts.note(name, tree, self.count if self.half is None else 1)

    @property
    def apart(self) -> bool:
        """Whether this is the first half alone, which a first forward is compared with."""
        return self.parts is not None and self.watch is None

    @property
    def key(self) -> Tensor:
        return self.staging.key

    @property
    def backend(self) -> str:
        return self.staging.backend

    @property
    def whole_batch(self) -> Samples:
        """The directions of kind "rank1": one a batch."""
        return Samples(self.samples.noise, None)

    @property
    def halves(self) -> int:
        """All points of this forward."""
        return len(self.staging.points)

    @property
    def count(self) -> int:
        """Points that a module called now serves."""
        return len(self.staging.here)

    def stage(
        self,
        w: Tensor,
        head: HeadParameter,
        dtype: torch.dtype | None = None,
        computed_in: torch.dtype | None = None,
    ) -> Tensor:
        """Perturbed weights of the points that run now: `[count, *w.shape]`.

        `computed_in` is the dtype that autocast will round them to, where it is not `dtype`.
        """
        if self.watch is None:
            return self.staging.weights(w, head, dtype)
        with self.watch.aside():
            self.watch.consume(head)
            halves = self.staging.weights(w, head, dtype)
            if self.staging.perturbs and head.scale != 0.0:
                self._check_perturbed(w, head, computed_in or halves.dtype)
            return halves

    def _check_perturbed(self, w: Tensor, head: HeadParameter, dtype: torch.dtype) -> None:
        assert self.watch is not None
        noise = self.samples.noise if self.kinds[head.name].name == "rank1" else self.staging.noise
        self.watch.check_perturbed(w, dtype, head, self.staging.eps, noise, self.precision)

    def note_fused(self, w: Tensor, head: HeadParameter, dtype: torch.dtype | None) -> None:
        """A kernel is about to read `w` and to perturb it itself."""
        self.staging.update_now(w)
        if self.watch is not None:
            self.watch.consume(head)
            if head.scale != 0.0:
                self._check_perturbed(w, head, dtype or w.dtype)

    def note_noise(self, layer: Layer, before: Tensor, after: Tensor) -> None:
        """Noise was added to the outputs of a layer."""
        for local, head in layer.head.items():
            if (id(layer.module), local) not in self.swapped and self.watch is not None:
                self.watch.consume(head)
        if self.watch is not None and self.staging.perturbs:
            moves = any(head.scale != 0.0 for head in layer.head.values())
            if moves:
                self.watch.check_moved(layer.name, before, after, self.staging.eps)

    def settle(self, layer: Layer, kind: Kind) -> None:
        """What "auto" came to."""
        learn_by(self.kinds, layer, kind)

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """The pass itself reads weights: nothing for the watch over who reads them unperturbed."""
        if self.watch is None:
            yield
            return
        with self.watch.aside():
            yield

    @contextmanager
    def only(self, half: int) -> Iterator[None]:
        """Run one point: everything called inside serves it alone."""
        before, here = self.half, self.staging.here
        ran = self.watch.tail_ran if self.watch is not None else None
        self.half, self.staging.here = half, self.staging.points.one(half)
        try:
            yield
        finally:
            self.half, self.staging.here = before, here
            if self.watch is not None and half + 1 < self.halves:
                self.watch.tail_ran = ran  # the next one starts where this one did

    def original(self, x: Tensor) -> Tensor | None:
        """One half of a stacked input that is still as the wrapper made it, else None."""
        stacked, version, half = self.batched.get(id(x), (None, 0, None))
        return half if self.shares and stacked is x and x._version == version else None

    def next_call(self, of: object) -> int:
        """How often this was called before in this half: distinguishes reused modules."""
        at = (id(of), self.half)
        self.calls[at] = self.calls.get(at, -1) + 1
        return self.calls[at]


def learn_by(kinds: dict[str, Kind], layer: Layer, kind: Kind) -> None:
    """From now on the weights of a layer, and of those that share one with it, are learnt by noise
    of this kind."""
    for one in [layer, *layer.partners]:
        one.kind = kind
        kinds.update(dict.fromkeys((h.name for h in one.head.values()), kind))
