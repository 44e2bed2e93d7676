"""The paper's method and what learns from every sample, side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.files import write_json
from experiments.paper.cells import Cell
from experiments.paper.compare import Mean
from experiments.paper.presets import DIGITS, PRESETS
from experiments.paper.report.__main__ import page
from experiments.paper.ways import WAYS, promises, read_ways
from tests.experiments.paper.paper_results import ACCURACIES, study, write_study

SMALL = replace(PRESETS["samples"], tasks=(DIGITS,))
BETTER = {
    "feedback": 6.0, "feedback-random": 4.0, "feedback-zero": 2.0, "auto": 1.0, None: 0.0,
    "feedback-exact": 6.5, "feedback-exact-zero": 5.0,
}  # fmt: skip


def accuracy(cell: Cell) -> float:
    """A seed's own luck is the same for all, and a tenth of it feedback's."""
    base = 95.0 if cell.method == "local" else ACCURACIES[cell.method]
    share = 1.1 if cell.directions == "feedback" else 1.0
    return base + BETTER[cell.directions] + share * cell.seed


def write_samples(folder: Path, **how: Any) -> None:
    write_json(folder / "paper_samples.json", study(SMALL, accuracy, **how))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_study(tmp_path)
    write_samples(tmp_path)
    return tmp_path


def test_every_way_has_its_accuracies(folder: Path) -> None:
    ways = read_ways(folder)
    assert ways is not None
    table = ways.accuracy_table(turned=False)
    assert table.head[2:] == ["LeNet-5, Digits"] and len(table.rows) == len(WAYS)
    found = {(row[0], row[1]): row[2] for row in table.rows}
    titles = {(way.method, way.directions): (way.title, way.learns) for way in WAYS}
    assert found[titles["cls2", "feedback"]] == "99.10 ± 1.10"
    assert found[titles["cls2", "feedback-zero"]] == "95.00 ± 1.00"
    assert found[titles["local", None]] == "96.00 ± 1.00"
    assert found[titles["cls1", None]] == "96.10 ± 0.10"  # of the paper's own study
    assert found[titles["full-bp", None]] == "100.00 ± 1.00"  # of this one
    turned = ways.accuracy_table(turned=True)
    assert {row[0] for row in turned.rows} == {way.title for way in WAYS if way.method != "local"}


def test_gains_are_taken_seed_by_seed(folder: Path) -> None:
    ways = read_ways(folder)
    assert ways is not None
    by = {(way.method, way.directions): way for way in WAYS}
    gain = ways.gain(ways.scenes[0], by["cls2", "feedback"], by["frozen-cls2", None])
    assert gain == Mean(pytest.approx(11.1), pytest.approx(0.1), 3)
    rows = ways.gain_table(turned=False).rows
    name = f"Cls2: {by['cls2', 'feedback'].learns}"
    assert [name, "Full BP: every sample, by BP", "-0.90 ± 0.06"] in rows
    assert {str(row[0]).partition(":")[0] for row in rows} == {"Full ZO", "Cls2", "Cls1"}


def test_what_is_to_be_reached(tmp_path: Path) -> None:
    """As if of MNIST: Cls2 is behind Full BP by 0.9 points, Cls1 ahead."""
    small = replace(SMALL, tasks=(replace(DIGITS, data="mnist", rotations=()),))
    write_json(tmp_path / "paper_samples.json", study(small, accuracy, data_dir=tmp_path))
    ways = read_ways(tmp_path)
    assert ways is not None
    rows = {str(row[0]): row[1:] for row in promises(ways).rows}
    assert len(rows) == 8 and {row[0] for row in rows.values()} == {"MNIST"}
    found = [
        next(row[1:] for name, row in rows.items() if part in name)
        for part in (
            "Cls2, every sample, by",
            "Cls1, every sample, by",
            "at least 97 %",
            "at least 97.5 %",
        )
    ]
    assert found == [
        ["-0.90 ± 0.06", "broken"],
        ["+3.10 ± 0.06", "kept"],
        ["85.10 ± 1.10", "broken"],
        ["98.00 ± 1.00", "kept"],
    ]


def test_what_has_not_run_is_named(tmp_path: Path) -> None:
    assert read_ways(tmp_path) is None
    write_samples(tmp_path, ran=lambda c: c.way == "cls2 by feedback" and c.section == "grid")
    ways = read_ways(tmp_path)
    assert ways is not None and len(ways.accuracy_table(turned=False).rows) == 1
    assert not ways.gain_table(turned=False).rows  # nothing beside it
    text = page(tmp_path)
    assert "Learning from every sample" in text and "preset samples, grid, Digits, FP32: " in text
