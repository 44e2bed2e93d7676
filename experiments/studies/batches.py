"""What a large batch is worth: `python -m experiments.studies.batches --data-dir DIR`.

Full ZO at equal epochs over the size of the batch, by each kind of direction: test accuracy, and
the steps to 90 %. The rate of what learns from every sample follows one rule and is not tuned
again: that of the recipe, found at batch 64, times the root of batch / 64, as for Adam on any
estimate whose error falls with the batch. That of directions of the batch stays: their error does
not fall (`experiments.estimator.by_sample`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from rich.table import Table

from experiments.commands import RESULTS, plain_console, run_command
from experiments.files import write_json
from experiments.studies.study import in_own_folder, made_by, options, run_all, without_places
from experiments.train.config import Data, Directions, TrainConfig
from experiments.train.folder import metrics_of
from experiments.train.plots import pyplot, save

COMMAND = "python -m experiments.studies.batches"
OF_RECIPE = 64  # the batch that its rates were found at
ENOUGH = 90.0  # % that the steps are counted to
Key = tuple[str, int]


@dataclass(frozen=True)
class BatchConfig:
    """Full ZO over the size of the batch, by kind of direction."""

    data_dir: Path | None = None
    """Folder of the data set's files; not needed for digits."""
    data: Data = "mnist"
    """Images."""
    kinds: tuple[Directions, ...] = ("weight", "sample", "node", "feedback")
    """By whose noise the head learns."""
    batches: tuple[int, ...] = (64, 256, 1024, 4096)
    """Samples of a step."""
    epochs: int = 4
    """Passes over the training set, >= 1: the same for all."""
    seed: int = 0
    """Of weights, noise and data order."""
    hold_out: int = 0
    """Test on so many training images kept out of training, in place of the test set."""
    threads: int | None = None
    """CPU threads of torch, >= 1. Default: torch's own."""
    out: Path = Path("runs/batches")
    """Folder of the runs; a finished one is not repeated."""
    results: Path = RESULTS
    """Folder of batches_<data>.json and .png."""


def scaled(config: TrainConfig) -> TrainConfig:
    """A resolved configuration with the rate that the rule gives its batch."""
    assert config.head_lr is not None
    if config.directions == "weight":
        return config
    return replace(config, head_lr=config.head_lr * math.sqrt(config.batch_size / OF_RECIPE))


def configurations(study: BatchConfig) -> dict[Key, TrainConfig]:
    """All runs."""
    runs: dict[Key, TrainConfig] = {}
    for batch in study.batches:
        for kind in study.kinds:
            config = TrainConfig(
                method="full-zo", directions=kind, batch_size=batch, data=study.data,
                data_dir=study.data_dir, epochs=study.epochs, seed=study.seed,
                hold_out=study.hold_out, threads=study.threads, device="cpu",
            )  # fmt: skip
            folder = study.out / study.data
            runs[kind, batch] = in_own_folder(scaled(in_own_folder(config, folder)), folder)
    return runs


def row_of(key: Key, config: TrainConfig, result: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy, and after how many steps a test first found 90 %; None where none did."""
    assert config.out is not None
    enough = [
        line["step"] for line in metrics_of(config.out, "test") if line["test_accuracy"] >= ENOUGH
    ]
    return {
        "kind": key[0],
        "batch": key[1],
        "test_accuracy": result["test_accuracy"],
        "steps": result["steps"],
        "steps_to_90": enough[0] if enough else None,
        "head_lr": config.head_lr,
    }


def draw(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Accuracy over the batch, and steps to 90 %."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        batches = [row["batch"] for row in own]
        left.plot(batches, [row["test_accuracy"] for row in own], marker="o", label=kind)
        there = [row for row in own if row["steps_to_90"] is not None]
        steps = [row["steps_to_90"] for row in there]
        right.plot([row["batch"] for row in there], steps, marker="o", label=kind)
    left.set(xscale="log", xlabel="batch", ylabel="test accuracy (%)", title=title)
    right.set(xscale="log", xlabel="batch", ylabel="steps to 90 % (tests by epoch)")
    if any(row["steps_to_90"] is not None for row in rows):  # a log scale wants a value
        right.set_yscale("log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend()
    save(plt, figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, report."""
    study = tyro.cli(BatchConfig, args=arguments, prog=COMMAND)
    console = plain_console()
    runs: dict[Key, TrainConfig] = {}

    def work() -> dict[Key, dict[str, Any]]:
        runs.update(configurations(study))
        return run_all(runs, COMMAND, console)

    def finish(results: dict[Key, dict[str, Any]]) -> int:
        rows = [row_of(key, runs[key], result) for key, result in results.items()]
        table = Table("batch", "kind", "test accuracy", "steps", "steps to 90 %")
        for row in rows:
            steps = "never" if row["steps_to_90"] is None else str(row["steps_to_90"])
            accuracy = f"{row['test_accuracy']:.2f} %"
            table.add_row(str(row["batch"]), row["kind"], accuracy, str(row["steps"]), steps)
        console.print(table)
        path = study.results / f"batches_{study.data.replace('-', '_')}"
        first = next(iter(runs.values()))
        head = {
            "command": f"{COMMAND} --data-dir DIR" + options(study),
            "meaning": "Full ZO, LeNet-5; rates by the recipe times sqrt(batch / 64), but for "
            "weight; steps_to_90: the first test, one an epoch, that found 90 %",
            "config": without_places(first),
            **made_by(results),
        }
        write_json(path.with_suffix(".json"), {**head, "epochs": study.epochs, "rows": rows})
        draw(path.with_suffix(".png"), rows, f"Full ZO, {study.data}, {study.epochs} epochs")
        console.print(f"written: {path}.json and .png", markup=False)
        return 0

    return run_command(work, finish, console)


if __name__ == "__main__":
    sys.exit(main())
