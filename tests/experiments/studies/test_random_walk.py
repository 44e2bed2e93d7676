"""The second control: a head that takes steps of the same size with random signs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiments.studies import random_walk
from experiments.studies.random_walk import Walker, gains
from experiments.train.config import TrainConfig
from experiments.train.data import load_data
from experiments.train.learner import FloatLearner
from experiments.train.resolve import resolve


def test_the_walk_has_the_same_steps_with_signs_of_a_coin() -> None:
    """The first step has the same z and |g|: the head moves by the same, there or back."""
    base = resolve(TrainConfig(method="cls2", device="cpu", threads=1, train_images=640, epochs=1))
    signs = []
    for seed in range(12):
        config = replace(base, seed=seed)
        own, walked = (kind(config, load_data(config)) for kind in (FloatLearner, Walker))
        start = flat(own.model.head_parameters())
        own.step()
        walked.step()
        assert torch.equal(flat(own.model.tail_parameters()), flat(walked.model.tail_parameters()))
        move = flat(own.model.head_parameters()) - start
        there = flat(walked.model.head_parameters()) - start
        sign = 1 if torch.equal(move, there) else -1
        assert move.abs().max() > 0
        torch.testing.assert_close(there, sign * move, rtol=1e-3, atol=1e-7)
        signs.append(sign)
    assert 2 <= signs.count(-1) <= 10  # outside with probability 0.6 %; the coins are fixed


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def test_gains_are_taken_seed_by_seed() -> None:
    found = gains(
        {
            "frozen": {"accuracies": [80.0, 90.0]},
            "walks": {"accuracies": [70.0, 82.0]},
            "descends": {"accuracies": [81.0, 93.0]},
        }
    )
    assert found["descends over walks"] == {"mean": 11.0, "standard_error": 0.0}
    assert found["descends over frozen"] == pytest.approx({"mean": 2.0, "standard_error": 1.0})
    assert found["walks over frozen"] == pytest.approx({"mean": -9.0, "standard_error": 1.0})


def test_the_command_writes_every_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--data", "digits", "--epochs", "1", "--seeds", "2", "--results", str(tmp_path)]
    assert random_walk.main(small) == 0
    written = json.loads((tmp_path / "random_walk_digits_cls2.json").read_text())
    assert written["command"].endswith("random_walk --data digits --epochs 1 --seeds 2")
    assert list(written["heads"]) == ["frozen", "walks", "descends"]
    for row in written["heads"].values():
        assert len(row["accuracies"]) == len(row["losses"]) == 2
    assert written["heads"]["frozen"]["config"]["method"] == "frozen-cls2"
    assert "descends over walks" in capsys.readouterr().out


def test_one_seed_has_no_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert random_walk.main(["--data", "digits", "--seeds", "1"]) == 2
    assert "seeds must be at least 2, got 1" in capsys.readouterr().err
    assert random_walk.main(["--data", "digits", "--threads", "0"]) == 2
    assert "threads must be in [1, 1024], got 0" in capsys.readouterr().err
