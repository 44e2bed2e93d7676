"""Does the head descend, or only move? `python -m experiments.studies.random_walk --data-dir DIR`.

Beside ElasticZO and its control (the same tail on a frozen head) a third run: the head takes steps
of the same size along the same kind of directions, but each with a sign that a coin decides. What
the method has over this random walk its projected gradients have earned; what the walk has under
the frozen head is the price of moving, which the tail pays.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import torch
import tyro
from rich.table import Table
from torch import Tensor

from experiments.commands import RESULTS, plain_console, run_command, tracked
from experiments.files import write_json
from experiments.studies.study import options, shared, without_places
from experiments.train.config import Data, Model, TrainConfig
from experiments.train.data import Samples, load_data
from experiments.train.environment import made_on, use_threads
from experiments.train.learner import FloatLearner
from experiments.train.plots import standard_error
from experiments.train.recipes import CONTROLS
from experiments.train.resolve import pick_device, resolve

HEADS = ("frozen", "walks", "descends")
Bar = Callable[[str, int], Iterable[int]]


@dataclass(frozen=True)
class WalkConfig:
    """ElasticZO beside a head that is frozen and one that takes random steps."""

    data_dir: Path | None = None
    """Folder of the data set's files; not needed for digits."""
    model: Model = "lenet5"
    """Network."""
    data: Data = "mnist"
    """Images, or clouds for pointnet."""
    method: Literal["cls2", "cls1"] = "cls2"
    """Whose cut and recipe; the control has its own."""
    epochs: int = 2
    """Passes over the training samples, >= 1."""
    batch_size: int = 64
    """Samples a step, >= 1."""
    points: int | None = None
    """Points of a cloud. Default: the training command's."""
    head_lr: float | None = None
    """Learning rate of the head. Default: the recipe's."""
    seeds: int = 3
    """Seeds 0 to seeds - 1, >= 2."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda or cuda:<n>."""
    threads: int = 1
    """CPU threads of torch, >= 1."""
    results: Path = RESULTS
    """Folder of random_walk_<data>_<method>.json."""


class Walker(FloatLearner):
    """A learner whose head does not descend: the sign of each projected gradient is random."""

    def __init__(self, config: TrainConfig, data: Samples) -> None:
        super().__init__(config, data)
        self.coin = torch.Generator().manual_seed(config.seed)

    def head_losses(self, losses: Tensor) -> Tensor:
        turned = bool(torch.randint(2, (), generator=self.coin))
        return losses.flip(0) if turned else losses


def configurations(study: WalkConfig) -> dict[str, TrainConfig]:
    """By what the head does, for seed 0."""
    if study.seeds < 2:
        raise ValueError(f"seeds must be at least 2, got {study.seeds}")
    own = TrainConfig(**shared(study))
    control = replace(own, method=CONTROLS[study.method], head_lr=None)
    return {"frozen": resolve(control), "walks": resolve(own), "descends": resolve(own)}


def measure(study: WalkConfig, bar: Bar) -> dict[str, Any]:
    """Test accuracy and loss of each head and seed."""
    configs = configurations(study)
    use_threads(study.threads)
    data = load_data(configs["frozen"])
    found: dict[str, Any] = {}
    for head in HEADS:
        tests = []
        for seed in range(study.seeds):
            kind = Walker if head == "walks" else FloatLearner
            learner = kind(replace(configs[head], seed=seed), data)
            for _ in bar(f"{head}, seed {seed}", learner.steps):
                learner.step()
            tests.append(learner.evaluate())
        accuracies = [accuracy for accuracy, _ in tests]
        found[head] = {
            "accuracies": accuracies,
            "losses": [loss for _, loss in tests],
            "mean": mean(accuracies),
            "sd": stdev(accuracies),
            "config": without_places(configs[head]),
        }
    return {"heads": found, "gains": gains(found)}


def gains(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Points of test accuracy seed by seed: mean and standard error."""
    pairs = {
        "descends over walks": ("descends", "walks"),
        "descends over frozen": ("descends", "frozen"),
        "walks over frozen": ("walks", "frozen"),
    }
    made = {}
    for name, (one, other) in pairs.items():
        differences = [
            a - b for a, b in zip(found[one]["accuracies"], found[other]["accuracies"], strict=True)
        ]
        error = standard_error(differences)
        made[name] = {"mean": mean(differences), "standard_error": error}
    return made


def command(study: WalkConfig) -> str:
    """What to type to run it again; folders are the reader's."""
    place = "" if study.data == "digits" else " --data-dir DIR"
    return f"python -m experiments.studies.random_walk{options(study)}{place}"


def table(found: dict[str, Any]) -> Table:
    """A line a head."""
    shown = Table(box=None, pad_edge=False)
    for name in ("head", "test accuracy %", "loss"):
        shown.add_column(name, justify="left" if name == "head" else "right")
    for head in HEADS:
        row = found["heads"][head]
        accuracy = f"{row['mean']:.2f} ± {row['sd']:.2f}"
        shown.add_row(head, accuracy, f"{mean(row['losses']):.3f}")
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, train, write."""
    study = tyro.cli(WalkConfig, args=arguments, prog="python -m experiments.studies.random_walk")
    console = plain_console()

    def bar(title: str, count: int) -> Iterable[int]:
        return tracked(range(count), title, console)

    def finish(found: dict[str, Any]) -> None:
        path = study.results / f"random_walk_{study.data.replace('-', '_')}_{study.method}.json"
        made = made_on(pick_device(study.device))
        write_json(path, {"command": command(study), "epochs": study.epochs, **found, **made})
        console.print(table(found))
        for name, gain in found["gains"].items():
            console.print(f"{name}: {gain['mean']:+.2f} ± {gain['standard_error']:.2f} points")
        console.print(f"written: {path}", markup=False)

    return run_command(lambda: measure(study, bar), finish, console)


if __name__ == "__main__":
    sys.exit(main())
