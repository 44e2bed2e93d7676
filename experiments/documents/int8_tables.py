"""The README's tables of ElasticZO-INT8, made from the committed results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from experiments.files import read_json
from experiments.train.plots import standard_error

METHODS: Mapping[str, str] = {
    "full-zo": "Full ZO",
    "cls2": "**ZO-Feat-Cls2**",
    "cls1": "**ZO-Feat-Cls1**",
    "full-bp": "Full BP (NITI)",
}
SETS: Mapping[str, str] = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST"}


def _text(values: list[float]) -> str:
    return f"{mean(values):.2f} ± {standard_error(values):.2f} %"


def accuracy(results: Path) -> str:
    """FP32 and INT8 over the seeds that both have, and their difference seed by seed."""
    columns: list[list[str]] = []
    titles = ["method"]
    for name, title in SETS.items():
        floats, integers = (
            read_json(results / f"accuracy_{name}{end}.json")["methods"] for end in ("", "_int8")
        )
        column: dict[str, list[str]] = {method: [] for method in METHODS}
        for method in METHODS:
            ours = integers[method]["accuracies"]
            theirs = floats[method]["accuracies"][: len(ours)]
            gap = [a - b for a, b in zip(ours, theirs, strict=True)]
            difference = f"{mean(gap):+.2f} ± {standard_error(gap):.2f}"
            column[method] = [_text(theirs), _text(ours), difference]
        titles += [f"{title}, FP32", "INT8", "difference"]
        columns += [[cells[i] for cells in column.values()] for i in range(3)]
    lines = [_line(titles), _line(["---"] * len(titles))]
    for row, method in enumerate(METHODS.values()):
        lines.append(_line([method, *(column[row] for column in columns)]))
    return "\n".join(lines)


def cost(results: Path) -> str:
    """A step on the CPU: time and peak memory of FP32 over INT8."""
    measured = read_json(results / "int8_step_cpu.json")
    memory = {
        (row["batch"], row["method"]): row["ratio"]
        for row in measured["memory"]
        if row["pairing"] == "stacked"
    }
    titles = ["batch", "method", "FP32", "INT8", "faster", "smaller (peak)"]
    lines = [_line(titles), _line(["---"] * len(titles))]
    for row in measured["time"]:
        lines.append(_line(_cost_row(row, memory[row["batch"], row["method"]])))
    return "\n".join(lines)


def _cost_row(row: Mapping[str, Any], smaller: float) -> list[str]:
    times = [f"{row[kind]['us'] / 1000:.2f} ms" for kind in ("fp32", "int8")]
    title = METHODS[row["method"]].removesuffix(" (NITI)")
    return [
        str(row["batch"]),
        title,
        *times,
        f"{row['speedup']['median']:.2f}x",
        f"{smaller:.2f}x",
    ]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


__all__ = ["accuracy", "cost"]
