"""What the zeroth-order estimator does: `python -m experiments.estimator --data-dir DIR`.

Each section is written when it is done: `estimator_<data>.json` and a picture or two.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import torch
import tyro

from experiments.commands import plain_console, run_command
from experiments.estimator import cosine, eps, noise, queries, tail
from experiments.estimator.bench import COMMAND, Bench, Result
from experiments.estimator.plots import DRAW
from experiments.estimator.settings import EstimatorConfig
from experiments.files import read_json, write_json
from experiments.studies.study import bar, options, without_places
from experiments.train.environment import made_on, use_threads

RUN: dict[str, ModuleType] = {
    "cosine": cosine,
    "queries": queries,
    "noise": noise,
    "eps": eps,
    "tail": tail,
}


def result_path(config: EstimatorConfig) -> Path:
    """Without its ending."""
    name = f"estimator_{config.data.replace('-', '_')}"
    return config.results / (f"{name}_reduced" if config.reduced else name)


def command(config: EstimatorConfig) -> str:
    """What to type to run all sections so."""
    return f"{COMMAND} --data {config.data} --data-dir DIR{options(config, 'data', 'only')}"


def done_before(path: Path) -> Result:
    """The sections of an earlier command."""
    return dict(read_json(path)["sections"]) if path.exists() else {}


def run(bench: Bench) -> Path:
    """Every section that was asked for; the path of the results without its ending."""
    config = bench.config
    path = result_path(config)
    sections = done_before(path.with_suffix(".json"))
    device = torch.device(bench.short("cls2").device)
    for name in config.only:
        start = time.process_time()
        result = RUN[name].run(bench)
        sections[name] = result | {
            "cpu_seconds": round(time.process_time() - start, 1),
            "command": f"{command(config)} --only {name}",
            "seeds": list(range(config.seeds)),
            **made_on(device),
        }
        summary = {
            "command": command(config),
            "reduced": config.reduced,
            "sizes": asdict(bench.sizes),
            "short_runs": {m: without_places(bench.short(m)) for m in ("full-zo", "cls2", "cls1")},
            "sections": {known: sections[known] for known in RUN if known in sections},
        }
        write_json(path.with_suffix(".json"), summary)
        title = f"LeNet-5, {config.data}{' (REDUCED)' if config.reduced else ''}"
        DRAW[name](path.with_name(f"{path.name}_{name}.png"), title, result)
        bench.console.print(f"{name}: done, {sections[name]['cpu_seconds']} s of CPU time")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, report; the exit status as that of the training command."""
    config = tyro.cli(EstimatorConfig, args=arguments, prog=COMMAND)
    console = plain_console()

    def work() -> Path:
        if config.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {config.seeds}")
        use_threads(config.threads)
        with bar(console) as progress:
            bench = Bench(config, console, progress, progress.add_task("forward passes", total=1))
            total = sum(RUN[name].passes(bench) for name in config.only)
            progress.update(bench.whole, total=total)
            return run(bench)

    def finish(path: Path) -> None:
        console.print(f"written: {path}.json and .png", markup=False)

    return run_command(work, finish, console)


if __name__ == "__main__":
    sys.exit(main())
