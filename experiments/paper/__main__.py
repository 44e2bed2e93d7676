"""The paper's study by one command: `python -m experiments.paper --preset cpu --data-dir DIR`.

It tunes every method by the same number of trials on held-out samples, trains each from scratch
over several seeds, and fine-tunes the networks that full backpropagation made on rotated images.
What is finished is never repeated: an interrupted study goes on by the same command.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from experiments.commands import RESULTS, plain_console, run_command
from experiments.files import read_checked
from experiments.paper.cells import Cell, needs
from experiments.paper.plan import Filter, Plan
from experiments.paper.pool import Pool, Stopped
from experiments.paper.presets import PRESETS, Arithmetic
from experiments.paper.progress import Meter
from experiments.paper.results import command, write
from experiments.train.config import Data, Directions, Method
from experiments.train.data import load_data
from experiments.train.folder import FINISH_AGAIN, RESULT

WRITE_EVERY = 60.0  # seconds between two writings of the results


@dataclass(frozen=True)
class PaperConfig:
    """Tuning, training from scratch and fine-tuning of every method, set and arithmetic."""

    preset: Literal["smoke", "cpu", "samples", "gpu"] = "cpu"
    """smoke: the digits, a minute; cpu: hours on two cores; samples: heads that learn from every
    sample, with the controls of feedback, likewise; gpu: full length."""
    data_dir: Path | None = None
    """Folder of the data sets, in folders of their names (modelnet10_hdf5 and
    modelnet40_ply_hdf5_2048 as published) or all in it; not needed for smoke."""
    only: tuple[Literal["tuning", "grid", "finetune"], ...] = ()
    """Sections to run, with what they need of others. Default: all."""
    sets: tuple[Data, ...] = ()
    """Data sets to run. Default: all of the preset. The results hold what is finished of all."""
    arithmetics: tuple[Arithmetic, ...] = ()
    """Arithmetics to run. Default: all of the preset."""
    methods: tuple[Method, ...] = ()
    """Methods to run, with what they need of others. Default: all of the preset."""
    directions: tuple[Directions, ...] = ()
    """Of methods with a head, by whose noise it learns; weight is the paper's way (and stands for
    methods without a head). Default: all of the preset."""
    processes: int = 1
    """Runs at a time, >= 1, of one thread each on the CPU."""
    out: Path = Path("runs/paper")
    """Folder of the runs; a finished one is not repeated."""
    results: Path = RESULTS
    """Folder of paper_<preset>.json."""


class Study:
    """Runs a plan and keeps its results file up to date.

    Args:
        plan: of a preset.
        folder: of the results file.
    """

    def __init__(self, plan: Plan, folder: Path, console: Console) -> None:
        self.plan, self.folder, self.console = plan, folder, console
        self.results: dict[Cell, Mapping[str, Any]] = {}
        self.failed: dict[Cell, str] = {}
        self._written = time.monotonic()

    def run(self, wanted: Filter, processes: int) -> None:
        """Raises: Stopped after SIGINT or SIGTERM; the results so far are written."""
        self._gather()
        if self.results:
            whole = len(self.plan.cells)
            self.console.print(f"{len(self.results)} of {whole} runs were finished before")
        waves = [
            [cell for cell in wave if cell not in self.results] for wave in self.plan.waves(wanted)
        ]
        steps = {cell: self.plan.steps(cell) for wave in waves for cell in wave}
        meter = Meter(steps, processes, self.console)
        for cell, result in self.results.items():
            meter.learn(cell, result)
        pool = Pool(processes, command(self.plan.preset), meter.tick)
        try:
            with meter:
                for wave in waves:
                    self._wave(wave, pool, meter)
        finally:
            path = self._write()
            self.console.print(f"written: {path}", markup=False)

    def _gather(self) -> None:
        """Take what is finished, of every section and set."""
        for wave in self.plan.waves():
            for cell in wave:
                if cell not in self.results and self._lacking(cell) is None:
                    out = self.plan.config(cell, self.results).out
                    assert out is not None
                    if (out / RESULT).exists():
                        self.results[cell] = read_checked(out / RESULT, FINISH_AGAIN)

    def _lacking(self, cell: Cell) -> Cell | None:
        """A run that is needed and not there."""
        needed = needs(cell, self.plan.cells)
        return next((c for c in needed if c not in self.results), None)

    def _wave(self, wave: Sequence[Cell], pool: Pool, meter: Meter) -> None:
        ready = {}
        for cell in wave:
            lacking = self._lacking(cell)
            if lacking is not None:
                self._fail(cell, f"needs {lacking}", meter)
            else:
                ready[cell] = self.plan.config(cell, self.results)
        for cell, (kind, found) in pool.run(ready):
            if kind == "failed":
                self._fail(cell, found, meter)
                continue
            self.results[cell] = found
            meter.end(cell, f"{found['test_accuracy']:.2f} %", found)
            if time.monotonic() - self._written > WRITE_EVERY:
                self._write()

    def _write(self) -> Path:
        """With what another process, of other sets, has finished meanwhile."""
        self._gather()
        self._written = time.monotonic()
        return write(self.plan, self.results, self.failed, self.folder)

    def _fail(self, cell: Cell, why: str, meter: Meter) -> None:
        self.failed[cell] = why
        meter.end(cell, f"failed: {why}", None)


def _sets(config: PaperConfig) -> list[str]:
    """The data sets to run."""
    known = [task.data for task in PRESETS[config.preset].tasks]
    unknown = [name for name in config.sets if name not in known]
    if unknown:
        raise ValueError(
            f"sets of preset {config.preset} must be of {', '.join(known)}, got {unknown[0]!r}"
        )
    return [name for name in known if not config.sets or name in config.sets]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, report; 1 where a run failed, else the training command's status."""
    config = tyro.cli(PaperConfig, args=arguments, prog="python -m experiments.paper")
    console = plain_console()

    def work() -> Study:
        plan = Plan(PRESETS[config.preset], config.data_dir, config.out)
        for name in _sets(config):  # a missing file is told before the first run
            load_data(plan.base(next(c for c in plan.cells if c.data == name)))
        study = Study(plan, config.results, console)
        study.run(
            Filter(config.only, config.sets, config.arithmetics, config.methods, config.directions),
            config.processes,
        )
        return study

    def finish(study: Study) -> int:
        for cell, why in study.failed.items():
            console.print(f"failed: {cell}: {why}", markup=False)
        return 1 if study.failed else 0

    try:
        return run_command(work, finish, console)
    except BrokenProcessPool:  # of one run alone the others would not know
        print("error: a run's process was killed (is there memory for --processes?); the same "
              "command goes on", file=sys.stderr)  # fmt: skip
        return 1
    except (Stopped, KeyboardInterrupt):
        console.print("interrupted; the same command goes on", markup=False)
        return 130


if __name__ == "__main__":
    sys.exit(main())
