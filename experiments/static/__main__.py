"""Compile every shipped configuration of every kernel: `python -m experiments.static`.

Needs Triton, no GPU; about a second a configuration. Writes table.json and table.md, which the
tests compare with the code; run it again after a change to a kernel or its settings.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.static.table import COMMAND, RESULTS, as_lines, table, write
from zo_kernels.registry import has_triton, interpreted

USAGE_ERROR = 2
Target = Literal["cuda-80", "cuda-90", "cuda-100", "hip-gfx942"]
ALL: tuple[Target, ...] = ("cuda-80", "cuda-90", "cuda-100", "hip-gfx942")


@dataclass(frozen=True)
class StaticConfig:
    """Registers, spills, memory, instructions and least times of all shipped kernels."""

    targets: tuple[Target, ...] = ALL
    """GPUs to compile for: sm_80, sm_90, sm_100, gfx942. None of them needs to be there."""
    only: str = ""
    """Regular expression; compile what it finds in <target>/<name>."""
    out: Path | None = None
    """Folder of table.json and table.md. Default: experiments/results/static for a run of
    everything; with --targets or --only rows are only printed."""


def compile_all(config: StaticConfig, console: Console) -> list[dict[str, Any]]:
    """The rows, in the order of the registry.

    Raises: ValueError where nothing is found, or --only is no regular expression.
    """
    from experiments.static.compiler import compile_for
    from experiments.static.registry import configs

    try:
        pattern = re.compile(config.only)
    except re.error as error:
        raise ValueError(f"only must be a regular expression, got {config.only!r}") from error
    todo = [
        (target, one)
        for target in ALL
        if target in config.targets
        for one in configs(target)
        if pattern.search(f"{target}/{one.name}")
    ]
    if not todo:
        raise ValueError(f"no configuration of {', '.join(config.targets)} has {config.only!r}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    rows = []
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as progress:
        bar = progress.add_task("", total=len(todo))
        for target, one in todo:
            progress.update(bar, description=f"{target}/{one.name}")
            rows.append(compile_for(one, target))
            progress.advance(bar)
    return rows


def run(config: StaticConfig) -> int:
    """Compile, report, write; 1 where a rule is broken."""
    from experiments.static.rules import violations

    whole = not config.only and {*config.targets} == {*ALL}
    if not whole and config.out is not None and config.out.resolve() == RESULTS:
        raise ValueError(f"out must be another folder for a part of the table, got {config.out}")
    console = Console(highlight=False, soft_wrap=True)
    rows = compile_all(config, Console(highlight=False, stderr=True))
    folder = config.out or (RESULTS if whole else None)
    if folder is None:
        for target in dict.fromkeys(row["target"] for row in rows):
            own = [row for row in rows if row["target"] == target]
            console.print("\n".join([target, *as_lines(own)]), markup=False)
    else:
        write(folder, table(rows))
        console.print(f"{len(rows)} configurations: {folder}/table.json and .md", markup=False)
    broken = [found for row in rows for found in violations(row)]
    for found in broken:
        print(f"broken: {found}", file=sys.stderr)
    return int(bool(broken))


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; 2 for wrong use, 130 when interrupted."""
    config = tyro.cli(StaticConfig, args=arguments, prog=COMMAND, description=__doc__)
    try:
        if not has_triton():
            raise ValueError("compiling needs the triton package (Linux); it is not installed")
        if interpreted():
            raise ValueError("TRITON_INTERPRET=1 replaces the compiler; run without it")
        return run(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
