"""Where the recipes stand: `python -m experiments.studies.sweep --data-dir DIR`.

Short runs, tested on held-out training images (never on the test set). Floats: a grid of head
learning rates and eps around the default of each method; what diverged is shown as such. Integers:
the recipe with one setting changed at a time: what r_max, p_zero, b_zo, b_bp, logit_shift and the
source of the tail are worth.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import tyro

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
from experiments.train.config import Method, TrainConfig
from experiments.train.data import load_data
from experiments.train.fields import FIELDS
from experiments.train.learner import learner_for
from experiments.train.plots import Grid, draw_changes, draw_grids, standard_error
from experiments.train.resolve import resolve

COMMAND = "python -m experiments.studies.sweep"
WITH_HEAD: tuple[Method, ...] = ("full-zo", "cls2", "cls1")
Point = tuple[str, str, int]  # method, change, seed
Changes = dict[str, Any]  # fields of a configuration
Results = Mapping[Point, dict[str, Any]]


@dataclass(frozen=True)
class SweepConfig:
    """Held-out accuracy around the recipes."""

    data_dir: Path | None = None
    """Folder of the image files; not needed for digits."""
    data: Literal["digits", "mnist", "fashion-mnist"] = "mnist"
    """Image set."""
    precision: Literal["fp32", "int8"] = "fp32"
    """fp32: over head_lr and eps; int8: one change to the recipe at a time."""
    methods: tuple[Method, ...] | None = None
    """Methods, for fp32 with a head to train. Default: full-zo, cls2, cls1; int8: full-bp, too."""
    lr_factors: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    """fp32: factors > 0 on the default head_lr."""
    eps: tuple[float, ...] = (1e-3, 1e-2, 3e-2, 1e-1)
    """fp32: perturbation scales, > 0; the default of each method is added."""
    train_images: int | None = None
    """Training images of a run. Default: 12,800; int8: 20,000."""
    hold_out: int = 5_000
    """Held-out training images that a run is tested on, >= 1."""
    epochs: int | None = None
    """Passes over them, >= 1. Default: 1; int8: 6."""
    seed: int = 0
    """The first."""
    seeds: int | None = None
    """Seeds from the first on, >= 1. Default: 1; int8: 2."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda or cuda:<n>."""
    threads: int | None = None
    """CPU threads of torch, >= 1. Default: torch's own; int8: 1."""
    out: Path | None = None
    """Folder of the runs; a finished one is not repeated. Default: runs/sweep; int8:
    runs/int8_sweep."""
    results: Path = RESULTS
    """Folder of sweep_<data>.json and .png; int8: int8_sweep_<data>."""


DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "fp32": {
        "methods": WITH_HEAD,
        "train_images": 12_800,
        "epochs": 1,
        "seeds": 1,
        "out": Path("runs/sweep"),
    },
    "int8": {
        "methods": (*WITH_HEAD, "full-bp"),
        "train_images": 20_000,
        "epochs": 6,
        "seeds": 2,
        "threads": 1,
        "out": Path("runs/int8_sweep"),
    },
}


class Sweep:
    """A checked configuration with its defaults, and the runs that it wants.

    Raises: ValueError that says which field expected what, and what came.
    """

    def __init__(self, given: SweepConfig) -> None:
        decided = DEFAULTS[given.precision].items()
        missing = {k: v for k, v in decided if getattr(given, k) is None}
        self.given, self.config = given, replace(given, **missing)
        c = self.config
        if c.hold_out < 1:
            raise ValueError(f"hold_out must be at least 1 (a sweep chooses), got {c.hold_out}")
        assert c.seeds is not None and c.methods is not None and c.out is not None
        if c.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {c.seeds}")
        if c.precision == "fp32" and not {*c.methods} <= {*WITH_HEAD}:
            raise ValueError(f"methods of fp32 must be of {', '.join(WITH_HEAD)}, got {c.methods}")
        self.seeds, self.methods = range(c.seed, c.seed + c.seeds), c.methods
        self.runs: dict[Point, TrainConfig] = {}
        for seed, method in product(self.seeds, c.methods):
            base = self.base(method, seed)
            tried = changes(base) if c.precision == "int8" else self.grid(base)
            for name, change in tried.items():
                config = replace(base, **change)
                self.runs[method, name, seed] = in_own_folder(config, c.out / c.data)

    def base(self, method: Method, seed: int) -> TrainConfig:
        """A short run of the method with its recipe."""
        given = shared(self.config, "eps", "seed")
        return resolve(TrainConfig(method=method, seed=seed, **given))

    def grid(self, config: TrainConfig) -> dict[str, Changes]:
        """Every head_lr with every eps."""
        assert config.head_lr is not None and config.eps is not None
        axes = sorted({*self.config.eps, config.eps}), sorted({*self.config.lr_factors, 1.0})
        pairs = [(config.head_lr * factor, eps) for eps, factor in product(*axes)]
        return {f"head_lr {lr!r}, eps {eps!r}": {"head_lr": lr, "eps": eps} for lr, eps in pairs}

    def of(self, method: str, name: str) -> list[Point]:
        """The points of all seeds."""
        return [(method, name, seed) for seed in self.seeds]

    @property
    def names(self) -> dict[tuple[str, str], None]:
        """Methods and changes, in their order."""
        return dict.fromkeys((method, name) for method, name, _ in self.runs)


def changes(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """One setting changed at a time; the recipe itself first.

    Args:
        config: resolved, of precision int8.
    """
    assert config.r_max and config.p_zero and config.b_zo and config.b_bp
    assert config.logit_shift is not None
    found: dict[str, dict[str, Any]] = {"recipe": {}}
    head, tail = config.method != "full-bp", config.method != "full-zo"
    if head:
        for factor in (0.5, 2):
            r_max = tuple(round(factor * r) for r in config.r_max)
            found[f"r_max x {factor:g}"] = {"r_max": FIELDS["r_max"].clipped(r_max)}
            moved = tuple(round(max(0.0, 1.0 - factor * (1.0 - p)), 6) for p in config.p_zero)
            found[f"share x {factor:g}"] = {"p_zero": moved}
        share = 1.0 - sum(config.p_zero) / len(config.p_zero)
        found["share constant"] = {"p_zero": (round(1.0 - share, 6),)}
        for more in (-1, 1):
            bits = tuple(b + more for b in config.b_zo)
            found[f"b_zo {more:+d}"] = {"b_zo": FIELDS["b_zo"].clipped(bits)}
        found["no scales"] = {"scale": {}}
    if tail:
        for more in (-1, 1):
            bits = tuple(b + more for b in config.b_bp)
            found[f"b_bp {more:+d}"] = {"b_bp": FIELDS["b_bp"].clipped(bits)}
        found["b_bp constant"] = {"b_bp": (round(sum(config.b_bp) / len(config.b_bp)),)}
    if head and tail:
        source = "plus" if config.tail_source == "mean" else "mean"
        found[f"tail from {source}"] = {"tail_source": source}
    for more in (-2, 2):
        (shift,) = FIELDS["logit_shift"].clipped((config.logit_shift + more,))
        found[f"logit_shift {more:+d}"] = {"logit_shift": shift}
    return found


# ---- floats


def diverged(result: Mapping[str, Any], untrained: float) -> bool:
    """Whether steps were skipped, or the loss ended no lower than it began."""
    loss = result["test_loss"]
    return bool(result["skipped"]) or loss is None or loss >= untrained


def of_floats(sweep: Sweep, results: Results) -> dict[str, Any]:
    """Accuracy (mean of the seeds) and whether a run diverged, over the grid."""
    defaults: dict[str, TrainConfig] = {m: sweep.base(m, sweep.config.seed) for m in sweep.methods}
    # Held-out loss before the first step.
    start = {m: learner_for(c, load_data(c)).evaluate()[1] for m, c in defaults.items()}
    points = []
    for method, name in sweep.names:
        keys = sweep.of(method, name)
        points.append(
            {
                "method": method,
                "head_lr": sweep.runs[keys[0]].head_lr,
                "eps": sweep.runs[keys[0]].eps,
                "accuracy": fmean(results[key]["test_accuracy"] for key in keys),
                "diverged": any(diverged(results[key], start[method]) for key in keys),
            }
        )
    return {
        "defaults": {m: without_places(c) for m, c in defaults.items()},
        "untrained_loss": start,
        "points": points,
    }


def grids(found: Mapping[str, Any]) -> dict[str, Grid]:
    """One grid a method: accuracies [eps][lr], None where the run diverged."""
    made: dict[str, Grid] = {}
    for method, default in found["defaults"].items():
        own = {(p["eps"], p["head_lr"]): p for p in found["points"] if p["method"] == method}
        epss, lrs = (sorted({*axis}) for axis in zip(*own, strict=True))
        values = [
            [None if own[e, lr]["diverged"] else own[e, lr]["accuracy"] for lr in lrs] for e in epss
        ]
        made[method] = Grid(lrs, epss, values, (default["head_lr"], default["eps"]))
    return made


# ---- integers


def of_integers(sweep: Sweep, results: Results) -> dict[str, Any]:
    """Accuracies of every change, by method."""
    methods: dict[str, Any] = {}
    for method, name in sweep.names:
        values = [results[key]["test_accuracy"] for key in sweep.of(method, name)]
        methods.setdefault(method, {"points": {}})["points"][name] = {
            "accuracies": values,
            "mean": sum(values) / len(values),
            "standard_error": standard_error(values) if len(values) > 1 else None,
        }
    for method, entry in methods.items():
        entry["recipe"] = without_places(sweep.runs[method, "recipe", sweep.config.seed])
    c = sweep.config
    sizes = {"train_images": c.train_images, "epochs": c.epochs, "seeds": list(sweep.seeds)}
    return {**sizes, "methods": methods}


def write_results(sweep: Sweep, results: Results) -> Path:
    """The JSON and the picture; the path without its ending."""
    c, int8 = sweep.config, sweep.config.precision == "int8"
    path = c.results / f"{'int8_' * int8}sweep_{c.data.replace('-', '_')}"
    found = of_integers(sweep, results) if int8 else of_floats(sweep, results)
    summary = {
        "command": f"{COMMAND} --data {c.data} --data-dir DIR{options(sweep.given, 'data')}",
        "tested_on": f"{c.hold_out} held-out training images",
        **found,
        **made_by(results),
    }
    write_json(path.with_suffix(".json"), summary)
    if int8:
        title = f"INT8, {c.data}, {c.epochs} epochs of {c.train_images} images"
        accuracies = {
            method: {name: point["accuracies"] for name, point in entry["points"].items()}
            for method, entry in found["methods"].items()
        }
        draw_changes(path.with_suffix(".png"), title, accuracies)
    else:
        title = f"{c.data}: {c.epochs} epoch(s) of {c.train_images} images"
        draw_grids(path.with_suffix(".png"), title, grids(found))
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, report; the exit status as that of the training command."""
    given = tyro.cli(SweepConfig, args=arguments, prog=COMMAND)
    console = plain_console()

    def work() -> tuple[Sweep, Results]:
        sweep = Sweep(given)
        return sweep, run_all(sweep.runs, COMMAND, console)

    def finish(found: tuple[Sweep, Results]) -> None:
        path = write_results(*found)
        console.print(f"written: {path}.json and .png", markup=False)

    return run_command(work, finish, console)


if __name__ == "__main__":
    sys.exit(main())
