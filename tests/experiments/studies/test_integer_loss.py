"""The studies of the integer loss: its comparison, synthetic logits, real runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from experiments.studies import integer_signs
from experiments.studies.integer_loss import Config, main, synthetic
from experiments.studies.signs import float_losses, sign_errors


def test_float_losses_are_torchs() -> None:
    logits, exponent, target = synthetic(3, 5, -4, 8, True, 0)
    losses = float_losses(logits, exponent, target)
    for step in range(3):
        for half in range(2):
            values = logits[step, half].double() * 2.0 ** int(exponent[step, half])
            want = torch.nn.functional.cross_entropy(values, target[step], reduction="sum")
            assert losses[step, half] == pytest.approx(float(want), rel=1e-12)


def test_counts_signs() -> None:
    """Three steps by hand: a clear difference, an equal pair, one that whole bits cannot see."""
    logits = torch.zeros(3, 2, 1, 2, dtype=torch.int8)
    logits[0, 0, 0, 0], logits[2, 0, 0, 0] = 100, 1
    exponent = torch.full((3, 2), -3, dtype=torch.int32)
    errors = sign_errors(logits, exponent, torch.zeros(3, 1, dtype=torch.int64), (0, 12))
    assert errors["0"]["zero"] == errors["0"]["differ"] == pytest.approx(1 / 3)
    assert errors["0"]["wrong"] == errors["12"]["differ"] == 0
    assert 0 < errors["12"]["loss_error"] < 1.5 / 2**12 < errors["0"]["loss_error"]


def test_more_bits_are_better_and_twelve_are_enough() -> None:
    logits = synthetic(200, 32, -5, 8, False, 1)
    errors = sign_errors(*logits, (0, 4, 12))
    differ = [errors[f]["differ"] for f in ("0", "4", "12")]
    assert differ[0] > differ[1] > differ[2] and differ[2] <= 0.01


def test_command(tmp_path: Path) -> None:
    out = tmp_path / "loss.json"
    small = {"trials": 5, "batches": (4,), "exponents": (-5,), "changes": (8,)}
    main(Config(out=out, fraction_bits=(0, 12), **small))  # type: ignore[arg-type]
    written = json.loads(out.read_text())
    assert len(written["rows"]) == 2 and set(written["rows"][0]["fraction_bits"]) == {"0", "12"}


def test_signs_of_real_runs(tmp_path: Path) -> None:
    out = tmp_path / "signs.json"
    study = integer_signs.Config(
        data=("digits",), methods=("cls2",), batches=(32,), epochs=1, fraction_bits=(0, 12), out=out
    )
    assert integer_signs.main(study) == 0
    written = json.loads(out.read_text())
    (row,) = written["rows"]
    assert row["steps"] == 44 and row["fraction_bits"]["0"]["differ"] > 0.1
    assert row["fraction_bits"]["12"]["differ"] == 0 and written["smallest_fraction_bits"] == 12
    assert set(row["cost_us"]) == {"0", "12", "float64"} and min(row["cost_us"].values()) > 0


def test_methods_without_a_sign_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    study = integer_signs.Config(data=("digits",), methods=("full-bp",), batches=(32,))
    assert integer_signs.main(study) == 2
    assert "full-bp has no head" in capsys.readouterr().err
