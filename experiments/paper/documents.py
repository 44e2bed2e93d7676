"""The study's tables in Markdown, for the README and docs/results.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.paper.compare import (
    MODEL_TITLES,
    Runs,
    Scene,
    accuracy_text,
    read_studies,
)
from experiments.paper.floors import floors
from experiments.paper.report.blocks import Cell, Table
from experiments.paper.report.claims import claims
from experiments.paper.report.study import accuracy_table, gain_table, integer_table

# Title of a method, and what backpropagation trains.
NAMES: Mapping[str, tuple[str, str]] = {
    "full-zo": ("Full ZO", "nothing"),
    "frozen-cls2": ("control: last FC on a frozen random head", "last FC"),
    "cls2": ("**ZO-Feat-Cls2**", "last FC"),
    "frozen-cls1": ("control: last two FC on a frozen random head", "last two FC"),
    "cls1": ("**ZO-Feat-Cls1**", "last two FC"),
    "full-bp": ("Full BP", "everything"),
}
NOTHING = "No results yet: `python -m experiments.paper --preset cpu --data-dir DIR`."


def markdown(table: Table) -> str:
    """The table, and its caption below."""
    lines = [_line(table.head), "|---" * len(table.head) + "|"]
    lines += [_line([_text(value) for value in row]) for row in table.rows]
    return "\n".join([*lines, "", table.caption] if table.caption else lines)


def _text(value: str | Cell) -> str:
    return value if isinstance(value, str) else value.text


def _line(values: Sequence[str]) -> str:
    return f"| {' | '.join(values)} |"


def accuracies(results: Path) -> str:
    """FP32 from scratch: methods and data sets; mean and standard deviation."""
    return _by_data(results, "fp32")


def integers(results: Path) -> str:
    """INT8 with the integer loss from scratch; in brackets what it has over FP32, in points."""
    return _by_data(results, "int8")


def _by_data(results: Path, arithmetic: str) -> str:
    runs = _study(results)
    if runs is None:
        return NOTHING
    seeds = len(runs.content["seeds"])
    there = [s for s in runs.scenes if s.rotate is None and _any(runs, s, arithmetic)]
    rows = []
    for method in runs.methods:
        row = [*NAMES[method]]
        for scene in there:
            text = accuracy_text(runs.mean(scene, arithmetic, method), seeds)
            gap = runs.difference(scene, method, arithmetic, "fp32")
            if arithmetic != "fp32" and gap is not None:
                text += f" ({gap.mean:+.2f})"
            row.append(text)
        rows.append(row)
    titles = [f"{MODEL_TITLES.get(s.model, s.model)}, {s.title}" for s in there]
    return markdown(Table(["method", "backpropagation trains", *titles], rows))


def scenes(results: Path, turned: bool) -> str:
    """Accuracies and gains of every data set, from scratch or fine-tuned."""
    runs = _study(results)
    if runs is None:
        return NOTHING
    parts = []
    for scene in runs.scenes:
        if (scene.rotate is not None) == turned and _any(runs, scene):
            parts.append(f"#### {MODEL_TITLES.get(scene.model, scene.model)}, {scene.title}")
            parts += [markdown(accuracy_table(runs, scene)), markdown(gain_table(runs, scene))]
    return "\n\n".join(parts) or NOTHING


def gaps(results: Path) -> str:
    """INT8 less FP32, and the float loss less the integer one."""
    runs = _study(results)
    if runs is None:
        return NOTHING
    there = [scene for scene in runs.scenes if _any(runs, scene, "int8")]
    tables = [markdown(integer_table(runs, scene)) for scene in there]
    return "\n\n".join(tables) or NOTHING


def claimed(results: Path) -> str:
    """The abstract's figures and ours."""
    return markdown(claims(read_studies(results), results))


def kept(results: Path) -> str:
    """The floors and what came of them."""
    rows = [[f.promise, f.of, f.measured, f.status] for f in floors(read_studies(results), results)]
    return markdown(Table(["floor", "of", "measured", "status"], rows))


def _study(results: Path) -> Runs | None:
    """The study on the CPU: what a reader can repeat."""
    return next((runs for runs in read_studies(results) if runs.preset == "cpu"), None)


def _any(runs: Runs, scene: Scene, arithmetic: str | None = None) -> bool:
    """Whether anything of it has run."""
    chosen = runs.arithmetics if arithmetic is None else [arithmetic]
    return any(runs.rows(scene, a, m) for a in chosen for m in runs.methods)


__all__ = ["NAMES", "accuracies", "claimed", "gaps", "integers", "kept", "markdown", "scenes"]
