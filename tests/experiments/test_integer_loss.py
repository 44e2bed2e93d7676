"""The study of the integer loss: its comparison, its synthetic and recorded logits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.integer_loss import Config, float_losses, main, sign_errors, synthetic


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
    logits, exponent, target = (t.numpy() for t in synthetic(4, 6, -4, 2, False, 2))
    np.savez(tmp_path / "run.npz", logits=logits, exponent=exponent, target=target)
    main(Config(out=out, recorded=tmp_path / "run.npz", fraction_bits=(8,)))
    written = json.loads(out.read_text())
    assert written["logits"] == "run.npz" and written["rows"][0]["steps"] == 4
