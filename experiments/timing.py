"""How contestants are timed: in turn, round by round, on inputs that rotate; ratios of each round.

On CUDA a region of several calls lies between two events; short work is recorded in a graph first,
so that its replay does not wait for Python. On the CPU the clock is `time.perf_counter`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zo_kernels.triton.table import hold_tables

Contestant = Callable[[int], object]  # gets the number of the call: inputs rotate with it
REGION = 4e-3  # seconds that a timed region lasts at the least, if MAX_CALLS allow
MAX_CALLS = 200
MAX_SETS = 32
ROTATED_BYTES = 8 << 30  # that all sets of inputs may take together


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """20 %, median and 80 %, interpolated."""
    ordered = sorted(values)

    def at(part: float) -> float:
        place = part * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return at(0.2), statistics.median(ordered), at(0.8)


@dataclass(frozen=True)
class Timings:
    """Seconds a call of each contestant, round by round."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def row(self, name: str) -> dict[str, float]:
        """Microseconds: median, 20 and 80 percentiles; and how many rounds there were."""
        low, middle, high = percentiles([1e6 * s for s in self.seconds[name]])
        return {"us": middle, "us_20": low, "us_80": high, "rounds": len(self.seconds[name])}

    def ratio(self, over: str, under: str) -> dict[str, float]:
        """Of the times of one round: median, 20 and 80 percentiles."""
        pairs = zip(self.seconds[over], self.seconds[under], strict=True)
        low, middle, high = percentiles([a / b for a, b in pairs])
        return {"median": middle, "p20": low, "p80": high}

    def faster(self, *names: str) -> str:
        """The one with the least median."""
        return min(names, key=self.median)


def _clock(device: torch.device) -> Callable[[Contestant, int, int], float]:
    """A function that gives the seconds of `calls` calls, the first of them number `first`."""
    if device.type != "cuda":

        def on_host(run: Contestant, first: int, calls: int) -> float:
            start = time.perf_counter()
            for i in range(first, first + calls):
                run(i)
            return time.perf_counter() - start

        return on_host
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    def on_device(run: Contestant, first: int, calls: int) -> float:
        torch.cuda.synchronize(device)
        begin.record()
        for i in range(first, first + calls):
            run(i)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3

    return on_device


def measure(
    contestants: Mapping[str, Contestant],
    device: torch.device,
    seconds: float = 1.0,
    rounds: tuple[int, int] = (5, 100),
) -> Timings:
    """Time contestants in turn.

    Args:
        contestants: by name; warmed up here, twice.
        seconds: that the rounds may take together; the least number of rounds is done anyway.
        rounds: the least and the most.
    """
    clock = _clock(device)
    calls, total, (least, most) = {}, 0.0, rounds
    for name, run in contestants.items():
        if most > 1:  # a single round is a rehearsal itself
            clock(run, 0, 1)
        once = max(clock(run, 1, 1), 1e-7) if most > 1 else REGION
        calls[name] = min(max(math.ceil(REGION / once), 1), MAX_CALLS)
        total += once * calls[name]
    wanted = min(max(int(seconds / total), least), most)
    found: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for i in range(wanted):
        # Another one begins in each round: nobody always follows the same.
        for name in names[i % len(names) :] + names[: i % len(names)]:
            n = calls[name]
            found[name].append(clock(contestants[name], 2 + i * n, n) / n)
    return Timings(found)


def in_turn(
    contestants: Mapping[str, Contestant],
    rounds: Iterable[int],
    clock: Callable[[], int] = time.perf_counter_ns,
    warm_up: int = 0,
) -> Timings:
    """Time one call of each contestant a round, by a clock in nanoseconds.

    Args:
        rounds: their numbers, which the calls get; the first `warm_up` do not count.
    """
    found: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for i in rounds:
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = clock()
            contestants[name](i)
            if i >= warm_up:
                found[name].append(1e-9 * (clock() - start))
    return Timings(found)


# ---- graphs


class Graphed:
    """Work recorded in a CUDA graph; on other devices it just runs.

    Attributes:
        output: what the recorded call returned (of the last call on other devices).
    """

    def __init__(self, run: Callable[[], Any], device: torch.device, pool: Any = None) -> None:
        self._run, self._graph = run, None
        self.output: Any = None
        if device.type != "cuda":
            return
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles kernels, makes handles
                run()
        torch.cuda.current_stream(device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # Tables of pointers that the launches read live as long as the graph.
        with hold_tables() as self._tables, torch.cuda.graph(self._graph, pool=pool):
            self.output = run()

    def __call__(self, i: int = 0) -> object:
        if self._graph is None:
            self.output = self._run()
        else:
            self._graph.replay()
        return self.output


def cache_bytes(device: torch.device) -> int:
    """The last cache before memory; 64 MB where it is not known."""
    if device.type == "cuda":
        known = torch.cuda.get_device_properties(device)
        return int(getattr(known, "L2_cache_size", 0)) or 64 << 20
    return 64 << 20


def sets_for(size: int, device: torch.device) -> int:
    """How many sets of inputs of `size` bytes make three times the cache, within limits."""
    if device.type != "cuda":
        return 1
    wanted = math.ceil(3 * cache_bytes(device) / max(size, 1)) + 1
    return max(2, min(wanted, MAX_SETS, ROTATED_BYTES // max(size, 1)))


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of all of them together."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
