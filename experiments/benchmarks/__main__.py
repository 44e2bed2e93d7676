"""Measure the library on this machine's GPU: `python -m experiments.benchmarks`.

Five sections, each of which verifies against float64 before it times, and writes its JSON (whole or
not at all) and a picture as it ends: `step` (against two inference passes and a MeZO-style loop),
`kernels` (against their floors), `paths` (fused or staged, and what the rule picks), `memory` (peak
over inference), `precision` (error of g). A result that is wrong is not timed, and the command ends
with 1. Without a GPU, `--reduced` runs every code path in Triton's interpreter, on tiny shapes: it
proves that they work, and its times mean nothing (the errors of `precision` are real).
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from experiments.benchmarks.section import Bench

Section = Literal["step", "kernels", "paths", "memory", "precision"]
MODULES: dict[Section, str] = {
    "step": "step",
    "kernels": "kernels",
    "paths": "paths_map",
    "memory": "memory_peak",
    "precision": "precision",
}
# Of the time that is left when a section begins, beside those still to come.
SHARES: dict[Section, float] = {
    "step": 0.55,
    "kernels": 0.15,
    "paths": 0.2,
    "memory": 0.05,
    "precision": 0.05,
}
COMPILED: tuple[Section, ...] = ("step", "kernels", "paths")  # by the workers
COMPILE_SHARE = 0.25
COMMAND = "python -m experiments.benchmarks"
RESULTS = Path(__file__).parent.parent / "results" / "gpu"
REDUCED = Path("runs") / "benchmarks-reduced"
WRONG, USAGE_ERROR, STOPPED = 1, 2, 130


@dataclass(frozen=True)
class Config:
    """Settings of the benchmarks."""

    only: tuple[Section, ...] = ()
    """Sections to run; all of them by default."""
    reduced: bool = False
    """Tiny shapes, one repeat; on the CPU in Triton's interpreter. Its times mean nothing."""
    budget_minutes: float = 8.0
    """Cases that come later are skipped, with a note in the JSON."""
    out: Path | None = None
    """Folder of the JSON and the pictures. Default: experiments/results/gpu; reduced:
    runs/benchmarks-reduced."""
    models: tuple[Literal["lenet5", "mlp", "vgg", "residual"], ...] = ()
    """Networks of the section `step`; all of them by default."""
    batches: tuple[int, ...] = (1, 16, 256, 4096, 65536)
    """Batches of the section `step`."""
    dtypes: tuple[Literal["bf16", "fp32"], ...] = ("bf16", "fp32")
    """Of weights and activations in the section `step`."""
    tf32: bool = False
    """Let torch multiply float32 matrices in tf32; else its settings stay as they are."""
    workers: int = 8
    """Processes that compile kernels first (none: 0); not in the reduced form."""
    commit: str | None = None
    """The commit to note, where there is no git."""
    replot: bool = False
    """Only draw the pictures again, from the JSON that is there."""
    part: str = ""
    """i/n: run each n-th case once, to compile its kernels; time and write nothing."""

    @property
    def folder(self) -> Path:
        return self.out or (REDUCED if self.reduced else RESULTS)

    @property
    def sections(self) -> tuple[Section, ...]:
        """In the order in which they run."""
        return tuple(name for name in MODULES if not self.only or name in self.only)


def check(config: Config) -> None:
    """Raises: ValueError for what cannot be."""
    if config.replot:
        return
    if not config.reduced and not torch.cuda.is_available():
        raise ValueError(
            "benchmarks need a CUDA device, and torch finds none; --reduced shows on the CPU that "
            "they work, and measures nothing"
        )
    if config.reduced and config.folder.resolve() == RESULTS.resolve():
        raise ValueError(f"out must be another folder for the reduced form, got {config.folder}")
    if config.budget_minutes <= 0:
        raise ValueError(f"budget_minutes must be > 0, got {config.budget_minutes}")
    if any(batch < 1 for batch in config.batches):
        raise ValueError(f"batches must be >= 1, got {config.batches}")
    if not config.reduced and os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET=1 replaces the compiler; run without it, or --reduced")


def part_of(text: str) -> tuple[int, int] | None:
    """Raises: ValueError unless it is i/n with 0 <= i < n, or empty."""
    if not text:
        return None
    i, _, n = text.partition("/")
    if not (i.isdigit() and n.isdigit() and int(i) < int(n)):
        raise ValueError(f"part must be i/n with 0 <= i < n, got {text!r}")
    return int(i), int(n)


def about(bench: Bench, config: Config, arguments: Sequence[str]) -> dict[str, Any]:
    """What a result was measured on, and how."""
    from experiments.train.environment import commit, hardware, versions

    device: dict[str, Any] = {"name": hardware(bench.device), "type": bench.device.type}
    if bench.cuda:
        known = torch.cuda.get_device_properties(bench.device)
        device |= {
            "memory_bytes": known.total_memory,
            "multiprocessors": known.multi_processor_count,
            "capability": f"{known.major}.{known.minor}",
            "l2_bytes": int(getattr(known, "L2_cache_size", 0)),
        }
    return {
        "reduced": bench.reduced,
        "device": device,
        "versions": versions() | {"cuda": torch.version.cuda, "hip": torch.version.hip},
        "commit": config.commit or commit(),
        "command": shlex.join([*COMMAND.split(), *arguments]),
        "settings": {
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "budget_minutes": config.budget_minutes,
        },
    }


def run_section(bench: Bench, config: Config, name: Section) -> dict[str, Any]:
    """The result of one section."""
    module = import_module(f"experiments.benchmarks.{MODULES[name]}")
    if name != "step":
        return dict(module.run(bench))
    return dict(module.run(bench, config.batches, config.models, config.dtypes))


def draw(config: Config, name: Section, result: dict[str, Any], console: Console) -> None:
    """A picture beside the JSON; without matplotlib a line that says so."""
    try:
        from experiments.benchmarks.plots import draw as draw_section

        path = draw_section(name, result, config.folder)
    except ImportError as error:
        console.print(f"{name}: no picture ({error}); later: {COMMAND} --replot", markup=False)
        return
    if path is not None:
        console.print(f"wrote {path}", markup=False)


def compile_first(config: Config, arguments: Sequence[str], limit: float) -> None:
    """Fill Triton's cache by several processes, each with a part of the cases."""
    n = min(config.workers, (os.cpu_count() or 1) // 2)
    if config.reduced or n < 2 or not {*config.sections} & {*COMPILED}:
        return
    command = [sys.executable, "-m", "experiments.benchmarks", *arguments]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    workers = [subprocess.Popen([*command, "--part", f"{i}/{n}"], **quiet) for i in range(n)]
    until = time.monotonic() + limit
    try:
        # What is not there in time is compiled on the way.
        with suppress(subprocess.TimeoutExpired):
            for worker in workers:
                worker.wait(max(until - time.monotonic(), 0.1))
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def run(config: Config, arguments: Sequence[str], console: Console) -> int:
    """All sections; 1 where a result was wrong or a case failed."""
    from experiments.benchmarks.section import Bench
    from experiments.files import write_json

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    bench = Bench(device, config.reduced, part=part_of(config.part))
    if config.tf32:
        torch.set_float32_matmul_precision("high")
    end = time.monotonic() + 60 * config.budget_minutes
    if bench.part is not None:
        for name in config.sections:
            if name in COMPILED:
                run_section(bench, config, name)
        return 0
    compile_first(config, arguments, COMPILE_SHARE * 60 * config.budget_minutes)
    results: dict[Section, dict[str, Any]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    left = sum(SHARES[name] for name in config.sections)
    visible = Console(highlight=False, stderr=True)
    with Progress(*columns, console=visible, disable=not visible.is_terminal) as progress:
        bar = progress.add_task("", total=None)
        bench.tell = lambda line: progress.update(bar, description=line)
        for name in config.sections:
            start = time.monotonic()
            bench.deadline = start + max(end - start, 0.0) * SHARES[name] / left
            left = max(left - SHARES[name], 1e-9)
            known = len(bench.refused), len(bench.failed)
            found = run_section(bench, config, name)
            results[name] = {
                "section": name,
                **about(bench, config, arguments),
                "seconds": time.monotonic() - start,
                "refused": bench.refused[known[0] :],
                "failed": bench.failed[known[1] :],
                **found,
            }
            write_json(config.folder / f"{name}.json", results[name])
            console.print(f"wrote {config.folder / f'{name}.json'}", markup=False)
            draw(config, name, results[name], console)
    report(results, console)
    for line in bench.refused:
        print(f"refused, not timed: {line}", file=sys.stderr)
    for line in bench.failed:
        print(f"failed: {line}", file=sys.stderr)
    return WRONG if bench.refused or bench.failed else 0


def report(results: dict[Section, dict[str, Any]], console: Console) -> None:
    """A short table a section."""
    for name, result in results.items():
        table = import_module(f"experiments.benchmarks.{MODULES[name]}").table(result)
        skipped = sum("skipped" in row for row in result["rows"])
        table.title = f"{name}, {result['seconds']:.0f} s" + (
            f", {skipped} cases skipped" if skipped else ""
        )
        console.print(table)
    if any(result["reduced"] for result in results.values()):
        console.print("reduced: every part ran; these times are no measurements")


def replot(config: Config, console: Console) -> int:
    """Pictures of the JSON that is there."""
    found = [name for name in config.sections if (config.folder / f"{name}.json").exists()]
    if not found:
        raise ValueError(f"no result of {', '.join(config.sections)} in {config.folder}")
    for name in found:
        draw(config, name, json.loads((config.folder / f"{name}.json").read_text()), console)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; 2 for wrong use, 130 when interrupted."""
    given = [*(sys.argv[1:] if arguments is None else arguments)]
    config = tyro.cli(Config, args=given, prog=COMMAND, description=__doc__)
    width = None if sys.stdout.isatty() else 120
    console = Console(highlight=False, width=width)
    try:
        check(config)
        if config.replot:
            return replot(config, console)
        if not torch.cuda.is_available():
            # Read when the kernels are imported, which nothing did so far.
            os.environ["TRITON_INTERPRET"] = "1"
        return run(config, given, console)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("stopped; sections that were written stay", file=sys.stderr)
        return STOPPED


if __name__ == "__main__":
    sys.exit(main())
