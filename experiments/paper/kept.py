"""What an earlier results file has of a study, for as long as the same settings would run again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.files import finite, read_json
from experiments.paper.cells import Cell, source
from experiments.paper.plan import Plan, Results
from experiments.studies.study import without_places

# What a run says of itself, and where the file lists it for all of them.
SOURCES = {"hardware": "hardware", "versions": "versions", "commit": "commits"}


def earlier(path: Path) -> dict[str, Any]:
    """The file's content; nothing where there is none."""
    return read_json(path) if path.exists() else {}


def kept(plan: Plan, content: Mapping[str, Any], results: Results) -> dict[Cell, dict[str, Any]]:
    """Rows of a results file that no run of `results` has: trials whose settings would be tried
    again, and runs of the configuration that these and the new trials choose.

    Args:
        content: of the file.
    """
    rows = {_cell(row): row for row in content.get("runs", ())}
    configs = {_way(_cell(row)): row["config"] for row in content.get("settings", ())}
    tried = {
        (_way(_cell(one)), trial["name"]): trial["values"]
        for one in content.get("tuning", ())
        for trial in one["tried"]
    }
    again = {
        (_way(cell), name): values
        for cell, table in plan.candidates.items()
        for name, values in table.items()
    }
    # Of its own: a plan remembers what it chose.
    fresh, known = Plan(plan.preset, plan.data_dir, plan.out), {**rows, **results}

    def same(cell: Cell) -> bool:
        if cell not in rows or (cell.fine and not same(source(cell))):
            return False
        if cell.candidate is not None:
            trial = (_way(cell), cell.candidate)
            return trial in again and _json(again[trial]) == tried.get(trial)
        config = configs.get(_way(cell))
        return config is not None and _apart(config) == _apart(
            without_places(fresh.config(cell, known))
        )

    told = {name: [*content.get(listed, ())] for name, listed in SOURCES.items()}
    there = [cell for cell in plan.cells if cell in rows and cell not in results]
    return {cell: {**rows[cell], **told} for cell in there if same(cell)}


def _cell(row: Mapping[str, Any]) -> Cell:
    return Cell(**{"seed": 0, **{k: row[k] for k in Cell.__dataclass_fields__ if k in row}})


def _way(cell: Cell) -> tuple[Any, ...]:
    return (cell.section, cell.data, cell.model, cell.arithmetic, cell.way, cell.rotate)


def _apart(config: Mapping[str, Any]) -> Any:
    """But for what differs by the seed: settings are stated of one."""
    return _json({k: v for k, v in config.items() if k not in ("seed", "start_from")})


def _json(value: Any) -> Any:
    return json.loads(json.dumps(finite(value)))
