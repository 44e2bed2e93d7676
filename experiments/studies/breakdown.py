"""Where the time of a training step goes: `python -m experiments.studies.breakdown`.

LeNet-5's step of every method, FP32 and INT8, by stage (experiments/studies/stages.py says how they
are told apart): "noise" makes z and writes the perturbed weights, "update" moves head (making z
again) and tail, "other" picks the batch and sets the rates. On the CPU in CPU time of the process,
on a GPU by CUDA events. Steps of all methods run in turn; each round also has a step that nobody
watches, and `sum_over_plain` compares. Digits are trained on: the time depends on shapes alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from experiments.commands import plain_console, run_command
from experiments.files import write_json
from experiments.studies.stages import STAGES
from experiments.studies.step_times import BreakdownConfig, measure, row, verify
from experiments.studies.study import options
from experiments.train.config import TrainConfig
from experiments.train.environment import hardware, made_on, use_threads
from experiments.train.plots import pyplot, save
from experiments.train.resolve import resolve

COMMAND = "python -m experiments.studies.breakdown"
MARGIN = 0.1  # that the sum of the stages may be off the step that nobody watches
COLORS = ("tab:purple", "tab:blue", "tab:cyan", "tab:orange", "tab:green", "lightgray")


def draw(path: Path, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Stacked bars: a panel a batch, a bar a method and precision."""
    plt = pyplot()
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    figure, panels = plt.subplots(1, len(batches), figsize=(6 * len(batches), 4.6), squeeze=False)
    for axes, batch in zip(panels[0], batches, strict=True):
        own = [row for row in rows if row["batch"] == batch]
        bottom = [0.0] * len(own)
        for color, stage in zip(COLORS, STAGES, strict=True):
            heights = [1e-3 * row["stages"][stage]["us"] for row in own]
            axes.bar(range(len(own)), heights, 0.7, bottom, color=color, label=stage)
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        for place, height in enumerate(bottom):
            axes.annotate(f"{height:.1f}", (place, height), (0, 2), ha="center",
                          textcoords="offset points", fontsize=8)  # fmt: skip
        names = [f"{row['method']}\n{row['precision']}" for row in own]
        axes.set_xticks(range(len(own)), names, fontsize=8)
        axes.set(ylabel="time of a step (ms)", title=f"batch {batch}")
        axes.grid(alpha=0.3, axis="y")
    panels[0][0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    save(plt, figure, path)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    found = Table("batch", "method", "step", *STAGES, title="step in ms, stages in % of it")
    for one in rows:
        shares = [f"{100 * one['stages'][stage]['share']:.0f}" for stage in STAGES]
        name = f"{one['method']} {one['precision']}"
        found.add_row(str(one["batch"]), name, f"{1e-3 * one['plain']['us']:.2f}", *shares)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Verify, time, write; 1 where the stages do not add up to the step, 2 for bad values."""
    config = tyro.cli(BreakdownConfig, args=arguments, prog=COMMAND, description=__doc__)
    console = plain_console()

    def work() -> tuple[torch.device, float, list[dict[str, Any]]]:
        if config.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {config.rounds}")
        use_threads(config.threads)
        device = torch.device(resolve(TrainConfig(device=config.device)).device)
        verify(replace(config, rounds=1))
        start, rows = time.process_time(), []
        for batch in config.batches:
            rows += [row(name, batch, t) for name, t in measure(config, batch, console).items()]
        return device, time.process_time() - start, rows

    return run_command(work, lambda found: finish(config, *found, console), console)


def finish(
    config: BreakdownConfig,
    device: torch.device,
    seconds: float,
    rows: Sequence[dict[str, Any]],
    console: Console,
) -> int:
    """Write and show; 1 where the stages do not add up."""
    clock = "CUDA events" if device.type == "cuda" else "CPU time of the process"
    off = max(abs(row["sum_over_plain"]["median"] - 1) for row in rows)
    path = config.results / f"breakdown_{device.type}"
    written = {
        "command": f"{COMMAND}{options(config)}",
        "meaning": " ".join((__doc__ or "").split()),
        "clock": clock,
        "threads": config.threads,
        "seeds": [0],
        "sum_off_by_at_most": off,
        "margin": MARGIN,
        "rows": rows,
        "cpu_seconds": round(seconds, 1),
        **made_on(device),
    }
    write_json(path.with_suffix(".json"), written)
    title = f"LeNet-5, a training step by stage ({clock}, median of {config.rounds})"
    draw(path.with_suffix(".png"), f"{title}\n{hardware(device)}", rows)
    console.print(table(rows))
    console.print(f"stages add up to the step within {100 * off:.1f} %; written: {path}.json, .png")
    return 0 if off <= MARGIN else 1


if __name__ == "__main__":
    sys.exit(main())
