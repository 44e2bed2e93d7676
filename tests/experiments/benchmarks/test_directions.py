"""The cost of each kind of direction: the command runs, and two passes are at least two passes."""

from __future__ import annotations

from pathlib import Path

from experiments.benchmarks.directions_cpu import Config, main
from experiments.files import read_json


def test_every_kind_is_timed_and_counted(tmp_path: Path) -> None:
    out = tmp_path / "cost.json"
    main(Config(batch=4, kinds=("auto", "feedback"), rounds=1, memory=False, out=out))
    steps = read_json(out)["steps"]
    plain = steps.pop("two forwards")["operations"]
    assert set(steps) == {
        f"{name}, {cut}" for name in ("auto", "feedback") for cut in ("full", "cls2")
    }
    assert all(row["operations"] > plain and row["median"] > 0 for row in steps.values())
