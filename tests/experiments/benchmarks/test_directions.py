"""The cost of each kind of direction: the command runs, and two passes are at least two passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elasticzo import ElasticZO
from elasticzo.models import LeNet5
from experiments.benchmarks.directions_cpu import Config, main, peaks_of
from experiments.files import read_json


def test_every_kind_is_timed_and_counted(tmp_path: Path) -> None:
    out = tmp_path / "cost.json"
    given: dict[str, Any] = {"batch": 4, "kinds": ("auto", "feedback"), "rounds": 1}
    main(Config(**given, memory=False, threads=(1,), out=out))
    (steps,) = read_json(out)["steps"].values()
    plain, full_bp = (steps.pop(name) for name in ("two forwards", "Full BP"))
    assert plain["launches"] == 2 * 11 < full_bp["launches"]  # modules that are no view
    assert set(steps) == {
        f"{name}, {cut}" for name in ("auto", "feedback") for cut in ("full", "cls2")
    }
    assert all(row["launches"] > plain["launches"] and row["median"] > 0 for row in steps.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["node", "feedback"])
def test_peaks_are_measured_as_they_are_predicted(kind: str) -> None:
    peak = peaks_of(lambda: ElasticZO(LeNet5(), 1, directions=kind).train(), (64, 1, 28, 28))
    assert peak["measured"] == pytest.approx(peak["predicted"], rel=0.02)
