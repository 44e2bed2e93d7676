"""What the paper's abstract claims, and what was measured here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.files import read_json
from experiments.paper.cells import WITH_HEAD
from experiments.paper.compare import Runs
from experiments.paper.floors import elastic_curves, grid_overheads, overhead
from experiments.paper.report.blocks import Row, Table

GAIN = "+5.2 to +9.5 points"
MEMORY = "0.072 to 1.7 %"
INT8_MEMORY = "1.46 to 1.60x"
INT8_TIME = "1.38 to 1.42x"


def claims(studies: Sequence[Runs], folder: Path) -> Table:
    """The abstract's figures beside the range of ours."""
    rows: list[Row] = [
        ["accuracy of ElasticZO over vanilla ZO, from scratch", GAIN, _gains(studies, False)],
        ["the same, fine-tuning", GAIN, _gains(studies, True)],
        ["memory of ElasticZO over vanilla ZO", MEMORY, _overheads(folder)],
        ["memory of FP32 over INT8", INT8_MEMORY, _memory_ratios(folder)],
        ["time of FP32 over INT8", INT8_TIME, _time_ratios(folder)],
    ]
    caption = (
        "Paper: from the abstract, which names no split; data sets, lengths and devices differ. "
        "Here: the range over data sets and both arithmetics of the better of Cls2 and Cls1; "
        "memory: measured peaks on a CPU, of Cls2 over Full ZO on every network, batch and pairing "
        "measured, and of LeNet-5 with Full ZO, Cls2 and Cls1 in FP32 over INT8; time: the same."
    )
    return Table(["claim", "paper", "here"], rows, caption)


def _gains(studies: Sequence[Runs], turned: bool) -> str:
    found = list(_each_gain(studies, turned))
    if not found:
        return "not measured"
    return f"{min(found):+.1f} to {max(found):+.1f} points"


def _each_gain(studies: Sequence[Runs], turned: bool) -> Iterator[float]:
    for runs in studies:
        for scene in runs.scenes:
            for arithmetic in runs.arithmetics:
                best = runs.best(scene, arithmetic)
                if best is None or (scene.rotate is not None) != turned:
                    continue
                if arithmetic == "int8-float":  # for comparison: not the paper's integers alone
                    continue
                gain = runs.gain(scene, arithmetic, best, "full-zo")
                if gain is not None:
                    yield gain.mean


def _overheads(folder: Path) -> str:
    found = [over for over in map(overhead, elastic_curves(folder)) if over is not None]
    found += [over for overheads in grid_overheads(folder).values() for over in overheads]
    if not found:
        return "not measured"
    ends = dict.fromkeys(f"{100 * over:+.3f}" for over in (min(found), max(found)))
    return f"{' to '.join(ends)} %"


def _memory_ratios(folder: Path) -> str:
    return _ratios([row["ratio"] for row in _int8_rows(folder, "memory")])


def _time_ratios(folder: Path) -> str:
    return _ratios([row["speedup"]["median"] for row in _int8_rows(folder, "time")])


def _int8_rows(folder: Path, name: str) -> list[Mapping[str, Any]]:
    """Of the step of INT8 against FP32, the methods with a head."""
    path = folder / "int8_step_cpu.json"
    rows = read_json(path)[name] if path.exists() else []
    return [row for row in rows if row["method"] in WITH_HEAD]


def _ratios(found: Sequence[float]) -> str:
    return f"{min(found):.2f} to {max(found):.2f}x" if found else "not measured"
