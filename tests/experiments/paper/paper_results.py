"""Results of a study that never ran: a plan with made-up accuracies, in the real layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.files import write_json
from experiments.paper.cells import Cell
from experiments.paper.plan import Plan
from experiments.paper.presets import PRESETS, Preset
from experiments.paper.results import summary
from experiments.train.recipes import METHODS

# Held-out and test accuracies in %, before what seed and arithmetic add.
ACCURACIES = {
    "full-zo": 78.0,
    "frozen-cls2": 87.0,
    "cls2": 92.0,
    "frozen-cls1": 95.0,
    "cls1": 96.0,
    "full-bp": 99.0,
}
SMALL: Preset = replace(PRESETS["smoke"], name="cpu", seeds=3, methods=METHODS)


def made_up(cell: Cell) -> float:
    """Gains of exactly 18 points (Cls1 over Full ZO) and 1 + 0.1 seed (over its control)."""
    noise = 0.1 * cell.seed if cell.method == "cls1" else 0.0
    less = {"fp32": 0.0, "int8": 0.5, "int8-float": 0.25}[cell.arithmetic]
    return ACCURACIES[cell.method] + noise - less


def study(
    preset: Preset = SMALL,
    accuracy: Callable[[Cell], float] = made_up,
    ran: Callable[[Cell], bool] = lambda cell: True,
    data_dir: Path | None = None,
) -> dict[str, Any]:
    """What `experiments.paper` would write."""
    plan = Plan(preset, data_dir, Path("runs"))
    results = {
        cell: {
            "test_accuracy": accuracy(cell),
            "start_accuracy": 60.0 + cell.seed if cell.fine else None,
            "seconds": 1.0,
            "steps": 10,
            "hardware": "a machine",
            "versions": {"torch": "2"},
            "commit": "0123456789abcdef",
        }
        for cell in plan.cells
        if ran(cell)
    }
    return summary(plan, results, {}, {})


def write_study(folder: Path, **how: Any) -> None:
    """paper_cpu.json."""
    write_json(folder / "paper_cpu.json", study(**how))


__all__ = ["ACCURACIES", "SMALL", "made_up", "study", "write_study"]
