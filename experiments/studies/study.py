"""Many runs as one: each in a folder named by its configuration, so that none is done twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.train.config import TrainConfig
from experiments.train.report import Reporter
from experiments.train.resolve import as_json, identity, resolve
from experiments.train.run import train

Key = TypeVar("Key", bound=Hashable)
PLACES = ("data_dir", "out", "download", "resume")  # of one machine: not for a committed result


class _Share(Reporter):
    """Moves a study's bar by the share of a run that is done."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task = progress.add_task("", total=1)

    def start(self, title: str, step: int, steps: int) -> None:
        self.progress.reset(self.task, total=steps, completed=step, description=title)

    def train(self, line: dict[str, Any]) -> None:
        self.progress.update(self.task, completed=line["step"])


def shared(study: Any, *own: str) -> dict[str, Any]:
    """The fields of a study that the training command has, too, but for its `own`."""
    names = {f.name for f in fields(study)} & {f.name for f in fields(TrainConfig)}
    return {name: getattr(study, name) for name in names.difference(own, ("out",))}


def in_own_folder(config: TrainConfig, under: Path) -> TrainConfig:
    """The resolved configuration without pictures, with a folder that its identity names."""
    config = replace(config, out=under, tensorboard=False, plot=False, trajectory=False)
    config = resolve(config)
    text = json.dumps(identity(config), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    return replace(config, out=under / f"{config.method}-{config.seed}-{digest}")


@contextmanager
def bar(console: Console) -> Iterator[Progress]:
    """A progress bar on a terminal, nothing elsewhere."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield progress


@contextmanager
def _lent(progress: Progress) -> Iterator[Progress]:
    """A bar that goes on; the tasks that were added to it go."""
    before = set(progress.task_ids)
    try:
        yield progress
    finally:
        for task in set(progress.task_ids) - before:
            progress.remove_task(task)


def run_all(
    configs: Mapping[Key, TrainConfig],
    command: str,
    console: Console,
    progress: Progress | None = None,
) -> dict[Key, dict[str, Any]]:
    """Train every configuration (of `in_own_folder`) that is not finished yet; their results.

    Args:
        progress: the bar of a command that does other things, too; else one of its own.
    Raises: Interrupted, after which the same study goes on where it stood.
    """
    results = {}
    with bar(console) if progress is None else _lent(progress) as progress:
        whole = progress.add_task("runs", total=len(configs))
        reporter = _Share(progress)
        for done, (key, config) in enumerate(configs.items(), start=1):
            results[key] = train(config, command, reporter)
            progress.update(whole, completed=done)
            accuracy = results[key]["test_accuracy"]
            console.print(f"{done}/{len(configs)} {key}: {accuracy:.2f} %", markup=False)
    return results


def made_by(results: Mapping[Any, Mapping[str, Any]]) -> dict[str, Any]:
    """What the runs of a study ran on."""
    first = next(iter(results.values()))
    return {
        "hardware": first["hardware"],
        "versions": first["versions"],
        "commits": sorted({str(r["commit"]) for r in results.values()}),
    }


def options(config: Any, *known: str) -> str:
    """The options of a command that are not its defaults, as they are typed; folders are the
    reader's.

    Args:
        config: the dataclass of the command.
        known: fields that the caller states himself.
    """
    typed = []
    for field in fields(config):
        value, name = getattr(config, field.name), field.name.replace("_", "-")
        if value == field.default or field.name in (*PLACES, "results", *known):
            continue
        if isinstance(value, bool):
            typed.append(f"--{name}" if value else f"--no-{name}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            typed.append(" ".join([f"--{name}", *map(str, values)]))
    return "".join(f" {option}" for option in typed)


def without_places(config: TrainConfig) -> dict[str, Any]:
    """The configuration as a committed result states it; of another run the folder's name."""
    plain = {k: v for k, v in as_json(config).items() if k not in PLACES}
    if config.start_from is not None:
        plain["start_from"] = config.start_from.name
    return plain
