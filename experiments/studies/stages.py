"""Where the time of a training step goes: its stages, told apart while the step runs as it is.

`watched` takes over, for the time of a measurement, what the step calls: the model's forward and
backward, the losses, the optimisers' steps, and inside the forward the ops that write perturbed
weights (`perturbed_weights` and `stage_` of `zo_kernels`; for int8 on the CPU the function inside
the products that makes `clip(w +- z)`, and packs it where that is one sweep). A stage is exclusive:
the noise is not counted as forward. What is made inside a kernel (fused layers on CUDA) cannot be
told apart and stays in the forward.
"""

from __future__ import annotations

import importlib
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from experiments.train.learner import Int8Learner, Learner

STAGES = ("noise", "forward", "loss", "tail backward", "update", "other")
# What a step calls: a part of the learner, or the module among whose names a function is looked
# up; the name; and its stage.
CALLS = (
    ("model", "forward", "forward"),
    ("model", "backward", "tail backward"),
    ("zo", "step", "update"),
    ("tail", "step", "update"),
    ("tail", "zero_grad", "update"),
)
FLOAT_CALLS = (
    ("experiments.train.learner", "pair_losses", "loss"),
    ("elasticzo.directions", "perturbed_weights", "noise"),
    ("elasticzo.forward.staging", "stage_", "noise"),
)
INT8_CALLS = (("model", "losses", "loss"),)
# The function of the int8 products on the CPU that makes `clip(w +- z)`: the first that is there
# and takes noise. The other backends make it inside their products.
INT8_NOISE = ("zo_kernels.cpu.int8_products", ("_packed", "_halves"))
# holder, attribute, stage, and whether a call counts
Target = tuple[Any, str, str, Callable[..., bool]]


def _always(*args: Any, **kwargs: Any) -> bool:
    return True


def _perturbs(*args: Any) -> bool:
    return any(getattr(a, "key", None) is not None for a in args)  # else it is the weight itself


def int8_noise() -> tuple[ModuleType, str]:
    """Where `INT8_NOISE` is."""
    products = importlib.import_module(INT8_NOISE[0])
    for name in INT8_NOISE[1]:
        function = getattr(products, name, None)
        if function is not None and "noise" in inspect.signature(function).parameters:
            return products, name
    raise RuntimeError(f"no function of {products.__name__} makes perturbed weights by themselves")


class Stopwatch:
    """Seconds of each stage of one step.

    On the CPU the clock is that of the process (CPU time over all its threads); on CUDA events lie
    in the stream between the stages, so that a wait for Python counts to the stage it falls into.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []
        self._stack: list[str] = []

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _seconds(self, begin: Any, end: Any) -> float:
        if self._device.type != "cuda":
            return float(end - begin)
        return float(begin.elapsed_time(end)) * 1e-3

    @property
    def running(self) -> str | None:
        """The stage that runs now; None outside a step."""
        return self._stack[-1] if self._stack else None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """All that happens inside belongs to `name`, but for stages inside of it."""
        self._marks.append((name, self._now()))
        self._stack.append(name)
        try:
            yield
        finally:
            self._stack.pop()
            self._marks.append((self._stack[-1] if self._stack else "", self._now()))

    def time(self, step: Callable[[], object]) -> dict[str, float]:
        """Run one step; seconds by stage, 0 for those that did not run."""
        self._marks = []
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        with self.stage("other"):
            step()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        found = dict.fromkeys(STAGES, 0.0)
        for (name, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            found[name] += self._seconds(begin, end)
        return found


def targets(learner: Learner) -> list[Target]:
    """What is taken over for a learner."""
    int8 = isinstance(learner, Int8Learner)
    found: list[Target] = []
    for place, name, stage in (*CALLS, *(INT8_CALLS if int8 else FLOAT_CALLS)):
        holder = importlib.import_module(place) if "." in place else getattr(learner, place)
        if holder is not None:
            found.append((holder, name, stage, _always))
    if int8 and learner.model.backend == "numba":
        found.append((*int8_noise(), "noise", _perturbs))
    return found


@contextmanager
def watched(learner: Learner, watch: Stopwatch) -> Iterator[None]:
    """The learner's steps tell `watch` which stage runs; everything is put back afterwards."""
    before: list[tuple[Any, str, Any, bool]] = []
    try:
        for holder, name, stage, counts in targets(learner):
            own = name in holder.__dict__
            original = getattr(holder, name)
            before.append((holder, name, original, own))
            holder.__dict__[name] = _telling(original, stage, counts, watch)
        yield
    finally:
        for holder, name, original, own in reversed(before):
            if own:
                holder.__dict__[name] = original
            else:
                del holder.__dict__[name]


def _telling(
    original: Callable[..., Any], stage: str, counts: Callable[..., bool], watch: Stopwatch
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        # Products of the backward use the forward's functions: they are no stage of their own.
        inside = stage == "noise" and watch.running != "forward"
        if watch.running is None or inside or not counts(*args, **kwargs):
            return original(*args, **kwargs)
        with watch.stage(stage):
            return original(*args, **kwargs)

    return call
