"""The study's runs by name: which there are, and which need others to be finished first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from experiments.paper.presets import Arithmetic, Preset, Task

Section = Literal["tuning", "grid", "pretraining", "finetune-tuning", "finetune"]

# What uses the sign of a loss difference; all others are the same run with either loss.
WITH_HEAD = ("full-zo", "cls2", "cls1")
TUNING_SEED = 100  # the first; no seed of the grid
# Runs of a later wave need those of an earlier one.
WAVES: tuple[tuple[Section, ...], ...] = (
    ("tuning",),
    ("grid", "pretraining"),
    ("finetune-tuning",),
    ("finetune",),
)


@dataclass(frozen=True)
class Cell:
    """One run of the study."""

    section: Section
    data: str
    model: str
    arithmetic: Arithmetic
    method: str
    seed: int
    rotate: float | None = None
    candidate: str | None = None
    """The setting that a tuning run tries."""
    directions: str | None = None
    """By whose noise the head learns; None is the paper's way."""

    def __str__(self) -> str:
        turned = "" if self.rotate is None else f" {self.rotate:g} degrees"
        tried = "" if self.candidate is None else f" ({self.candidate})"
        return (
            f"{self.section} {self.data}{turned} {self.arithmetic} {self.way} "
            f"seed {self.seed}{tried}"
        )

    @property
    def way(self) -> str:
        """The method, and by whose noise."""
        return self.method if self.directions is None else f"{self.method} by {self.directions}"

    @property
    def tuned_as(self) -> Arithmetic:
        """Both losses of int8 take the settings found with the integer one."""
        return "fp32" if self.arithmetic == "fp32" else "int8"

    @property
    def fine(self) -> bool:
        """Whether it starts from trained weights."""
        return self.section.startswith("finetune")


def all_cells(preset: Preset, labels: Sequence[tuple[Cell, Sequence[str]]]) -> list[Cell]:
    """Every run of a preset, `labels` being the settings to try for each tuning cell."""
    tuning = [
        replace(cell, candidate=label, seed=TUNING_SEED + seed)
        for cell, tried in labels
        for seed in range(preset.tuning_seeds)
        for label in tried
    ]
    cells = list(tuning)
    for task in preset.tasks:
        upright = _rows(preset, task, "grid", range(preset.seeds))
        cells += upright
        if not task.rotations:
            continue
        if any(cell.fine for cell in tuning):
            seeds = range(TUNING_SEED, TUNING_SEED + preset.tuning_seeds)
            cells += [
                cell
                for cell in _rows(preset, task, "pretraining", seeds)
                if cell.method == "full-bp" and cell.arithmetic != "int8-float"
            ]
        cells += [
            replace(cell, section="finetune", rotate=angle)
            for angle in task.rotations
            for cell in upright
            if cell.method != "local"  # has weights that the trained ones lack
        ]
    return cells


def tuned_cells(preset: Preset) -> list[Cell]:
    """One cell (of no seed and no setting) for everything that is tuned."""
    found = []
    for task in preset.tasks:
        rows = [c for c in _rows(preset, task, "tuning", [0]) if c.arithmetic != "int8-float"]
        found += rows
        if task.rotations:
            angle = task.rotations[0]
            fine = [c for c in rows if c.method != "local"]
            found += [replace(c, section="finetune-tuning", rotate=angle) for c in fine]
    return found


def _rows(preset: Preset, task: Task, section: Section, seeds: Iterable[int]) -> list[Cell]:
    return [
        Cell(section, task.data, task.model, arithmetic, method, seed, directions=kind)
        for seed in seeds
        for arithmetic in preset.arithmetics
        for method in preset.methods
        for kind in preset.directions.get(method, (None,))
        if arithmetic != "int8-float" or method in WITH_HEAD
    ]


def source(cell: Cell) -> Cell:
    """The run whose weights a fine-tuning run starts from."""
    section: Section = "pretraining" if cell.section == "finetune-tuning" else "grid"
    return replace(
        cell, section=section, arithmetic=cell.tuned_as, method="full-bp", rotate=None,
        candidate=None, directions=None,
    )  # fmt: skip


def trials(cell: Cell, cells: Iterable[Cell]) -> list[Cell]:
    """The tuning runs that decide a cell's settings."""
    section = "finetune-tuning" if cell.fine else "tuning"
    key = (section, cell.data, cell.model, cell.tuned_as, cell.way)
    return [c for c in cells if (c.section, c.data, c.model, c.arithmetic, c.way) == key]


def needs(cell: Cell, cells: Sequence[Cell]) -> list[Cell]:
    """The runs that must be finished before this one."""
    found = [source(cell)] if cell.fine else []
    if cell.candidate is None:
        found += trials(cell, cells)
    return found


def with_needs(wanted: Iterable[Cell], cells: Sequence[Cell]) -> list[Cell]:
    """The wanted cells and all that they need, in the order of `cells`."""
    found: set[Cell] = set()
    waiting = list(wanted)
    while waiting:
        cell = waiting.pop()
        if cell not in found:
            found.add(cell)
            waiting += needs(cell, cells)
    return [cell for cell in cells if cell in found]


def row(cell: Cell) -> dict[str, Any]:
    """The cell as a line of the results states it."""
    return {k: v for k, v in vars(cell).items() if v is not None}
