"""The integer loss in real runs: `python -m experiments.studies.integer_signs --data-dir DIR`.

ElasticZO-INT8 trains as the training command does, and at every step the sign of L+ - L- by the
integer cross-entropy, with F fractional bits, is held against that of float64's cross-entropy on
the same int8 logits. All steps count, those of a network that has learned as well as the first.
The cost of the losses is that of both halves of one step, in turn, on the logits of the last run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import Progress, TaskID
from torch import Tensor

from elasticzo.int8 import Int8Tensor
from experiments.commands import RESULTS, plain_console, run_command
from experiments.files import write_json
from experiments.studies.signs import float_losses, sign_errors, table
from experiments.timing import Contestant, in_turn
from experiments.train.config import Method, TrainConfig
from experiments.train.data import load_data
from experiments.train.environment import made_on
from experiments.train.learner import Int8Learner
from experiments.train.resolve import resolve
from zo_kernels import integer_cross_entropy

MOST_DIFFER = 1e-3  # share of steps whose sign may not be float64's
ROUNDS = 200


@dataclass(frozen=True)
class Config:
    """Signs of the integer loss against float64's, at every step of real runs."""

    data_dir: Path | None = None
    """Holds a folder for each image set: mnist, fashion-mnist. Not needed for digits."""
    data: tuple[Literal["digits", "mnist", "fashion-mnist"], ...] = ("mnist", "fashion-mnist")
    """Image sets."""
    methods: tuple[Method, ...] = ("full-zo", "cls2", "cls1")
    """Methods with a head."""
    batches: tuple[int, ...] = (32, 256)
    """Images a step."""
    fraction_bits: tuple[int, ...] = (0, 4, 8, 9, 10, 11, 12)
    """F to compare, each in [0, 16]; the run itself trains with the recipe's."""
    epochs: int = 6
    """Of each run, >= 1."""
    seed: int = 0
    """Of each run."""
    out: Path = RESULTS / "integer_signs.json"
    """The file to write."""


def configurations(study: Config) -> Iterator[TrainConfig]:
    for data in study.data:
        for method in study.methods:
            for batch in study.batches:
                folder = None if study.data_dir is None else study.data_dir / data
                yield resolve(
                    TrainConfig(
                        precision="int8",
                        data=data,
                        data_dir=folder,
                        method=method,
                        batch_size=batch,
                        epochs=study.epochs,
                        seed=study.seed,
                        threads=1,
                    )
                )


class Recorder:
    """Trains a configuration and keeps the logits and labels of every step."""

    def __init__(self, config: TrainConfig) -> None:
        self.learner = Int8Learner(config, load_data(config))
        model = self.learner.model
        if model.cut.everything:
            raise ValueError(f"{config.method} has no head: nothing uses the sign of its loss")
        self.logits: list[Tensor] = []
        self.exponents: list[Tensor] = []
        self.targets: list[Tensor] = []
        self._losses = model.losses
        model.losses = self._keep  # type: ignore[method-assign]

    def _keep(self, logits: Int8Tensor, y: Tensor) -> Tensor:
        self.logits.append(logits.q[:2].cpu())
        self.exponents.append(logits.exponent[:2].cpu())
        self.targets.append(y.cpu())
        return self._losses(logits, y)

    def steps(self) -> Iterator[int]:
        for _ in range(self.learner.steps):
            self.learner.step()
            yield 1

    def kept(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits `[N, 2, B, C]`, exponents `[N, 2]`, labels `[N, B]`."""
        return torch.stack(self.logits), torch.stack(self.exponents), torch.stack(self.targets)


def row(config: TrainConfig, study: Config, bar: Progress, whole: TaskID) -> dict[str, Any]:
    recorder = Recorder(config)
    task = bar.add_task(f"{config.data} {config.method} {config.batch_size}", total=None)
    bar.update(task, total=recorder.learner.steps)
    for done in recorder.steps():
        bar.advance(task, done)
    kept = recorder.kept()
    bar.remove_task(task)
    bar.advance(whole)
    return {
        "data": config.data,
        "method": config.method,
        "batch": config.batch_size,
        "steps": len(kept[0]),
        "test_accuracy": recorder.learner.evaluate()[0],
        "fraction_bits": sign_errors(*kept, study.fraction_bits),
        "cost_us": cost(*kept, study.fraction_bits),
    }


def cost(
    logits: Tensor, exponent: Tensor, target: Tensor, fraction_bits: tuple[int, ...]
) -> dict[str, float]:
    """Median microseconds of CPU for both losses of a step, by F and in float64; taken in turn."""
    step = (logits[-1], exponent[-1], target[-1])
    calls: dict[str, Contestant] = {
        str(f): lambda i, f=f: integer_cross_entropy(*step, fraction_bits=f)  # type: ignore[misc]
        for f in fraction_bits
    }
    calls["float64"] = lambda i: float_losses(*(t[None] for t in step))
    times = in_turn(calls, range(ROUNDS), time.process_time_ns)
    return {name: 1e6 * times.median(name) for name in calls}


def smallest(rows: list[dict[str, Any]], fraction_bits: tuple[int, ...]) -> int | None:
    """The least F with which no run differs from float64 in more than 0.1 % of its steps."""
    for f in sorted(fraction_bits):
        if all(r["fraction_bits"][str(f)]["differ"] <= MOST_DIFFER for r in rows):
            return f
    return None


def main(study: Config) -> int:
    torch.set_num_threads(1)

    def work() -> list[dict[str, Any]]:
        configs = list(configurations(study))
        with Progress(console=Console(stderr=True)) as bar:
            whole = bar.add_task("runs", total=len(configs))
            return [row(config, study, bar, whole) for config in configs]

    def finish(rows: list[dict[str, Any]]) -> None:
        f = smallest(rows, study.fraction_bits)
        most = f"{100 * MOST_DIFFER:g} %"
        print("wrong / zero signs, % of steps\n" + table(rows, but=("cost_us",)))
        print(f"smallest F with at most {most} of steps differing in every run: {f}")
        written = {
            "command": "python -m experiments.studies.integer_signs --data-dir DIR",
            **made_on(torch.device("cpu")),
            "epochs": study.epochs,
            "seed": study.seed,
            "smallest_fraction_bits": f,
            "rows": rows,
        }
        write_json(study.out, written)
        print(f"wrote {study.out}")

    return run_command(work, finish, plain_console())


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
