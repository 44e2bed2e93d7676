"""Times of the stages of LeNet-5's training step, of every method and precision in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import track

from experiments.commands import RESULTS
from experiments.studies.stages import STAGES, Stopwatch, watched
from experiments.timing import Timings
from experiments.train.config import Method, TrainConfig
from experiments.train.data import load_data
from experiments.train.learner import Learner, learner_for
from experiments.train.resolve import resolve

METHODS: tuple[Method, ...] = ("full-zo", "cls2", "cls1", "full-bp")
WARM_UP = 3  # steps: compilation, the first forward's checks


@dataclass(frozen=True)
class BreakdownConfig:
    """The stages of a training step of LeNet-5."""

    methods: tuple[Method, ...] = METHODS
    """Methods to compare."""
    precisions: tuple[Literal["fp32", "int8"], ...] = ("fp32", "int8")
    """Precisions to compare."""
    batches: tuple[int, ...] = (32, 256)
    """Images a step, each >= 1."""
    rounds: int = 60
    """Steps of each method that are timed, >= 1."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda or cuda:<n>."""
    threads: int = 1
    """CPU threads of torch, >= 1."""
    results: Path = RESULTS
    """Folder of breakdown_<device>.json and .png."""


def learner_of(config: BreakdownConfig, method: Method, precision: str, batch: int) -> Learner:
    """A fresh run of the recipe that is long enough."""
    given = TrainConfig(
        method=method,
        precision="int8" if precision == "int8" else "fp32",
        data="digits",
        batch_size=batch,
        epochs=100 * (config.rounds + WARM_UP),
        device=config.device,
        threads=config.threads,
    )
    made = resolve(given)
    return learner_for(made, load_data(made))


def verify(config: BreakdownConfig) -> None:
    """Refuse to time what is wrong: watched steps leave the weights of steps that are not."""
    for precision in config.precisions:
        for method in config.methods:
            plain, other = (learner_of(config, method, precision, 32) for _ in range(2))
            watch = Stopwatch(other.device)
            for _ in range(2):
                plain.step()
                with watched(other, watch):
                    watch.time(other.step)
            state = other.model.state_dict()
            if not all(torch.equal(w, state[k]) for k, w in plain.model.state_dict().items()):
                raise SystemExit(f"{method}, {precision}: a watched step leaves other weights")


def plain_time(learner: Learner) -> float:
    """Seconds of a step that nobody watches, by the same clock."""
    watch = Stopwatch(learner.device)
    return sum(watch.time(learner.step).values())


Name = tuple[Method, str]


def measure(config: BreakdownConfig, batch: int, console: Console) -> dict[Name, Timings]:
    """Seconds of the stages, of their sum ("sum") and of an unwatched step ("plain"), by round."""
    learners = {
        (method, precision): learner_of(config, method, precision, batch)
        for precision in config.precisions
        for method in config.methods
    }
    found: dict[Name, dict[str, list[float]]] = {
        name: {key: [] for key in (*STAGES, "sum", "plain")} for name in learners
    }
    for learner in learners.values():
        for _ in range(WARM_UP):
            learner.step()
    disable = not console.is_terminal
    rounds = track(range(config.rounds), f"batch {batch}", console=console, disable=disable)
    for i in rounds:
        names = list(learners)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            learner, watch = learners[name], Stopwatch(learners[name].device)

            def with_stages(learner: Any = learner, watch: Any = watch) -> dict[str, float]:
                with watched(learner, watch):
                    stages: dict[str, float] = watch.time(learner.step)
                return stages | {"sum": sum(stages.values())}

            def without(learner: Any = learner) -> dict[str, float]:
                return {"plain": plain_time(learner)}

            order: list[Callable[[], dict[str, float]]] = [with_stages, without]
            for run in order if i % 2 else reversed(order):
                for key, seconds in run().items():
                    found[name][key].append(seconds)
    return {name: Timings(seconds) for name, seconds in found.items()}


def row(name: Name, batch: int, timings: Timings) -> dict[str, Any]:
    """Medians and 20 and 80 percentiles in microseconds, standard deviations, shares of the sum."""
    method, precision = name
    stages = {}
    whole = sum(timings.median(stage) for stage in STAGES)
    for stage in STAGES:
        spread = statistics.pstdev(timings.seconds[stage])
        share = timings.median(stage) / whole
        stages[stage] = {**timings.row(stage), "us_sd": 1e6 * spread, "share": share}
    return {
        "method": method,
        "precision": precision,
        "batch": batch,
        "stages": stages,
        "plain": timings.row("plain"),
        "sum_over_plain": timings.ratio("sum", "plain"),
    }
