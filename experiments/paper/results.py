"""The study's results as one file: what ran, what was chosen, what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.files import write_json
from experiments.paper.cells import Cell, row, trials
from experiments.paper.kept import earlier, kept
from experiments.paper.plan import Plan, Results
from experiments.paper.presets import Preset
from experiments.studies.study import without_places

MEASURED = (
    "test_accuracy",
    "best_test_accuracy",
    "test_loss",
    "start_accuracy",
    "steps",
    "skipped",
    "seconds",
    "ms_per_step",
)
SAME_RUN = (
    "full-bp and frozen-* use no sign of a loss difference: int8 with the float loss is the same "
    "run as with the integer one, and was not done twice"
)


def command(preset: Preset) -> str:
    """What to type for these results."""
    return f"python -m experiments.paper --preset {preset.name} --data-dir DIR"


def summary(
    plan: Plan, own: Results, failed: Mapping[Cell, str], before: Mapping[str, Any]
) -> dict[str, Any]:
    """All of the results file.

    Args:
        own: what ran. before: the file's content so far, whose other rows stay.
    """
    results = {**kept(plan, before, own), **own}
    done = [cell for cell in plan.cells if cell in results]
    missing = [cell for cell in plan.cells if cell not in results]
    return {
        "command": command(plan.preset),
        "seeds": list(range(plan.preset.seeds)),
        "tasks": [vars(task) for task in plan.preset.tasks],
        "same_run": SAME_RUN,
        "tuning": tuning(plan, results),
        "runs": [{**row(c), **{k: results[c].get(k) for k in MEASURED}} for c in done],
        "settings": settings(plan, done, results),
        "missing": [{**row(c), "why": failed.get(c, "not run")} for c in missing],
        "hardware": sorted({str(one) for one in _told(results, "hardware")}),
        "versions": _distinct(_told(results, "versions")),
        "commits": sorted({str(one) for one in _told(results, "commit")}),
    }


def tuning(plan: Plan, results: Results) -> list[dict[str, Any]]:
    """Every setting that was tried, with its held-out accuracies, and the one that was chosen: none
    before all of them have run."""
    record = []
    for cell, table in plan.candidates.items():
        tried = plan.tried(cell, results)
        whole = all(trial in results for trial in trials(cell, plan.cells))
        record.append({
            "section": cell.section,
            "data": cell.data,
            "model": cell.model,
            "arithmetic": cell.arithmetic,
            "method": cell.method,
            **({} if cell.directions is None else {"directions": cell.directions}),
            **({} if cell.rotate is None else {"rotate": cell.rotate}),
            "tried": [
                {"name": name, "values": _plain(changes), "accuracies": tried.get(name, [])}
                for name, changes in table.items()
            ],
            "chosen": plan.chosen(cell, results) if whole else None,
        })  # fmt: skip
    return record


def settings(plan: Plan, done: Sequence[Cell], results: Results) -> list[dict[str, Any]]:
    """The resolved configuration of each row of the tables, of its first seed that ran."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for cell in done:
        key = (cell.section, cell.data, cell.model, cell.arithmetic, cell.way, cell.rotate)
        if cell.candidate is None and key not in found:
            config = without_places(plan.config(cell, results))
            found[key] = {**row(cell), "config": config}
    return list(found.values())


def _told(results: Results, name: str) -> list[Any]:
    """What the runs say of themselves; of rows that were kept, all that their file said."""
    values = [result[name] for result in results.values()]
    return [one for v in values for one in (v if isinstance(v, list) else [v])]


def _plain(changes: Mapping[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in changes.items()}


def _distinct(values: Sequence[Any]) -> list[Any]:
    """Those that differ, in their order."""
    return [v for i, v in enumerate(values) if v not in values[:i]]


def write(plan: Plan, results: Results, failed: Mapping[Cell, str], folder: Path) -> Path:
    """paper_<preset>.json, whole or not at all, with the rows that it has of the same settings; its
    path."""
    path = folder / f"paper_{plan.preset.name}.json"
    write_json(path, summary(plan, results, failed, earlier(path)))
    return path
