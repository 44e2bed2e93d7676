"""Where the defaults stand: `python -m experiments.studies.sweep --data-dir DIR`.

Short runs over a grid of head learning rates and eps, tested on held-out training images (never on
the test set); what diverged is shown as such. The grid is centred on the default of each method.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from experiments.commands import REFUSED, RESULTS, USAGE_ERROR, Interrupted
from experiments.files import write_json
from experiments.studies.study import in_own_folder, run_all, without_places
from experiments.train.config import Method, TrainConfig
from experiments.train.data import load_data
from experiments.train.learner import FloatLearner
from experiments.train.plots import Grid, draw_grids
from experiments.train.resolve import resolve

Point = tuple[str, float, float]  # method, head_lr, eps


@dataclass(frozen=True)
class SweepConfig:
    """Held-out accuracy over head_lr and eps."""

    data_dir: Path | None = None
    """Folder of the image files; not needed for digits."""
    data: Literal["digits", "mnist", "fashion-mnist"] = "mnist"
    """Image set."""
    methods: tuple[Literal["full-zo", "cls2", "cls1"], ...] = ("full-zo", "cls2", "cls1")
    """Methods with a head to train."""
    lr_factors: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    """Factors > 0 on the default head_lr."""
    eps: tuple[float, ...] = (1e-3, 1e-2, 3e-2, 1e-1)
    """Perturbation scales, > 0; the default of each method is added."""
    train_images: int = 12_800
    """Training images of a run."""
    hold_out: int = 5_000
    """Held-out training images that a run is tested on, >= 1."""
    epochs: int = 1
    """Passes over them, >= 1."""
    seed: int = 0
    """Of every run."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda or cuda:<n>."""
    threads: int | None = None
    """CPU threads of torch, >= 1. Default: torch's own."""
    out: Path = Path("runs/sweep")
    """Folder of the runs; a finished one is not repeated."""
    results: Path = RESULTS
    """Folder of sweep_<data>.json and .png."""


def base(sweep: SweepConfig, method: Method) -> TrainConfig:
    """A short run of the method with its defaults."""
    return resolve(
        TrainConfig(
            method=method,
            data=sweep.data,
            data_dir=sweep.data_dir,
            train_images=sweep.train_images,
            hold_out=sweep.hold_out,
            epochs=sweep.epochs,
            seed=sweep.seed,
            device=sweep.device,
            threads=sweep.threads,
        )
    )


def configurations(sweep: SweepConfig) -> dict[Point, TrainConfig]:
    if sweep.hold_out < 1:
        raise ValueError(f"hold_out must be at least 1 (a sweep chooses), got {sweep.hold_out}")
    runs: dict[Point, TrainConfig] = {}
    for method in sweep.methods:
        default = base(sweep, method)
        assert default.head_lr is not None and default.eps is not None
        for eps in sorted({*sweep.eps, default.eps}):
            for factor in sorted({*sweep.lr_factors, 1.0}):
                lr = default.head_lr * factor
                config = replace(default, head_lr=lr, eps=eps)
                runs[method, lr, eps] = in_own_folder(config, sweep.out / sweep.data)
    return runs


def untrained_loss(config: TrainConfig) -> float:
    """Held-out loss before the first step."""
    return FloatLearner(config, load_data(config)).evaluate()[1]


def diverged(result: Mapping[str, Any], untrained: float) -> bool:
    """Whether steps were skipped, or the loss ended no lower than it began."""
    loss = result["test_loss"]
    return bool(result["skipped"]) or loss is None or loss >= untrained


def grids(sweep: SweepConfig, points: Sequence[Mapping[str, Any]]) -> dict[str, Grid]:
    """One grid a method: accuracies [eps][lr], None where the run diverged."""
    found: dict[str, Grid] = {}
    for method in sweep.methods:
        own = [p for p in points if p["method"] == method]
        lrs = sorted({p["head_lr"] for p in own})
        epss = sorted({p["eps"] for p in own})
        cells = {(p["eps"], p["head_lr"]): p for p in own}
        values = [
            [None if cells[e, lr]["diverged"] else cells[e, lr]["accuracy"] for lr in lrs]
            for e in epss
        ]
        default = base(sweep, method)
        assert default.head_lr is not None and default.eps is not None
        found[method] = Grid(lrs, epss, values, (default.head_lr, default.eps))
    return found


def write_results(
    sweep: SweepConfig,
    runs: Mapping[Point, TrainConfig],
    results: Mapping[Point, dict[str, Any]],
) -> Path:
    """The JSON and the picture; the path without its ending."""
    start: dict[str, float] = {m: untrained_loss(base(sweep, m)) for m in sweep.methods}
    points = [
        {
            "method": method,
            "head_lr": lr,
            "eps": eps,
            "accuracy": results[method, lr, eps]["test_accuracy"],
            "diverged": diverged(results[method, lr, eps], start[method]),
        }
        for method, lr, eps in runs
    ]
    any_result = next(iter(results.values()))
    path = sweep.results / f"sweep_{sweep.data.replace('-', '_')}"
    summary = {
        "command": f"python -m experiments.studies.sweep --data {sweep.data} --data-dir DIR",
        "tested_on": f"{sweep.hold_out} held-out training images",
        "defaults": {m: without_places(base(sweep, m)) for m in sweep.methods},
        "untrained_loss": start,
        "points": points,
        "hardware": any_result["hardware"],
        "versions": any_result["versions"],
        "commits": sorted({str(r["commit"]) for r in results.values()}),
    }
    write_json(path.with_suffix(".json"), summary)
    title = f"{sweep.data}: {sweep.epochs} epoch(s) of {sweep.train_images} images"
    draw_grids(path.with_suffix(".png"), title, grids(sweep, points))
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, report; the exit status as that of the training command."""
    sweep = tyro.cli(SweepConfig, args=arguments, prog="python -m experiments.studies.sweep")
    console = Console(highlight=False, soft_wrap=True)
    try:
        runs = configurations(sweep)
        results = run_all(runs, "python -m experiments.studies.sweep", console)
    except REFUSED as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except Interrupted as stop:
        console.print(f"{stop}; the same command goes on", markup=False)
        return 128 + stop.signal.value
    path = write_results(sweep, runs, results)
    console.print(f"written: {path}.json and .png", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
