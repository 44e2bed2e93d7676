"""Rows of an earlier results file stay for as long as the same settings would run again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from experiments.paper.kept import earlier, kept
from experiments.paper.plan import Plan
from experiments.paper.presets import PRESETS
from experiments.paper.results import summary
from tests.experiments.paper.paper_results import study

SMALL = PRESETS["smoke"]


def test_rows_stay_while_their_settings_do(tmp_path: Path) -> None:
    plan = Plan(SMALL, None, tmp_path)
    before = study(SMALL, lambda cell: 90.0)
    found = kept(plan, before, {})
    assert set(found) == set(plan.cells)
    again = summary(plan, {}, {}, before)
    assert again["runs"] == before["runs"] and again["tuning"] == before["tuning"]
    assert again["settings"] == before["settings"] and again["commits"] == before["commits"]
    assert earlier(tmp_path / "nothing.json") == {}
    longer = replace(SMALL, tasks=(replace(SMALL.tasks[0], epochs=3),))
    left = kept(Plan(longer, None, tmp_path), before, {})  # the tables' rows were of two epochs
    assert left and all(cell.section == "tuning" for cell in left)


def test_rows_go_where_new_trials_choose_otherwise(tmp_path: Path) -> None:
    """And the new trials take the place of the old ones."""
    plan = Plan(SMALL, None, tmp_path)
    before = study(SMALL, lambda cell: 90.0)
    trials = [c for c in plan.cells if c.section == "tuning" and c.method == "cls2"]
    result = {"hardware": "x", "versions": {}, "commit": "y"}
    new = {c: {"test_accuracy": 1.0 if c.candidate == "recipe" else 99.0, **result} for c in trials}
    found = kept(plan, before, new)
    gone = [c for c in plan.cells if c not in found and c not in new]
    assert gone and all(c.method == "cls2" and c.section == "grid" for c in gone)
    after = summary(plan, new, {}, before)
    assert "x" in after["hardware"] and set(before["commits"]) < set(after["commits"])
