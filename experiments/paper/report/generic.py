"""Tables of results that nobody described: whatever is regular in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.paper.report.blocks import Row, Table

SKIPPED = ("versions", "settings", "config", "seeds", "commits")
LONGEST = 12  # rows that are shown unasked
WIDEST = 12  # columns


def generic_tables(content: Mapping[str, Any]) -> list[Table]:
    """A table for each list of objects and each object of objects."""
    tables = []
    for name, value in content.items():
        if name in SKIPPED:
            continue
        if isinstance(value, list):
            lines = [_flat(line) for line in value if isinstance(line, dict)]
        elif isinstance(value, dict) and any(isinstance(v, dict) for v in value.values()):
            lines = [
                {name: key} | _flat(line) for key, line in value.items() if isinstance(line, dict)
            ]
        else:
            continue
        if lines:
            tables.append(_table(name.replace("_", " "), lines))
    return tables


def _flat(value: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Scalars by name; of nested objects with their names before."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict):
            found |= _flat(inner, f"{before}{key} ")
        elif not isinstance(inner, list):
            found[f"{before}{key}"] = inner
    return found


def _table(caption: str, lines: list[dict[str, Any]]) -> Table:
    head = list(dict.fromkeys(key for line in lines for key in line))
    if len(head) > WIDEST:
        caption += f"; {len(head) - WIDEST} more columns in the file"
        head = head[:WIDEST]
    rows: list[Row] = [[number(line.get(key)) for key in head] for line in lines]
    names = [key.replace("_", " ") for key in head]
    return Table(names, rows, caption, folded=len(rows) > LONGEST)


def number(value: Any) -> str:
    """Four figures of a float; nothing for nothing."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
