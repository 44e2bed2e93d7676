"""What a large batch is worth: rates by the rule, rows, files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from experiments.files import read_json
from experiments.studies.batches import BatchConfig, configurations, main


def test_rates_follow_one_rule(tmp_path: Path) -> None:
    kinds = ("weight", "sample", "node", "feedback")
    found = configurations(BatchConfig(data="digits", batches=(64, 256), out=tmp_path))
    assert set(found) == {(kind, batch) for kind in kinds for batch in (64, 256)}
    for kind in kinds:
        few, many = found[kind, 64], found[kind, 256]
        assert few.head_lr is not None and many.head_lr is not None
        assert math.isclose(many.head_lr, few.head_lr * (1 if kind == "weight" else 2))
        assert (few.method, few.tail, few.epochs) == ("full-zo", ("0",), 4)
    assert len({config.out for config in found.values()}) == len(found)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--data", "digits", "--kinds", "weight", "feedback", "--batches", "64", "--epochs"]
    given += ["4", "--threads", "1", "--out", str(tmp_path / "r"), "--results", str(tmp_path)]
    assert main(given) == 0
    content = read_json(tmp_path / "batches_digits.json")
    rows = {row["kind"]: row for row in content["rows"]}
    assert rows["feedback"]["steps"] == 4 * 22 and rows["weight"]["steps_to_90"] is None
    assert rows["feedback"]["test_accuracy"] > rows["weight"]["test_accuracy"]
    assert (tmp_path / "batches_digits.png").exists()
    assert "--data digits" in content["command"] and "never" in capsys.readouterr().out
