"""The table of all compiled configurations: made, written, read, and shown as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.files import write_text
from experiments.static.roofline import H200
from experiments.train.environment import commit, versions

COMMAND = "python -m experiments.static"
RESULTS = Path(__file__).resolve().parent.parent / "results" / "static"
JSON, MARKDOWN = "table.json", "table.md"

FIELDS = {
    "hash": "of the kernel's source, of all it calls, and of the configuration",
    "registers": "of a thread; on gfx942 vector registers",
    "spills": "instructions that access local memory; on gfx942 vector registers spilled",
    "scalar_spills": "gfx942: scalars moved to lanes of vector registers",
    "local": "bytes of stack and local memory of a thread",
    "shared": "bytes of a program",
    "instructions": "of the whole text, by opcode in `opcodes`",
    "loop_instructions": "of a warp in a turn of the main loop, by opcode in `loop`",
    "outside": "opcodes that a warp executes outside of the main loop, on the way with the most "
    "16-byte accesses",
    "loads, stores": "instructions that access global memory; `_16`: 16 bytes a thread",
    "repeats": "how often a program makes the products of its tile: 1, with tf32x3 3; more where "
    "its warps are too many (sm_100: not told by opcodes)",
    "noise_instructions": "of a thread for an element of z: all instructions of a turn of the main "
    "loop (without a loop: all that are executed), loads, rounding and products included, over the "
    "elements that a thread makes there",
    "h200": "microseconds at the least on an H200, of each unit and of the busiest (roofline.py)",
}


def table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All that table.json says."""
    return {
        "command": COMMAND,
        "fields": FIELDS,
        "peaks": asdict(H200),
        "versions": versions(),
        "commit": commit(),
        "rows": list(rows),
    }


def as_json(content: Mapping[str, Any]) -> str:
    """A field of a row a line, so that changes can be read."""
    head = json.dumps({k: v for k, v in content.items() if k != "rows"}, indent=2)
    rows = [
        ",\n".join(f"      {json.dumps(k)}: {json.dumps(v)}" for k, v in row.items())
        for row in content["rows"]
    ]
    body = ",\n".join(f"    {{\n{row}\n    }}" for row in rows)
    return f'{head[:-2]},\n  "rows": [\n{body}\n  ]\n}}\n'


def read(folder: Path = RESULTS) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / JSON).read_text())
    return content


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """table.json and table.md; each whole or not at all."""
    write_text(folder / JSON, as_json(content))
    write_text(folder / MARKDOWN, as_markdown(content))


COLUMNS = (
    "configuration",
    "registers",
    "spills",
    "shared KiB",
    "instructions",
    "in the loop",
    "per z",
    "16-byte loads / stores",
    "products",
)


def as_markdown(content: Mapping[str, Any]) -> str:
    """A table a target."""
    rows = content["rows"]
    lines = [
        "# Compiled configurations",
        "",
        f"Written by `{content['command']}` with Triton {content['versions'].get('triton')}; "
        f"`{JSON}` has the rest.",
        "",
        *(f"- {name}: {meaning}." for name, meaning in content["fields"].items()),
    ]
    for target in dict.fromkeys(row["target"] for row in rows):
        own = [row for row in rows if row["target"] == target]
        lines += ["", f"## {target}", "", *as_lines(own)]
    return "\n".join(lines) + "\n"


def as_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows of one target as a Markdown table."""
    timed = any("h200" in row for row in rows)
    columns = [*COLUMNS, *(["H200, us at the least"] if timed else [])]
    return [
        _line(columns),
        _line(["---"] * len(columns)),
        *(_line(_cells(row, timed)) for row in rows),
    ]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Mapping[str, Any], timed: bool) -> list[str]:
    spills = str(row["spills"])
    if row["local"]:
        spills += f" ({row['local']} bytes)"
    if row.get("scalar_spills"):
        spills += f" ({row['scalar_spills']} scalars)"
    cells = [
        row["name"],
        str(row["registers"]),
        spills,
        f"{row['shared'] / 1024:.4g}",
        str(row["instructions"]),
        str(row["loop_instructions"] or "-"),
        "-" if row["noise_instructions"] is None else f"{row['noise_instructions']:.1f}",
        f"{row['loads_16']} / {row['stores_16']}",
        ", ".join(row["tensor"]) or "-",
    ]
    if timed:
        time = row.get("h200")
        cells.append(f"{time['us']:.1f} ({time['bound']})" if time else "-")
    return cells


__all__ = ["COMMAND", "RESULTS", "as_json", "as_lines", "as_markdown", "read", "table", "write"]
