"""The training command: `python -m experiments.train --help`.

It refuses bad values before it writes anything, goes on where a killed run of the same
configuration stood (to the same bits), and leaves metrics, curves, a checkpoint and a result.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from experiments.commands import plain_console, run_command
from experiments.train.config import TrainConfig
from experiments.train.environment import hardware, versions
from experiments.train.report import ConsoleReporter
from experiments.train.resolve import as_json
from experiments.train.run import Run


def command_line(module: str, arguments: Sequence[str]) -> str:
    """What to type to run it again; what forbids to resume is left out."""
    kept = [a for a in arguments if a not in ("--no-resume", "--resume")]
    return shlex.join(["python", "-m", module, *kept])


def describe(run: Run, console: Console) -> None:
    """Print what it runs on and the resolved configuration."""
    c = run.config
    found = ", ".join(f"{k} {v}" for k, v in versions().items())
    console.print(
        f"{run.title}: device {c.device} ({hardware(run.device)}), backend {c.backend}, "
        f"pairing {c.pairing}, precision {c.precision}; {found}",
        markup=False,
    )
    table = Table(show_header=False, box=None, padding=(0, 2))
    items = [f"{k} = {v}" for k, v in as_json(c).items()]
    for i in range(0, len(items), 3):
        table.add_row(*items[i : i + 3])
    console.print(table, markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, report; the exit status (0 done, 2 refused, 128 + signal interrupted)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    config = tyro.cli(TrainConfig, args=arguments, prog="python -m experiments.train")
    console = plain_console()
    command = command_line("experiments.train", arguments)

    def work() -> dict[str, Any]:
        run = Run(config, command, ConsoleReporter(console))
        describe(run, console)
        return run.go()

    def finish(result: dict[str, Any]) -> None:
        console.print(summary(result), markup=False)

    try:
        return run_command(work, finish, console, again=f"\ngo on with:\n  {command}")
    except KeyboardInterrupt:  # while nothing was being learnt: what is saved is whole
        console.print(f"interrupted; start again with:\n  {command}", markup=False)
        return 130


def summary(result: dict[str, Any]) -> str:
    memory = result["peak_memory"]
    skipped = f", {result['skipped']} steps skipped" if result["skipped"] else ""
    return (
        f"test accuracy {result['test_accuracy']:.2f} % after {result['steps']} steps, "
        f"{result['ms_per_step']:.2f} ms a step (median), {result['seconds']:.1f} s{skipped}; peak "
        f"memory {memory['bytes'] / 2**20:.1f} MiB ({memory['measure']}); {result['config']['out']}"
    )


if __name__ == "__main__":
    sys.exit(main())
