"""The method in a minute: `python -m experiments.demo`.

Trains LeNet-5 on scikit-learn's digits with the paper's Full ZO, ZO-Feat-Cls2 and ZO-Feat-Cls1,
with two of these cuts where the head learns by feedback, and with Full BP, one after the other, for
equal epochs, and compares accuracy, time and memory of a step. Needs no data files and no GPU;
everything goes to runs/demo.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from experiments.commands import plain_console, run_command
from experiments.files import write_json
from experiments.train.config import Directions, Method, TrainConfig
from experiments.train.environment import hardware, made_on
from experiments.train.folder import metrics_of
from experiments.train.memory import measure_step
from experiments.train.network import build_network
from experiments.train.plots import draw_accuracies
from experiments.train.report import ConsoleReporter
from experiments.train.resolve import resolve
from experiments.train.run import train

# (method, by what the head learns; None: the paper's noise on all weights)
NAMES: Mapping[tuple[Method, Directions | None], str] = {
    ("full-zo", None): "Full ZO",
    ("cls2", None): "ZO-Feat-Cls2",
    ("cls1", None): "ZO-Feat-Cls1",
    ("full-zo", "feedback"): "Full ZO, feedback",
    ("cls2", "feedback"): "Cls2, feedback",
    ("full-bp", None): "Full BP",
}
PAIRINGS: tuple[Literal["stacked", "sequential"], ...] = ("stacked", "sequential")


@dataclass(frozen=True)
class DemoConfig:
    """The methods on the digits, side by side."""

    epochs: int = 80
    """Passes over the 1,438 training images, >= 1, equal for all methods."""
    seed: int = 0
    """Of weights, noise and data order, in [0, 2^63)."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda or cuda:<n>."""
    threads: int | None = 1
    """CPU threads of torch, >= 1. At this size a second one saves a sixth of the time, and costs
    several times that where another program wants the core."""
    out: Path = Path("runs/demo")
    """Folder of runs, plot and JSON; a finished run in it is not repeated."""


def folder(method: Method, directions: Directions | None) -> str:
    return method if directions is None else f"{method}-{directions}"


def configuration(
    demo: DemoConfig, method: Method, directions: Directions | None = None
) -> TrainConfig:
    return resolve(
        TrainConfig(
            method=method,
            directions=directions,
            data="digits",
            epochs=demo.epochs,
            eval_epochs=max(1, demo.epochs // 16),
            seed=demo.seed,
            device=demo.device,
            threads=demo.threads,
            out=demo.out / folder(method, directions),
            tensorboard=False,
            plot=False,
        )
    )


def measure(config: TrainConfig) -> dict[str, Any]:
    """What BP trains, and the memory of a step, per pairing."""
    model = build_network(config)
    total = sum(p.numel() for p in model.parameters())
    memory = {p: measure_step(replace(config, pairing=p)) for p in PAIRINGS}
    return {
        "tail": list(config.tail or ()),
        "tail_parameters": sum(p.numel() for p in model.tail_parameters()),
        "parameters": total,
        "memory": memory,
    }


def table(rows: Mapping[str, dict[str, Any]]) -> Table:
    shown = Table(title="LeNet-5 on the digits")
    columns = ("method", "BP trains", "accuracy", "ms/step", "MiB", "MiB seq.")
    for i, name in enumerate(columns):
        shown.add_column(name, justify="left" if i < 2 else "right", no_wrap=True)
    for method, row in rows.items():
        what = {"0": "nothing", "all": "everything"}.get(row["tail"][0], ", ".join(row["tail"]))
        if not method.startswith("Full"):
            what += f" ({100 * row['tail_parameters'] / row['parameters']:.1f} %)"
        memory = [f"{row['memory'][p]['bytes'] / 2**20:.2f}" for p in PAIRINGS]
        shown.add_row(
            method,
            what,
            f"{row['test_accuracy']:.1f} %",
            f"{row['ms_per_step']:.2f}",
            *memory,
        )
    return shown


def run(demo: DemoConfig, console: Console) -> None:
    configs = {key: configuration(demo, *key) for key in NAMES}
    first = configs["full-zo", None]
    if first.threads is not None:
        torch.set_num_threads(first.threads)
    device = torch.device(first.device)
    console.print(
        f"LeNet-5 on the digits, {demo.epochs} epochs each, on {first.device} "
        f"({hardware(device)}), noise by {first.backend}, torch {torch.__version__}",
        markup=False,
    )
    rows: dict[str, dict[str, Any]] = {}
    curves = {}
    for key, config in configs.items():
        result = train(config, "python -m experiments.demo", ConsoleReporter(console))
        row = {k: result[k] for k in ("test_accuracy", "ms_per_step", "steps", "seconds", "config")}
        rows[NAMES[key]] = {**row, **measure(config)}
        curves[NAMES[key]] = metrics_of(demo.out / folder(*key), "test")
    summary = {
        "command": "python -m experiments.demo",
        **made_on(device),
        "methods": rows,
    }
    write_json(demo.out / "demo.json", summary)
    draw_accuracies(demo.out / "demo.png", "LeNet-5 on the digits", curves)
    console.print(table(rows))
    kind = rows["Full ZO"]["memory"]["stacked"]["measure"]
    console.print(
        f"MiB: {kind}; seq.: with pairing='sequential', the halves one after the other.\n"
        f"A step sees {first.batch_size} images; the time is the median. "
        f"Curves: {demo.out / 'demo.png'}, numbers: {demo.out / 'demo.json'}",
        markup=False,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, report; the exit status as that of the training command."""
    demo = tyro.cli(DemoConfig, args=arguments, prog="python -m experiments.demo")
    console = plain_console()
    return run_command(lambda: run(demo, console), lambda done: None, console)


if __name__ == "__main__":
    sys.exit(main())
