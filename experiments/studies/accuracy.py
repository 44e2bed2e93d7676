"""What ZO training of the head brings: `python -m experiments.studies.accuracy --data-dir DIR`.

Every method, and for the two mixed ones the control (the same tail on a head that stays random),
over several seeds with the defaults of the training command. Differences to the control are taken
seed by seed: both start from the same weights.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from experiments.commands import RESULTS, plain_console, run_command
from experiments.files import write_json
from experiments.studies.study import (
    in_own_folder,
    made_by,
    options,
    run_all,
    shared,
    without_places,
)
from experiments.train.config import TrainConfig
from experiments.train.plots import draw_points, standard_error
from experiments.train.recipes import CONTROLS, METHODS

COMMAND = "python -m experiments.studies.accuracy"
# Test accuracy in % that MNIST must reach with the defaults.
FLOORS: Mapping[str, float] = {"full-zo": 75.0, "cls2": 90.0, "cls1": 94.0, "full-bp": 98.5}
CLS2_GAIN = 3.0  # points over the control
CLS1_ERRORS = 2.0  # standard errors over the control
Accuracies = dict[str, list[float]]


@dataclass(frozen=True)
class AccuracyConfig:
    """Accuracy of every method and of the controls, over several seeds."""

    data_dir: Path | None = None
    """Folder of the image files; not needed for digits."""
    data: Literal["digits", "mnist", "fashion-mnist"] = "mnist"
    """Image set."""
    download: bool = False
    """Fetch missing files of the image set into data_dir."""
    precision: Literal["fp32", "int8"] = "fp32"
    """fp32, or int8: ElasticZO-INT8."""
    seeds: int = 5
    """Seeds 0 to seeds - 1, >= 1."""
    epochs: int = 6
    """Passes over the training images, >= 1."""
    batch_size: int = 64
    """Images a step, >= 1."""
    hold_out: int = 0
    """Test on so many training images kept out of training, in place of the test set."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda or cuda:<n>."""
    threads: int | None = None
    """CPU threads of torch, >= 1. Default: torch's own."""
    out: Path = Path("runs/accuracy")
    """Folder of the runs; a finished one is not repeated."""
    results: Path = RESULTS
    """Folder of accuracy_<data>.json and .png, accuracy_<data>_int8 for precision int8."""


def configurations(study: AccuracyConfig) -> dict[tuple[str, int], TrainConfig]:
    """All runs, seed by seed: an interrupted study has whole comparisons."""
    if study.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {study.seeds}")
    runs: dict[tuple[str, int], TrainConfig] = {}
    for seed in range(study.seeds):
        for method in METHODS:
            config = TrainConfig(method=method, seed=seed, **shared(study))
            runs[method, seed] = in_own_folder(config, study.out / study.data)
    return runs


def compare(accuracies: Accuracies) -> dict[str, dict[str, float]]:
    """Mean difference to the control and its standard error, over pairs of equal seed."""
    compared = {}
    for method, control in CONTROLS.items():
        pairs = zip(accuracies[method], accuracies[control], strict=True)
        gains = [a - b for a, b in pairs]
        compared[method] = {
            "difference": sum(gains) / len(gains),
            "standard_error": standard_error(gains),
        }
    return compared


def check_floors(study: AccuracyConfig, accuracies: Accuracies) -> dict[str, bool]:
    """Each promise in words, and whether it is kept. For MNIST in FP32; elsewhere none is made."""
    kept: dict[str, bool] = {}
    if (study.data, study.precision) != ("mnist", "fp32"):
        return kept
    for method, floor in FLOORS.items():
        values = accuracies[method]
        kept[f"{method} >= {floor:g} %"] = sum(values) / len(values) >= floor
    gains = compare(accuracies)
    kept[f"cls2 >= control + {CLS2_GAIN:g} points"] = gains["cls2"]["difference"] >= CLS2_GAIN
    least = CLS1_ERRORS * gains["cls1"]["standard_error"]
    kept[f"cls1 > control + {CLS1_ERRORS:g} standard errors"] = gains["cls1"]["difference"] > least
    return kept


def write_results(
    study: AccuracyConfig,
    runs: Mapping[tuple[str, int], TrainConfig],
    results: Mapping[tuple[str, int], dict[str, Any]],
    accuracies: Accuracies,
) -> Path:
    """The JSON and the picture; the path without its ending."""
    methods = {}
    for method, values in accuracies.items():
        own = [r for (m, _), r in results.items() if m == method]
        methods[method] = {
            "accuracies": values,
            "mean": sum(values) / len(values),
            "standard_error": standard_error(values),
            "skipped_steps": sum(r["skipped"] for r in own),
            "ms_per_step": [r["ms_per_step"] for r in own],
            "config": without_places(runs[method, 0]),
        }
    int8 = study.precision == "int8"
    name = f"accuracy_{study.data.replace('-', '_')}"
    path = study.results / (f"{name}_int8" if int8 else name)
    tested = f"{study.hold_out} held-out training images" if study.hold_out else "the test set"
    summary = {
        "command": f"{COMMAND} --data {study.data} --data-dir DIR" + options(study, "data"),
        "tested_on": tested,
        "seeds": list(range(study.seeds)),
        "epochs": study.epochs,
        "batch_size": study.batch_size,
        "methods": methods,
        "over_control": compare(accuracies),
        "floors": check_floors(study, accuracies),
        **made_by(results),
    }
    write_json(path.with_suffix(".json"), summary)
    title = f"LeNet-5, {study.precision}, {study.data}, {study.epochs} epochs, {study.seeds} seeds"
    floors = FLOORS if study.data == "mnist" and not int8 else {}
    draw_points(path.with_suffix(".png"), title, accuracies, floors)
    return path


def show(study: AccuracyConfig, accuracies: Accuracies, console: Console) -> None:
    table = Table(title=f"{study.data}, {study.epochs} epochs, {study.seeds} seeds")
    for name in ("method", "test accuracy", "over the control"):
        table.add_column(name)
    gains = compare(accuracies)
    for method, values in accuracies.items():
        gain = gains.get(method)
        over = f"{gain['difference']:+.2f} ± {gain['standard_error']:.2f}" if gain else ""
        mean = sum(values) / len(values)
        table.add_row(method, f"{mean:.2f} ± {standard_error(values):.2f} %", over)
    console.print(table)
    for promise, kept in check_floors(study, accuracies).items():
        console.print(f"{'kept  ' if kept else 'BROKEN'} {promise}", markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, report; 1 where a floor is not reached, else the training command's status."""
    study = tyro.cli(AccuracyConfig, args=arguments, prog=COMMAND)
    console = plain_console()
    runs: dict[tuple[str, int], TrainConfig] = {}

    def work() -> dict[tuple[str, int], dict[str, Any]]:
        runs.update(configurations(study))
        return run_all(runs, COMMAND, console)

    def finish(results: dict[tuple[str, int], dict[str, Any]]) -> int:
        accuracies: Accuracies = {m: [] for m in METHODS}
        for (method, _), result in results.items():
            accuracies[method].append(result["test_accuracy"])
        path = write_results(study, runs, results, accuracies)
        show(study, accuracies, console)
        console.print(f"written: {path}.json and .png", markup=False)
        return 0 if all(check_floors(study, accuracies).values()) else 1

    return run_command(work, finish, console)


if __name__ == "__main__":
    sys.exit(main())
