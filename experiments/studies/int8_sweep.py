"""Where the integer recipes stand: `python -m experiments.studies.int8_sweep --data-dir DIR`.

Short runs of each method with its recipe and with one setting changed at a time, several seeds,
tested on held-out training images (never on the test set): what r_max, p_zero, b_zo, b_bp,
logit_shift and the source of the tail are worth.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from experiments.commands import REFUSED, RESULTS, USAGE_ERROR, Interrupted
from experiments.files import write_json
from experiments.studies.study import in_own_folder, run_all, without_places
from experiments.train.config import Method, TrainConfig
from experiments.train.fields import FIELDS
from experiments.train.plots import draw_changes, standard_error
from experiments.train.resolve import resolve

Point = tuple[str, str, int]  # method, change, seed


@dataclass(frozen=True)
class SweepConfig:
    """Held-out accuracy of the integer recipes and of one change at a time."""

    data_dir: Path | None = None
    """Folder of the image files; not needed for digits."""
    data: Literal["digits", "mnist", "fashion-mnist"] = "mnist"
    """Image set."""
    methods: tuple[Method, ...] = ("full-zo", "cls2", "cls1", "full-bp")
    """Methods."""
    seeds: int = 2
    """Seeds 0 to seeds - 1, >= 1."""
    train_images: int = 20_000
    """Training images of a run."""
    hold_out: int = 5_000
    """Held-out training images that a run is tested on, >= 1."""
    epochs: int = 6
    """Passes over them, >= 1."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda or cuda:<n>."""
    out: Path = Path("runs/int8_sweep")
    """Folder of the runs; a finished one is not repeated."""
    results: Path = RESULTS
    """Folder of int8_sweep_<data>.json and .png."""


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


def configurations(sweep: SweepConfig) -> dict[Point, TrainConfig]:
    """All runs, seed by seed."""
    if sweep.hold_out < 1:
        raise ValueError(f"hold_out must be at least 1 (a sweep chooses), got {sweep.hold_out}")
    if sweep.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {sweep.seeds}")
    runs: dict[Point, TrainConfig] = {}
    for seed in range(sweep.seeds):
        for method in sweep.methods:
            base = resolve(
                TrainConfig(
                    precision="int8",
                    method=method,
                    data=sweep.data,
                    data_dir=sweep.data_dir,
                    train_images=sweep.train_images,
                    hold_out=sweep.hold_out,
                    epochs=sweep.epochs,
                    seed=seed,
                    device=sweep.device,
                    threads=1,
                )
            )
            for name, change in changes(base).items():
                config = replace(base, **change)
                runs[method, name, seed] = in_own_folder(config, sweep.out / sweep.data)
    return runs


def summary(
    sweep: SweepConfig,
    runs: Mapping[Point, TrainConfig],
    results: Mapping[Point, dict[str, Any]],
) -> dict[str, Any]:
    any_result = next(iter(results.values()))
    methods: dict[str, Any] = {}
    for method, change, seed in runs:
        points = methods.setdefault(method, {"points": {}})["points"]
        accuracy = results[method, change, seed]["test_accuracy"]
        points.setdefault(change, {"accuracies": []})["accuracies"].append(accuracy)
    for method, entry in methods.items():
        entry["recipe"] = without_places(runs[method, "recipe", 0])
        for point in entry["points"].values():
            values = point["accuracies"]
            point["mean"] = sum(values) / len(values)
            point["standard_error"] = standard_error(values) if len(values) > 1 else None
    return {
        "command": f"python -m experiments.studies.int8_sweep --data {sweep.data} --data-dir DIR"
        + ("" if sweep.seeds == SweepConfig.seeds else f" --seeds {sweep.seeds}"),
        "tested_on": f"{sweep.hold_out} held-out training images",
        "train_images": sweep.train_images,
        "epochs": sweep.epochs,
        "seeds": list(range(sweep.seeds)),
        "methods": methods,
        "hardware": any_result["hardware"],
        "versions": any_result["versions"],
        "commits": sorted({str(r["commit"]) for r in results.values()}),
    }


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, report; the exit status as that of the training command."""
    sweep = tyro.cli(SweepConfig, args=arguments, prog="python -m experiments.studies.int8_sweep")
    console = Console(highlight=False, soft_wrap=True)
    try:
        runs = configurations(sweep)
        results = run_all(runs, "python -m experiments.studies.int8_sweep", console)
    except REFUSED as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except Interrupted as stop:
        console.print(f"{stop}; the same command goes on", markup=False)
        return 128 + stop.signal.value
    written = summary(sweep, runs, results)
    path = sweep.results / f"int8_sweep_{sweep.data.replace('-', '_')}"
    write_json(path.with_suffix(".json"), written)
    title = f"INT8, {sweep.data}, {sweep.epochs} epochs of {sweep.train_images} images"
    accuracies = {
        method: {name: point["accuracies"] for name, point in entry["points"].items()}
        for method, entry in written["methods"].items()
    }
    draw_changes(path.with_suffix(".png"), title, accuracies)
    console.print(f"written: {path}.json and .png", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
